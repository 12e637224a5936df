"""Linear maps as products of factors that are easily solved."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.affine import soft_clip
from flowppl.bijections.base import Array, Bijection, Params
from flowppl.errors import DimensionError

_MAX_SKEW = 100.0  # of a skew-symmetric matrix: half-turns stay 1.2 degrees away, and the solve accurate in float32


class Factor(NamedTuple):
    """A square matrix of a kind whose systems of equations are easily solved."""

    matrix: Array
    kind: str  # "lower", "unit lower" (ones on the diagonal), "upper" or "orthogonal"

    def solve(self, y: Array, transpose: bool = False) -> Array:
        """A^-1 y, or A^-T y, for y `(*batch, dim)`."""
        if self.kind == "orthogonal":
            return y @ (self.matrix.T if transpose else self.matrix)
        lower, unit = self.kind != "upper", self.kind == "unit lower"
        solve = backend_of(y).solve_triangular
        return solve(self.matrix, y[..., None], lower=lower, transpose=transpose, unit=unit)[..., 0]


class FactoredLinear(Bijection):
    """y = W x + b, with W a product of factors: it is built once a call, and inverse and score solve factor by factor.

    A subclass implements `init` and `factors`. The bias is params["bias"], or zero where there is none.
    """

    def factors(self, params: Params) -> tuple[tuple[Factor, ...], Array]:
        """The factors of W from left to right, and log |det W|."""
        raise NotImplementedError

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        factors, log_det = self.factors(params)
        return _product(factors, params, x), log_det + backend_of(x).xp.zeros_like(x[..., 0])

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`."""
        factors, log_det = self.factors(params)
        x = y - params.get("bias", 0)
        for factor in factors:
            x = factor.solve(x)
        return x, backend_of(y).xp.zeros_like(y[..., 0]) - log_det

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """g' = W^-T g."""
        backend = backend_of(x)
        factors, log_det = self.factors(params)
        score = backend.stop(score)
        for factor in reversed(factors):
            score = factor._replace(matrix=backend.stop(factor.matrix)).solve(score, transpose=True)
        return _product(factors, params, x), log_det + backend.xp.zeros_like(x[..., 0]), score, score_context


def _product(factors: tuple[Factor, ...], params: Params, x: Array) -> Array:
    return x @ functools.reduce(operator.matmul, [f.matrix for f in factors]).T + params.get("bias", 0)


def exp_diagonal(raw: Array) -> tuple[Array, Array, Array]:
    """The identity, the diagonal matrix exp(raw_ii), and the logarithm of its determinant."""
    xp = backend_of(raw).xp
    eye = identity_like(raw)
    return eye, eye * xp.exp(raw * eye), xp.sum(raw * eye)


def identity_like(a: Array) -> Array:
    """Ones on the main diagonal of the last two axes of `a`; on its device, under tracing too."""
    xp = backend_of(a).xp
    return xp.tril(xp.triu(xp.ones_like(a)))


@dataclass(frozen=True)
class LULinear(FactoredLinear):
    """y = L U x + b, with L unit lower and U upper triangular with a positive diagonal.

    Log-determinant and inverse cost no more than the product. One matrix holds both factors: L below the diagonal, U above it, and
    the logarithm of U's diagonal on it. A mean and a Cholesky factor are one choice of the parameters: see `from_cholesky`.
    Oliva et al. 2018, "Transformation autoregressive networks", section 3.2.

    Attributes:
        dim: Length of the vectors.
        light: How many coordinates, the first ones, are computed from themselves alone, so that heavy tails of the others
            do not reach them. Laszkiewicz et al. 2022, "Marginal tail-adaptive normalizing flows".
    """

    dim: int
    context_dim: int = 0
    light: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.light <= self.dim:
            raise DimensionError(f"light: expected a number of coordinates from 0 to {self.dim}, got {self.light}")

    def init(self, rng: Any) -> dict[str, Any]:
        """Starts as the identity."""
        xp = backend_of_rng(rng).xp
        return {"params": {"lu": xp.zeros((self.dim, self.dim)), "bias": xp.zeros((self.dim,))}, "const": {}}

    @staticmethod
    def from_cholesky(loc: Array, scale_tril: Array) -> dict[str, Array]:
        """The parameters for which y = loc + scale_tril x."""
        backend = backend_of(scale_tril)
        xp = backend.xp
        diagonal = xp.linalg.diagonal(scale_tril)
        return {"lu": xp.tril(scale_tril / diagonal, k=-1) + identity_like(scale_tril) * xp.log(diagonal), "bias": loc}

    @staticmethod
    def rescaled(params: Params, loc: Array, scale_tril: Array) -> Params:
        """The parameters of this map followed by x -> loc + scale_tril x."""
        xp = backend_of(scale_tril).xp
        lu, unit = params["lu"], identity_like(scale_tril)
        scale = xp.linalg.diagonal(
            scale_tril
        )  # S L = (S L S_d^-1) S_d with a unit lower triangular matrix in parentheses
        lower = scale_tril @ (xp.tril(lu, k=-1) + unit) / scale
        upper = xp.triu(lu, k=1) * scale[:, None] + unit * (lu + xp.log(scale))
        return {"lu": xp.tril(lower, k=-1) + upper, "bias": loc + scale_tril @ params["bias"]}

    def factors(self, params: Params) -> tuple[tuple[Factor, ...], Array]:
        """L and U."""
        lu = params["lu"]
        backend = backend_of(lu)
        xp = backend.xp
        eye, diagonal, log_det = exp_diagonal(lu)
        above = xp.triu(lu, k=1)
        if self.light:
            light = backend.asarray([float(i < self.light) for i in range(self.dim)], lu)
            above = above * (1 - light[:, None] * (1 - light))
        return (Factor(xp.tril(lu, k=-1) + eye, "unit lower"), Factor(above + diagonal, "upper")), log_det


@dataclass(frozen=True)
class TriangularLinear(FactoredLinear):
    """y = L x + b, with L lower triangular and a positive diagonal: coordinate i is made of the first i.

    The inverse is one triangular solve. One matrix holds L below the diagonal and the logarithm of L's diagonal on it.

    Attributes:
        dim: Length of the vectors.
    """

    dim: int
    context_dim: int = 0

    def init(self, rng: Any) -> dict[str, Any]:
        """Starts as the identity."""
        xp = backend_of_rng(rng).xp
        return {"params": {"lower": xp.zeros((self.dim, self.dim)), "bias": xp.zeros((self.dim,))}, "const": {}}

    def factors(self, params: Params) -> tuple[tuple[Factor, ...], Array]:
        """L alone."""
        _, diagonal, log_det = exp_diagonal(params["lower"])
        return (Factor(backend_of(diagonal).xp.tril(params["lower"], k=-1) + diagonal, "lower"),), log_det


@dataclass(frozen=True)
class Orthogonal(FactoredLinear):
    """y = (I + S)^-1 (I - S) x with a skew-symmetric S, the Cayley transform.

    Any rotation without half-turns has such an S, with dim (dim - 1) / 2 free numbers. Reflections are out of reach, and
    half-turns (eigenvalue -1) are so as limits of large S: `Householder` has all rotations.

    Attributes:
        dim: Length of the vectors.
    """

    dim: int
    context_dim: int = 0

    def init(self, rng: Any) -> dict[str, Any]:
        """Starts as the identity."""
        return {"params": {"skew": backend_of_rng(rng).xp.zeros((self.dim, self.dim))}, "const": {}}

    def factors(self, params: Params) -> tuple[tuple[Factor, ...], Array]:
        """The one orthogonal matrix; its log-determinant is zero."""
        xp = backend_of(params["skew"]).xp
        eye, lower = identity_like(params["skew"]), xp.tril(soft_clip(params["skew"], _MAX_SKEW), k=-1)
        skew = lower - lower.T
        return (Factor(xp.linalg.solve(eye + skew, eye - skew), "orthogonal"),), 0.0
