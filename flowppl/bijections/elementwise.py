"""Transformers: monotone maps of single numbers, and the bijection that applies one to each coordinate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.base import Array, Bijection, Params, broadcast
from flowppl.config import Configured
from flowppl.networks import MLP


class Transformer(Configured):
    """An increasing map of the line with `num_params` parameters; the identity where they are all zero.

    Parameters lead: `theta` is `(num_params, *shape)` and broadcasts with x `(*shape,)`.
    """

    @property
    def num_params(self) -> int:
        """The number of parameters of one map."""
        raise NotImplementedError

    def forward(self, theta: Array, x: Array) -> tuple[Array, Array]:
        """Returns y and log dy/dx."""
        raise NotImplementedError

    def inverse(self, theta: Array, y: Array) -> tuple[Array, Array]:
        """Returns x and log dx/dy."""
        raise NotImplementedError

    def forward_with_curvature(self, theta: Array, x: Array) -> tuple[Array, Array, Array]:
        """Returns y, log dy/dx and, without derivatives of its own, d/dx log dy/dx.

        The default differentiates; a closed form is cheaper.
        """
        backend = backend_of(x)
        (y, log_slope), pull = backend.vjp(lambda x: self.forward(theta, x), x, once=True)
        ones = backend.xp.ones_like(log_slope)
        (curvature,) = pull((0 * ones, ones))
        return y, log_slope, backend.stop(curvature)


@dataclass(frozen=True)
class Composed(Transformer):
    """One transformer after another, with parameters of their own.

    Attributes:
        first: What x meets first.
        second: What acts on its result.
    """

    first: Transformer
    second: Transformer

    @property
    def num_params(self) -> int:
        """Those of both."""
        return self.first.num_params + self.second.num_params

    def forward(self, theta: Array, x: Array) -> tuple[Array, Array]:
        """See `Transformer.forward`."""
        n = self.first.num_params
        middle, first = self.first.forward(theta[:n], x)
        y, second = self.second.forward(theta[n:], middle)
        return y, first + second

    def inverse(self, theta: Array, y: Array) -> tuple[Array, Array]:
        """See `Transformer.inverse`."""
        n = self.first.num_params
        middle, second = self.second.inverse(theta[n:], y)
        x, first = self.first.inverse(theta[:n], middle)
        return x, first + second

    def forward_with_curvature(self, theta: Array, x: Array) -> tuple[Array, Array, Array]:
        """Curvatures add up, the second one in units of x."""
        n = self.first.num_params
        middle, first, curvature = self.first.forward_with_curvature(theta[:n], x)
        y, second, outer = self.second.forward_with_curvature(theta[n:], middle)
        backend = backend_of(x)
        return y, first + second, curvature + outer * backend.xp.exp(backend.stop(first))


def event_first(x: Array) -> Array:
    """`(*batch, dim)` to `(dim, *batch)`, the layout of transformers: loops run along the batch."""
    # not moveaxis, for which torch's vmap has no rule
    return backend_of(x).xp.permute_dims(x, (x.ndim - 1, *range(x.ndim - 1)))


def event_last(x: Array) -> Array:
    """The inverse of `event_first`."""
    return backend_of(x).xp.permute_dims(x, (*range(1, x.ndim), 0))


@dataclass(frozen=True)
class Elementwise(Bijection):
    """Applies a transformer to each coordinate, with parameters of its own or, given a context, from a network.

    Attributes:
        dim: Length of the vectors.
        transformer: The monotone map.
        context_dim: Length of the context; 0 makes the parameters plain arrays.
        hidden: Widths of the network's hidden layers.
    """

    dim: int
    transformer: Transformer
    context_dim: int = 0
    hidden: tuple[int, ...] = (64, 64)

    @property
    def _net(self) -> MLP:
        return MLP(self.context_dim, (self.transformer.num_params, self.dim), self.hidden)

    def init(self, rng: Any) -> dict[str, Any]:
        """Starts as the identity."""
        if self.context_dim:
            return {"params": {"net": self._net.init(rng)}, "const": {}}
        theta = backend_of_rng(rng).xp.zeros((self.transformer.num_params, self.dim))
        return {"params": {"theta": theta}, "const": {}}

    def _theta(self, params: Params, x: Array, context: Array | None) -> Array:
        if context is not None:
            return self._net(params["net"], context)
        theta = params["theta"]
        return backend_of(x).xp.reshape(theta, (*theta.shape, *(1 for _ in x.shape[:-1])))

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        x, context = broadcast(x, context, self.context_dim)
        y, log_slope = self.transformer.forward(self._theta(params, x, context), event_first(x))
        return event_last(y), backend_of(x).xp.sum(log_slope, axis=0)

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`."""
        y, context = broadcast(y, context, self.context_dim)
        x, log_slope = self.transformer.inverse(self._theta(params, y, context), event_first(y))
        return event_last(x), backend_of(y).xp.sum(log_slope, axis=0)

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """g' = (g - d log tau'/dx) / tau', and for the context one pullback through the network."""
        x, own_context = broadcast(x, context, self.context_dim)
        xp = backend_of(x).xp
        y, log_slope, score, from_context = transform_with_score(
            self.transformer, lambda c: self._theta(params, x, c), own_context, event_first(x), event_first(score)
        )
        if own_context is not None:
            score_context = score_context - from_context
        return event_last(y), xp.sum(log_slope, axis=0), event_last(score), score_context


def transform_with_score(
    transformer: Transformer, theta_of: Any, inputs: Array | None, x: Array, score: Array
) -> tuple[Array, Array, Array, Any]:
    """One transformer step y = tau(x; theta(inputs)) that carries the score through a single pullback.

    Returns:
        y and log tau', attached; the score at y, g' = (g - d log tau'/dx) / tau'; and what the inputs' score loses, the
        pullback of (g', 1) from (tau, log tau') to the inputs (None without inputs).
    """
    backend = backend_of(x)
    xp = backend.xp

    def tau(inputs: Array | None) -> tuple[tuple[Array, Array], Array]:
        y, log_slope, curvature = transformer.forward_with_curvature(theta_of(inputs), x)
        return (y, log_slope), curvature

    if inputs is None:
        (y, log_slope), curvature = tau(None)
    else:
        (y, log_slope), pull, curvature = backend.vjp(tau, inputs, has_aux=True, once=True)
    score = backend.stop((score - curvature) * xp.exp(-log_slope))
    if inputs is None:
        return y, log_slope, score, None
    (from_inputs,) = pull((score, xp.ones_like(score)))
    return y, log_slope, score, backend.stop(from_inputs)
