"""Gradient estimators of variational objectives."""

from flowppl.objectives.path import GRADIENTS, check_gradient, path_log_prob

__all__ = ["GRADIENTS", "check_gradient", "path_log_prob"]
