"""The contract of a bijection, and the shape handling that all of them share."""

from __future__ import annotations

from typing import Any

import numpy as np

from flowppl import tree
from flowppl.backend import backend_of
from flowppl.config import Configured
from flowppl.errors import DimensionError

Array = Any
Params = Any


class Bijection(Configured):
    """An invertible map of vectors, as a frozen dataclass of hashable configuration; arrays live in `params`.

    `forward` maps base to data, the sampling direction. A new bijection implements `init`, `forward` and `inverse`, and
    `forward_with_score` where it knows a cheaper way than differentiating its inverse.

    Attributes:
        dim: Length of the vectors.
        context_dim: Length of the context, 0 for none.
    """

    dim: int
    context_dim: int = 0

    def init(self, rng: Any) -> dict[str, Any]:
        """Draws `{"params": ..., "const": ...}`: floating leaves that train, and arrays that never do.

        Args:
            rng: A jax key, or a `torch.Generator` (None: torch's global one).
        """
        raise NotImplementedError

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """Maps x `(*batch, dim)` to y `(*batch, dim)`, and log |det dy/dx| `(*batch,)`.

        Args:
            params: The trainable and the constant arrays of `init` in one tree, as `bind` joins them.
            x: Points `(*batch, dim)`.
            context: `(*batch, context_dim)` or None; batches broadcast.
        """
        raise NotImplementedError

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """Maps y back to x, and log |det dx/dy|."""
        raise NotImplementedError

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """Carries the score of the density along with the point.

        With x ~ q and y = T(x; c) this returns y, log |det dy/dx|, the score g' = d log q'(y | c) / dy of the new density and
        its derivative with respect to the context:

            g' = J^-T (g - d log|det J| / dx),    s'_c = s_c - (dT/dc)^T g' - d log|det J| / dc

        y and the log-determinant stay attached to the parameters; no derivative flows through the scores. The default pulls
        back through the inverse. Vaitl et al. 2024, "Fast and unified path gradient estimators for normalizing flows".
        """
        y, log_det = self.forward(params, x, context)
        return y, log_det, *pull_through_inverse(self.inverse, params, y, score, context, score_context)


def pull_through_inverse(
    inverse: Any, params: Params, y: Array, score: Array, context: Array | None, score_context: Any
) -> tuple[Array, Array | None]:
    """Returns the scores at y by one pullback through `inverse(params, y, context)`."""
    backend = backend_of(y)
    params, y, score = backend.stop(params), backend.stop(y), backend.stop(score)
    if context is None:
        (_, log_det), pull = backend.vjp(lambda y: inverse(params, y, None), y, once=True)
        (score,) = pull((score, backend.xp.ones_like(log_det)))
        return backend.stop(score), None
    (_, log_det), pull = backend.vjp(lambda y, c: inverse(params, y, c), y, backend.stop(context), once=True)
    score, from_context = pull((score, backend.xp.ones_like(log_det)))
    return backend.stop(score), backend.stop(score_context + from_context)


def score_of_context(forward: Any, params: Params, x: Array, context: Array, score: Array, score_context: Any) -> Array:
    """s_c - (dT/dc)^T g' - d log|det J| / dc, by one pullback through `forward(params, x, context)`, with g' the new score."""
    backend = backend_of(x)
    params, x = backend.stop(params), backend.stop(x)
    (_, log_det), pull = backend.vjp(lambda c: forward(params, x, c), backend.stop(context), once=True)
    return backend.stop(score_context - pull((score, backend.xp.ones_like(log_det)))[0])


def bind(variables: dict[str, Any]) -> Params:
    """Joins what `init` returned into the one tree that the maps take; no derivative reaches the constants."""
    const = variables["const"]
    leaves = tree.leaves(const)
    return merge(variables["params"], backend_of(*leaves).stop(const) if leaves else const)


def merge(a: Any, b: Any) -> Any:
    """Joins two trees whose leaves have different names."""
    if isinstance(a, dict) and isinstance(b, dict):
        return {k: merge(a[k], b[k]) if k in a and k in b else a.get(k, b.get(k)) for k in {**a, **b}}
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return tuple(merge(x, y) for x, y in zip(a, b, strict=True))
    raise TypeError("init gives one name to a trained and to a constant array")


def broadcast(x: Array, context: Array | None, context_dim: int) -> tuple[Array, Array | None]:
    """Gives x and context one batch shape; a bijection without a context ignores the one it is given.

    Raises:
        DimensionError: the context is missing or has another length.
    """
    if not context_dim:
        return x, None
    if context is None or context.shape[-1] != context_dim:
        got = "none" if context is None else f"shape {tuple(context.shape)}"
        raise DimensionError(f"context: expected shape (*batch, {context_dim}), got {got}")
    if x.shape[:-1] == context.shape[:-1]:
        return x, context
    xp = backend_of(x, context).xp
    batch = np.broadcast_shapes(tuple(x.shape[:-1]), tuple(context.shape[:-1]))
    return xp.broadcast_to(x, (*batch, x.shape[-1])), xp.broadcast_to(context, (*batch, context_dim))


def join(x: Array, context: Array | None) -> Array:
    """The input of a conditioner: x and, where there is one, the context behind it."""
    return x if context is None else backend_of(x).xp.concat([x, context], axis=-1)


def pick(x: Array, order: tuple[int, ...]) -> Array:
    """The coordinates x[..., order], for an order known in advance: by slices of its runs, without an index array."""
    starts = [i for i in range(len(order)) if i == 0 or order[i] != order[i - 1] + 1]
    runs = [(order[i], order[j - 1] + 1) for i, j in zip(starts, [*starts[1:], len(order)], strict=False)]
    pieces = [x[..., a:b] for a, b in runs]
    return backend_of(x).xp.concat(pieces, axis=-1) if pieces else x[..., :0]
