"""One guide for the regressions of 188 countries: births per woman over four decades, fitted in minibatches.

Each country has an intercept and a slope of its own, which vary around common means. An encoder reads a country's ten numbers;
every fifth country is left out of the training and encoded all the same. Posterior means are compared with those of a long NUTS run
over all countries (`references/make_fertility.py`). The picture is docs/images/amortized.png when run from the root with
`--output docs/images`.

    python examples/amortized.py --ppl pyro
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
BATCH, PARTICLES, DRAWS, RATE = 32, 8, 4000, 5e-3
Arrays = dict[str, np.ndarray]


def load() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Codes of the countries, decades since 1987.5 `(10,)`, and log rates `(188, 10)`."""
    header, *rows = (line.split(",") for line in (HERE / "data" / "fertility.csv").read_text().splitlines())
    x = (np.array(header[1:], float) - 1987.5) / 10
    return [row[0] for row in rows], x, np.log(np.array([row[1:] for row in rows], float))


def features(x, y, batch_size=None):
    """What the encoder sees: the numbers, on a scale of one."""
    return (y - 1.3) / 0.5


def numpyro_model() -> Callable:
    """The model in NumPyro."""
    import numpyro
    import numpyro.distributions as dist

    def model(x, y, batch_size=None):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        tau = numpyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
        with numpyro.plate("countries", len(y), subsample_size=batch_size):
            batch = numpyro.subsample(y, event_dim=1)
            theta = numpyro.sample("theta", dist.Normal(mu, tau).to_event(1))
            line = theta[..., :1] + theta[..., 1:] * x
            numpyro.sample("obs", dist.Normal(line, sigma[..., None]).to_event(1), obs=batch)

    return model


def pyro_model() -> Callable:
    """The same model in Pyro."""
    import pyro
    import pyro.distributions as dist

    def model(x, y, batch_size=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
        with pyro.plate("countries", len(y), subsample_size=batch_size):
            batch = pyro.subsample(y, event_dim=1)
            theta = pyro.sample("theta", dist.Normal(mu, tau).to_event(1))
            line = theta[..., :1] + theta[..., 1:] * x
            pyro.sample("obs", dist.Normal(line, sigma[..., None]).to_event(1), obs=batch)

    return model


def in_numpyro(x: np.ndarray, y: np.ndarray, seen: np.ndarray, steps: int) -> Arrays:
    """Draws of all sites, of all countries, from a guide that was trained on some."""
    import jax
    import jax.numpy as jnp
    import optax
    from numpyro.infer import SVI, Trace_ELBO

    from flowppl import flows
    from flowppl.numpyro import AmortizedFlow

    model, x, y, kept = numpyro_model(), jnp.asarray(x), jnp.asarray(y), jnp.asarray(y[seen])
    guide = AmortizedFlow(model, features, "countries", flow=flows.nsf(layers=2), global_flow="affine", gradient="path")
    svi = SVI(model, guide, optax.adam(optax.cosine_decay_schedule(RATE, steps)), Trace_ELBO(num_particles=PARTICLES))
    result = svi.run(jax.random.key(0), steps, x, kept, batch_size=BATCH, progress_bar=False)
    draw = jax.jit(lambda p: guide.sample_posterior(jax.random.key(1), p, x, y, sample_shape=(DRAWS,)))
    return {name: np.asarray(values) for name, values in draw(result.params).items()}


def in_pyro(x: np.ndarray, y: np.ndarray, seen: np.ndarray, steps: int) -> Arrays:
    """The same in Pyro."""
    import pyro
    import torch
    from pyro.infer import SVI, Trace_ELBO

    from flowppl import flows
    from flowppl.pyro import AmortizedFlow

    pyro.set_rng_seed(0)
    model, x, y = pyro_model(), torch.as_tensor(x).float(), torch.as_tensor(y).float()
    kept = y[torch.as_tensor(seen)]
    guide = AmortizedFlow(model, features, "countries", flow=flows.nsf(layers=2), global_flow="affine", gradient="path")
    guide.setup(x, kept, batch_size=BATCH)
    optimizer = torch.optim.Adam
    cosine = {"optimizer": optimizer, "optim_args": {"lr": RATE}, "T_max": steps}
    scheduler = pyro.optim.CosineAnnealingLR(cosine)
    svi = SVI(model, guide, scheduler, Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True))
    for _ in range(steps):
        svi.step(x, kept, batch_size=BATCH)
        scheduler.step()
    return {name: values.numpy() for name, values in guide.sample_posterior(None, x, y, sample_shape=(DRAWS,)).items()}


def main() -> None:
    """Fits, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ppl", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    options = parser.parse_args()
    _, x, y = load()
    seen = np.arange(len(y)) % 5 != 4
    start = time.perf_counter()
    draws = {"numpyro": in_numpyro, "pyro": in_pyro}[options.ppl](x, y, seen, options.steps)
    print(f"{options.ppl}: {options.steps} steps and {DRAWS} draws in {time.perf_counter() - start:.0f} s\n")
    with np.load(HERE / "references" / "fertility.npz") as file:
        reference = dict(file)
    mean, sd = reference["mean/theta"], reference["std/theta"]
    off = np.abs(draws["theta"].mean(0) - mean) / sd
    ratio = draws["theta"].std(0) / sd
    print("countries     mean |error| in sds: intercept  slope    ratio of sds: intercept  slope")
    for name, rows in (("in training", seen), ("left out", ~seen)):
        error, width = off[rows].mean(0), ratio[rows].mean(0)
        print(f"{name:12s} {rows.sum():3d} {error[0]:27.3f} {error[1]:6.3f} {width[0]:26.3f} {width[1]:6.3f}")
    for name in ("mu", "tau", "sigma"):
        error = (draws[name].mean(0) - reference[f"mean/{name}"]) / reference[f"std/{name}"]
        print(f"{name}: off by {np.round(error, 2)} sds")
    _draw(x, y, seen, draws["theta"], mean, sd, options.output)


def _draw(
    x: np.ndarray, y: np.ndarray, seen: np.ndarray, theta: np.ndarray, mean: np.ndarray, sd: np.ndarray, folder: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(10.5, 3.4), layout="constrained")
    years, unseen = 1987.5 + 10 * x, np.flatnonzero(~seen)
    for i, color in zip(unseen[[1, 9, 17, 30]], ("C0", "C1", "C2", "C3"), strict=True):
        lines = np.exp(theta[:, i, :1] + theta[:, i, 1:] * x)
        axes[0].fill_between(years, *np.quantile(lines, [0.05, 0.95], axis=0), color=color, alpha=0.3, linewidth=0)
        axes[0].plot(years, np.exp(y[i]), ".", color=color)
    axes[0].set(title="four countries left out", xlabel="year", ylabel="births per woman")
    for k, name in enumerate(("intercept", "slope per decade")):
        ax = axes[1 + k]
        for rows, label in ((seen, "in training"), (~seen, "left out")):
            ax.errorbar(
                mean[rows, k],
                theta[:, rows, k].mean(0),
                theta[:, rows, k].std(0),
                sd[rows, k],
                ".",
                lw=0.6,
                label=label,
            )
        ax.axline((mean[0, k], mean[0, k]), slope=1, color="black", linewidth=0.5)
        ax.set(title=name, xlabel="NUTS", ylabel="AmortizedFlow")
    axes[1].legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "amortized.png", dpi=130)


if __name__ == "__main__":
    main()
