"""The planar flow, invertible at every point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.base import Array, Bijection, Params, broadcast, score_of_context
from flowppl.bijections.elementwise import event_last
from flowppl.bijections.root import solve_increasing
from flowppl.networks import MLP

_MIN_SLOPE = 1e-3  # of the map along w: at zero, where w.u = -1, it has no inverse


def bounded_dot(raw: Array) -> Array:
    """softplus(r + log(e^c - 1)) - c > -c for c = 1 - 1e-3: it leaves r = 0 alone, so a flow can start as the identity."""
    return backend_of(raw).softplus(raw + math.log(math.expm1(1 - _MIN_SLOPE))) - (1 - _MIN_SLOPE)


def solve_ridge(dot: Array, target: Array) -> Array:
    """The a with a + dot tanh(a) = target, for dot > -1."""
    xp = backend_of(target).xp

    def along_w(a: Array) -> tuple[Array, Array]:
        h = xp.tanh(a)
        return a + dot * h, 1 + dot * (1 - h * h)

    reach = xp.abs(dot) + xp.zeros_like(target)
    return solve_increasing(along_w, target, target - reach, target + reach)


@dataclass(frozen=True)
class Planar(Bijection):
    """y = x + u tanh(w.x + b), with u moved along w so that w.u > -1 + 1e-3. Rezende and Mohamed 2015, equations 10 to 12.

    The inverse needs one number: a = w.x + b solves a + (w.u) tanh(a) = w.y + b, an increasing equation with a known bracket.

    Attributes:
        dim: Length of the vectors.
        context_dim: Length of the context; given one, a network chooses w, u and b.
        hidden: Widths of that network's hidden layers.
    """

    dim: int
    context_dim: int = 0
    hidden: tuple[int, ...] = (64, 64)

    @property
    def _net(self) -> MLP:
        return MLP(self.context_dim, (2 * self.dim + 1,), self.hidden)

    def init(self, rng: Any) -> dict[str, Any]:
        """Starts as the identity: u is zero, w a random direction."""
        backend = backend_of_rng(rng)
        w_key, net_key = backend.split(rng, 2)
        w = backend.normal(w_key, (self.dim,)) / math.sqrt(self.dim)
        params = {"w": w, "u": 0 * w, "b": 0 * w[0]}
        if self.context_dim:
            params["net"] = self._net.init(net_key)
        return {"params": params, "const": {}}

    def _unpack(self, params: Params, context: Array | None) -> tuple[Array, Array, Array, Array]:
        """w, u `(*batch, dim)`, b and w.u `(*batch,)`."""
        xp, d = backend_of(params["w"]).xp, self.dim
        w, u, b = params["w"], params["u"], params["b"]
        if context is not None:
            delta = event_last(self._net(params["net"], context))
            w, u, b = w + delta[..., :d], u + delta[..., d : 2 * d], b + delta[..., -1]
        raw = xp.sum(w * u, axis=-1)
        dot = bounded_dot(raw)  # replaces w.u
        shift = (dot - raw) / (xp.sum(w * w, axis=-1) + xp.finfo(w.dtype).tiny)
        return w, u + shift[..., None] * w, b, dot

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        xp = backend_of(x).xp
        x, context = broadcast(x, context, self.context_dim)
        w, u, b, dot = self._unpack(params, context)
        h = xp.tanh(xp.sum(w * x, axis=-1) + b)
        return x + u * h[..., None], xp.log1p(dot * (1 - h * h))

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`."""
        xp = backend_of(y).xp
        y, context = broadcast(y, context, self.context_dim)
        w, u, b, dot = self._unpack(params, context)

        h = xp.tanh(solve_ridge(dot, xp.sum(w * y, axis=-1) + b))
        return y - u * h[..., None], -xp.log1p(dot * (1 - h * h))

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """J = I + h' u w^T is inverted by the Sherman-Morrison formula."""
        backend = backend_of(x)
        xp = backend.xp
        x, own_context = broadcast(x, context, self.context_dim)
        y, log_det = self.forward(params, x, own_context)
        w, u, b, dot = self._unpack(backend.stop(params), own_context)
        h = xp.tanh(xp.sum(w * x, axis=-1) + b)
        slope = 1 - h * h
        score = score + w * (2 * dot * h * slope / (1 + dot * slope))[..., None]  # minus the gradient of log|det J|
        along_u = xp.sum(u * score, axis=-1)
        score = backend.stop(score - w * (slope * along_u / (1 + dot * slope))[..., None])
        if own_context is not None:
            score_context = score_of_context(self.forward, params, x, own_context, score, score_context)
        return y, log_det, score, score_context
