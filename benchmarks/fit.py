"""`fit` without options on textbook posteriors, against long NUTS runs.

    python -m benchmarks fit [--ppl numpyro|pyro] [--seeds 3] [--names engel cars ...] [--jobs 1] [--output rows.json]

For each posterior: the normal at the start, the same importance-weighted, and the fit, by the largest error of any mean in
reference sds, the largest relative error of any sd (both of logarithms where a half-Cauchy scale has no variance), k-hat, the
verdict, and the seconds from call to verdict, compilation included, beside those of a default NUTS run (four chains of 1000 + 1000
draws) and its own error. The bounds: means within 0.1, sds within 10 % and k-hat below 0.7. A confident error is a verdict "good"
with a mean off by more than 0.3.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import posteriors

PPLS = ("numpyro", "pyro")
_SHORT = {"good": "good", "usable after reweighting": "usable", "not to be trusted": "flagged"}


def run(ppl: str, name: str, seed: int) -> dict[str, Any]:
    """One fit, and what it is worth."""
    arrays = posteriors.load(name)
    if ppl == "numpyro":
        from flowppl.numpyro import fit

        model = posteriors.numpyro_model(name)
    else:
        import torch

        from flowppl.pyro import fit

        torch.set_num_threads(1)
        model, arrays = posteriors.pyro_model(name), tuple(map(torch.as_tensor, arrays))
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = fit(model, *arrays, seed=seed, progress_bar=False)
    seconds = time.perf_counter() - began
    verdict = posterior.diagnose()
    uniform = np.full(len(posterior.weights), 1 / len(posterior.weights))
    mean, sd = errors(name, posterior, posterior.weights)
    start = posterior.start
    first = SimpleNamespace(samples=posterior._view.constrain(posterior.start_draws[0]))
    return {
        "ppl": ppl,
        "name": name,
        "seed": seed,
        "seconds": seconds,
        "elbo": posterior.elbo[0],
        "log_evidence": posterior.log_evidence[0],
        "mean": mean,
        "sd": sd,
        "raw_mean": errors(name, posterior, uniform)[0],
        "khat": posterior.khat,
        "ess": posterior.ess / len(posterior.weights),
        "verdict": verdict.verdict,
        "reasons": verdict.reasons,
        "steps": len(posterior.history) * 250,
        "coefficient": float(np.mean([r.coefficient for r in posterior.history])),
        "start_elbo": start.elbo,
        "start_khat": start.khat,
        "start_mean": errors(name, first, uniform)[0],
        "start_weighted_mean": errors(name, first, start.weight)[0],
    }


def errors(name: str, posterior: Any, weights: np.ndarray) -> tuple[float, float]:
    """The largest error of a mean, in reference sds, and of an sd, relative, over the elements of all sites."""
    means, sds = [], []
    for site, truth in posteriors.reference(name)["sites"].items():
        x, what = posterior.samples[site], ""
        if site in posteriors.WITHOUT_VARIANCE.get(name, ()):
            x, what = np.log(x), "free_"
        x = x.reshape(len(weights), -1)
        mean, sd = (np.ravel(truth[what + kind]) for kind in ("mean", "sd"))
        found = weights @ x
        means.append(np.abs(found - mean) / sd)
        sds.append(np.abs(np.sqrt(weights @ (x - found) ** 2) / sd - 1))
    return float(np.max(np.concatenate(means))), float(np.max(np.concatenate(sds)))


def reached(row: dict[str, Any]) -> bool:
    """Whether a fit is within the bounds."""
    return row["mean"] < 0.1 and row["sd"] < 0.1 and row["khat"] < 0.7


def table(rows: list[dict[str, Any]]) -> str:
    """The worst seed of each posterior, with medians of seconds and steps, and what all add up to for each PPL."""
    head = ["posterior", "dim", "PPL", "within", "mean, sds", "sd", "k-hat", "ESS", "verdicts", "seconds", "steps"]
    head += ["start: mean", "weighted", "k-hat", "NUTS: mean", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    sums = []
    for ppl in PPLS:
        mine = [r for r in rows if r["ppl"] == ppl]
        groups = [[r for r in mine if r["name"] == name] for name in posteriors.POSTERIORS]
        groups = [group for group in groups if group]
        lines += [f"| {' | '.join(_cells(group))} |" for group in groups]
        confident = sum(r["verdict"] == "good" and r["raw_mean"] > 0.3 for r in mine)
        unflagged = [r for r in mine if r["verdict"] != "not to be trusted" and not reached(r)]
        off = max((r["mean"] for r in unflagged), default=0.0)
        if mine:
            sums.append(
                f"{ppl}: {sum(all(map(reached, group)) for group in groups)} of {len(groups)} posteriors within the bounds "
                f"with every seed, {sum(map(reached, mine))} of {len(mine)} fits; {len(unflagged)} outside of them and not "
                f"flagged, with means within {off:.2f} sds; {confident} confident errors."
            )
    return "\n".join([*lines, "", *sums])


def _cells(group: list[dict[str, Any]]) -> list[str]:
    name = group[0]["name"]
    reference = posteriors.reference(name)
    worst = {
        k: max(r[k] for r in group) for k in ("mean", "sd", "khat", "start_mean", "start_weighted_mean", "start_khat")
    }
    counts = Counter(_SHORT[r["verdict"]] for r in group)
    return [
        name,
        str(posteriors.POSTERIORS[name].dim),
        group[0]["ppl"],
        f"{sum(map(reached, group))}/{len(group)}",
        f"{worst['mean']:.3f}",
        f"{worst['sd']:.1%}",
        f"{worst['khat']:.2f}",
        f"{min(r['ess'] for r in group):.0%}",
        ", ".join(f"{n} {verdict}" for verdict, n in counts.items()),
        f"{np.median([r['seconds'] for r in group]):.0f}",
        f"{np.median([r['steps'] for r in group]):.0f}",
        f"{worst['start_mean']:.2f}",
        f"{worst['start_weighted_mean']:.2f}",
        f"{worst['start_khat']:.2f}",
        f"{reference['nuts_mean_error']:.2f}",
        f"{reference['nuts_seconds']:.0f}",
    ]


def _in_a_process(ppl: str, name: str, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks", "fit", "--one", ppl, name, str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"ppl": ppl, "name": name, "seed": seed, "error": done.stderr[-2000:]}
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str]) -> None:
    """Runs every fit in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks fit", description=__doc__)
    parser.add_argument("--ppl", choices=PPLS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--names", nargs="+", default=list(posteriors.POSTERIORS), choices=list(posteriors.POSTERIORS))
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes at a time; seconds mean little with more than one"
    )
    parser.add_argument("--output", type=Path, help="a file for the rows")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        ppl, name, seed = options.one
        print(json.dumps(run(ppl, name, int(seed))))
        return
    ppls = PPLS if options.ppl is None else (options.ppl,)
    tasks = [(ppl, name, seed) for seed in range(options.seeds) for name in options.names for ppl in ppls]
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in as_completed([pool.submit(_in_a_process, *task) for task in tasks]):
            row = done.result()
            print(row.get("error") or json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
            if options.output:
                options.output.write_text(json.dumps(rows, indent=1))
    print(table([row for row in rows if "error" not in row]))


if __name__ == "__main__":
    main(sys.argv[1:])
