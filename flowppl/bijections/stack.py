"""Copies of one bijection in sequence, scanned; all of them with networks of their own, or with one that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowppl import tree
from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.base import Array, Bijection, Params, broadcast, merge
from flowppl.errors import DimensionError


@dataclass(frozen=True)
class Stack(Bijection):
    """`depth` copies of one bijection with arrays of their own, on a leading axis and scanned: compile time is flat in depth.

    With an `embedding` the copies share their networks, and each tells them which one it is by a learned vector behind the
    context; what is not a network (linear maps, say) stays their own. Lee et al. 2020, "NanoFlow: scalable normalizing flows with
    sublinear parameter complexity".

    Attributes:
        layer: The repeated bijection; given an embedding, its context is the stack's and the embedding's length longer.
        depth: How often.
        embedding: Length of the vector that tells copies of a shared network apart; 0 for networks of their own.
    """

    layer: Bijection
    depth: int
    embedding: int = 0

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")
        if not 0 <= self.embedding <= self.layer.context_dim:
            raise DimensionError(
                f"embedding: the layer's context holds it, and has length {self.layer.context_dim}; got {self.embedding}"
            )

    @property
    def dim(self) -> int:  # type: ignore[override]
        """Length of the vectors."""
        return self.layer.dim

    @property
    def context_dim(self) -> int:  # type: ignore[override]
        """Length of the context."""
        return self.layer.context_dim - self.embedding

    def init(self, rng: Any) -> dict[str, Any]:
        """Draws each layer's arrays and stacks them."""
        backend = backend_of_rng(rng)
        *keys, key = backend.split(rng, self.depth + 1)
        layers = [self.layer.init(k) for k in keys]
        if not self.embedding:
            return tree.stack(layers)
        own = tree.stack([_split(layer["params"])[0] for layer in layers])
        shared = {"own": own, "shared": _split(layers[0]["params"])[1]}
        embedding = backend.normal(key, (self.depth, self.embedding))
        return {
            "params": {**shared, "embedding": embedding},
            "const": {"own": tree.stack([layer["const"] for layer in layers])},
        }

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        return self._scan(self.layer.forward, params, x, context)

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`: the scan runs over the layers from the last to the first."""
        return self._scan(self.layer.inverse, params, y, context, reverse=True)

    def _scan(
        self, step: Any, params: Params, x: Array, context: Array | None, reverse: bool = False
    ) -> tuple[Array, Array]:
        backend = backend_of(x)
        x, context = broadcast(x, context, self.context_dim)

        def body(carry: tuple[Array, Array], row: Params) -> tuple[tuple[Array, Array], None]:
            x, log_det = carry
            p, with_embedding = self._layer(params, row, x, context)
            x, term = step(p, x, with_embedding)
            return (x, log_det + term), None

        return backend.scan(body, (x, backend.xp.zeros_like(x[..., 0])), self._rows(params), reverse=reverse)[0]

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """See `Bijection.forward_with_score`."""
        backend = backend_of(x)
        x, context = broadcast(x, context, self.context_dim)

        def body(carry: Any, row: Params) -> tuple[Any, None]:
            x, log_det, score, score_context = carry
            p, with_embedding = self._layer(params, row, x, context)
            full = self._with_embedding(backend.stop(0 * row[1]), x, score_context) if self.embedding else score_context
            x, term, score, full = self.layer.forward_with_score(p, x, score, with_embedding, full)
            score_context = None if score_context is None else full[..., : self.context_dim]  # type: ignore[index]
            return (x, log_det + term, score, score_context), None

        start = (x, backend.xp.zeros_like(x[..., 0]), score, score_context)
        return backend.scan(body, start, self._rows(params))[0]

    def unstack(
        self, variables: dict[str, Any], x: Array, context: Array | None
    ) -> tuple[list[dict[str, Any]], list[Array | None]]:
        """The variables and the contexts of layers that share their networks, one by one."""
        params, const = variables["params"], variables["const"]
        parts = [
            {"params": merge(tree.index(params["own"], i), params["shared"]), "const": tree.index(const["own"], i)}
            for i in range(self.depth)
        ]
        return parts, [self._with_embedding(params["embedding"][i], x, context) for i in range(self.depth)]

    def _rows(self, params: Params) -> Params:
        """What is scanned over."""
        return (params["own"], params["embedding"]) if self.embedding else params

    def _layer(self, params: Params, row: Params, x: Array, context: Array | None) -> tuple[Params, Array | None]:
        """One layer's parameters and its context at x."""
        if not self.embedding:
            return row, context
        own, embedding = row
        return merge(own, params["shared"]), self._with_embedding(embedding, x, context)

    def _with_embedding(self, embedding: Array, x: Array, context: Array | None) -> Array | None:
        if not self.embedding:
            return context
        xp = backend_of(x).xp
        embedding = xp.broadcast_to(embedding, (*x.shape[:-1], self.embedding))
        return embedding if context is None else xp.concat([context, embedding], axis=-1)


def _split(params: Any) -> tuple[Any, Any]:
    """Two trees of the same outline: all but the networks, and the networks, which go by the name of "net"."""
    if isinstance(params, dict):
        pairs = {k: ({}, v) if k == "net" else _split(v) for k, v in params.items()}
        return (
            {k: own for k, (own, _) in pairs.items() if k != "net"},
            {k: net for k, (_, net) in pairs.items() if k == "net" or isinstance(params[k], dict | tuple)},
        )
    if isinstance(params, tuple):
        owns, nets = zip(*map(_split, params), strict=True)
        return owns, nets
    return params, {}
