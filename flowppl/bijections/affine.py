"""The affine transformer: shift and bounded positive scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowppl.backend import backend_of
from flowppl.bijections.base import Array
from flowppl.bijections.elementwise import Transformer


def soft_clip(x: Array, bound: float) -> Array:
    """x / (1 + |x| / bound): the identity near zero, within (-bound, bound), never flat in float32."""
    return x / (1 + backend_of(x).xp.abs(x) * (1 / bound))


@dataclass(frozen=True)
class Affine(Transformer):
    """y = x exp(s) + t with s smoothly bounded, so that no conditioner output can overflow.

    Attributes:
        max_scale: The scale stays within (1 / max_scale, max_scale).
    """

    max_scale: float = 20.0

    @property
    def num_params(self) -> int:
        """Shift and raw log-scale."""
        return 2

    def forward(self, theta: Array, x: Array) -> tuple[Array, Array]:
        """See `Transformer.forward`."""
        shift, log_scale = self._unpack(theta, x)
        return x * backend_of(x).xp.exp(log_scale) + shift, log_scale

    def inverse(self, theta: Array, y: Array) -> tuple[Array, Array]:
        """See `Transformer.inverse`."""
        shift, log_scale = self._unpack(theta, y)
        return (y - shift) * backend_of(y).xp.exp(-log_scale), -log_scale

    def forward_with_curvature(self, theta: Array, x: Array) -> tuple[Array, Array, Array]:
        """The slope is constant: no curvature."""
        y, log_scale = self.forward(theta, x)
        return y, log_scale, backend_of(x).xp.zeros_like(y)

    def _unpack(self, theta: Array, x: Array) -> tuple[Array, Array]:
        log_scale = soft_clip(theta[1], math.log(self.max_scale))
        return theta[0], log_scale + backend_of(x).xp.zeros_like(x)
