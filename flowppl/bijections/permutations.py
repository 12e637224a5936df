"""Permutations of the coordinates: drawn ones, rotations and the reversal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.base import Array, Bijection, Params


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


@dataclass(frozen=True)
class Reversal(Bijection):
    """y_i = x_{dim - 1 - i}: the permutation between two autoregressive maps.

    Attributes:
        dim: Length of the vectors.
    """

    dim: int
    context_dim: int = 0

    def init(self, rng: Any) -> dict[str, Any]:
        """Nothing to draw."""
        return {"params": {}, "const": {}}

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        xp = backend_of(x).xp
        return xp.flip(x, axis=-1), xp.zeros_like(x[..., 0])

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`."""
        return self.forward(params, y)

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """The score is reversed like the point."""
        return *self.forward(params, x), self.forward(params, score)[0], score_context


def _take(x: Array, indices: Array) -> tuple[Array, Array]:
    xp = backend_of(x).xp
    return xp.take(x, indices, axis=-1), xp.zeros_like(x[..., 0])
