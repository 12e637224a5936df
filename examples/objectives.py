"""One guide, four objectives, one of them of our own: the bioassay of Racine et al. 1986, four doses with five animals each.

    logit P(death) = a + b log dose

The posterior of a and b is correlated and skewed, and a mean-field normal is none of that. The ELBO fits it into the posterior, the
chi upper bound lays it over the posterior, the importance-weighted bound is between them, and an objective of our own is the
effective sample size itself. The guide is the PPL's `AutoDiagonalNormal`. It prints a table and saves a picture:
docs/images/objectives.png when run from the root with `--output docs/images`.

    python examples/objectives.py --ppl numpyro
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flowppl.weights import ess, log_mean_exp, psis

DOSE = [-0.86, -0.30, -0.05, 0.73]  # log g/ml
DEATHS = [0.0, 1.0, 3.0, 5.0]  # of five
PARTICLES, DRAWS = 64, 100_000
LogDensity = Callable[[np.ndarray], np.ndarray]  # points (n, 2) to (n,)


def log_ess(log_w: Any) -> Any:
    """The log of the effective sample size, as a share of the particles: (mean w)^2 / mean w^2. Arrays of either framework."""
    return 2 * log_mean_exp(log_w, axis=0) - log_mean_exp(2 * log_w, axis=0)


OBJECTIVES = {"elbo": "elbo", "iwae": "iwae", "cubo": "cubo", "own: ESS": log_ess}


def in_numpyro(steps: int) -> tuple[LogDensity, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The model's log density, and the location and scale of the guide for every objective."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    import optax
    from numpyro.infer import SVI
    from numpyro.infer.autoguide import AutoDiagonalNormal

    from flowppl.numpyro import LogDensity, Objective, PathELBO

    def model(dose: Any, deaths: Any) -> None:
        a = numpyro.sample("a", dist.Normal(0.0, 5.0))
        b = numpyro.sample("b", dist.Normal(10.0, 20.0))
        with numpyro.plate("group", 4):
            numpyro.sample("deaths", dist.Binomial(5, logits=a + b * dose), obs=deaths)

    data = jnp.array(DOSE), jnp.array(DEATHS)
    guide = AutoDiagonalNormal(model)

    def train(objective: Any, start: Any) -> Any:
        svi = SVI(model, guide, optax.adam(optax.cosine_decay_schedule(0.1, steps)), objective)
        return svi.run(jax.random.key(0), steps, *data, init_params=start, progress_bar=False).params

    # All start from the ELBO's guide: where nearly all weights are zero the others have nothing to go by.
    start, fitted = train(PathELBO(PARTICLES), None), {}
    for name, objective in OBJECTIVES.items():
        q = guide.get_posterior(train(Objective(objective, PARTICLES), start))
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

    def model(dose: Any, deaths: Any) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 5.0))
        b = pyro.sample("b", dist.Normal(10.0, 20.0))
        with pyro.plate("group", 4):
            pyro.sample("deaths", dist.Binomial(5, logits=a + b * dose), obs=deaths)

    pyro.set_rng_seed(0)
    data = torch.tensor(DOSE), torch.tensor(DEATHS)

    def train(objective: Any, guide: Any) -> Any:
        pyro.clear_param_store()  # it would hold the parameters of the guide before
        cosine = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "T_max": steps}
        scheduler = pyro.optim.CosineAnnealingLR(cosine)
        svi = SVI(model, guide, scheduler, objective)
        for _ in range(steps):
            svi.step(*data)
            scheduler.step()
        return guide

    start, fitted = train(PathELBO(PARTICLES), AutoDiagonalNormal(model)), {}
    for name, objective in OBJECTIVES.items():
        q = train(Objective(objective, PARTICLES), copy.deepcopy(start)).get_posterior().base_dist
        fitted[name] = q.loc.detach().double().numpy(), q.scale.detach().double().numpy()
    density = LogDensity(model, data)
    return lambda u: density.log_prob(torch.as_tensor(u).float()).double().detach().numpy(), fitted


def main() -> None:
    """Trains, weighs, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ppl", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--steps", type=int, default=1500, help="for each objective")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="the folder of the picture")
    options = parser.parse_args()
    began = time.perf_counter()
    log_density, fitted = {"numpyro": in_numpyro, "pyro": in_pyro}[options.ppl](options.steps)
    print(f"{time.perf_counter() - began:.0f} seconds\n\n{'objective':12}{'ELBO':>9}{'log evidence':>20}{'ESS %':>8}{'k-hat':>8}")
    z = np.random.default_rng(0).standard_normal((DRAWS, 2))
    for name, (loc, scale) in fitted.items():
        log_q = -0.5 * (z**2).sum(1) - np.log(2 * np.pi * scale.prod())
        log_w = log_density(loc + scale * z) - log_q
        share = float(ess(log_w)) / DRAWS
        error = np.sqrt((1 / share - 1) / DRAWS)
        evidence = f"{float(log_mean_exp(log_w)):.4f} ± {error:.4f}"
        print(f"{name:12}{log_w.mean():9.3f}{evidence:>20}{100 * share:8.1f}{psis(log_w)[1]:8.2f}")
    a, b = np.linspace(-6.0, 14.0, 401), np.linspace(-10.0, 90.0, 401)
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
        axes.plot(*(loc + scale * circle).T, f"C{i}", linestyle=("-", "--", "-", "-.")[i], label=name)
    axes.set(xlabel="a", ylabel="b", xlim=(-4, 7), ylim=(-8, 45))
    axes.legend(frameon=False, loc="upper left")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "objectives.png", dpi=110)


if __name__ == "__main__":
    main()
