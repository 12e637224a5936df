"""Root finding with exact derivatives: a bracketed solve that is not differentiated, then two Newton steps that are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from flowppl.backend import backend_of
from flowppl.bijections.solves import watch

Array = Any
MAX_STEPS = 60  # halving alone reaches float64 from a bracket of width 1e2


def solve_increasing(
    f: Callable[[Array], tuple[Array, Array]],
    target: Array,
    lower: Array | None = None,
    upper: Array | None = None,
) -> Array:
    """Solves f(x) = target, element by element, for increasing f.

    The bracketed search runs under `stop`: Newton's method, and a halving of the bracket where a step leaves it or is not at most
    half as long as the step before (along an exponential Newton's method creeps). The two Newton steps after it change the value
    by rounding only and give the solution its first and second derivatives with respect to everything that f closes over and
    to the target: each attached step makes one more derivative exact.

    An end of the bracket that is not given is found by steps of growing length, 1, 4, 64, 4096 and so on to a quarter of the
    largest number, from the other end or from zero. A target out of the reach of f has no solution, and comes back as NaN: a
    density there is NaN and never a wrong number. Its neighbours in the batch are not affected.

    Args:
        f: Maps x to (value, slope), both attached to f's parameters; the slope is positive.
        target: The values to reach.
        lower: Points with f(lower) <= target, or None where no such points are known.
        upper: Points with f(upper) >= target, or None.
    """
    backend = backend_of(target)
    xp = backend.xp
    goal = backend.stop(target)
    if lower is None or upper is None:
        low, high, harmless = _bracket(f, goal, backend.stop(lower), backend.stop(upper))
    else:
        low, high, harmless = backend.stop(lower), backend.stop(upper), None

    eps = xp.finfo(target.dtype).eps

    def unsolved(x: Array, value: Array, slope: Array, width: Array) -> Array:
        tolerance = 8 * eps * (1 + xp.abs(x))
        # a quotient, for where both overflow it is NaN and the number unsolved; a bracket of NaN has nothing to solve
        close = (xp.abs(value - goal) - 2 * eps * xp.abs(goal)) / slope <= tolerance
        return ~close & (width > tolerance)

    def narrow(state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, low, high, last, _ = state
        value, slope = f(x)
        error = value - goal
        low, high = xp.where(error <= 0, x, low), xp.where(error >= 0, x, high)
        newton, middle = x - error / slope, (low + high) / 2
        converging = (newton > low) & (newton < high) & (2 * xp.abs(newton - x) <= last)
        # a solved number stays: rounding does not halve its steps, and halving its bracket would lead it away
        go = unsolved(x, value, slope, high - low)
        new = xp.where(go, xp.where(converging, newton, middle), x)
        return new, low, high, xp.abs(new - x), go

    start = ((low + high) / 2, low, high, high - low, high >= low)
    watch("root", narrow, start, max_steps=MAX_STEPS, tol=8 * xp.finfo(target.dtype).eps, first=lambda s: s[0])
    x = backend.stop(backend.while_loop(lambda state: xp.any(state[-1]), narrow, start, max_steps=MAX_STEPS)[0])
    missed = None
    if harmless is not None:
        # What is thrown away must have finite derivatives: there the attached steps solve for a value that f has.
        missed = xp.isnan(low)
        x, target = xp.where(missed, harmless[0], x), xp.where(missed, harmless[1], target)
    for _ in range(2):
        value, slope = f(x)
        x = x - (value - target) / slope
    return x if missed is None else xp.where(missed, xp.nan * xp.ones_like(x), x)


def _bracket(
    f: Callable[[Array], tuple[Array, Array]], goal: Array, lower: Array | None, upper: Array | None
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Points around the solution, NaN where there is none; and the point from which they were found, with the value there."""
    backend = backend_of(goal)
    xp = backend.xp
    info = xp.finfo(goal.dtype)
    limit = float(info.max) / 4  # so that the middle of two such points does not overflow
    ones = xp.ones_like(goal)
    known = lower if lower is not None else upper
    start = 0 * ones if known is None else known + 0 * ones
    value, slope = backend.stop(f(start))
    if known is None:
        sign, promised = xp.where(value <= goal, ones, -ones), ~xp.isnan(goal)
    else:
        sign = ones if upper is None else -ones
        slack = 8 * info.eps * ((1 + xp.abs(start)) * slope + xp.abs(goal))
        promised = sign * (value - goal) <= slack

    def grow(state: tuple[Array, ...]) -> tuple[Array, ...]:
        near, far, width, factor, found = state
        found = found | (sign * (f(far)[0] - goal) >= 0)
        width, factor = xp.minimum(width, limit / factor) * factor, 4 * factor
        return xp.where(found, near, far), xp.where(found, far, start + sign * width), width, factor, found

    state = (start, start + sign, ones, 4 * ones, ~promised)
    steps = math.isqrt(math.ceil(math.log2(float(info.max)))) + 1  # step k has width 2^(k (k + 1))
    near, far, _, _, found = backend.while_loop(lambda s: xp.any(~s[-1]), grow, state, max_steps=steps)
    nan = xp.nan * ones
    near, far = (xp.where(found & promised, a, nan) for a in (near, far))
    return xp.where(sign > 0, near, far), xp.where(sign > 0, far, near), (start, value)
