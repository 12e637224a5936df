"""Bijections made of bijections: in sequence, and inverted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.base import Array, Bijection, Params, broadcast
from flowppl.errors import DimensionError


@dataclass(frozen=True)
class Chain(Bijection):
    """Bijections in sequence: `forward` applies the first one first.

    Attributes:
        bijections: At least one bijection, all of one dimension.
    """

    bijections: tuple[Bijection, ...]

    def __post_init__(self) -> None:
        dims = {b.dim for b in self.bijections}
        contexts = {b.context_dim for b in self.bijections} - {0}
        if len(dims) != 1 or len(contexts) > 1:
            raise DimensionError(
                "bijections: expected at least one, all of one dim and at most one context_dim; "
                f"got dims {sorted(dims)} and context_dims {sorted(contexts)}"
            )

    @property
    def dim(self) -> int:  # type: ignore[override]
        """Length of the vectors."""
        return self.bijections[0].dim

    @property
    def context_dim(self) -> int:  # type: ignore[override]
        """Length of the context."""
        return max(b.context_dim for b in self.bijections)

    def init(self, rng: Any) -> dict[str, Any]:
        """Draws each bijection's arrays."""
        keys = backend_of_rng(rng).split(rng, len(self.bijections))
        parts = [b.init(key) for b, key in zip(self.bijections, keys, strict=True)]
        return {kind: tuple(part[kind] for part in parts) for kind in ("params", "const")}

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        x, context = broadcast(x, context, self.context_dim)
        log_det = backend_of(x).xp.zeros_like(x[..., 0])
        for bijection, p in zip(self.bijections, params, strict=True):
            x, term = bijection.forward(p, x, context)
            log_det = log_det + term
        return x, log_det

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`."""
        y, context = broadcast(y, context, self.context_dim)
        log_det = backend_of(y).xp.zeros_like(y[..., 0])
        for bijection, p in zip(self.bijections[::-1], params[::-1], strict=True):
            y, term = bijection.inverse(p, y, context)
            log_det = log_det + term
        return y, log_det

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """See `Bijection.forward_with_score`."""
        x, context = broadcast(x, context, self.context_dim)
        log_det = backend_of(x).xp.zeros_like(x[..., 0])
        for bijection, p in zip(self.bijections, params, strict=True):
            x, term, score, score_context = bijection.forward_with_score(p, x, score, context, score_context)
            log_det = log_det + term
        return x, log_det, score, score_context


@dataclass(frozen=True)
class Inverse(Bijection):
    """A bijection in the other direction: a masked-autoregressive flow from an inverse one, say.

    Attributes:
        bijection: The bijection to invert.
    """

    bijection: Bijection

    @property
    def dim(self) -> int:  # type: ignore[override]
        """Length of the vectors."""
        return self.bijection.dim

    @property
    def context_dim(self) -> int:  # type: ignore[override]
        """Length of the context."""
        return self.bijection.context_dim

    def init(self, rng: Any) -> dict[str, Any]:
        """The bijection's arrays."""
        return self.bijection.init(rng)

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """The bijection's inverse."""
        return self.bijection.inverse(params, x, context)

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """The bijection's forward map."""
        return self.bijection.forward(params, y, context)
