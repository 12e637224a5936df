"""Sylvester flows: planar flows of higher rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.affine import soft_clip
from flowppl.bijections.base import Array, Bijection, Params, broadcast, score_of_context
from flowppl.bijections.elementwise import event_first, event_last
from flowppl.bijections.householder import householder
from flowppl.bijections.linear import identity_like
from flowppl.bijections.planar import bounded_dot, solve_ridge
from flowppl.errors import DimensionError
from flowppl.networks import MLP

_LOG_RANGE = math.log(1e3)  # of the inner diagonal
_DEFAULT_RANK = 8  # at most: the inverse solves one coordinate of the subspace after the other


class _Parts(NamedTuple):
    basis: Array  # Q, (dim, rank)
    outer: Array  # R, (*batch, rank, rank), upper triangular
    inner: Array  # R~, the same
    diagonal: Array  # r~_ii, (*batch, rank)
    dot: Array  # r_ii r~_ii, the same
    bias: Array  # the same


@dataclass(frozen=True)
class Sylvester(Bijection):
    """y = x + Q R tanh(R~ Q^T x + b), with orthonormal columns of Q and upper triangular R and R~, r_ii r~_ii > -1 + 1e-3.

    Van den Berg et al. 2018, "Sylvester normalizing flows for variational inference", section 3, with Householder vectors for Q.
    The inverse solves for Q^T x from the last coordinate to the first, in each an equation as the planar flow's. The inner
    diagonal is positive: a change of its sign and of those of R and b would cancel.

    Attributes:
        dim: Length of the vectors.
        rank: How many columns Q has; None for dim, at most 8.
        context_dim: Length of the context; given one, a network chooses R, R~ and b.
        hidden: Widths of that network's hidden layers.
    """

    dim: int
    rank: int | None = None
    context_dim: int = 0
    hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        if self.rank is not None and not 1 <= self.rank <= self.dim:
            raise DimensionError(f"rank: expected None or a number from 1 to {self.dim}, got {self.rank}")

    @property
    def _rank(self) -> int:
        return min(self.dim, _DEFAULT_RANK) if self.rank is None else self.rank

    @property
    def _net(self) -> MLP:
        return MLP(self.context_dim, (self._rank * (self._rank + 2),), self.hidden)

    def init(self, rng: Any) -> dict[str, Any]:
        """Starts as the identity: R is zero, R~ one, Q random."""
        backend = backend_of_rng(rng)
        m = self._rank
        q_key, net_key = backend.split(rng, 2)
        params = {"vectors": backend.normal(q_key, (m, self.dim))}
        params |= {"factors": backend.xp.zeros((m, m + 1)), "bias": backend.xp.zeros((m,))}
        if self.context_dim:
            params["net"] = self._net.init(net_key)
        return {"params": params, "const": {}}

    def _unpack(self, params: Params, context: Array | None) -> _Parts:
        """One matrix holds both triangles: r_ii r~_ii (raw) and R to the right of the diagonal, log r~_ii and R~^T from it down."""
        packed, bias, m = params["factors"], params["bias"], self._rank
        xp = backend_of(packed).xp
        if context is not None:
            delta = event_last(self._net(params["net"], context))
            packed = packed + xp.reshape(delta[..., m:], (*delta.shape[:-1], m, m + 1))
            bias = bias + delta[..., :m]
        right, left = packed[..., 1:], packed[..., :-1]
        eye = identity_like(right)
        dot = bounded_dot(xp.sum(right * eye, axis=-1))
        diagonal = xp.exp(soft_clip(xp.sum(left * eye, axis=-1), _LOG_RANGE))
        outer = xp.triu(right, k=1) + eye * (dot / diagonal)[..., None]
        inner = xp.matrix_transpose(xp.tril(left, k=-1)) + eye * diagonal[..., None]
        return _Parts(householder(params["vectors"], m), outer, inner, diagonal, dot, bias)

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        x, context = broadcast(x, context, self.context_dim)
        parts = self._unpack(params, context)
        h = _tanh(parts, x)
        return x + _times(parts.outer, h) @ parts.basis.T, _log_det(parts, h)

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`."""
        backend = backend_of(y)
        xp = backend.xp
        y, context = broadcast(y, context, self.context_dim)
        parts = self._unpack(params, context)

        def body(carry: tuple[Array, Array], row: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
            v, h = carry  # zero from the first coordinate up to this one
            here, outer, inner, diagonal, dot, bias, target = row
            after = xp.sum(inner * v, axis=-1) + bias
            rest = target - xp.sum(outer * h, axis=-1)
            new = xp.tanh(solve_ridge(dot, diagonal * rest + after))
            return (v + here * (rest - dot / diagonal * new)[..., None], h + here * new[..., None]), None

        target = y @ parts.basis
        per_row = (parts.diagonal, parts.dot, parts.bias, target)
        eye = identity_like(parts.basis.T @ parts.basis)
        rows = (eye, _rows_first(parts.outer), _rows_first(parts.inner), *(event_first(a) for a in per_row))
        start = (xp.zeros_like(target), xp.zeros_like(target))
        (_, h), _ = backend.scan(body, start, rows, reverse=True)
        return y - _times(parts.outer, h) @ parts.basis.T, -_log_det(parts, h)

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """J acts as M = I + R diag(h') R~ on the span of Q and as the identity across: J^-T g = g + Q (M^-T - I) Q^T g."""
        backend = backend_of(x)
        xp = backend.xp
        x, own_context = broadcast(x, context, self.context_dim)
        y, log_det = self.forward(params, x, own_context)
        parts = self._unpack(backend.stop(params), own_context)
        h = _tanh(parts, x)
        slope = 1 - h * h
        along = score @ parts.basis
        curvature = -2 * parts.dot * h * slope / (1 + parts.dot * slope)
        rest = along - _times(xp.matrix_transpose(parts.inner), curvature)
        matrix = identity_like(parts.outer) + parts.outer @ (slope[..., None] * parts.inner)
        solved = backend.solve_triangular(matrix, rest[..., None], lower=False, transpose=True)[..., 0]
        score = backend.stop(score + (solved - along) @ parts.basis.T)
        if own_context is not None:
            score_context = score_of_context(self.forward, params, x, own_context, score, score_context)
        return y, log_det, score, score_context


def _tanh(parts: _Parts, x: Array) -> Array:
    return backend_of(x).xp.tanh(_times(parts.inner, x @ parts.basis) + parts.bias)


def _log_det(parts: _Parts, h: Array) -> Array:
    xp = backend_of(h).xp
    return xp.sum(xp.log1p(parts.dot * (1 - h * h)), axis=-1)


def _times(matrix: Array, v: Array) -> Array:
    """A v for A `(*batch or none, n, n)` and v `(*batch, n)`."""
    return (matrix @ v[..., None])[..., 0]


def _rows_first(a: Array) -> Array:
    return backend_of(a).xp.permute_dims(a, (a.ndim - 2, *range(a.ndim - 2), a.ndim - 1))
