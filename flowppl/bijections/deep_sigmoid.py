"""The deep sigmoidal transformer: a mixture of logistic distribution functions between two logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from flowppl.backend import backend_of
from flowppl.bijections.affine import soft_clip
from flowppl.bijections.base import Array
from flowppl.bijections.elementwise import Transformer
from flowppl.bijections.root import solve_increasing

_LOG_SCALE = math.log(1e2)  # slopes of units lie between 1e-2 and 1e2, hence also those of the map's tails
_LOG_WEIGHT = 0.5 * math.log(1e3)  # weights differ by at most a factor of 1e3
_SHIFT = (
    20.0  # between units on either side of a gap the slope is at least about exp(-20): float32 can divide by its square
)


@dataclass(frozen=True)
class DeepSigmoid(Transformer):
    """y = logit(S(x)) with S(x) = sum_j w_j sigmoid(a_j x + b_j), a_j > 0 and weights w that sum to one.

    Huang et al. 2018, "Neural autoregressive flows", section 3.1. This is one layer of it; `Composed` stacks them. Everything is
    in log space, y = log S - log(1 - S), so nothing saturates and y takes every value; a_j and b_j are smoothly bounded. The
    inverse is a root search within min_j (y - b_j) / a_j <= x <= max_j (y - b_j) / a_j.

    At the identity all units are alike and would stay so, having equal gradients: each reads its parameters in units of its own.

    Attributes:
        units: Number of sigmoids.
    """

    units: int = 8

    def __post_init__(self) -> None:
        if self.units < 1:
            raise ValueError(f"units must be at least 1, got {self.units}")

    @property
    def num_params(self) -> int:
        """Slope, shift and weight of each unit."""
        return 3 * self.units

    def forward(self, theta: Array, x: Array) -> tuple[Array, Array]:
        """See `Transformer.forward`."""
        y, log_slope, _ = _evaluate(self._unpack(theta), x)
        return y, log_slope

    def forward_with_curvature(self, theta: Array, x: Array) -> tuple[Array, Array, Array]:
        """With f_j the part of unit j in the slope, d/dx log dy/dx = y' tanh(y / 2) - sum_j f_j a_j tanh(t_j / 2)."""
        backend = backend_of(x)
        xp, units = backend.xp, self._unpack(theta)
        y, log_slope, parts = _evaluate(units, x)
        pull = xp.sum(parts * units.scale * xp.tanh(0.5 * (units.scale * x + units.shift)), axis=0)
        curvature = xp.exp(log_slope) * xp.tanh(0.5 * y) - pull / xp.sum(parts, axis=0)
        return y, log_slope, backend.stop(curvature)

    def inverse(self, theta: Array, y: Array) -> tuple[Array, Array]:
        """See `Transformer.inverse`."""
        xp, units = backend_of(y).xp, self._unpack(theta)
        y = y + xp.zeros_like(theta[0])

        def f(x: Array) -> tuple[Array, Array]:
            y, log_slope, _ = _evaluate(units, x)
            return y, xp.exp(log_slope)

        ends = (y - units.shift) / units.scale
        x = solve_increasing(f, y, xp.min(ends, axis=0), xp.max(ends, axis=0))
        return x, -_evaluate(units, x)[1]

    def _unpack(self, theta: Array) -> _Units:
        backend = backend_of(theta)
        xp, n = backend.xp, self.units
        ratios = backend.asarray([j + 1.0 for j in range(n)], theta) * (2 / (n + 1))
        theta = xp.reshape(theta, (3, n, *theta.shape[1:]))
        theta = theta * xp.reshape(ratios, (n, *(1 for _ in theta.shape[2:])))
        scale = xp.exp(soft_clip(theta[0], _LOG_SCALE))
        log_weight = soft_clip(theta[2], _LOG_WEIGHT)
        return _Units(scale, soft_clip(theta[1], _SHIFT), log_weight - backend.logsumexp(log_weight, axis=0))


class _Units(NamedTuple):
    scale: Array
    shift: Array
    log_weight: Array


def _evaluate(units: _Units, x: Array) -> tuple[Array, Array, Array]:
    """y, log dy/dx and, in proportion, what each unit adds to dy/dx.

    In the tails S or 1 - S is tiny, and the smaller of the two is a factor of the slope's numerator too. So it is divided out
    before sums are formed: with s the sign of y, p_j the part of unit j in sum_j w_j sigmoid(-s t_j), the smaller one,

        dy/dx = sum_j p_j a_j sigmoid(s t_j) / sigmoid(s y)
    """
    backend = backend_of(x)
    xp = backend.xp
    t = units.scale * x + units.shift
    log_sigmoid, log_rest = -backend.softplus(-t), -backend.softplus(t)
    below, above = units.log_weight + log_sigmoid, units.log_weight + log_rest
    y = backend.logsumexp(below, axis=0) - backend.logsumexp(above, axis=0)
    positive = y >= 0
    parts = backend.softmax(xp.where(positive, above, below), axis=0)
    parts = parts * units.scale * xp.exp(xp.where(positive, log_sigmoid, log_rest))
    return y, xp.log(xp.sum(parts, axis=0)) + backend.softplus(xp.where(positive, -y, y)), parts
