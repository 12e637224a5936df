"""Which of two models: births per woman of one country, 1965 to 2010, on a line in the logarithm or on a curve between two levels?

    line:   log births = level + slope decades, with errors of unknown size
    levels: log births = high - fall / (1 + exp((middle - decades) / width)), with the same

`anneal` gives the evidence of each, p(data | model), with its error, and their ratio, the Bayes factor, says by how much the data
favour one of them: a model that could have explained much else pays for it. It prints a table and saves a picture:
docs/images/evidence.png when run from the root with `--output docs/images`.

    python examples/evidence.py --ppl numpyro
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DECADES = 0.5 * np.arange(10)  # since 1965
NAMES = ["line", "levels"]


def in_numpyro() -> tuple[Callable, dict[str, Callable], Callable]:
    """`anneal`, the models by name, and what makes arrays."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from flowppl.numpyro import anneal

    def line(t: Any, y: Any = None) -> None:
        level = numpyro.sample("level", dist.Normal(1.5, 0.7))
        slope = numpyro.sample("slope", dist.Normal(0.0, 0.3))
        observe(level + slope * t, y)

    def levels(t: Any, y: Any = None) -> None:
        high = numpyro.sample("high", dist.Normal(1.5, 0.7))
        fall = numpyro.sample("fall", dist.Normal(0.0, 0.7))
        middle = numpyro.sample("middle", dist.Normal(2.25, 1.0))
        width = numpyro.sample("width", dist.LogNormal(-0.7, 0.5))
        observe(high - fall / (1 + jnp.exp((middle - t) / width)), y)

    def observe(mean: Any, y: Any) -> None:
        sigma = numpyro.sample("sigma", dist.HalfNormal(0.2))
        numpyro.deterministic("curve", mean)
        with numpyro.plate("years", len(DECADES)):
            numpyro.sample("y", dist.Normal(mean, sigma), obs=y)

    return anneal, {"line": line, "levels": levels}, jnp.asarray


def in_pyro() -> tuple[Callable, dict[str, Callable], Callable]:
    """The same in Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    from flowppl.pyro import anneal

    def line(t: Any, y: Any = None) -> None:
        level = pyro.sample("level", dist.Normal(1.5, 0.7))
        slope = pyro.sample("slope", dist.Normal(0.0, 0.3))
        observe(level + slope * t, y)

    def levels(t: Any, y: Any = None) -> None:
        high = pyro.sample("high", dist.Normal(1.5, 0.7))
        fall = pyro.sample("fall", dist.Normal(0.0, 0.7))
        middle = pyro.sample("middle", dist.Normal(2.25, 1.0))
        width = pyro.sample("width", dist.LogNormal(-0.7, 0.5))
        observe(high - fall / (1 + torch.exp((middle - t) / width)), y)

    def observe(mean: Any, y: Any) -> None:
        sigma = pyro.sample("sigma", dist.HalfNormal(0.2))
        pyro.deterministic("curve", mean)
        with pyro.plate("years", len(DECADES)):
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    return anneal, {"line": line, "levels": levels}, lambda a: torch.as_tensor(a).float()


def main() -> None:
    """Anneals, compares, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ppl", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--country", default="IRN", help="three letters")
    parser.add_argument("--draws", type=int, default=10_000, help="for each model")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="the folder of the picture")
    options = parser.parse_args()
    anneal, models, array = {"numpyro": in_numpyro, "pyro": in_pyro}[options.ppl]()
    y = np.log(births(options.country))

    print(f"{'model':10}{'log evidence':>20}{'ESS %':>8}{'k-hat':>8}{'temperatures':>14}{'seconds':>9}")
    found = {}
    for name in NAMES:
        began = time.perf_counter()
        found[name] = anneal(models[name], array(DECADES), array(y), num_samples=options.draws, progress_bar=False)
        value, error = found[name].log_evidence
        share, temperatures = found[name].ess / options.draws, len(found[name].annealing.schedule.betas)
        line = f"{name:10}{f'{value:.4f} ± {error:.4f}':>20}{100 * share:8.1f}{found[name].khat:8.2f}{temperatures:14d}"
        print(f"{line}{time.perf_counter() - began:9.0f}", flush=True)
    (a, error_a), (b, error_b) = (found[name].log_evidence for name in NAMES)
    factor, error = math.exp(b - a), math.hypot(error_a, error_b)
    print(f"\nBayes factor of {NAMES[1]} over {NAMES[0]}: {factor:.3g} ± {factor * error:.1g}")
    picture(y, found, options.output)


def births(country: str) -> np.ndarray:
    """Births per woman in ten years, 1965 to 2010."""
    with (Path(__file__).parent / "data" / "fertility.csv").open(encoding="utf-8") as file:
        rows = {row.pop("country"): row for row in csv.DictReader(file)}
    if country not in rows:
        raise SystemExit(f"no country {country!r}; there are {', '.join(rows)}")
    return np.array(list(rows[country].values()), float)


def picture(y: np.ndarray, found: dict[str, Any], folder: Path) -> None:
    """What each model makes of the data, its evidence, and the way there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.0), layout="constrained")
    curves, evidence, way = figure.subplots(1, 3, width_ratios=[3, 1.4, 3])
    for i, (name, posterior) in enumerate(found.items()):
        mean, sd = posterior.mean()["curve"], posterior.sd()["curve"]
        curves.plot(1965 + 10 * DECADES, np.exp(mean), f"C{i}", label=name)
        curves.fill_between(
            1965 + 10 * DECADES, np.exp(mean - 2 * sd), np.exp(mean + 2 * sd), color=f"C{i}", alpha=0.25, linewidth=0
        )
        value, error = posterior.log_evidence
        evidence.errorbar([i], [value], [2 * error], fmt="o", color=f"C{i}", capsize=4)
        annealing = posterior.annealing
        betas = annealing.schedule.betas
        way.plot(betas, annealing.ess, f"C{i}.-", label=f"{name}: effective share")
        way.plot(betas, annealing.acceptance, f"C{i}.:", label=f"{name}: acceptance")
    curves.plot(1965 + 10 * DECADES, np.exp(y), "k.")
    curves.set(ylabel="births per woman")
    curves.legend(frameon=False)
    evidence.set(xlim=(-0.5, len(found) - 0.5), ylabel="log evidence")
    evidence.set_xticks(range(len(found)), list(found))
    way.set(xlabel="beta", ylim=(0, 1.05))
    way.legend(frameon=False, fontsize="small", loc="lower right")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "evidence.png", dpi=100)


if __name__ == "__main__":
    main()
