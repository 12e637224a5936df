"""Invertible maps with log-determinants, each written once for torch and jax."""

from flowppl.bijections.affine import Affine
from flowppl.bijections.autoregressive import MaskedAutoregressive
from flowppl.bijections.base import Bijection, bind
from flowppl.bijections.circular import CircularSpline
from flowppl.bijections.compose import Chain, Inverse
from flowppl.bijections.coupling import Coupling
from flowppl.bijections.deep_sigmoid import DeepSigmoid
from flowppl.bijections.elementwise import Composed, Elementwise, Transformer
from flowppl.bijections.linear import LULinear
from flowppl.bijections.permutations import Permutation, Rotation
from flowppl.bijections.planar import Planar
from flowppl.bijections.polynomial import SumOfSquares
from flowppl.bijections.root import solve_increasing
from flowppl.bijections.solves import Solve, watch_solves
from flowppl.bijections.spline import RQSpline
from flowppl.bijections.stack import Stack
from flowppl.bijections.tails import ExtremeTails
from flowppl.bijections.torus import Keep, TorusEnd

__all__ = [
    "Affine",
    "Bijection",
    "Chain",
    "CircularSpline",
    "Composed",
    "Coupling",
    "DeepSigmoid",
    "Elementwise",
    "ExtremeTails",
    "Inverse",
    "Keep",
    "LULinear",
    "MaskedAutoregressive",
    "Permutation",
    "Planar",
    "RQSpline",
    "Rotation",
    "Solve",
    "Stack",
    "SumOfSquares",
    "TorusEnd",
    "Transformer",
    "bind",
    "solve_increasing",
    "watch_solves",
]
