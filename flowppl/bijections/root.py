"""Root finding with exact derivatives: a bracketed solve that is not differentiated, then two Newton steps that are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowppl.backend import backend_of
from flowppl.bijections.solves import watch

Array = Any
MAX_STEPS = 60  # halving alone reaches float64 from a bracket of width 1e2


def solve_increasing(f: Callable[[Array], tuple[Array, Array]], target: Array, lower: Array, upper: Array) -> Array:
    """Solves f(x) = target, element by element, for increasing f.

    The bracketed search runs under `stop`: Newton's method, and a halving of the bracket where a step leaves it or is not at most
    half as long as the step before (along an exponential Newton's method creeps). The two Newton steps after it change the value
    by rounding only and give the solution its first and second derivatives with respect to everything that f closes over and
    to the target: each attached step makes one more derivative exact.

    Args:
        f: Maps x to (value, slope), both attached to f's parameters; the slope is positive.
        target: The values to reach.
        lower: Points with f(lower) <= target.
        upper: Points with f(upper) >= target.
    """
    backend = backend_of(target)
    xp = backend.xp
    goal = backend.stop(target)

    def narrow(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        x, low, high, last = state
        value, slope = f(x)
        error = value - goal
        low, high = xp.where(error <= 0, x, low), xp.where(error >= 0, x, high)
        newton, middle = x - error / slope, (low + high) / 2
        converging = (newton > low) & (newton < high) & (2 * xp.abs(newton - x) <= last)
        new = xp.where(converging, newton, middle)
        return new, low, high, xp.abs(new - x)

    def unfinished(state: tuple[Array, Array, Array, Array]) -> Array:
        x, low, high, _ = state
        value, slope = f(x)
        tolerance = 8 * xp.finfo(x.dtype).eps * (1 + xp.abs(x))
        return xp.any((xp.abs(value - goal) > tolerance * slope) & (high - low > tolerance))

    low, high = backend.stop(lower), backend.stop(upper)
    start = ((low + high) / 2, low, high, high - low)
    watch("root", narrow, start, max_steps=MAX_STEPS, tol=8 * xp.finfo(target.dtype).eps, first=lambda s: s[0])
    x = backend.stop(backend.while_loop(unfinished, narrow, start, max_steps=MAX_STEPS)[0])
    for _ in range(2):
        value, slope = f(x)
        x = x - (value - target) / slope
    return x
