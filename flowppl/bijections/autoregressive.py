"""Masked-autoregressive maps: coordinate i depends on the coordinates before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of
from flowppl.bijections.base import Array, Bijection, Params, broadcast, join
from flowppl.bijections.elementwise import Transformer, event_first, event_last
from flowppl.networks import MaskedMLP


@dataclass(frozen=True)
class MaskedAutoregressive(Bijection):
    """y_i = tau(x_i; net_i(x_1 ... x_{i-1}, context)): sampling is one pass (an inverse autoregressive flow).

    Kingma et al. 2016, "Improved variational inference with inverse autoregressive flow". `Inverse` of it scores in one pass
    instead (a masked autoregressive flow, Papamakarios et al. 2017).

    Attributes:
        dim: Length of the vectors.
        transformer: The monotone map of each coordinate.
        context_dim: Length of the context, 0 for none.
        hidden: Widths of the masked network's hidden layers.
        activation: Its activation, "relu", "silu" or "gelu".
    """

    dim: int
    transformer: Transformer
    context_dim: int = 0
    hidden: tuple[int, ...] = (64, 64)
    activation: str = "silu"

    @property
    def _net(self) -> MaskedMLP:
        outputs = (self.transformer.num_params, self.dim)
        return MaskedMLP(self.dim + self.context_dim, outputs, self.hidden, self.activation, self.context_dim)

    def init(self, rng: Any) -> dict[str, Any]:
        """Starts as the identity."""
        return {"params": {"net": self._net.init(rng)}, "const": {}}

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`: one network call."""
        x, context = broadcast(x, context, self.context_dim)
        y, log_slope = self.transformer.forward(self._net(params["net"], join(x, context)), event_first(x))
        return event_last(y), backend_of(x).xp.sum(log_slope, axis=0)

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`: sweep i makes coordinate i exact, so `dim` network calls make all of them so."""
        backend = backend_of(y)
        xp = backend.xp
        y, context = broadcast(y, context, self.context_dim)

        def sweep(carry: tuple[Array, Array], _: Array) -> tuple[tuple[Array, Array], None]:
            theta = self._net(params["net"], join(carry[0], context))
            x, log_slope = self.transformer.inverse(theta, event_first(y))
            return (event_last(x), xp.sum(log_slope, axis=0)), None

        start = (xp.zeros_like(y), xp.zeros_like(y[..., 0]))
        return backend.scan(sweep, start, backend.asarray(list(range(self.dim)), y))[0]

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """Solves J^T g' = g - d log|det J| / dx; J^T is diagonal plus nilpotent, so Jacobi sweeps end after dim at the latest."""
        backend = backend_of(x)
        xp = backend.xp
        x, own_context = broadcast(x, context, self.context_dim)
        inputs = join(x, own_context)
        fixed, at = backend.stop(params), backend.stop(x)

        def through_net(inputs: Array) -> tuple[tuple[Array, Array], Array]:
            theta = self._net(fixed["net"], inputs)
            y, log_slope, curvature = self.transformer.forward_with_curvature(theta, event_first(at))
            return (y, log_slope), (log_slope, curvature)

        _, pull, (log_slope, curvature) = backend.vjp(through_net, backend.stop(inputs), has_aux=True, once=True)
        ones, slope = xp.ones_like(log_slope), event_last(xp.exp(log_slope))

        def from_net(score: Array, log_slope: Array) -> Array:
            return pull((event_first(score), log_slope))[0]

        rest = score - event_last(curvature) - from_net(0 * score, ones)[..., : self.dim]
        tolerance = 16 * xp.finfo(x.dtype).eps

        def unfinished(state: tuple[Array, Array]) -> Array:
            change, solution = state
            return xp.any(xp.abs(change) > tolerance * (1 + xp.abs(solution)))

        def sweep(state: tuple[Array, Array]) -> tuple[Array, Array]:
            _, solution = state
            new = (rest - from_net(solution, 0 * ones)[..., : self.dim]) / slope
            return new - solution, new

        first = rest / slope
        _, score = backend.while_loop(unfinished, sweep, (first, first), max_steps=self.dim - 1)
        score = backend.stop(score)
        y, log_det = self.forward(params, x, own_context)
        if own_context is not None:
            score_context = backend.stop(score_context - from_net(score, ones)[..., self.dim :])
        return y, log_det, score, score_context
