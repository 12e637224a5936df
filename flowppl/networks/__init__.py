"""Conditioners: the networks that bijections call for their parameters."""

from flowppl.networks.mlp import MLP, MaskedMLP

__all__ = ["MLP", "MaskedMLP"]
