"""Angles: numbers up to whole turns."""

from __future__ import annotations

import math

from flowppl.backend import backend_of
from flowppl.bijections.base import Array


def wrap(x: Array, half: float = math.pi) -> Array:
    """x less a whole number of turns, in [-half, half): exactly x where it is there already; the derivative is one everywhere.

    The turn is split in two parts, of which the first has eight bits: whole multiples of it are exact, so in float32 the result
    is as exact as x is up to a million turns.

    Args:
        x: Any finite numbers.
        half: Half a turn.
    """
    backend = backend_of(x)
    xp = backend.xp
    at = backend.stop(x)
    mantissa, exponent = math.frexp(2 * half)
    coarse = math.ldexp(round(mantissa * 256), exponent - 8)
    turns = xp.floor(at * (0.5 / half) + 0.5)
    wrapped = xp.clip(at - turns * coarse - turns * (2 * half - coarse), -half, half)
    wrapped = xp.where(wrapped < half, wrapped, -half * xp.ones_like(at))
    return xp.where((at >= -half) & (at < half), at, wrapped) + (x - at)
