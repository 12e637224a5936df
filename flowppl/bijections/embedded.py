"""A bijection that sees a network's view of its context: the encoder of amortised inference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.base import Array, Bijection, Params, broadcast
from flowppl.networks import MLP


@dataclass(frozen=True)
class Embedded(Bijection):
    """Gives a bijection the last hidden units of a perceptron of the context, in place of the context.

    The network's parameters are the bijection's own. So path gradients hold them fixed in log q, as they hold all parameters, and
    still pass through the network to whatever the context was computed from.

    Attributes:
        bijection: The bijection; its context is the embedding.
        inputs: Length of the context.
        hidden: Widths of the hidden layers before the embedding.

    Example:
        >>> import numpy as np
        >>> from flowppl.bijections import Affine, Elementwise, Embedded, bind
        >>> b = Embedded(Elementwise(2, Affine(), context_dim=8), inputs=3)
        >>> y, log_det = b.forward(bind(b.init(np.random.default_rng(0))), np.zeros((5, 2)), np.zeros((5, 3)))
        >>> y.shape, log_det.shape
        ((5, 2), (5,))
    """

    bijection: Bijection
    inputs: int
    hidden: tuple[int, ...] = (64, 64)

    @property
    def dim(self) -> int:  # type: ignore[override]
        """Length of the vectors."""
        return self.bijection.dim

    @property
    def context_dim(self) -> int:  # type: ignore[override]
        """Length of the context."""
        return self.inputs

    @property
    def _net(self) -> MLP:
        return MLP(self.inputs, (), (*self.hidden, self.bijection.context_dim))

    def init(self, rng: Any) -> dict[str, Any]:
        """Draws the network and the bijection's arrays."""
        own, rest = backend_of_rng(rng).split(rng, 2)
        # No output layer: it would start at zero, as does what reads it, and of two zeros neither would ever move.
        net, inner = {"layers": self._net.init(own)["layers"][:-1]}, self.bijection.init(rest)
        return {"params": {"net": net, "inner": inner["params"]}, "const": {"inner": inner["const"]}}

    def _embed(self, net: Params, context: Array) -> Array:
        """Maps `(*batch, inputs)` to `(*batch, embedding)`."""
        xp, batch = backend_of(context).xp, context.shape[:-1]
        rows = xp.reshape(context, (math.prod(batch), self.inputs))
        units = self._net.hidden_units({"layers": (*net["layers"], None)}, rows.T).T
        return xp.reshape(units, (*batch, self.bijection.context_dim))

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        x, context = broadcast(x, context, self.inputs)
        return self.bijection.forward(params["inner"], x, self._embed(params["net"], context))

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`."""
        y, context = broadcast(y, context, self.inputs)
        return self.bijection.inverse(params["inner"], y, self._embed(params["net"], context))

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """The score of the embedding, pulled back through the network."""
        x, context = broadcast(x, context, self.inputs)
        backend = backend_of(x)
        embedding, pull = backend.vjp(lambda c: self._embed(params["net"], c), context, once=True)
        start = backend.xp.zeros_like(embedding)
        y, log_det, score, from_embedding = self.bijection.forward_with_score(
            params["inner"], x, score, embedding, start
        )
        (from_context,) = pull(from_embedding)
        return y, log_det, score, backend.stop(score_context + from_context)
