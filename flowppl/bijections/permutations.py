"""Permutations of the coordinates: drawn ones, rotations and the reversal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.base import Array, Bijection, Params


class _Reordering(Bijection):
    """A map that only moves coordinates: the volume stays, and the score moves like the point."""

    def init(self, rng: Any) -> dict[str, Any]:
        """Nothing to draw."""
        return {"params": {}, "const": {}}

    def _move(self, params: Params, x: Array) -> Array:
        raise NotImplementedError

    def _move_back(self, params: Params, y: Array) -> Array:
        raise NotImplementedError

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        return self._move(params, x), backend_of(x).xp.zeros_like(x[..., 0])

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`."""
        return self._move_back(params, y), backend_of(y).xp.zeros_like(y[..., 0])

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """The score moves like the point."""
        return *self.forward(params, x), self._move(params, score), score_context


@dataclass(frozen=True)
class Permutation(_Reordering):
    """y_i = x_{indices[i]} with drawn indices; they are a constant array, so that stacked layers may differ.

    Attributes:
        dim: Length of the vectors.
    """

    dim: int
    context_dim: int = 0

    def init(self, rng: Any) -> dict[str, Any]:
        """Draws the permutation."""
        return {"params": {}, "const": {"indices": backend_of_rng(rng).permutation(rng, self.dim)}}

    def _move(self, params: Params, x: Array) -> Array:
        return backend_of(x).xp.take(x, params["indices"], axis=-1)

    def _move_back(self, params: Params, y: Array) -> Array:
        xp = backend_of(y).xp
        return xp.take(y, xp.argsort(params["indices"]), axis=-1)


@dataclass(frozen=True)
class Rotation(_Reordering):
    """y_i = x_{(i + shift) mod dim}: the permutation that hands roles on between couplings, without an index array.

    Attributes:
        dim: Length of the vectors.
        shift: How far.
    """

    dim: int
    shift: int
    context_dim: int = 0

    def _move(self, params: Params, x: Array) -> Array:
        return backend_of(x).xp.roll(x, -self.shift, axis=-1)

    def _move_back(self, params: Params, y: Array) -> Array:
        return backend_of(y).xp.roll(y, self.shift, axis=-1)


@dataclass(frozen=True)
class Reversal(_Reordering):
    """y_i = x_{dim - 1 - i}: the permutation between two autoregressive maps.

    Attributes:
        dim: Length of the vectors.
    """

    dim: int
    context_dim: int = 0

    def _move(self, params: Params, x: Array) -> Array:
        return backend_of(x).xp.flip(x, axis=-1)

    def _move_back(self, params: Params, y: Array) -> Array:
        return self._move(params, y)
