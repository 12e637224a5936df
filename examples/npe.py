"""Lynx and hare by neural posterior estimation: populations that are easy to simulate, with a likelihood that none can write down.

Lotka and Volterra's equations with noise in both growth rates, for log h and log l of the densities of hares and lynxes,

    d log h = (birth - predation l) dt + noise dW_1,    d log l = (growth h - death) dt + noise dW_2,

are seen once a year, with an error, through the pelts that the Hudson's Bay Company traded. Between two years lie ten steps of
Euler and Maruyama, so the density of the data is an integral over all paths. Here the paths are only drawn: a flow learns the
posterior of the rates, the noise, the error and the start from simulated histories, and then sees the real one.

    python examples/npe.py --ppl numpyro

prints the posterior beside two tests of its calibration on fresh simulations, and draws the predictive distribution over the data:
npe.png, or docs/images/npe.png when run from the root with `--output docs/images`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fitting import pyplot, save

STEPS, YEARS = 10, 21  # of Euler and Maruyama in each year; years of data
LOWEST, HIGHEST = -7.0, 7.0  # where logarithms of densities are stopped: one pelt, and a million
# log-normal priors: median and sd of the logarithm
PRIORS = {
    "birth": (0.6, 0.4),
    "predation": (0.03, 0.4),
    "growth": (0.03, 0.4),
    "death": (0.8, 0.4),
    "noise": (0.15, 0.5),
    "error": (0.15, 0.5),
    "hares": (30.0, 0.5),
    "lynxes": (6.0, 0.5),
}


def main() -> None:
    """Simulates, trains, tests, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ppl", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--simulations", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=20_000, help="of training, at most")
    parser.add_argument("--replications", type=int, default=1000, help="of the test of calibration")
    parser.add_argument("--nuts", action="store_true", help="NUTS over parameters and paths beside it, in NumPyro")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="the folder of the picture")
    options = parser.parse_args()

    model, npe, predict, log = in_numpyro() if options.ppl == "numpyro" else in_pyro()
    years, pelts = history()
    began = time.process_time()
    amortized = npe(
        model,
        observed="pelts",
        latents=list(PRIORS),  # not the noise of the paths, which is averaged over
        summary=lambda data: log(data["pelts"] + 0.1).reshape(len(data["pelts"]), -1),
        embedding=32,
        hidden=(128, 128),
        num_simulations=options.simulations,
        max_steps=options.steps,
    )
    print(
        f"{options.simulations} simulations, {len(amortized.history)} looks, {time.process_time() - began:.0f} s of CPU time"
    )
    print("held-out log q {:.2f} ± {:.2f}".format(*amortized.held_out))
    draws = amortized.condition(pelts).sample(4000)
    table(draws, amortized.calibration(options.replications, seed=1))
    if options.nuts:
        by_nuts(pelts)
    picture(years, pelts, predict(draws), options.output / "npe.png")


def table(draws: dict[str, np.ndarray], calibration: Any) -> None:
    """Prints the posterior, and whether posteriors of fresh simulations are right."""
    print(f"{'':11}{'prior median':>13}{'mean':>8}{'sd':>8}{'chi-square p':>14}{'50%':>8}{'90%':>8}")
    columns = zip(
        calibration.names, calibration.p_values(), calibration.coverage(0.5), calibration.coverage(0.9), strict=True
    )
    for name, p, half, most in columns:
        x = draws[name]
        print(f"{name:11}{PRIORS[name][0]:13.3g}{x.mean():8.3f}{x.std():8.3f}{p:14.3f}{half:8.1%}{most:8.1%}")
    print(f"{'error of':32}{'':>8}{'':>14}{_error(0.5, calibration):8.1%}{_error(0.9, calibration):8.1%}")


def by_nuts(pelts: np.ndarray) -> None:
    """Prints the posterior by a chain over the parameters and the 400 kicks of a path, which this model still allows."""
    import jax
    from numpyro.diagnostics import summary
    from numpyro.infer import MCMC, NUTS

    mcmc = MCMC(NUTS(in_numpyro()[0], max_tree_depth=8), num_warmup=1500, num_samples=5000, progress_bar=False)
    mcmc.run(jax.random.key(1), pelts)
    found = summary({name: mcmc.get_samples(group_by_chain=True)[name] for name in sorted(PRIORS)})
    print(f"{'NUTS':24}{'mean':>8}{'sd':>8}{'effective draws':>18}")
    for name, row in found.items():
        print(f"{name:24}{row['mean']:8.3f}{row['std']:8.3f}{row['n_eff']:18.0f}")


def _error(level: float, calibration: Any) -> float:
    return float(np.sqrt(level * (1 - level) / len(calibration.ranks)))


def history() -> tuple[np.ndarray, np.ndarray]:
    """Years, and pelts of hares and lynxes in thousands `(21, 2)`."""
    rows = np.loadtxt(Path(__file__).parent / "data" / "lynx_hare.csv", delimiter=",", skiprows=1, dtype=np.float32)
    return rows[:, 0], rows[:, [2, 1]]


def rates(parameters: dict[str, Any], log_h: Any, log_l: Any, exp: Callable) -> tuple[Any, Any]:
    """Growth rates of hares and lynxes."""
    p = parameters
    return p["birth"] - p["predation"] * exp(log_l), p["growth"] * exp(log_h) - p["death"]


def in_numpyro() -> tuple[Callable, Callable, Callable, Callable]:
    """The model in NumPyro, `npe`, the predictive distribution and a logarithm."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import Predictive

    from flowppl.numpyro import npe

    def model(pelts: Any = None) -> None:
        p = {name: numpyro.sample(name, dist.LogNormal(np.log(m), s)) for name, (m, s) in PRIORS.items()}
        kicks = numpyro.sample("kicks", dist.Normal(jnp.zeros(((YEARS - 1) * STEPS, 2)), 1.0).to_event(2))

        def step(logs: Any, kick: Any) -> tuple[Any, Any]:
            drift = jnp.stack(rates(p, logs[0], logs[1], jnp.exp)) / STEPS
            logs = jnp.clip(logs + drift + p["noise"] * kick / np.sqrt(STEPS), LOWEST, HIGHEST)
            return logs, logs

        start = jnp.log(jnp.stack([p["hares"], p["lynxes"]]))
        _, path = jax.lax.scan(step, start, kicks)
        logs = jnp.concatenate([start[None], path[STEPS - 1 :: STEPS]])
        numpyro.sample("pelts", dist.LogNormal(logs, p["error"]).to_event(2), obs=pelts)

    def predict(draws: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray(Predictive(model, draws)(jax.random.key(2))["pelts"])

    return model, npe, predict, jnp.log


def in_pyro() -> tuple[Callable, Callable, Callable, Callable]:
    """The same in Pyro; axes are counted from the right, so that many histories run at once."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import Predictive

    from flowppl.pyro import npe

    def model(pelts: Any = None) -> None:
        p = {name: pyro.sample(name, dist.LogNormal(float(np.log(m)), s)) for name, (m, s) in PRIORS.items()}
        kicks = pyro.sample("kicks", dist.Normal(torch.zeros((YEARS - 1) * STEPS, 2), 1.0).to_event(2))
        logs = torch.log(torch.stack([p["hares"], p["lynxes"]], -1))
        path = [logs]
        for i in range((YEARS - 1) * STEPS):
            drift = torch.stack(rates(p, logs[..., 0], logs[..., 1], torch.exp), -1) / STEPS
            kick = p["noise"][..., None] * kicks[..., i, :] / np.sqrt(STEPS)
            logs = torch.clamp(logs + drift + kick, LOWEST, HIGHEST)
            if i % STEPS == STEPS - 1:
                path.append(logs)
        pyro.sample("pelts", dist.LogNormal(torch.stack(path, -2), p["error"][..., None, None]).to_event(2), obs=pelts)

    def predict(draws: dict[str, np.ndarray]) -> np.ndarray:
        samples = {name: torch.as_tensor(x) for name, x in draws.items()}
        return Predictive(model, samples, parallel=True)()["pelts"].numpy()

    return model, npe, predict, torch.log


def picture(years: np.ndarray, pelts: np.ndarray, predicted: np.ndarray, path: Path) -> None:
    """Draws the bands of 50 and 90 % of what the posterior predicts over what was seen."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for k, (ax, name) in enumerate(zip(axes, ("hare", "lynx"), strict=True)):
        q = np.quantile(predicted[..., k].reshape(-1, len(years)), [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
        ax.fill_between(years, q[0], q[4], color=f"C{k}", alpha=0.2, lw=0, label="90 %")
        ax.fill_between(years, q[1], q[3], color=f"C{k}", alpha=0.4, lw=0, label="50 %")
        ax.plot(years, q[2], color=f"C{k}", lw=1)
        ax.plot(years, pelts[:, k], "ko", ms=3, label="pelts")
        ax.set(title=name, yscale="log", xticks=range(1900, 1921, 5), ylabel="thousands a year" if k == 0 else None)
        ax.legend(fontsize="small")
    save(figure, path, colors=64)
    print(path)


if __name__ == "__main__":
    main()
