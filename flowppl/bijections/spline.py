"""The monotone rational-quadratic spline, with three kinds of ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from flowppl.backend import backend_of
from flowppl.bijections.affine import soft_clip
from flowppl.bijections.base import Array
from flowppl.bijections.elementwise import Transformer
from flowppl.bijections.wrap import wrap

_LOG_SHARE = 0.5 * math.log(1e3)  # bins differ in width by at most a factor of 1e3: no bin vanishes in float32
_LOG_SLOPE = math.log(1e3)  # and knots have slopes between 1e-3 and 1e3
_FREE_SLOPES = {"identity": -1, "free": 1, "circular": 0}  # of the knots, beyond the number of bins


@dataclass(frozen=True)
class RQSpline(Transformer):
    """A rational-quadratic spline of [-bound, bound] onto itself, continuously differentiable everywhere.

    Durkan et al. 2019, "Neural spline flows", equations 4 to 8, written so that nothing cancels in float32. With p = the
    position in the bin and q = 1 - p (both from differences of knots, hence exact), s the bin's mean slope and d0, d1 the slopes
    at its ends, all terms of

        y = y_k + h (s p^2 + d0 p q) / D,    dy/dx = s^2 (d1 p^2 + 2 s p q + d0 q^2) / D^2,    D = s (p^2 + q^2) + (d0 + d1) p q

    are positive. The inverse solves A u^2 + B u - C = 0 for u = p / q, where A = s (1 - t), C = s t >= 0 and
    B = d0 (1 - t) - d1 t for the relative height t: the discriminant B^2 + 4 A C is a sum of positive terms.

    What happens at the ends of the box and outside depends on `ends`:

    - "identity": the slope at both ends is one, and outside is the identity.
    - "free": the slopes at the ends are learned, and the map goes on outside along its tangents: tails of any scale, and
      densities on a bounded support that do not have to agree with the base's at its ends.
    - "circular": the ends are one point of a circle, with one learned slope; x is first wrapped into [-bound, bound).

    Attributes:
        bins: Number of bins.
        bound: Half-width of the box.
        ends: "identity", "free" or "circular".
    """

    bins: int = 8
    bound: float = 5.0
    ends: str = "identity"

    def __post_init__(self) -> None:
        if self.bins < 2 or not self.bound > 0:
            raise ValueError(f"bins must be at least 2 and bound positive, got bins={self.bins}, bound={self.bound}")
        if self.ends not in _FREE_SLOPES:
            raise ValueError(f"ends must be one of {', '.join(_FREE_SLOPES)}, got {self.ends!r}")

    @property
    def num_params(self) -> int:
        """Widths, heights, and the slopes at inner knots and at those ends that have a learned one."""
        return 3 * self.bins + _FREE_SLOPES[self.ends]

    def forward(self, theta: Array, x: Array) -> tuple[Array, Array]:
        """See `Transformer.forward`."""
        return self.forward_with_curvature(theta, x)[:2]

    def forward_with_curvature(self, theta: Array, x: Array) -> tuple[Array, Array, Array]:
        """Value, log-slope and its derivative in closed form, from one pass."""
        kernel = self._kernel(x, inverse=False)
        if kernel:
            return kernel(theta, x)
        xp = backend_of(x).xp
        x, inside, x_in = self._clip(x)
        xs, ys, slopes = self._knots(theta)
        x0, x1, y0, y1, d0, d1 = _bin(x_in, xs, (xs, ys, slopes))
        w, h = x1 - x0, y1 - y0
        p, q = (x_in - x0) / w, (x1 - x_in) / w
        y, log_slope, curvature = _evaluate(xp, p, q, w, h, d0, d1)
        curvature = backend_of(x).stop(xp.where(inside, curvature, xp.zeros_like(y)))
        return *self._outside(x, inside, x_in, y0 + y, log_slope), curvature

    def inverse(self, theta: Array, y: Array) -> tuple[Array, Array]:
        """See `Transformer.inverse`."""
        kernel = self._kernel(y, inverse=True)
        if kernel:
            return kernel(theta, y)[:2]
        xp = backend_of(y).xp
        y, inside, y_in = self._clip(y)
        xs, ys, slopes = self._knots(theta)
        x0, x1, y0, y1, d0, d1 = _bin(y_in, ys, (xs, ys, slopes))
        w, h = x1 - x0, y1 - y0
        p, q = _solve(xp, (y_in - y0) / h, (y1 - y_in) / h, h / w, d0, d1)
        _, log_slope, _ = _evaluate(xp, p, q, w, h, d0, d1)
        # From the nearer knot: at the right end of a bin, x0 + p w would lose q.
        x = xp.where(p < q, x0 + p * w, x1 - q * w)
        return self._outside(y, inside, y_in, x, -log_slope)

    def _outside(self, x: Array, inside: Array, x_in: Array, y: Array, log_slope: Array) -> tuple[Array, Array]:
        """Value and log-slope at x from those at x_in, the nearest point of the box."""
        xp = backend_of(x).xp
        if self.ends == "identity":
            return xp.where(inside, y, x), xp.where(inside, log_slope, xp.zeros_like(log_slope))
        return y + (x - x_in) * xp.exp(log_slope), log_slope

    def _kernel(self, x: Array, inverse: bool) -> Callable[[Array, Array], tuple[Array, Array, Array]] | None:
        """The backend's own version of this map, if it has one; what is written here is its oracle."""
        kernel = getattr(backend_of(x), "rq_spline", None) if self.ends == "identity" else None
        options = {"bound": self.bound, "log_share": _LOG_SHARE, "log_slope": _LOG_SLOPE, "inverse": inverse}
        return kernel and partial(kernel, **options)

    def _clip(self, x: Array) -> tuple[Array, Array, Array]:
        """The point, wrapped if it is one of a circle; whether it is in the box; and the nearest point of the box."""
        backend = backend_of(x)
        xp, bound = backend.xp, self.bound
        x = wrap(x, bound) if self.ends == "circular" else x
        inside = (x > -bound) & (x < bound)
        # The unused branch of a `where` must stay finite, or its gradient poisons the used one: clip first.
        return x, inside, xp.where(inside, x, backend.stop(xp.clip(x, -bound, bound)))

    def _knots(self, theta: Array) -> tuple[Array, Array, Array]:
        """Positions, heights and slopes of the knots, each `(bins + 1, *shape)`."""
        backend = backend_of(theta)
        xp, k = backend.xp, self.bins
        shape = theta.shape[1:]
        shares = xp.exp(soft_clip(xp.reshape(theta[: 2 * k], (2, k, *shape)), _LOG_SHARE))
        sums = xp.cumulative_sum(shares, axis=1)
        inner = sums[:, :-1] * (2 * self.bound / sums[:, -1:]) - self.bound
        edge = xp.ones_like(inner[:, :1])
        knots = xp.concat([-self.bound * edge, inner, self.bound * edge], axis=1)
        slopes = xp.exp(soft_clip(theta[2 * k :], _LOG_SLOPE))
        if self.ends == "identity":
            slopes = xp.concat([edge[0], slopes, edge[0]], axis=0)
        elif self.ends == "circular":
            slopes = xp.concat([slopes, slopes[:1]], axis=0)
        return knots[0], knots[1], slopes


def _bin(x: Array, knots: Array, values: tuple[Array, ...]) -> list[Array]:
    """Each of `values` at the left and at the right knot of the bin of x, picked by a mask (no indexing: fuses, vmaps)."""
    xp = backend_of(x).xp
    right_of = x >= knots[1:-1]
    everywhere = xp.ones_like(right_of[:1])
    here = xp.concat([everywhere, right_of], axis=0) & ~xp.concat([right_of, ~everywhere], axis=0)
    mask = xp.astype(here, x.dtype)
    return [xp.sum(part * mask, axis=0) for v in values for part in (v[:-1], v[1:])]


def _evaluate(xp: Array, p: Array, q: Array, w: Array, h: Array, d0: Array, d1: Array) -> tuple[Array, Array, Array]:
    """Height above the left knot, log-slope, and derivative of the log-slope."""
    s = h / w
    pq = p * q
    denominator = s * (p * p + q * q) + (d0 + d1) * pq
    slope = d1 * p * p + 2 * s * pq + d0 * q * q
    y = h * (s * p * p + d0 * pq) / denominator
    log_slope = 2 * xp.log(s / denominator) + xp.log(slope)
    from_slope = (d1 * p + s * (q - p) - d0 * q) / slope
    from_denominator = (d0 + d1 - 2 * s) * (q - p) / denominator
    return y, log_slope, 2 * (from_slope - from_denominator) / w


def _solve(xp: Array, t: Array, t1: Array, s: Array, d0: Array, d1: Array) -> tuple[Array, Array]:
    """The position p in the bin, and 1 - p, at relative height t, with t1 = 1 - t."""
    a, b, c = s * t1, d0 * t1 - d1 * t, s * t
    positive = b >= 0
    root = xp.where(positive, b, -b) + xp.sqrt(b * b + 4 * a * c)  # never zero: d0 and d1 are positive
    # u = p / q = 2 c / root where b >= 0, root / (2 a) where b < 0
    up, down = xp.where(positive, 2 * c, root), xp.where(positive, root, 2 * a)
    return up / (up + down), down / (up + down)
