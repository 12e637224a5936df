"""Simulation-based calibration of `fit` without options, and of an `AmortizedFlow`.

    python -m benchmarks calibration [--only NAME ...] [--replications N] [--output rows.json] [--picture FILE.png]

Again and again, parameters are drawn from a model's prior and data from the model, and the posterior of these data is fitted. Where
posteriors are right, the rank of the true value of each scalar among 99 draws is uniform (Talts et al. 2018). The draws are
`posterior.resample(99)` of each fit, whatever its verdict, and `sample_posterior` of one guide that was trained on other groups of
the model. The bound: no p-value of the chi-square test below 1e-3, times the number of scalars. Rows in the file are taken over, so
that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowppl.diagnostics import Calibration
from flowppl.posterior import coordinates

DRAWS = 99
REPLICATIONS = {"regression": 120, "logistic": 120, "groups": 120, "amortized": 1000}
TRAINED, BATCH, STEPS, RATE = 20_000, 128, 6000, 3e-3  # of the amortized guide
BOUND = 1e-3
Row = dict[str, Any]


def models() -> dict[str, tuple[Callable, tuple[Any, ...]]]:
    """Models, which draw their data if these are None, and the arguments before the data."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def regression(x: Any, y: Any = None) -> None:
        """A line with noise of an unknown scale, on twelve points."""
        intercept = numpyro.sample("intercept", dist.Normal(0.0, 2.0))
        slope = numpyro.sample("slope", dist.Normal(0.0, 2.0))
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        with numpyro.plate("points", len(x)):
            numpyro.sample("y", dist.Normal(intercept + slope * x, scale), obs=y)

    def logistic(x: Any, y: Any = None) -> None:
        """So few answers that some separate: coefficients are skewed, and nearly as wide as their prior."""
        beta = numpyro.sample("beta", dist.Normal(jnp.zeros(3), 2.0).to_event(1))
        with numpyro.plate("answers", len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

    def groups(size: int, y: Any = None) -> None:
        """Four groups around a common mean, written as they come: a funnel where their spread may be zero."""
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        with numpyro.plate("groups", 4):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta[:, None], 1.0).expand([4, size]).to_event(1), obs=y)

    rng = np.random.default_rng(0)
    x = np.column_stack([np.ones(16), rng.standard_normal((16, 2))])
    return {
        "regression": (regression, (jnp.linspace(-1.0, 1.0, 12),)),
        "logistic": (logistic, (jnp.asarray(x, jnp.float32),)),
        "groups": (groups, (3,)),
    }


def many(num: int, y: Any = None, batch_size: int | None = None) -> None:
    """Groups of five numbers, each with a location and a scale of its own: local latents only."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    with numpyro.plate("groups", num, subsample_size=batch_size):
        batch = None if y is None else numpyro.subsample(y, event_dim=1)
        loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.7))
        numpyro.sample("y", dist.Normal(loc[:, None], scale[:, None] * jnp.ones(5)).to_event(1), obs=batch)


def summaries(num: int, y: Any, batch_size: int | None = None) -> Any:
    """The mean of each group and the logarithm of its standard deviation."""
    import jax.numpy as jnp

    return jnp.stack([jnp.mean(y, -1), jnp.log(jnp.std(y, -1))], -1)


def simulate(model: Callable, seed: int, *args: Any) -> tuple[dict[str, Any], Any]:
    """Values of the latents by site, and data."""
    import jax
    from numpyro import handlers

    trace = handlers.trace(handlers.seed(model, jax.random.key(seed))).get_trace(*args)
    values = {name: site["value"] for name, site in trace.items() if site["type"] == "sample"}
    y = values.pop("y")
    return values, y


def ranks(truth: dict[str, Any], draws: dict[str, Any]) -> dict[str, int]:
    """How many draws `(DRAWS, *shape)` of each scalar are below the truth."""
    shapes = {name: np.shape(value) for name, value in truth.items()}
    counts = [np.ravel((np.asarray(draws[name]) < np.asarray(truth[name])).sum(0)) for name in shapes]
    return dict(zip(coordinates(shapes), np.concatenate(counts).tolist(), strict=True))


def fits(name: str, seeds: range) -> Iterator[Row]:
    """A fit for each seed."""
    from flowppl.numpyro import fit

    model, args = models()[name]
    warnings.simplefilter("ignore")
    for seed in seeds:
        truth, y = simulate(model, seed, *args)
        began = time.perf_counter()
        posterior = fit(model, *args, y, seed=seed, progress_bar=False)
        yield {
            "name": name,
            "seed": seed,
            "ranks": ranks(truth, posterior.resample(DRAWS, seed)),
            "verdict": posterior.diagnose().verdict,
            "khat": posterior.khat,
            "steps": len(posterior.history) * 250,
            "seconds": time.perf_counter() - began,
        }


def amortized(seeds: range) -> Iterator[Row]:
    """One guide, and a fresh group for each seed."""
    import jax
    import optax
    from numpyro.infer import SVI, Trace_ELBO

    from flowppl import flows
    from flowppl.numpyro import AmortizedFlow

    _, seen = simulate(many, 0, TRAINED)
    guide = AmortizedFlow(many, summaries, "groups", flow=flows.nsf(layers=4), gradient="path")
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))
    svi = SVI(many, guide, optimizer, Trace_ELBO(num_particles=8))
    params = svi.run(jax.random.key(0), STEPS, TRAINED, seen, batch_size=BATCH, progress_bar=False).params
    truth, fresh = simulate(many, 1, seeds.stop)
    key, shape = jax.random.key(1), (DRAWS,)
    draws = jax.jit(lambda y: guide.sample_posterior(key, params, seeds.stop, y, sample_shape=shape))(fresh)
    for seed in seeds:
        one = {name: value[:, seed] for name, value in draws.items()}
        yield {"name": "amortized", "seed": seed, "ranks": ranks({k: v[seed] for k, v in truth.items()}, one)}


def table(rows: list[Row]) -> str:
    """A line for each model."""
    head = ["model", "PPL", "replications", "scalars", "smallest p x scalars", "of", "in 50 %", "worst"]
    head += ["in 90 %", "worst", "not to be trusted"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|---:|---:|---|---:|---|---:|---|---:|"]
    for name, calibration in calibrations(rows).items():
        p = calibration.p_values(bins(calibration))
        cells = [name, "numpyro", str(len(calibration.ranks)), str(len(p)), f"{min(1.0, len(p) * p.min()):.2g}"]
        cells += [calibration.names[p.argmin()]]
        for level in (0.5, 0.9):
            found = calibration.coverage(level)
            error = np.sqrt(level * (1 - level) / len(calibration.ranks))
            worst = np.abs(found - level).argmax()
            cells += [f"{found.mean():.1%} ± {error:.1%}", f"{found[worst]:.1%} ({calibration.names[worst]})"]
        verdicts = [row["verdict"] for row in rows if row["name"] == name and "verdict" in row]
        cells += [str(verdicts.count("not to be trusted")) if verdicts else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def calibrations(rows: list[Row]) -> dict[str, Calibration]:
    """The ranks of each model that there are rows of."""
    found = {}
    for name in REPLICATIONS:
        own = [row["ranks"] for row in rows if row["name"] == name]
        if own:
            found[name] = Calibration(np.array([list(one.values()) for one in own]), DRAWS, list(own[0]))
    return found


def bins(calibration: Calibration) -> int:
    """As many as twenty, with five ranks expected in each."""
    return min(20, max(2, len(calibration.ranks) // 5))


def draw(rows: list[Row], path: Path) -> None:
    """Histograms of the ranks of each scalar, over what 99 % of such bars are within."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from scipy.stats import binom

    panels = [(name, c.names[i], c.ranks[:, i]) for name, c in calibrations(rows).items() for i in range(len(c.names))]
    columns, num_bins = 7, 10
    figure, axes = pyplot.subplots(
        -(-len(panels) // columns), columns, figsize=(10.5, 3.2), layout="constrained", squeeze=False, sharex=True
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, scalar, column) in zip(axes.flat, panels, strict=False):
        axis.set_axis_on()
        expected = len(column) / num_bins
        low, high = binom.interval(0.99, len(column), 1 / num_bins)
        axis.axhspan(low / expected, high / expected, color="0.88")
        axis.hist(
            column,
            np.linspace(0, DRAWS + 1, num_bins + 1) - 0.5,
            weights=np.full(len(column), 1 / expected),
            color="C0",
        )
        axis.set(title=f"{name}\n{scalar}", ylim=(0, 2.6), yticks=[0, 1, 2], xticks=[0, DRAWS])
        axis.title.set_fontsize(8)
        axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=110)


def _rows(name: str, first: int, last: int, cache: str) -> Iterator[Row]:
    """Those of a process of its own, where jax takes data as arguments: what it compiled once serves all replications."""
    hoisted = {"JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS": "1", "JAX_EMBEDDED_CONSTANTS_MAX_BYTES": "0"}
    kept = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "benchmarks", "calibration", "--one", name, str(first), str(last)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **hoisted, **kept}) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        print(f"{name} ended with {process.returncode}", file=sys.stderr)


def main(arguments: Sequence[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks calibration", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(REPLICATIONS), default=list(REPLICATIONS))
    parser.add_argument("--replications", type=int, help="of each model")
    parser.add_argument("--output", type=Path, help="a file for the rows")
    parser.add_argument("--picture", type=Path, help="a file for the histograms")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        name, seeds = options.one[0], range(*map(int, options.one[1:]))
        for row in amortized(seeds) if name == "amortized" else fits(name, seeds):
            print(json.dumps(row), flush=True)
        return
    rows = json.loads(options.output.read_text()) if options.output and options.output.exists() else []
    with tempfile.TemporaryDirectory() as cache:
        for name in options.only:
            have, wanted = sum(row["name"] == name for row in rows), options.replications or REPLICATIONS[name]
            for row in _rows(name, have, wanted, cache) if have < wanted else ():
                rows.append(row)
                if options.output:
                    options.output.write_text(json.dumps(rows))
    print(table(rows))
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main(sys.argv[1:])
