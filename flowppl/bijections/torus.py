"""Angles beside real numbers: a linear layer for the real ones, and the data end of a flow on a torus and a line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.base import Array, Bijection, Params, pick
from flowppl.bijections.linear import LULinear, identity_like
from flowppl.bijections.wrap import wrap
from flowppl.errors import DimensionError


@dataclass(frozen=True)
class Keep(Bijection):
    """The first coordinates stay, a bijection maps the others.

    Attributes:
        kept: How many stay.
        bijection: The map of the others.
    """

    kept: int
    bijection: Bijection

    @property
    def dim(self) -> int:  # type: ignore[override]
        """Length of the vectors."""
        return self.kept + self.bijection.dim

    @property
    def context_dim(self) -> int:  # type: ignore[override]
        """Length of the context."""
        return self.bijection.context_dim

    def init(self, rng: Any) -> dict[str, Any]:
        """The bijection's arrays."""
        return self.bijection.init(rng)

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        y, log_det = self.bijection.forward(params, x[..., self.kept :], context)
        return self._beside(x, y), log_det

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`."""
        x, log_det = self.bijection.inverse(params, y[..., self.kept :], context)
        return self._beside(y, x), log_det

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """The scores of what stays stay."""
        y, log_det, moved, score_context = self.bijection.forward_with_score(
            params, x[..., self.kept :], score[..., self.kept :], context, score_context
        )
        return self._beside(x, y), log_det, self._beside(score, moved), score_context

    def _beside(self, x: Array, moved: Array) -> Array:
        return backend_of(x).xp.concat([x[..., : self.kept], moved], axis=-1)


@dataclass(frozen=True)
class TorusEnd(Bijection):
    """From angles first and real numbers after them to the order of the data; the last layer of a flow over both.

    Angles are shifted, real numbers mapped affinely. So it starts as the identity but for the order, and a location and a scale
    can be put into it, see `from_cholesky`.

    Attributes:
        dim: Length of the vectors.
        circular: Where the angles belong in the data, in [-pi, pi) there.
        boxed: Whether the data's angles are given as u, the angle being 2 pi sigmoid(u) - pi: NumPyro's unconstrained form of an
            angle. The density of u then makes that of the angle the flow's own, without an edge at the seam.
    """

    dim: int
    circular: tuple[int, ...]
    boxed: bool = False
    context_dim: int = 0

    def __post_init__(self) -> None:
        if not self.circular or sorted(set(self.circular) & set(range(self.dim))) != sorted(self.circular):
            raise DimensionError(f"circular: expected some of the coordinates 0 to {self.dim - 1}, got {self.circular}")

    @property
    def _order(self) -> tuple[int, ...]:
        """Coordinate i here is coordinate order[i] of the data."""
        return (*self.circular, *(i for i in range(self.dim) if i not in self.circular))

    @property
    def _linear(self) -> LULinear | None:
        reals = self.dim - len(self.circular)
        return LULinear(reals) if reals else None

    def init(self, rng: Any) -> dict[str, Any]:
        """No shift and the identity."""
        shift = backend_of_rng(rng).xp.zeros((len(self.circular),))
        linear = {"linear": self._linear.init(rng)["params"]} if self._linear else {}
        return {"params": {"shift": shift, **linear}, "const": {}}

    def from_cholesky(self, loc: Array, scale_tril: Array) -> Params:
        """The parameters with this location, and this scale of the real numbers; angles keep the base's.

        Args:
            loc: `(dim,)`, in the data's coordinates.
            scale_tril: `(dim, dim)`, lower triangular with a positive diagonal.
        """
        xp = backend_of(scale_tril).xp
        k, loc = len(self.circular), pick(loc, self._order)
        placed = {"shift": self._angle(loc[:k])}
        if self._linear:
            rows = pick(scale_tril.T, self._order[k:]).T
            placed["linear"] = LULinear.from_cholesky(loc[k:], xp.linalg.cholesky(rows @ rows.T))
        return placed

    def whitening(self, loc: Array, scale_tril: Array) -> tuple[Array, Array]:
        """The part of x -> loc + scale_tril x that moves real numbers by themselves; angles stay.

        Args:
            loc: `(dim,)`, in the data's coordinates.
            scale_tril: `(dim, dim)`.
        """
        backend = backend_of(scale_tril)
        xp, angle = backend.xp, backend.asarray([float(i in self.circular) for i in range(self.dim)], scale_tril)
        covariance = (scale_tril @ scale_tril.T) * (1 - angle) * (1 - angle)[:, None] + identity_like(
            scale_tril
        ) * angle
        return loc * (1 - angle), xp.linalg.cholesky(covariance)

    def rescaled(self, params: Params, loc: Array, scale_tril: Array) -> Params:
        """The parameters of this map followed by x -> loc + scale_tril x, which leaves angles alone."""
        rest = self._order[len(self.circular) :]
        if not rest:
            return params
        scale = pick(pick(scale_tril, rest).T, rest).T
        return {**params, "linear": LULinear.rescaled(params["linear"], pick(loc, rest), scale)}

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        backend = backend_of(x)
        xp, k = backend.xp, len(self.circular)
        angles = wrap(x[..., :k] + params["shift"])
        rest, log_det = x[..., k:], xp.zeros_like(x[..., 0])
        if self._linear:
            rest, log_det = self._linear.forward(params["linear"], rest)
        if self.boxed:
            angles, slope = self._box(angles)
            log_det = log_det - xp.sum(slope, axis=-1)
        return self._arrange(angles, rest), log_det

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`."""
        xp, k = backend_of(y).xp, len(self.circular)
        y = pick(y, self._order)
        rest, log_det = y[..., k:], xp.zeros_like(y[..., 0])
        if self._linear:
            rest, log_det = self._linear.inverse(params["linear"], rest)
        angles = self._angle(y[..., :k])
        if self.boxed:
            log_det = log_det + xp.sum(self._log_slope(y[..., :k]), axis=-1)
        return xp.concat([wrap(angles - params["shift"]), rest], axis=-1), log_det

    def centred(self, y: Array) -> tuple[Array, Callable[[Array], Array]]:
        """Data `(n, dim)` whose angles are counted from their mean direction, and the way back: for quantiles of angles."""
        backend = backend_of(y)
        xp, k = backend.xp, len(self.circular)
        angles, rest = self._angle(pick(y, self._order[:k])), pick(y, self._order[k:])
        centre = xp.atan2(xp.mean(xp.sin(angles), axis=0), xp.mean(xp.cos(angles), axis=0))

        def back(y: Array) -> Array:
            y = pick(y, self._order)
            angles = wrap(y[..., :k] + centre)
            return self._arrange(self._box(angles)[0] if self.boxed else angles, y[..., k:])

        return self._arrange(wrap(angles - centre), rest), back

    def _arrange(self, angles: Array, rest: Array) -> Array:
        """Angles and real numbers in the order of the data."""
        place = tuple(sorted(range(self.dim), key=self._order.__getitem__))
        return pick(backend_of(angles).xp.concat([angles, rest], axis=-1), place)

    def _angle(self, u: Array) -> Array:
        return wrap(u) if not self.boxed else math.pi * backend_of(u).xp.tanh(0.5 * u)

    def _log_slope(self, u: Array) -> Array:
        """log d angle / du."""
        softplus = backend_of(u).softplus
        return math.log(2 * math.pi) - softplus(u) - softplus(-u)

    def _box(self, angle: Array) -> tuple[Array, Array]:
        """u of an angle, and log d angle / du there; at the seam u would be infinite, and is as large as rounding lets it."""
        xp = backend_of(angle).xp
        edge = 1 - 2 * float(xp.finfo(angle.dtype).eps)
        u = 2 * xp.atanh(xp.clip(angle * (1 / math.pi), -edge, edge))
        return u, self._log_slope(u)
