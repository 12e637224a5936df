"""One guide, four objectives, one of them of our own: a line through the log of Brazil's births per woman, 1965 to 2010.

    log births = a + b decades since 1965, with errors of a tenth

The intercept and the slope are correlated in the posterior, and the guide, the PPL's own `AutoDiagonalNormal`, cannot say so: what
it gives up instead is up to the objective. The ELBO keeps the guide inside the posterior; the others lay it over the posterior, so
that weights are bounded. It prints a table and saves a picture: docs/images/objectives.png when run from the root with
`--output docs/images`.

    python examples/objectives.py --ppl numpyro
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flowppl.weights import ess, log_mean_exp, psis

BIRTHS = [5.815, 5.024, 4.499, 4.073, 3.449, 2.809, 2.502, 2.364, 2.066, 1.838]  # per woman, every fifth year
DECADES = 0.5 * np.arange(10)
PARTICLES, DRAWS = 64, 100_000
LogDensity = Callable[[np.ndarray], np.ndarray]  # points (n, 2) to (n,)


def pairs(log_w: Any) -> Any:
    """The bound that two particles give, on average over pairs: log-weights (K, *batch) of either framework to (*batch,)."""
    return log_mean_exp(log_w.reshape(2, -1, *log_w.shape[1:]), axis=0).mean(0)


RATE = 3e-2  # the first step size
AFTER_ELBO = {"pairs": pairs, "iwae": "iwae", "cubo": "cubo"}


def in_numpyro(steps: int) -> tuple[LogDensity, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The model's log density, and the guide's location and scales by objective."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    import optax
    from numpyro.infer import SVI
    from numpyro.infer.autoguide import AutoDiagonalNormal

    from flowppl.numpyro import LogDensity, Objective, PathELBO

    def model(x: Any, y: Any) -> None:
        a = numpyro.sample("a", dist.Normal(0.0, 3.0))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("years", len(x)):
            numpyro.sample("y", dist.Normal(a + b * x, 0.1), obs=y)

    data = jnp.array(DECADES), jnp.log(jnp.array(BIRTHS))
    guide = AutoDiagonalNormal(model)

    # Each starts from the guide before: the first weights of a cold start are those of one particle.
    objectives = {"elbo": PathELBO(PARTICLES), **{name: Objective(f, PARTICLES) for name, f in AFTER_ELBO.items()}}
    params, fitted = None, {}
    for name, objective in objectives.items():
        svi = SVI(model, guide, optax.adam(optax.cosine_decay_schedule(RATE, steps)), objective)
        params = svi.run(jax.random.key(0), steps, *data, init_params=params, progress_bar=False).params
        q = guide.get_posterior(params)
        fitted[name] = np.asarray(q.loc, np.float64), np.asarray(q.scale, np.float64)
    log_density = jax.jit(LogDensity(model, data).log_prob)
    return lambda u: np.asarray(log_density(jnp.asarray(u, jnp.float32)), np.float64), fitted


def in_pyro(steps: int) -> tuple[LogDensity, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The same in Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI
    from pyro.infer.autoguide import AutoDiagonalNormal

    from flowppl.pyro import LogDensity, Objective, PathELBO

    def model(x: Any, y: Any) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("years", len(x)):
            pyro.sample("y", dist.Normal(a + b * x, 0.1), obs=y)

    pyro.set_rng_seed(0)
    data = torch.tensor(DECADES).float(), torch.tensor(BIRTHS).log()

    guide = AutoDiagonalNormal(model)
    objectives = {"elbo": PathELBO(PARTICLES), **{name: Objective(f, PARTICLES) for name, f in AFTER_ELBO.items()}}
    fitted = {}
    for name, objective in objectives.items():
        scheduler = pyro.optim.CosineAnnealingLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": RATE}, "T_max": steps}
        )
        svi = SVI(model, guide, scheduler, objective)
        for _ in range(steps):
            svi.step(*data)
            scheduler.step()
        q = guide.get_posterior().base_dist
        fitted[name] = q.loc.detach().double().clone().numpy(), q.scale.detach().double().clone().numpy()
    density = LogDensity(model, data)
    return lambda u: density.log_prob(torch.as_tensor(u).float()).double().detach().numpy(), fitted


def main() -> None:
    """Trains, weighs, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ppl", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--steps", type=int, default=1000, help="for each objective")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="the folder of the picture")
    options = parser.parse_args()
    began = time.perf_counter()
    log_density, fitted = {"numpyro": in_numpyro, "pyro": in_pyro}[options.ppl](options.steps)
    print(
        f"{time.perf_counter() - began:.0f} seconds\n\n{'objective':12}{'ELBO':>9}{'log evidence':>20}{'ESS %':>8}{'k-hat':>8}"
    )
    z = np.random.default_rng(0).standard_normal((DRAWS, 2))
    for name, (loc, scale) in fitted.items():
        log_q = -0.5 * (z**2).sum(1) - np.log(2 * np.pi * scale.prod())
        log_w = log_density(loc + scale * z) - log_q
        share = float(ess(log_w)) / DRAWS
        error = np.sqrt((1 / share - 1) / DRAWS)
        evidence = f"{float(log_mean_exp(log_w)):.4f} ± {error:.4f}"
        print(f"{name:12}{log_w.mean():9.3f}{evidence:>20}{100 * share:8.1f}{psis(log_w)[1]:8.2f}")
    a, b = np.linspace(1.4, 2.1, 401), np.linspace(-0.42, -0.12, 401)
    grid = log_density(np.stack(np.meshgrid(a, b), -1).reshape(-1, 2)).reshape(401, 401)
    cell = (a[1] - a[0]) * (b[1] - b[0])
    print(f"{'by a grid':21}{np.log(np.exp(grid - grid.max()).sum() * cell) + grid.max():>11.4f}")
    picture(a, b, grid, fitted, options.output)


def picture(a: np.ndarray, b: np.ndarray, grid: np.ndarray, fitted: dict[str, Any], folder: Path) -> None:
    """The posterior's regions of 50 and 95 percent, and the guides' of 95."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    mass = np.sort(np.exp(grid - grid.max()).ravel())[::-1]
    levels = [np.log(mass[np.searchsorted(mass.cumsum(), p * mass.sum())]) + grid.max() for p in (0.95, 0.5)]
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.sqrt(-2 * np.log(0.05)) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    figure, axes = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
    axes.contourf(a, b, grid, [*levels, grid.max()], colors=["0.85", "0.65"])
    for i, (name, (loc, scale)) in enumerate(fitted.items()):
        axes.plot(*(loc + scale * circle).T, f"C{i}", label=name)
    axes.set(xlabel="intercept", ylabel="slope per decade", xlim=(1.54, 1.96), ylim=(-0.345, -0.195))
    axes.legend(frameon=False, loc="upper left")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "objectives.png", dpi=110)


if __name__ == "__main__":
    main()
