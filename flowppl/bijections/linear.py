"""Linear maps: LU-factorised and permutations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.base import Array, Bijection, Params


@dataclass(frozen=True)
class LULinear(Bijection):
    """y = L U x + b, with L unit lower and U upper triangular with a positive diagonal.

    Log-determinant and inverse cost no more than the product. One matrix holds both factors: L below the diagonal, U above it, and
    the logarithm of U's diagonal on it. A mean and a Cholesky factor are one choice of the parameters: see `from_cholesky`.
    Oliva et al. 2018, "Transformation autoregressive networks", section 3.2.

    Attributes:
        dim: Length of the vectors.
    """

    dim: int
    context_dim: int = 0

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
        eye = xp.tril(xp.triu(xp.ones_like(scale_tril)))
        return {"lu": xp.tril(scale_tril / diagonal, k=-1) + eye * xp.log(diagonal), "bias": loc}

    def _factors(self, params: Params) -> tuple[Array, Array, Array]:
        lu = params["lu"]
        backend = backend_of(lu)
        xp = backend.xp
        eye = xp.tril(xp.triu(xp.ones_like(lu)))  # on lu's device, under tracing too
        log_diagonal = lu * eye
        return xp.tril(lu, k=-1) + eye, xp.triu(lu, k=1) + eye * xp.exp(log_diagonal), xp.sum(log_diagonal)

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        lower, upper, log_det = self._factors(params)
        return x @ (lower @ upper).T + params["bias"], log_det + backend_of(x).xp.zeros_like(x[..., 0])

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`: two triangular solves."""
        lower, upper, log_det = self._factors(params)
        return self._solve(lower, upper, y - params["bias"]), -log_det + backend_of(y).xp.zeros_like(y[..., 0])

    def _solve(self, lower: Array, upper: Array, y: Array, transpose: bool = False) -> Array:
        solve = backend_of(y).solve_triangular
        first, second = ((lower, True), (upper, False)) if not transpose else ((upper, False), (lower, True))
        for factor, is_lower in (first, second):
            y = solve(factor, y[..., None], lower=is_lower, transpose=transpose, unit=is_lower)[..., 0]
        return y

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """g' = (L U)^-T g."""
        y, log_det = self.forward(params, x)
        backend = backend_of(x)
        lower, upper, _ = self._factors(backend.stop(params))
        return y, log_det, self._solve(lower, upper, backend.stop(score), transpose=True), score_context


@dataclass(frozen=True)
class Permutation(Bijection):
    """y_i = x_{indices[i]} with drawn indices; they are a constant array, so that stacked layers may differ.

    Attributes:
        dim: Length of the vectors.
    """

    dim: int
    context_dim: int = 0

    def init(self, rng: Any) -> dict[str, Any]:
        """Draws the permutation."""
        return {"params": {}, "const": {"indices": backend_of_rng(rng).permutation(rng, self.dim)}}

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        return _take(x, params["indices"])

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`."""
        return _take(y, backend_of(y).xp.argsort(params["indices"]))

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """The score is permuted like the point."""
        return *_take(x, params["indices"]), _take(score, params["indices"])[0], score_context


@dataclass(frozen=True)
class Rotation(Bijection):
    """y_i = x_{(i + shift) mod dim}: the permutation that hands roles on between couplings, without an index array.

    Attributes:
        dim: Length of the vectors.
        shift: How far.
    """

    dim: int
    shift: int
    context_dim: int = 0

    def init(self, rng: Any) -> dict[str, Any]:
        """Nothing to draw."""
        return {"params": {}, "const": {}}

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        xp = backend_of(x).xp
        return xp.roll(x, -self.shift, axis=-1), xp.zeros_like(x[..., 0])

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`."""
        xp = backend_of(y).xp
        return xp.roll(y, self.shift, axis=-1), xp.zeros_like(y[..., 0])

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """The score is rotated like the point."""
        return *self.forward(params, x), self.forward(params, score)[0], score_context


def _take(x: Array, indices: Array) -> tuple[Array, Array]:
    xp = backend_of(x).xp
    return xp.take(x, indices, axis=-1), xp.zeros_like(x[..., 0])
