"""The slow direction of masked autoregressive maps in 64 dimensions: blockwise Jacobi sweeps beside the sequential pass.

    python -m benchmarks autoregressive [--quick]

The sequential pass is what other libraries run: as many sweeps as there are coordinates, each the whole network and all
coordinates' inverse maps, without an early exit. Networks, points and maps are the same; value and log-determinant; one process
for each framework, one thread, the two in turns. y is the image of normal x (drawn parameters) or normal itself (fitted ones: the
map then draws digits). Residual: |forward(inverse(y)) - y| / (1 + |y|), the largest of all, the forward map in float64.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowppl import tree
from flowppl.backend import backend_of
from flowppl.bijections import Affine, Composed, MaskedAutoregressive, RQSpline, watch_solves
from flowppl.bijections.elementwise import Transformer, event_first, event_last

DIM, POINTS, TOL, SCALES, STEPS, TARGET = 64, 512, 1e-5, (1.0, 2.0, 4.0), 300, 5.0
TRANSFORMERS: dict[str, Transformer] = {"affine": Affine(), "spline": Composed(RQSpline(), Affine())}
ROOT = Path(__file__).parents[1]


class Case(NamedTuple):
    """One line of the table."""

    transformer: str
    parameters: str
    bijection: MaskedAutoregressive
    params: Any
    y: np.ndarray


def cases(steps: int) -> Iterator[Case]:
    """All lines, arrays in numpy."""
    from benchmarks.parameters import data, drawn, fitted

    points = np.random.default_rng(1).standard_normal((POINTS, DIM)).astype(np.float32)
    for name, transformer in TRANSFORMERS.items():
        bijection = MaskedAutoregressive(DIM, transformer, tol=TOL)
        for scale in SCALES:
            params = drawn(bijection, 0, scale)
            yield Case(name, f"drawn, x {scale:g}", bijection, params, bijection.forward(params, points)[0])
        yield Case(name, "fitted", bijection, fitted(bijection, data(DIM), steps), points)


def sequential(bijection: MaskedAutoregressive) -> Callable:
    """(params, y) -> x and the log-determinant, one coordinate more in each sweep."""

    def inverse(params: Any, y: Any) -> tuple[Any, Any]:
        backend = backend_of(y)

        def sweep(state: tuple[Any, Any]) -> tuple[Any, Any]:
            theta = bijection._net(params["net"], state[0])
            x, log_slope = bijection.transformer.inverse(theta, event_first(y))
            return event_last(x), backend.xp.sum(log_slope, axis=0)

        start = (backend.xp.zeros_like(y), backend.xp.zeros_like(y[:, 0]))
        return backend.while_loop(lambda state: backend.xp.all(state[1] == state[1]), sweep, start, max_steps=DIM)

    return inverse


def _seconds(f: Callable, least: float) -> float:
    """The median time of a call, over `least` seconds."""
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _residual(case: Case, x: np.ndarray) -> float:
    exact = tree.map(lambda a: np.asarray(a, np.float64), case.params)
    y = case.bijection.forward(exact, x.astype(np.float64))[0]
    return float(np.max(np.abs(y - case.y) / (1 + np.abs(case.y))))


def _sweeps(case: Case) -> float:
    """Jacobi sweeps, the mean over blocks of the most of any point."""
    import torch

    with watch_solves() as solves, torch.no_grad():
        case.bijection.inverse(tree.map(torch.as_tensor, case.params), torch.as_tensor(case.y))
    return statistics.mean(solve.steps for solve in solves)


def _programs(framework: str, case: Case) -> list[Callable[[], Any]]:
    """Ours and the sequential pass, ready to time."""
    maps = (case.bijection.inverse, sequential(case.bijection))
    if framework == "jax":
        import jax

        params, y = jax.tree.map(jax.numpy.asarray, (case.params, case.y))
        compiled = [jax.jit(f) for f in maps]
        return [lambda f=f: jax.block_until_ready(f(params, y)) for f in compiled]
    import torch

    params, y = tree.map(torch.as_tensor, case.params), torch.as_tensor(case.y)
    return [torch.no_grad()(lambda f=f: f(params, y)) for f in maps]


def worker(framework: str, rounds: int, seconds: float, steps: int) -> None:
    """Prints the lines of one framework."""
    import torch

    torch.set_num_threads(1)
    for case in cases(steps):
        programs = _programs(framework, case)
        residuals = [_residual(case, np.asarray(program()[0])) for program in programs]
        turns = [[_seconds(program, seconds) for program in programs] for _ in range(rounds)]
        ours, other = (1e3 * statistics.median(times) for times in zip(*turns, strict=True))
        ratios = [b / a for a, b in turns]
        ratio = statistics.median(ratios)
        print(
            f"| {framework} | {case.transformer} | {case.parameters} | {_sweeps(case):.1f} of {DIM // case.bijection._blocks} "
            f"| {ours:.1f} ms | {other:.1f} ms | {ratio:.1f} | {min(ratios):.1f} to {max(ratios):.1f} "
            f"| {residuals[0]:.0e} | {residuals[1]:.0e} | {'yes' if ratio >= TARGET else 'no'} |",
            flush=True,
        )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks autoregressive", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often the two take turns")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn of each")
    parser.add_argument("--steps", type=int, default=STEPS, help="of Adam, for the fitted parameters")
    parser.add_argument("--quick", action="store_true", help="3 turns of 0.1 seconds, 50 steps")
    parser.add_argument("--worker", choices=["torch", "jax"], help="measure one framework in this process and stop")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds, options.steps = 3, 0.1, 50
    if options.worker:
        worker(options.worker, options.rounds, options.seconds, options.steps)
        return
    print(
        f"Dimension {DIM}, batch {POINTS}, hidden {MaskedAutoregressive.hidden}, float32, tol {TOL:g}, one thread. Sweeps: "
        "mean over blocks of coordinates, of as many as a block has.\n"
    )
    columns = ["framework", "map", "parameters", "sweeps", "blockwise", "sequential", "ratio", "spread", "residual"]
    print(f"| {' | '.join([*columns, 'of sequential', f'at least {TARGET:g}'])} |")
    print("|---|---|---|---|---:|---:|---:|---|---:|---:|---|", flush=True)
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for framework in ("torch", "jax"):
        command = [sys.executable, "-m", "benchmarks", "autoregressive", "--worker", framework]
        command += ["--rounds", str(options.rounds), "--seconds", str(options.seconds), "--steps", str(options.steps)]
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main(sys.argv[1:])
