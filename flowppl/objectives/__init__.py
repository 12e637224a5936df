"""Gradient estimators of variational objectives."""

from flowppl.objectives.path import path_log_prob

__all__ = ["path_log_prob"]
