"""Every kind of flow beside the same kind in another library, where there is one: gradients of both tasks.

    python -m benchmarks family [--quick] [--only torch] [--flow BNAF]

"density" is the log density of given points with the gradient of its mean; "draw" is a draw with its log density and the gradient
of their Monte Carlo ELBO. One process for each framework, one thread; flowppl and the peer take turns, and only times of the
same turn are divided. "cannot": the peer refuses; "fails": its numerical inverse does.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowppl import flows
from flowppl.bijections import (
    Affine,
    Bijection,
    BlockAutoregressive,
    Chain,
    Coupling,
    DeepSigmoid,
    Inverse,
    LULinear,
    MaskedAutoregressive,
    Planar,
    Radial,
    Residual,
    Reversal,
    RQSpline,
    Stack,
    SumOfSquares,
    Sylvester,
)
from flowppl.flows import Flow

DIM, BATCH, LAYERS, SIMPLE_LAYERS, HIDDEN, BINS, BOUND = 16, 512, 4, 8, (64, 64), 8, 5.0
LIMIT = 30  # seconds of a peer's first step
TASKS = ("density", "draw")
PACKAGES = ("torch", "zuko", "normflows", "nflows", "pyro-ppl", "jax", "flowjax", "numpyro")
ROOT = Path(__file__).parents[1]


class Row(NamedTuple):
    """A kind of flow and who else has it; `framework` and `peer` name the peer's program."""

    framework: str
    flow: str
    peer: str
    ours: Flow
    scale: float = 1.0  # of our random parameters


def _flow(layer: Bijection, depth: int = LAYERS) -> Flow:
    return Flow(Stack(Chain((layer, Reversal(DIM))), depth))


def _density(transformer: Any) -> Flow:
    """Autoregressive layers that score in one pass."""
    return _flow(Inverse(MaskedAutoregressive(DIM, transformer, hidden=HIDDEN)))


_MAF, _IAF = _density(Affine()), _flow(MaskedAutoregressive(DIM, Affine(), hidden=HIDDEN))
_COUPLING = _flow(Coupling(DIM, RQSpline(BINS, BOUND), hidden=HIDDEN))
_PLANAR, _RADIAL = Flow(Stack(Planar(DIM), SIMPLE_LAYERS)), Flow(Stack(Radial(DIM), SIMPLE_LAYERS))
_BNAF = _flow(BlockAutoregressive(DIM), 2)
_TORUS = flows.nsf(layers=LAYERS // 2, hidden=HIDDEN, bins=BINS, linear=False).with_circular(tuple(range(DIM)), False)(
    DIM
)
ROWS = [
    Row("torch", "spline autoregressive", "zuko", _density(RQSpline(BINS, BOUND))),
    Row("torch", "spline coupling", "zuko", _COUPLING),
    Row("torch", "affine autoregressive (MAF)", "zuko", _MAF),
    Row("torch", "deep sigmoid autoregressive (NAF)", "zuko", _density(DeepSigmoid())),
    Row("torch", "sum of squares autoregressive", "zuko", _density(SumOfSquares(3, 4)), 0.3),
    Row("torch", "affine coupling (RealNVP)", "normflows", _flow(Coupling(DIM, Affine(), hidden=HIDDEN))),
    Row("torch", "circular spline coupling", "normflows", _TORUS),
    Row("torch", "residual", "normflows", _flow(Inverse(Residual(DIM, hidden=HIDDEN)))),
    Row("torch", "planar", "normflows", _PLANAR),
    Row("torch", "radial", "normflows", _RADIAL),
    Row("torch", "spline coupling", "nflows", _COUPLING),
    Row("torch", "affine autoregressive (MAF)", "nflows", _MAF),
    Row("torch", "LU-factorised linear", "nflows", Flow(Stack(LULinear(DIM), LAYERS)), 0.1),
    Row("torch", "affine autoregressive (IAF)", "pyro", _IAF),
    Row("torch", "block autoregressive (BNAF)", "pyro", _BNAF),
    Row("torch", "planar", "pyro", _PLANAR),
    Row("torch", "radial", "pyro", _RADIAL),
    Row("torch", "Sylvester", "pyro", Flow(Stack(Sylvester(DIM, DIM), SIMPLE_LAYERS)), 0.3),
    Row("jax", "spline coupling", "flowjax", _COUPLING),
    Row("jax", "affine autoregressive (MAF)", "flowjax", _MAF),
    Row("jax", "block autoregressive (BNAF)", "flowjax", _flow(Inverse(BlockAutoregressive(DIM)), 2)),
    Row("jax", "planar", "flowjax", _PLANAR),
    Row("jax", "affine autoregressive (IAF)", "numpyro", _IAF),
    Row("jax", "block autoregressive (BNAF)", "numpyro", _BNAF),
]


def points() -> np.ndarray:
    """The points to score, within every flow's range (angles too)."""
    return np.clip(np.random.default_rng(0).standard_normal((BATCH, DIM)), -3, 3).astype(np.float32)


def _milliseconds(step: Callable[[], Any], least: float) -> float:
    """The median time of a call, over `least` seconds and three calls."""
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _refusal(step: Callable[[], Any], who: str) -> str:
    """What keeps the peer from a step, after trying it; empty if nothing does."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"a step takes more than {LIMIT} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        step()
    except TimeoutError as error:
        return str(error)
    except (NotImplementedError, KeyError) as error:  # Pyro misses the key of an inverse that it has not seen
        print(f"{who}: {str(error)[:200]}", file=sys.stderr, flush=True)
        return "cannot"
    except RuntimeError as error:  # jax's solvers say so when they have not converged
        print(f"{who}: {str(error)[-400:]}", file=sys.stderr, flush=True)
        return "fails"
    finally:
        signal.alarm(0)
    return ""


def worker(framework: str, rounds: int, seconds: float, flow: str) -> None:
    """Prints the lines of one framework."""
    module = importlib.import_module(f"benchmarks.family_{framework}")
    for row in ROWS:
        if row.framework != framework or flow not in row.flow:
            continue
        ours, peers = module.flowppl(row), module.PEERS[row.peer, row.flow]()
        for task in TASKS:
            label = f"| {framework} | {row.flow} | {task} | "
            step, other = ours[task], peers[task]
            refusal = _refusal(other, f"{row.peer}: {row.flow}, {task}")
            step()
            if refusal:
                print(f"{label}{_milliseconds(step, seconds):.3g} ms | {row.peer}: {refusal} | | |", flush=True)
                continue
            turns = [(_milliseconds(step, seconds), _milliseconds(other, seconds)) for _ in range(rounds)]
            mine, theirs = (statistics.median(times) for times in zip(*turns, strict=True))
            ratios = [a / b for a, b in turns]
            print(
                f"{label}{mine:.3g} ms | {row.peer}: {theirs:.3g} ms | {statistics.median(ratios):.2f} "
                f"| {min(ratios):.2f} to {max(ratios):.2f} |",
                flush=True,
            )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks family", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often the two take turns")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each turn of each")
    parser.add_argument("--quick", action="store_true", help="3 turns of 0.05 seconds")
    parser.add_argument("--only", choices=["torch", "jax"], help="one framework")
    parser.add_argument("--flow", default="", help="only flows whose names have this in them")
    parser.add_argument("--worker", action="store_true", help="measure in this process and stop")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds = 3, 0.05
    if options.worker:
        worker(options.only, options.rounds, options.seconds, options.flow)
        return
    print(
        f"Dimension {DIM}, batch {BATCH}, {LAYERS} layers (block autoregressive: 2; planar, radial and Sylvester: "
        f"{SIMPLE_LAYERS}), hidden {HIDDEN}, {BINS} bins, float32, one thread, {options.rounds} turns; "
        f"{', '.join(f'{p} {version(p)}' for p in PACKAGES)}.\n"
    )
    print(
        "| framework | flow | task | flowppl | beside | ratio | spread |\n|---|---|---|---:|---|---:|---|", flush=True
    )
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for framework in [options.only] if options.only else ["torch", "jax"]:
        command = [
            sys.executable,
            "-m",
            "benchmarks",
            "family",
            "--worker",
            "--only",
            framework,
            "--flow",
            options.flow,
        ]
        command += ["--rounds", str(options.rounds), "--seconds", str(options.seconds)]
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main(sys.argv[1:])
