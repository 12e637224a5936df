"""What every program of the benchmark computes, and how a step is timed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flowppl.bijections import Chain, Coupling, Rotation, RQSpline, Stack
from flowppl.flows import Flow

DIM, LAYERS, HIDDEN, BINS, BOUND, BATCH = 16, 8, (64, 64), 8, 5.0, 1024
KEPT = DIM // 2
OUTPUTS = (DIM - KEPT) * (3 * BINS - 1)  # of one conditioner


def spline_couplings(layers: int) -> Flow:
    """The flow that all libraries have: couplings that take turns, and nothing else.

    What flowppl's recipe "nsf" adds by default (linear mixing, an affine map behind each spline and one at the end) is left out.
    """
    coupling = Coupling(DIM, RQSpline(BINS, BOUND), hidden=HIDDEN, activation="relu")
    return Flow(Stack(Chain((coupling, Rotation(DIM, KEPT))), layers))


class Step(NamedTuple):
    """One thing to time: `run()` does it and waits for the result; `params` counts the parameters behind it."""

    run: Callable[[], Any]
    params: int


def points(shape: tuple[int, ...] = (BATCH, DIM), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def measure(step: Step, seconds: float, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Seconds of the first call, and the median over the calls that fit into `seconds` (at least five)."""
    start = clock()
    step.run()
    first = clock() - start
    for _ in range(3):
        step.run()
    gc.collect()
    gc.disable()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        start = clock()
        step.run()
        times.append(clock() - start)
    return {"first": first, "step": statistics.median(times), "params": step.params, "repeats": len(times)}
