"""Heavy tails: a transformer that turns a normal variable into one with tails of a learned index."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowppl.backend import backend_of
from flowppl.bijections.affine import soft_clip
from flowppl.bijections.base import Array
from flowppl.bijections.elementwise import Transformer

_INDEX = 0.1  # at zero parameters: the tails of a Student-t density with ten degrees of freedom
_LOG_RANGE = math.log(15.0)  # the tail index stays within (1/150, 1.5)
_FAR = 8.0  # from here on, where a standard normal variable is once in 1e15 draws, the map is linear
_UNIT = math.sqrt(math.pi / 2)  # makes the slope at zero one
_LOG_SQRT_TAU = 0.5 * math.log(math.tau)


@dataclass(frozen=True)
class ExtremeTails(Transformer):
    """T(z) = +-u (P^-lam - 1) / lam, P = 2 Phi(-|z|): standard normal z in, and out come tails Pr(|y| > t) ~ t^(-1 / lam).

    Hickling and Prangle 2024, "Flexible tails for normalizing flows", with u = sqrt(pi / 2) so that the slope at
    zero is one. P is the probability of a larger |z|, so |y| has a generalised Pareto distribution; lam, one number for each
    side, is 1 / df of a Student-t density with such tails, within (1/150, 1.5). It belongs at the data's end of a flow with a
    normal base. Beyond |z| = 8 the map is linear, and so continuously differentiable, finite in float32, and onto the line.

    This does not start as the identity: at zero parameters both tails have lam = 0.1.
    """

    @property
    def num_params(self) -> int:
        """The raw tail indices, left and right."""
        return 2

    def forward(self, theta: Array, x: Array) -> tuple[Array, Array]:
        """See `Transformer.forward`."""
        y, log_slope, _, _, _ = _evaluate(*_side(theta, x))
        return y, log_slope

    def forward_with_curvature(self, theta: Array, x: Array) -> tuple[Array, Array, Array]:
        """With h the hazard rate of |z|, d/dz log T' = +-((1 + lam) h - |z|), and zero in the linear part."""
        backend = backend_of(x)
        sign, a, index = _side(theta, x)
        y, log_slope, near, at, log_hazard = _evaluate(sign, a, index)
        curvature = sign * ((1 + index) * backend.xp.exp(log_hazard) - at)
        return y, log_slope, backend.stop(backend.xp.where(near, curvature, 0 * curvature))

    def inverse(self, theta: Array, y: Array) -> tuple[Array, Array]:
        """See `Transformer.inverse`: in closed form, by the normal quantile function."""
        backend = backend_of(y)
        xp = backend.xp
        sign, b, index = _side(theta, y)
        end, log_slope, _, _, _ = _evaluate(xp.ones_like(b), _FAR * xp.ones_like(b), index)
        near = b < end
        p = xp.exp(-xp.log1p(index * xp.where(near, b, 0 * b) / _UNIT) / index)
        a = xp.where(near, -backend.ndtri(0.5 * p), _FAR + (b - end) * xp.exp(-log_slope))
        return sign * a, -_evaluate(sign, a, index)[1]


def _side(theta: Array, x: Array) -> tuple[Array, Array, Array]:
    """The sign of x (one at zero), |x|, and the tail index on that side."""
    backend = backend_of(x)
    xp = backend.xp
    right = x >= 0
    sign = xp.where(right, xp.ones_like(x), -xp.ones_like(x))  # |x| = sign x, and has a derivative at zero
    index = _INDEX * xp.exp(soft_clip(theta, _LOG_RANGE))
    return sign, sign * x, xp.where(right, index[1], index[0])


def _evaluate(sign: Array, a: Array, index: Array) -> tuple[Array, Array, Array, Array, Array]:
    """y and log dy/dz at |z| = a, whether that is not in the linear part, and there a and the log of the hazard rate."""
    backend = backend_of(a)
    xp = backend.xp
    near = a < _FAR
    at = xp.where(near, a, _FAR * xp.ones_like(a))
    log_half = backend.log_ndtr(-at)  # L = log P is this plus log 2
    log_hazard = -0.5 * at * at - _LOG_SQRT_TAU - log_half
    grown = -index * (log_half + math.log(2.0))
    log_slope = grown + log_hazard + math.log(_UNIT)
    y = _UNIT * xp.expm1(grown) / index + (a - at) * xp.exp(log_slope)
    return sign * y, log_slope, near, at, log_hazard
