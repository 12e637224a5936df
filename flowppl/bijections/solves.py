"""Iterative solves under observation: how many steps each took and what was left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from flowppl.backend import backend_of

Array = Any


class Solve(NamedTuple):
    """One iterative solve of a batch."""

    method: str  # what was iterated
    steps: int  # of the slowest number of the batch
    residual: float  # the largest last change, relative: |change| / (1 + |x|)
    unsolved: int  # how many numbers did not get down to the tolerance, or are not finite


_WATCHERS: list[list[Solve]] = []


@contextmanager
def watch_solves() -> Iterator[list[Solve]]:
    """Collects a `Solve` for every iterative solve inside the block, which costs each solve once more.

    For eager code: inside `jit` or `vmap` there are no numbers to collect, and the framework says so.

    Example:
        >>> import numpy as np
        >>> from flowppl.bijections import Planar, bind, watch_solves
        >>> params = bind(Planar(2).init(np.random.default_rng(0)))
        >>> with watch_solves() as solves:
        ...     _ = Planar(2).inverse(params, np.ones((5, 2)))
        >>> [(solve.method, solve.unsolved) for solve in solves]
        [('root', 0)]
    """
    collected: list[Solve] = []
    _WATCHERS.append(collected)
    try:
        yield collected
    finally:
        _WATCHERS[:] = [c for c in _WATCHERS if c is not collected]


@contextmanager
def _unwatched() -> Iterator[None]:
    watchers, _WATCHERS[:] = _WATCHERS[:], []
    try:
        yield
    finally:
        _WATCHERS[:] = watchers


def fixed_point(
    step: Callable[[Any, Array], Array], args: Any, x: Array, *, max_steps: int, tol: float, method: str = "fixed point"
) -> Array:
    """Solves x = step(args, x) by iteration from x, with implicit derivatives of any order.

    Args:
        step: One sweep; all that needs derivatives comes in through `args`.
        args: A tree of arrays.
        x: The start.
        max_steps: The most sweeps, of the iteration and of the linear one behind each derivative.
        tol: The sweeps end when no number changes by more than tol (1 + |x|).
        method: The name for those who watch.
    """
    backend = backend_of(x)
    x = iterate(lambda x: step(args, x), x, max_steps=max_steps, tol=tol, method=method)
    return backend.implicit(step, args, x, max_steps=max_steps, tol=tol)


def iterate(
    sweep: Callable[[Array], Array], x: Array, *, max_steps: int, tol: float, method: str, exact: bool = False
) -> Array:
    """The same without derivatives; `exact` says that the last one of `max_steps` sweeps is, whatever it changes."""
    backend = backend_of(x)
    xp = backend.xp
    watch(method, sweep, x, max_steps=max_steps, tol=tol, exact=exact)

    def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
        new = sweep(state[0])
        return new, xp.any(xp.abs(new - state[0]) > tol * (1 + xp.abs(new)))

    def loop() -> Array:
        start = x, xp.any(x == x)  # an empty batch is solved
        return backend.stop(backend.while_loop(lambda state: state[1], body, start, max_steps=max_steps)[0])

    if not _WATCHERS:
        return loop()
    with _unwatched():  # what a sweep solves has been seen, and a loop may be traced
        return loop()


def watch(
    method: str,
    step: Callable,
    start: Any,
    *,
    max_steps: int,
    tol: float,
    first: Callable = lambda x: x,
    exact: bool = False,
) -> None:
    """Where somebody watches, runs state = step(state) as the solver does and counts.

    Args:
        method: The solver's name.
        step: One step of it.
        start: The first state.
        max_steps: The most steps.
        tol: A number is solved once a step changes it by no more than tol (1 + |x|).
        first: Picks x from the state.
        exact: Whether the last one of `max_steps` steps is, whatever it changes: finite numbers are then solved.
    """
    if not _WATCHERS:
        return
    change: Any = None
    state, steps = start, 0
    while steps < max_steps:
        new = backend_of(start).stop(step(state))
        x, last = first(new), first(state)
        backend = backend_of(x)
        change = backend.to_numpy(backend.xp.abs(x - last) / (1 + backend.xp.abs(x)))
        state, steps = new, steps + 1
        if not (change > tol).any():
            break
    limit = sys.float_info.max if exact and steps == max_steps else tol
    unsolved = int((~(change <= limit)).sum()) if steps else 0
    worst = float(change.max()) if steps and change.size else 0.0
    for collected in _WATCHERS:
        collected.append(Solve(method, steps, worst, unsolved))
