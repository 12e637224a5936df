"""A coupling spline flow beside its peers: ratios of times, from alternating processes.

The thread pools of torch and jax fight inside one process, and a machine drifts: so each program runs in a process of its own,
the programs of a group take turns, and only times of the same turn are divided.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.workload import BATCH, BINS, DIM, HIDDEN, LAYERS, measure

Run = tuple[str, str, int]  # program, task, layers
ROOT = Path(__file__).parents[1]


class Ratio(NamedTuple):
    """One line of the table: our time over the other's, in the field "step" or "first" (compilation and the first step)."""

    group: str
    what: str
    ours: Run
    other: Run
    target: float | None = None
    field: str = "step"


def _rows(framework: str, peer: str, targets: dict[str, float]) -> list[Ratio]:
    """What both frameworks are measured by."""
    names = {
        "nll": "log-density and gradient",
        "draw": "sampling, log-density and gradient",
        "sample": "sampling and log-density",
    }
    rows = []
    for task, name in names.items():
        ours, group = (f"flowppl-{framework}", task, LAYERS), f"{framework} {task}"
        rows.append(Ratio(group, name, ours, (peer, task, LAYERS), targets.get(task)))
        rows.append(Ratio(group, name, ours, (f"conditioner-{framework}", task, LAYERS), targets.get(f"{task} floor")))
        if task == "draw":
            rows.append(Ratio(group, f"{name}, path", (ours[0], "path", LAYERS), ours))
    return rows


RATIOS = [
    *_rows("jax", "flowjax", {"nll": 1.0, "draw": 1.0, "nll floor": 3.0, "draw floor": 3.0}),
    *(
        Ratio(f"jax {task}", f"{name}: compilation", (*ours, LAYERS), ("flowjax", task, LAYERS), 0.5, "first")
        for task, name in (("nll", "log-density and gradient"), ("draw", "sampling, log-density and gradient"))
        for ours in [("flowppl-jax", task)]
    ),
    Ratio("jax depth", "compilation, 32 layers", ("flowppl-jax", "draw", 32), ("flowppl-jax", "draw", 4), 1.3, "first"),
    *_rows("torch", "zuko", {"nll": 0.65, "draw": 0.35, "nll floor": 4.0, "draw floor": 4.0}),
    Ratio("torch layer", "one compiled layer", ("coupling-torch", "layer", 1), ("conditioner-torch", "layer", 1), 2.5),
]


def worker(program: str, task: str, layers: int, options: argparse.Namespace) -> dict[str, float]:
    """Measures one program in this process."""
    threads = options.threads
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if program.endswith("torch") or program == "zuko":
        import torch

        torch.set_num_threads(threads)
        programs = importlib.import_module("benchmarks.on_torch").PROGRAMS
    else:
        programs = importlib.import_module("benchmarks.on_jax").PROGRAMS
    clock = time.process_time if options.cpu_time else time.perf_counter
    return measure(programs[program](task, layers), options.seconds, clock)


def _spawn(run: Run, options: argparse.Namespace) -> dict[str, float]:
    threads, seconds = options.threads, options.seconds
    command = [sys.executable, "-m", "benchmarks.speed", "--worker", *map(str, run)]
    command += ["--threads", str(threads), "--seconds", str(seconds), *["--cpu-time"] * options.cpu_time]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, run))} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure_groups(ratios: list[Ratio], options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The measurements of each run of each group, one per round."""
    results: dict[str, list[dict[str, float]]] = {}
    for group in dict.fromkeys(r.group for r in ratios):
        runs = list(dict.fromkeys(run for r in ratios if r.group == group for run in (r.ours, r.other)))
        for i in range(options.rounds):
            for run in runs:
                results.setdefault(_key(group, run), []).append(_spawn(run, options))
            print(f"{group}: round {i + 1} of {options.rounds}", file=sys.stderr, flush=True)
    return results


def _key(group: str, run: Run) -> str:
    return f"{group}: {run[0]} {run[1]} {run[2]}"


def _table(ratios: list[Ratio], results: dict[str, list[dict[str, float]]]) -> tuple[str, list[dict[str, Any]]]:
    lines = [
        "| framework | task | ours | beside | ratio | spread | target | |",
        "|---|---|---:|---|---:|---|---:|---|",
    ]
    records = []
    for r in ratios:
        ours, other = ([m[r.field] for m in results[_key(r.group, run)]] for run in (r.ours, r.other))
        pairs = [a / b for a, b in zip(ours, other, strict=True)]
        ratio = statistics.median(pairs)
        met = "" if r.target is None else "yes" if ratio <= r.target else "no"
        milliseconds = [f"{1e3 * statistics.median(times):.3g} ms" for times in (ours, other)]
        beside = f"{r.other[0]}{'' if r.ours[0] != r.other[0] else f' {r.other[1]}, {r.other[2]} layers'}"
        lines.append(
            f"| {r.group.split()[0]} | {r.what} | {milliseconds[0]} | {beside}: {milliseconds[1]} | {ratio:.2f} "
            f"| {min(pairs):.2f} to {max(pairs):.2f} | {'' if r.target is None else r.target} | {met} |"
        )
        records.append({**r._asdict(), "pairs": pairs, "ratio": ratio})
    return "\n".join(lines), records


def _heading(results: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> str:
    packages = ", ".join(f"{p} {version(p)}" for p in ("jax", "flowjax", "torch", "zuko") if _installed(p))
    counts = {
        key.split(": ")[1].split()[0]: int(m[0]["params"]) for key, m in results.items() if key.endswith(f" {LAYERS}")
    }
    return (
        f"Spline couplings: dimension {DIM}, {LAYERS} layers, hidden {HIDDEN}, {BINS} bins, batch {BATCH}, float32, ReLU; "
        f"{options.threads} threads of {os.cpu_count()} cores ({platform.machine()}), {options.rounds} rounds, "
        f"{'processor' if options.cpu_time else 'wall'} time; {packages}.\n"
        f"Parameters: {', '.join(f'{name} {count}' for name, count in counts.items())}.\n"
    )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks speed", description=__doc__)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of each process (default: all cores)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often the programs of a group take turns")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each process repeats its step")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a busy machine, with one thread")
    parser.add_argument("--quick", action="store_true", help="short runs: 3 rounds of half a second")
    parser.add_argument("--only", default="", help='only groups that begin so: "jax", "torch nll", ...')
    parser.add_argument("--output", type=Path, help="write all measurements here as JSON")
    parser.add_argument("--worker", nargs=3, metavar=("PROGRAM", "TASK", "LAYERS"), help="measure one program and stop")
    options = parser.parse_args(arguments)
    if options.worker:
        program, task, layers = options.worker
        print(json.dumps(worker(program, task, int(layers), options)))
        return
    if options.quick:
        options.rounds, options.seconds = 3, 0.5
    ratios = [r for r in RATIOS if r.group.startswith(options.only)]
    results = _measure_groups(ratios, options)
    table, records = _table(ratios, results)
    print(_heading(results, options))
    print(table)
    if options.output:
        options.output.write_text(json.dumps({"ratios": records, "measurements": results}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
