"""Invertible maps with log-determinants, each written once for torch and jax."""

from flowppl.bijections.actnorm import ActNorm, calibrate
from flowppl.bijections.affine import Affine
from flowppl.bijections.autoregressive import MaskedAutoregressive
from flowppl.bijections.base import Bijection, bind
from flowppl.bijections.bnaf import BlockAutoregressive
from flowppl.bijections.circular import CircularSpline
from flowppl.bijections.compose import Chain, Inverse
from flowppl.bijections.coupling import Coupling
from flowppl.bijections.deep_sigmoid import DeepSigmoid
from flowppl.bijections.elementwise import Composed, Elementwise, Transformer
from flowppl.bijections.embedded import Embedded
from flowppl.bijections.householder import Householder, QRLinear
from flowppl.bijections.linear import LULinear, Orthogonal, TriangularLinear
from flowppl.bijections.permutations import Permutation, Reversal, Rotation
from flowppl.bijections.planar import Planar
from flowppl.bijections.polynomial import SumOfSquares
from flowppl.bijections.radial import Radial
from flowppl.bijections.residual import Residual
from flowppl.bijections.root import solve_increasing
from flowppl.bijections.roulette import roulette_log_det
from flowppl.bijections.solves import Solve, fixed_point, watch_solves
from flowppl.bijections.spline import RQSpline
from flowppl.bijections.stack import Stack
from flowppl.bijections.sylvester import Sylvester
from flowppl.bijections.tails import ExtremeTails
from flowppl.bijections.torus import Keep, TorusEnd

__all__ = [
    "ActNorm",
    "Affine",
    "Bijection",
    "BlockAutoregressive",
    "Chain",
    "CircularSpline",
    "Composed",
    "Coupling",
    "DeepSigmoid",
    "Elementwise",
    "Embedded",
    "ExtremeTails",
    "Householder",
    "Inverse",
    "Keep",
    "LULinear",
    "MaskedAutoregressive",
    "Orthogonal",
    "Permutation",
    "Planar",
    "QRLinear",
    "RQSpline",
    "Radial",
    "Residual",
    "Reversal",
    "Rotation",
    "Solve",
    "Stack",
    "SumOfSquares",
    "Sylvester",
    "TorusEnd",
    "Transformer",
    "TriangularLinear",
    "bind",
    "calibrate",
    "fixed_point",
    "roulette_log_det",
    "solve_increasing",
    "watch_solves",
]
