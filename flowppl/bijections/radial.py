"""The radial flow, invertible in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.affine import soft_clip
from flowppl.bijections.base import Array, Bijection, Params, broadcast, score_of_context
from flowppl.bijections.elementwise import event_last
from flowppl.networks import MLP

_LOG_RANGE = math.log(1e3)  # of alpha about its start, and of the slope at the centre


class _Parts(NamedTuple):
    centre: Array  # (*batch, dim)
    alpha: Array  # (*batch,), as the others
    beta: Array


@dataclass(frozen=True)
class Radial(Bijection):
    """y = x + beta h(r) (x - x_0), with r = |x - x_0| and h = 1 / (alpha + r). Rezende and Mohamed 2015, equations 13 and 14.

    The slope 1 + beta / alpha at the centre stays within (1e-3, 1e3), so that beta > -alpha. The distance of y from the centre
    is a quadratic equation for r.

    Attributes:
        dim: Length of the vectors.
        context_dim: Length of the context; given one, a network chooses centre, alpha and beta.
        hidden: Widths of that network's hidden layers.
    """

    dim: int
    context_dim: int = 0
    hidden: tuple[int, ...] = (64, 64)

    @property
    def _net(self) -> MLP:
        return MLP(self.context_dim, (self.dim + 2,), self.hidden)

    def init(self, rng: Any) -> dict[str, Any]:
        """Starts as the identity: beta is zero, the centre drawn from a standard normal, alpha a typical distance from it."""
        backend = backend_of_rng(rng)
        centre_key, net_key = backend.split(rng, 2)
        centre = backend.normal(centre_key, (self.dim,))
        params = {"centre": centre, "alpha": 0 * centre[0], "beta": 0 * centre[0]}
        if self.context_dim:
            params["net"] = self._net.init(net_key)
        return {"params": params, "const": {}}

    def _unpack(self, params: Params, context: Array | None) -> _Parts:
        xp = backend_of(params["centre"]).xp
        centre, log_alpha, log_slope = params["centre"], params["alpha"], params["beta"]
        if context is not None:
            delta = event_last(self._net(params["net"], context))
            centre, log_alpha = centre + delta[..., : self.dim], log_alpha + delta[..., -2]
            log_slope = log_slope + delta[..., -1]
        alpha = math.sqrt(self.dim) * xp.exp(soft_clip(log_alpha, _LOG_RANGE))
        return _Parts(centre, alpha, alpha * xp.expm1(soft_clip(log_slope, _LOG_RANGE)))

    def _log_slopes(self, parts: _Parts, r: Array) -> tuple[Array, Array]:
        """log(1 + beta h) and log(1 + alpha beta h^2): J's eigenvalues across the direction from the centre, and along it."""
        xp, h = backend_of(r).xp, 1 / (parts.alpha + r)
        return xp.log1p(parts.beta * h), xp.log1p(parts.beta * h * (parts.alpha * h))

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        x, context = broadcast(x, context, self.context_dim)
        parts = self._unpack(params, context)
        offset = x - parts.centre
        r = _length(offset)
        across, along = self._log_slopes(parts, r)
        return x + (parts.beta / (parts.alpha + r))[..., None] * offset, (self.dim - 1) * across + along

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`: s = r + beta r h is r^2 + (alpha + beta - s) r - alpha s = 0."""
        xp = backend_of(y).xp
        y, context = broadcast(y, context, self.context_dim)
        parts = self._unpack(params, context)
        offset = y - parts.centre
        s = _length(offset)
        linear = parts.alpha + parts.beta - s
        # The root that does not cancel, and the other one by their product; not abs, whose derivative at zero is a choice.
        size = xp.where(linear > 0, linear, -linear)
        root = (size + xp.sqrt(linear * linear + 4 * parts.alpha * s)) / 2
        r = xp.where(linear > 0, parts.alpha * s / root, root)
        across, along = self._log_slopes(parts, r)
        shrink = parts.beta / (parts.alpha + r + parts.beta)
        return y - shrink[..., None] * offset, -(self.dim - 1) * across - along

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """The symmetric J has two eigenvalues, one along the direction from the centre and one across."""
        backend = backend_of(x)
        xp = backend.xp
        x, own_context = broadcast(x, context, self.context_dim)
        y, log_det = self.forward(params, x, own_context)
        parts = self._unpack(backend.stop(params), own_context)
        offset = x - parts.centre
        r = _length(offset)
        direction = offset / xp.where(r > 0, r, xp.ones_like(r))[..., None]
        h = 1 / (parts.alpha + r)
        across, along = (xp.exp(-s) for s in self._log_slopes(parts, r))
        slope = -parts.beta * h * h * ((self.dim - 1) * across + 2 * parts.alpha * h * along)  # d log|det J| / dr
        radial = xp.sum(direction * score, axis=-1)
        change = along * (radial - slope) - across * radial
        score = backend.stop(across[..., None] * score + change[..., None] * direction)
        if own_context is not None:
            score_context = score_of_context(self.forward, params, x, own_context, score, score_context)
        return y, log_det, score, score_context


def _length(offset: Array) -> Array:
    """Euclidean length; zero, with a zero derivative, where cubes of it would underflow."""
    xp = backend_of(offset).xp
    square = xp.sum(offset * offset, axis=-1)
    far = square > xp.finfo(offset.dtype).tiny ** (2 / 3)
    length = xp.sqrt(xp.where(far, square, xp.ones_like(square)))
    return xp.where(far, length, xp.zeros_like(length))
