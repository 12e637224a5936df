"""What annealing costs beside the bare gradients of its leapfrog steps, and how time grows with temperatures and particles.

    python -m benchmarks overhead [--rounds 7]

A logistic regression with 35 coefficients and 351 rows, 500 particles, 16 temperatures of HMC with 8 leapfrog steps; beside it the
same number of evaluations of the log density and its gradient, one after the other, at points that move. jax in one compiled call,
torch eagerly, float32, one thread; both in turns, the median ratio. Bounds: 1.15 in jax, 1.5 in torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from flowppl.backend import get_backend
from flowppl.flows.bases import Normal
from flowppl.kernels import Known, hmc
from flowppl.stochastic import Bridge, anneal

ROWS, DIM, PARTICLES, TEMPERATURES, LEAPFROG = 351, 35, 500, 16, 8
BOUNDS = {"jax": 1.15, "torch": 1.5}


def measured(name: str, rounds: int, temperatures: int = TEMPERATURES, particles: int = PARTICLES) -> tuple[list, list]:
    """Seconds of annealing and of the bare gradients, in turns."""
    backend = get_backend(name)
    xp = backend.xp
    like = backend.asarray(xp.zeros((), dtype=xp.float32))
    rng = np.random.default_rng(0)
    rows, signs = rng.standard_normal((ROWS, DIM)), rng.choice([-1.0, 1.0], ROWS)
    data = backend.asarray(xp.asarray((rows * signs[:, None]).T.copy()), like)

    def log_prob(x: Any) -> Any:
        return -xp.sum(backend.softplus(-(x @ data)), axis=-1) - 0.5 * xp.sum(x * x, axis=-1)

    base = Known(partial(Normal().log_prob, {}), partial(Normal().score, {}))
    bridge = Bridge(lambda rng, n: backend.normal(rng, (n, DIM), like=like), base, log_prob)
    betas = backend.asarray(xp.linspace(1 / temperatures, 1, temperatures), like)
    schedule = (betas, 0 * betas + 0.1)
    steps = temperatures * LEAPFROG

    def annealed(rng: Any) -> Any:
        return anneal(rng, bridge, partial(hmc.step, num_steps=LEAPFROG), schedule, particles).log_w

    def bare(rng: Any) -> Any:
        def one(x: Any, _: Any) -> Any:
            value, score = backend.value_and_score(log_prob, x)
            return x + 0.001 * score, value

        start = backend.normal(rng, (particles, DIM), like=like)
        return backend.scan(one, start, backend.asarray(xp.zeros(steps), like))

    return _in_turns([backend.jit(annealed), backend.jit(bare)], backend, like, rounds)


def _in_turns(functions: Sequence[Callable], backend: Any, like: Any, rounds: int) -> Any:
    seconds: list[list[float]] = [[] for _ in functions]
    for i in range(rounds + 1):
        for f, mine in zip(functions, seconds, strict=True):
            began = time.perf_counter()
            found = f(backend.rng(i, like))
            backend.to_numpy(backend.stop(found if not isinstance(found, tuple) else found[0]))
            mine.append(time.perf_counter() - began)
    return [mine[1:] for mine in seconds]  # the first compiles


def main(arguments: Sequence[str]) -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    print("| framework | annealing, ms | bare gradients, ms | ratio | spread | bound |\n|---|---:|---:|---:|---|---:|")
    for name, bound in BOUNDS.items():
        ours, bare = measured(name, options.rounds)
        ratios = np.array(ours) / np.array(bare)
        spread = f"{ratios.min():.2f} to {ratios.max():.2f}"
        cells = [
            name,
            f"{1e3 * np.median(ours):.0f}",
            f"{1e3 * np.median(bare):.0f}",
            f"{np.median(ratios):.2f}",
            spread,
            bound,
        ]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print("\n| framework | temperatures | particles | ms | over the first |\n|---|---:|---:|---:|---:|")
    for name in BOUNDS:
        sizes = [(8, 500), (16, 500), (32, 500), (8, 1000), (8, 2000)]
        found = [np.median(measured(name, options.rounds, *size)[0]) for size in sizes]
        for (temperatures, particles), seconds in zip(sizes, found, strict=True):
            print(
                f"| {name} | {temperatures} | {particles} | {1e3 * seconds:.0f} | {seconds / found[0]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
