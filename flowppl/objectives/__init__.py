"""Gradient estimators of variational objectives, and objectives for samples of the target."""

from flowppl.objectives.on_samples import fisher_divergence, forward_kl, sliced_mmd
from flowppl.objectives.path import GRADIENTS, check_gradient, path_log_prob

__all__ = ["GRADIENTS", "check_gradient", "fisher_divergence", "forward_kl", "path_log_prob", "sliced_mmd"]
