"""What path gradients cost: a reverse-KL step with them over the plain step, and over the estimator that scores twice.

    python -m benchmarks path [--framework jax|torch] [--flow nsf] [--rounds 5]

Flows of dimension 16 (autoregressive ones also 64), batch 512, float32, one thread, one process for each framework; the three steps
take turns, and only times of the same turn are divided. "Cheap": a standard normal target; others: a logistic regression of so many
observations. "Twice": the draw is scored once more with its parameters held still, by the inverse, as
other libraries do; "one by one": by the inverse of autoregressive flows as those have it, a sweep for each coordinate. "Compiled":
one layer of couplings, its loss and gradient by `torch.compile`. In jax, "operations" and "memory" are ratios of the compiler's own
counts (it counts the body of a loop once, in each of the steps).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from benchmarks.workload import spline_couplings
from flowppl import flows, tree
from flowppl.backend import backend_of
from flowppl.bijections import MaskedAutoregressive
from flowppl.bijections.elementwise import event_first, event_last
from flowppl.flows import Flow
from flowppl.objectives import path_log_prob

DIM, WIDE, BATCH = 16, 64, 512
FRAMEWORKS = ("jax", "torch")
STEPS = ("plain", "path", "twice")
ROOT = Path(__file__).parents[1]


class Case(NamedTuple):
    """A flow and how many observations its target has; `kind` is "", "one by one" or "compiled"."""

    name: str
    flow: Flow
    observations: int = 0
    kind: str = ""


def cases() -> list[Case]:
    """All lines."""
    found = [Case("couplings of splines", spline_couplings(8), n) for n in (0, 2000, 20_000)]
    found += [Case(name, flows.get(name)(DIM)) for name in flows.names() if name not in ("affine", "iaf", "bnaf")]
    found += [Case(name, flows.get(name)(dim)) for name in ("iaf", "bnaf") for dim in (DIM, WIDE)]
    found += [Case(name, flows.get(name)(WIDE), kind="one by one") for name in ("iaf", "bnaf")]
    return [*found, Case("couplings of splines", spline_couplings(1), kind="compiled")]


def target(observations: int, like: Any, dim: int) -> Callable[[Any], Any]:
    """A log density of points `(n, dim)`."""
    backend = backend_of(like)
    rng = np.random.default_rng(0)
    rows = backend.asarray(rng.standard_normal((observations, dim)).astype(np.float32), like)
    sign = backend.asarray(np.sign(rng.standard_normal(observations)).astype(np.float32), like)

    def log_prob(x: Any) -> Any:
        prior = -0.5 * backend.xp.sum(x * x, axis=-1)
        if not observations:
            return prior
        return prior - backend.xp.sum(backend.softplus(-sign * (x @ backend.xp.matrix_transpose(rows))), axis=-1)

    return log_prob


def losses(case: Case, variables: dict[str, Any]) -> dict[str, Callable[[Any, Any], Any]]:
    """Loss functions of params and random numbers."""
    like = tree.leaves(variables["params"])[0]
    backend, log_p = backend_of(like), target(case.observations, like, case.flow.dim)

    def plain(params: Any, rng: Any) -> Any:
        draws = case.flow.sample(rng, {**variables, "params": params}, (BATCH,), with_log_prob=True)
        return backend.xp.mean(draws.log_prob - log_p(draws.x))

    def path(params: Any, rng: Any) -> Any:
        draws = case.flow.sample(rng, {**variables, "params": params}, (BATCH,), with_score=True)
        return backend.xp.mean(path_log_prob(draws) - log_p(draws.x))

    def twice(params: Any, rng: Any) -> Any:
        x = case.flow.sample(rng, {**variables, "params": params}, (BATCH,)).x
        still = {**variables, "params": backend.stop(params)}
        with _one_by_one() if case.kind == "one by one" else contextlib.nullcontext():
            return backend.xp.mean(case.flow.log_prob(still, x) - log_p(x))

    return {"plain": plain, "path": path, "twice": twice}


@contextlib.contextmanager
def _one_by_one() -> Iterator[None]:
    """Within, autoregressive maps are inverted one coordinate after the other, each by the whole network."""

    def all_sweeps(sweep: Callable[[Any], Any], x: Any, *, max_steps: int, **_: Any) -> Any:
        each = backend_of(x).xp.zeros_like(x[:, 0])
        return backend_of(x).scan(lambda x, _: (sweep(x), _), x, each)[0]

    def inverse(self: MaskedAutoregressive, params: Any, y: Any, context: Any = None) -> tuple[Any, Any]:
        backend = backend_of(y)

        def sweep(state: tuple[Any, Any], _: Any) -> tuple[tuple[Any, Any], Any]:
            x, log_slope = self.transformer.inverse(self._net(params["net"], state[0]), event_first(y))
            return (event_last(x), backend.xp.sum(log_slope, axis=0)), _

        start = backend.xp.zeros_like(y), backend.xp.zeros_like(y[:, 0])
        return backend.scan(sweep, start, backend.asarray(backend.xp.zeros(self.dim), y))[0]

    with (
        mock.patch.object(MaskedAutoregressive, "inverse", inverse),
        mock.patch("flowppl.bijections.bnaf.iterate", all_sweeps),
    ):
        yield


def _on_jax(case: Case) -> tuple[dict[str, Callable], dict[str, tuple[float, float]]]:
    import jax

    variables = case.flow.init(jax.random.key(0))
    params = _shaken(variables["params"], lambda a: jax.numpy.asarray(a))
    steps, counts = {}, {}
    for name, loss in losses(case, variables).items():
        compiled = jax.jit(jax.value_and_grad(loss)).lower(params, jax.random.key(1)).compile()
        cost = compiled.cost_analysis()
        cost = cost[0] if isinstance(cost, list) else cost
        counts[name] = cost["flops"], compiled.memory_analysis().temp_size_in_bytes
        steps[name] = lambda f=compiled: jax.block_until_ready(f(params, jax.random.key(1)))
    return steps, counts


def _on_torch(case: Case) -> tuple[dict[str, Callable], dict[str, tuple[float, float]]]:
    import torch

    torch.set_num_threads(1)
    variables = case.flow.init(torch.Generator().manual_seed(0))
    params = _shaken(variables["params"], lambda a: torch.as_tensor(a).requires_grad_())
    leaves = tree.leaves(params)
    steps = {}
    for name, loss in losses(case, {**variables, "params": params}).items():
        loss = torch.compile(loss) if case.kind == "compiled" else loss
        steps[name] = lambda loss=loss: torch.autograd.grad(loss(params, None), leaves, allow_unused=True)
    return steps, {}


def _shaken(params: Any, made: Callable) -> Any:
    """Moves the flow away from the identity, where it starts."""
    rng = np.random.default_rng(2)
    return tree.map(lambda a: made(np.asarray(a) + 0.05 * rng.standard_normal(a.shape).astype(np.float32)), params)


def worker(options: argparse.Namespace) -> None:
    """Prints one line of the table for each case."""
    prepare = {"jax": _on_jax, "torch": _on_torch}[options.framework]
    for case in cases():
        if options.flow not in (None, case.name) or (case.kind == "compiled" and options.framework == "jax"):
            continue
        steps, counts = prepare(case)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.rounds + 1):  # the first one warms up
            for name, step in steps.items():
                times[name].append(_seconds(step, options.seconds))
        times = {name: values[1:] for name, values in times.items()}
        pairs = {n: [a / b for a, b in zip(times["path"], times[n], strict=True)] for n in ("plain", "twice")}
        operations, memory = ("", "")
        if counts:
            operations, memory = (f"{counts['path'][i] / counts['plain'][i]:.2f}" for i in (0, 1))
        cells = [options.framework, ", ".join(filter(None, [case.name, case.kind])), str(case.flow.dim)]
        cells += [f"{case.observations} observations" if case.observations else "cheap"]
        cells += [f"{1e3 * statistics.median(times[name]):.1f} ms" for name in STEPS]
        cells += [f"{statistics.median(pairs['plain']):.2f}", f"{min(pairs['plain']):.2f} to {max(pairs['plain']):.2f}"]
        cells += [f"{statistics.median(pairs['twice']):.2f}", operations, memory]
        print(f"| {' | '.join(cells)} |", flush=True)


def _seconds(step: Callable[[], Any], least: float) -> float:
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(arguments: Sequence[str]) -> None:
    """Runs each framework in a process of its own, with one thread."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks path", description=__doc__)
    parser.add_argument("--framework", choices=FRAMEWORKS)
    parser.add_argument("--flow")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="at least, for each step in each round")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(options)
        return
    head = [
        "framework",
        "flow",
        "dim",
        "target",
        *STEPS,
        "path / plain",
        "spread",
        "path / twice",
        "operations",
        "memory",
    ]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for framework in FRAMEWORKS if options.framework is None else (options.framework,):
        command = [sys.executable, "-m", "benchmarks", "path", "--worker", "--framework", framework]
        command += ["--rounds", str(options.rounds), "--seconds", str(options.seconds)]
        command += ["--flow", options.flow] if options.flow else []
        pin = ["taskset", "-c", "0"] if hasattr(os, "sched_setaffinity") else []
        subprocess.run(pin + command, env=environment, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
