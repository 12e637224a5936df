"""Density estimation on real tables: held-out log-likelihood beside zuko and flowjax, with the same architectures and protocol.

    python -m benchmarks density [--quick] [--jobs 2]

Five folds a data set; for every library Adam with one schedule, the same batches in the same order, and early stopping on the
validation rows, which also choose among the same few rates: parametrisations differ in how far a step of Adam takes them, and so
in the rate that suits them. Differences are paired by fold.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.tabular import ARCHITECTURES, BINS, DATA, FOLDS, HIDDEN, LAYERS, Adam, Split, splits, table

RATES = (3e-3, 1e-2, 3e-2)
STEPS, PATIENCE, TIMEOUT = 300, 150, 1800  # patience in steps, the limit of a process in seconds
PEERS = {"zuko": "flowppl-torch", "flowjax": "flowppl-jax"}
QUICK = (("diabetes",), 2, 100)  # data sets, folds, steps
ROOT = Path(__file__).parents[1]


class Outcome(NamedTuple):
    """One fit: mean held-out log-likelihood of a row in nats, of validation rows, the rate, the step, parameters and seconds."""

    nats: float
    validation: float
    rate: float
    step: int
    params: int
    seconds: float


def fit(make: Any, architecture: str, split: Split, seed: int, batch: int, steps: int, rate: float) -> Outcome:
    """Trains one flow; judges it where the validation rows are likeliest."""
    start = time.perf_counter()
    flow = make(architecture, split.train.shape[1], seed, Adam(rate, steps))
    rng = np.random.default_rng(seed)
    judges = np.concatenate([split.validation, split.test])  # one call: one compilation
    per_epoch = len(split.train) // batch
    best, nats, best_step, step = -np.inf, -np.inf, 0, 0
    while step < steps and step - best_step < PATIENCE:
        order = rng.permutation(len(split.train))[: per_epoch * batch]
        flow.epoch(split.train[order].reshape(per_epoch, batch, -1))
        step += per_epoch
        validation, test = np.split(flow.log_prob(judges), [len(split.validation)])
        if validation.mean() > best:
            best, best_step, nats = float(validation.mean()), step, float(test.mean())
    return Outcome(nats, best, rate, best_step, flow.params, time.perf_counter() - start)


def worker(library: str, data: str, folds: int, steps: int) -> dict[str, list[Outcome]]:
    """All fits of one library to one data set, in this process."""
    torch_library = library in ("flowppl-torch", "zuko")
    if torch_library:
        import torch

        torch.set_num_threads(1)
    make = importlib.import_module("benchmarks.fit_torch" if torch_library else "benchmarks.fit_jax").PROGRAMS[library]
    parts = list(splits(table(data)))[:folds]
    # Folds differ in size by a row: cut, so that one compilation serves them all.
    sizes = [min(len(part[i]) for part in parts) for i in range(3)]
    parts = [Split(*(rows[:size] for rows, size in zip(part, sizes, strict=True))) for part in parts]
    batch = DATA[data].batch

    def best(architecture: str, i: int, part: Split) -> Outcome:
        fits = [fit(make, architecture, part, i, batch, steps, rate) for rate in RATES]
        return max(fits, key=lambda outcome: outcome.validation)

    return {a: [best(a, i, part) for i, part in enumerate(parts)] for a in ARCHITECTURES}


def _spawn(library: str, data: str, folds: int, steps: int) -> dict[str, list[Outcome]]:
    command = [sys.executable, "-m", "benchmarks.density", "--worker", library, data, str(folds), str(steps)]
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT)
    if done.returncode:
        raise RuntimeError(f"{library} on {data} failed:\n{done.stderr[-2000:]}")
    print(f"{data}, {library}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {a: [Outcome(*outcome) for outcome in outcomes] for a, outcomes in found.items()}


def mean_and_error(x: Sequence[float]) -> tuple[float, float]:
    """The mean over folds and its standard error."""
    return float(np.mean(x)), float(np.std(x, ddof=1) / len(x) ** 0.5)


def _rows(results: dict[tuple[str, str], dict[str, list[Outcome]]]) -> list[str]:
    lines = [
        "| data | flow | flowppl | beside | difference | parameters | rates | steps | within noise or above |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for data in dict.fromkeys(data for _, data in results):
        for architecture, name in ARCHITECTURES.items():
            for peer, ours in PEERS.items():
                a, b = results[ours, data][architecture], results[peer, data][architecture]
                mean, error = mean_and_error([p.nats - q.nats for p, q in zip(a, b, strict=True)])
                sides = ["{:.2f} ± {:.2f}".format(*mean_and_error([o.nats for o in side])) for side in (a, b)]
                steps = " / ".join(f"{np.mean([o.step for o in side]):.0f}" for side in (a, b))
                rates = " / ".join(f"{np.median([o.rate for o in side]):g}" for side in (a, b))
                lines.append(
                    f"| {data} | {name} | {ours.split('-')[1]}: {sides[0]} | {peer}: {sides[1]} "
                    f"| {mean:+.3f} ± {error:.3f} | {a[0].params} / {b[0].params} | {rates} | {steps} "
                    f"| {'yes' if mean + 2 * error >= 0 else 'no'} |"
                )
    return lines


def _heading(names: Sequence[str], folds: int, steps: int) -> str:
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "zuko", "jax", "flowjax", "scikit-learn", "plotnine"))
    sizes = ", ".join("{} {} x {} (batch {})".format(name, *table(name).shape, DATA[name].batch) for name in names)
    return (
        f"Mean log-likelihood of a held-out row in nats, ± the standard error over {folds} folds; differences are paired by "
        f"fold. {LAYERS} layers, hidden {HIDDEN}, {BINS} bins, float32; Adam, its rate falling as half a cosine to zero "
        f"at step {steps}, from the best one of {', '.join(map(str, RATES))} on the validation rows; the test rows are scored "
        f"where the validation rows were likeliest, and a fit ends after "
        f"{PATIENCE} steps without improvement. Rows by columns: {sizes}. {packages}.\n"
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks density", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small data set, two folds, 100 steps")
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--folds", type=int, default=FOLDS, help="at least two, at most five")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time, of one thread each")
    parser.add_argument("--output", type=Path, help="write all fits here as JSON")
    parser.add_argument("--worker", nargs=4, metavar=("LIBRARY", "DATA", "FOLDS", "STEPS"), help="fit and stop")
    options = parser.parse_args(arguments)
    if options.worker:
        library, data, folds, steps = options.worker
        print(json.dumps(worker(library, data, int(folds), int(steps))))
        return
    if options.quick:
        options.data, options.folds, options.steps = QUICK
    runs = [(library, data) for data in options.data for pair in PEERS.items() for library in pair]
    with ThreadPoolExecutor(options.jobs) as pool:
        fits = list(pool.map(lambda run: _spawn(*run, options.folds, options.steps), runs))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{used.ru_utime + used.ru_stime:.0f} s of processor time", file=sys.stderr)
    results = dict(zip(runs, fits, strict=True))
    print(_heading(options.data, options.folds, options.steps))
    print("\n".join(_rows(results)))
    if options.output:
        records = [
            {
                "library": library,
                "data": data,
                "flow": architecture,
                "fits": [outcome._asdict() for outcome in outcomes],
            }
            for (library, data), found in results.items()
            for architecture, outcomes in found.items()
        ]
        options.output.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
