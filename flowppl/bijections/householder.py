"""Rotations as products of Householder reflections, and the linear map made of one and a triangular matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.base import Array, Params
from flowppl.bijections.linear import Factor, FactoredLinear, exp_diagonal, identity_like
from flowppl.errors import DimensionError


def householder(vectors: Array, columns: int | None = None) -> Array:
    """H_1 H_2 ... H_n with H_i = I - 2 v_i v_i^T / |v_i|^2: orthogonal, whatever the vectors.

    A vector that is zero counts as (1, ..., 1). With unit vectors in the rows of V the product is I - V^T T V, where T^-1 has
    1/2 on its diagonal and the upper triangle of V V^T above it. Joffrain et al. 2006, "Accumulating Householder
    transformations, revisited".

    Args:
        vectors: `(n, dim)`.
        columns: How many columns of the product, the first ones, to return; None for all.

    Returns:
        `(dim, columns)`.
    """
    backend = backend_of(vectors)
    xp = backend.xp
    size = backend.stop(xp.max(xp.abs(vectors), axis=-1, keepdims=True))  # only the direction matters
    known = size > xp.finfo(vectors.dtype).tiny ** 0.5
    v = xp.where(known, vectors / xp.where(known, size, xp.ones_like(size)), xp.ones_like(vectors))
    v = v / xp.sqrt(xp.sum(v * v, axis=-1, keepdims=True))
    gram = v @ v.T
    first = v[:, :columns]
    t_first = backend.solve_triangular(xp.triu(gram, k=1) + identity_like(gram) / 2, first, lower=False)
    update = v.T @ t_first
    return identity_like(update) - update


def _draw(rng: Any, reflections: int, dim: int) -> Array:
    """Vectors in equal pairs, whose reflections cancel: the identity, with gradients that are neither zero nor symmetric."""
    backend = backend_of_rng(rng)
    half = backend.normal(rng, (reflections // 2, dim))
    return backend.xp.reshape(backend.xp.stack([half, half], axis=1), (reflections, dim))


class _Reflecting(FactoredLinear):
    reflections: int | None

    def __post_init__(self) -> None:
        if self.reflections is not None and (self.reflections < 2 or self.reflections % 2):
            raise DimensionError(f"reflections: expected None or an even number from 2 on, got {self.reflections}")

    @property
    def _count(self) -> int:
        # No rotation needs more: an odd dimension leaves it an axis.
        return max(2, self.dim - self.dim % 2) if self.reflections is None else self.reflections


@dataclass(frozen=True)
class Householder(_Reflecting):
    """y = Q x, a product of an even number of reflections: volume is kept, and the score turns with the point.

    Tomczak and Welling 2016, "Improving variational auto-encoders using Householder flow".

    Attributes:
        dim: Length of the vectors.
        reflections: How many, an even number; None for as many as reach every rotation: dim, or dim - 1 where that is odd.
    """

    dim: int
    reflections: int | None = None
    context_dim: int = 0

    def init(self, rng: Any) -> dict[str, Any]:
        """Starts as the identity."""
        return {"params": {"vectors": _draw(rng, self._count, self.dim)}, "const": {}}

    def factors(self, params: Params) -> tuple[tuple[Factor, ...], Array]:
        """Q alone; its log-determinant is zero."""
        return (Factor(householder(params["vectors"]), "orthogonal"),), 0.0


@dataclass(frozen=True)
class QRLinear(_Reflecting):
    """y = Q R x + b, a product of reflections and an upper triangular matrix with a positive diagonal.

    Every matrix of positive determinant, at a condition number that R's alone decides. Hoogeboom et al. 2019, "Emerging
    convolutions for generative normalizing flows".

    Attributes:
        dim: Length of the vectors.
        reflections: How many, an even number; None for as many as reach every rotation: dim, or dim - 1 where that is odd.
    """

    dim: int
    reflections: int | None = None
    context_dim: int = 0

    def init(self, rng: Any) -> dict[str, Any]:
        """Starts as the identity."""
        xp, d = backend_of_rng(rng).xp, self.dim
        params = {"vectors": _draw(rng, self._count, d), "upper": xp.zeros((d, d)), "bias": xp.zeros((d,))}
        return {"params": params, "const": {}}

    def factors(self, params: Params) -> tuple[tuple[Factor, ...], Array]:
        """Q and R; one matrix holds R above the diagonal and the logarithm of R's diagonal on it."""
        _, diagonal, log_det = exp_diagonal(params["upper"])
        upper = backend_of(diagonal).xp.triu(params["upper"], k=1) + diagonal
        return (Factor(householder(params["vectors"]), "orthogonal"), Factor(upper, "upper")), log_det
