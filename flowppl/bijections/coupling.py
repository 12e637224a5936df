"""Coupling: some coordinates stay and choose the maps of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of
from flowppl.bijections.base import Array, Bijection, Params, broadcast, join, pick
from flowppl.bijections.elementwise import Transformer, event_first, event_last, transform_with_score
from flowppl.errors import DimensionError
from flowppl.networks import MLP


@dataclass(frozen=True)
class Coupling(Bijection):
    """y_a = x_a, y_b = tau(x_b; net(x_a, context)). Dinh et al. 2017, "Density estimation using Real NVP".

    The first half of the coordinates stays, unless `moved` says how many do not; a `Rotation` or `Permutation` between two
    couplings changes the roles. In one dimension nothing stays, and the transformer depends on the context alone.

    Attributes:
        dim: Length of the vectors.
        transformer: The monotone map of the other coordinates.
        context_dim: Length of the context, 0 for none.
        hidden: Widths of the conditioner's hidden layers.
        activation: Its activation, "relu", "silu" or "gelu".
        moved: How many coordinates, the last ones, are mapped; None for half of them.
        angles: Which of those that stay are angles: the network sees their sines and cosines.
    """

    dim: int
    transformer: Transformer
    context_dim: int = 0
    hidden: tuple[int, ...] = (64, 64)
    activation: str = "silu"
    moved: int | None = None
    angles: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.kept < self.dim or not set(self.angles) <= set(range(self.kept)):
            raise DimensionError(
                f"expected 1 <= moved <= dim and angles among those that stay, got dim={self.dim}, moved={self.moved}, "
                f"angles={self.angles}"
            )

    @property
    def kept(self) -> int:
        """How many coordinates stay."""
        return self.dim // 2 if self.moved is None else self.dim - self.moved

    @property
    def _net(self) -> MLP:
        outputs = (self.transformer.num_params, self.dim - self.kept)
        return MLP(self.kept + len(self.angles) + self.context_dim, outputs, self.hidden, self.activation)

    def _theta(self, params: Params, inputs: Array) -> Array:
        """The transformer's parameters, from what stays and the context."""
        if self.angles:
            xp = backend_of(inputs).xp
            angles = pick(inputs, self.angles)
            rest = pick(inputs, tuple(i for i in range(inputs.shape[-1]) if i not in self.angles))
            inputs = xp.concat([xp.cos(angles), xp.sin(angles), rest], axis=-1)
        return self._net(params["net"], inputs)

    def init(self, rng: Any) -> dict[str, Any]:
        """Starts as the identity."""
        return {"params": {"net": self._net.init(rng)}, "const": {}}

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        return self._couple(self.transformer.forward, params, x, context)

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`: the same network call, the inverse transformer."""
        return self._couple(self.transformer.inverse, params, y, context)

    def _couple(self, tau: Any, params: Params, x: Array, context: Array | None) -> tuple[Array, Array]:
        x, context = broadcast(x, context, self.context_dim)
        xp = backend_of(x).xp
        kept, moved = x[..., : self.kept], x[..., self.kept :]
        moved, log_slope = tau(self._theta(params, join(kept, context)), event_first(moved))
        return xp.concat([kept, event_last(moved)], axis=-1), xp.sum(log_slope, axis=0)

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """One pullback through the conditioner. Vaitl et al. 2024, proposition 3.3."""
        x, own_context = broadcast(x, context, self.context_dim)
        xp = backend_of(x).xp
        kept, moved = x[..., : self.kept], x[..., self.kept :]
        moved, log_slope, moved_score, from_inputs = transform_with_score(
            self.transformer,
            lambda inputs: self._theta(params, inputs),
            join(kept, own_context),
            event_first(moved),
            event_first(score[..., self.kept :]),
        )
        kept_score = score[..., : self.kept] - from_inputs[..., : self.kept]
        if own_context is not None:
            score_context = score_context - from_inputs[..., self.kept :]
        y = xp.concat([kept, event_last(moved)], axis=-1)
        score = xp.concat([kept_score, event_last(moved_score)], axis=-1)
        return y, xp.sum(log_slope, axis=0), score, score_context
