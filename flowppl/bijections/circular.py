"""The circular spline: a transformer of angles."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowppl.bijections.base import Array
from flowppl.bijections.elementwise import Transformer
from flowppl.bijections.spline import RQSpline
from flowppl.bijections.wrap import wrap


@dataclass(frozen=True)
class CircularSpline(Transformer):
    """y = wrap(spline(x) + shift) on the circle of angles [-pi, pi), continuously differentiable across the seam.

    The spline has circular ends and a rotation follows it. A whole turn more in x changes nothing: this is a map of angles, not of
    the line, and belongs on a base density of angles. Rezende et al. 2020, "Normalizing flows on tori and spheres", section 2.1.

    Attributes:
        bins: Number of bins of the spline.
    """

    bins: int = 8

    @property
    def _spline(self) -> RQSpline:
        return RQSpline(self.bins, math.pi, "circular")

    def __post_init__(self) -> None:
        _ = self._spline  # which refuses too few bins

    @property
    def num_params(self) -> int:
        """Those of the spline, and the shift."""
        return self._spline.num_params + 1

    def forward(self, theta: Array, x: Array) -> tuple[Array, Array]:
        """See `Transformer.forward`."""
        y, log_slope = self._spline.forward(theta[:-1], x)
        return wrap(y + theta[-1]), log_slope

    def inverse(self, theta: Array, y: Array) -> tuple[Array, Array]:
        """See `Transformer.inverse`: x is in [-pi, pi)."""
        x, log_slope = self._spline.inverse(theta[:-1], y - theta[-1])
        return wrap(x), log_slope

    def forward_with_curvature(self, theta: Array, x: Array) -> tuple[Array, Array, Array]:
        """The spline's closed form."""
        y, log_slope, curvature = self._spline.forward_with_curvature(theta[:-1], x)
        return wrap(y + theta[-1]), log_slope, curvature
