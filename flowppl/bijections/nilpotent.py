"""The linear equations behind triangular maps, without their matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowppl.backend import backend_of

Array = Any


def nilpotent_solve(off_diagonal: Callable[[Array], Array], diagonal: Array, rest: Array) -> Array:
    """Solves (D + N) u = rest by Jacobi sweeps, without derivatives.

    N is strictly triangular, so sweep i makes one more coordinate exact whatever the others are; the sweeps end as soon as none
    changes, which is far earlier where the dependence is not extreme.

    Args:
        off_diagonal: Maps u `(*batch, dim)` to N u.
        diagonal: That of D, `(*batch, dim)`.
        rest: The right-hand side, `(*batch, dim)`.
    """
    backend = backend_of(rest)
    xp = backend.xp
    tolerance = 16 * xp.finfo(rest.dtype).eps

    def unfinished(state: tuple[Array, Array]) -> Array:
        change, solution = state
        return xp.any(xp.abs(change) > tolerance * (1 + xp.abs(solution)))

    def sweep(state: tuple[Array, Array]) -> tuple[Array, Array]:
        _, solution = state
        new = (rest - off_diagonal(solution)) / diagonal
        return new - solution, new

    first = rest / diagonal
    return backend.stop(backend.while_loop(unfinished, sweep, (first, first), max_steps=rest.shape[-1] - 1)[1])
