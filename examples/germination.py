"""One call on a real hierarchical model: which seeds germinate, with an effect of each of 21 plates (Crowder 1978).

    python examples/germination.py --ppl numpyro

The model is written naively: centred, so that its posterior is a funnel. `fit` gets no options. It prints the verdict, means
and sds of the coefficients, and what they predict for a new plate, and saves two pictures: the posterior, and the funnel.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

GERMINATED = [10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3]
TOTAL = [39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7]
CUCUMBER = np.repeat([0.0, 1.0, 0.0, 1.0], [5, 6, 5, 5])  # the root extract that the seeds lay in; beans otherwise
KIND = np.repeat([0.0, 1.0], [11, 10])  # Orobanche aegyptiaca 75, then 73


def in_numpyro() -> tuple[Any, Any, tuple]:
    """The model, `fit`, and the data."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from flowppl.numpyro import fit

    def model(total: Any, kind: Any, cucumber: Any, germinated: Any = None) -> None:
        with numpyro.plate("term", 4):
            beta = numpyro.sample("beta", dist.Normal(0.0, 10.0))
        sigma = numpyro.sample("sigma", dist.HalfCauchy(1.0))
        mean = beta[0] + beta[1] * kind + beta[2] * cucumber + beta[3] * kind * cucumber
        with numpyro.plate("plate", len(total)):
            logit = numpyro.sample("logit", dist.Normal(mean, sigma))
            numpyro.sample("germinated", dist.Binomial(total, logits=logit), obs=germinated)

    return model, fit, tuple(map(jnp.asarray, (TOTAL, KIND, CUCUMBER, GERMINATED)))


def in_pyro() -> tuple[Any, Any, tuple]:
    """The same in Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    from flowppl.pyro import fit

    def model(total: Any, kind: Any, cucumber: Any, germinated: Any = None) -> None:
        with pyro.plate("term", 4):
            beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
        mean = beta[..., 0] + beta[..., 1] * kind + beta[..., 2] * cucumber + beta[..., 3] * kind * cucumber
        with pyro.plate("plate", len(total)):
            logit = pyro.sample("logit", dist.Normal(mean, sigma))
            pyro.sample("germinated", dist.Binomial(total, logits=logit), obs=germinated)

    data = [torch.as_tensor(np.asarray(a, np.float32)) for a in (TOTAL, KIND, CUCUMBER, GERMINATED)]
    return model, fit, tuple(data)


def main() -> None:
    """Fits, judges, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ppl", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--steps", type=int, default=8000, help="at most so many")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="the folder of the pictures")
    options = parser.parse_args()
    model, fit, data = in_numpyro() if options.ppl == "numpyro" else in_pyro()

    began = time.perf_counter()
    posterior = fit(model, *data, max_steps=options.steps)
    print(f"{time.perf_counter() - began:.0f} seconds")
    print(posterior.diagnose())

    mean, sd = posterior.mean(), posterior.sd()
    print(f"\n{'':24}{'mean':>8}{'sd':>8}")
    names = ["intercept", "kind 73", "cucumber", "kind 73 and cucumber"]
    for name, m, s in zip([*names, "sigma"], [*mean["beta"], mean["sigma"]], [*sd["beta"], sd["sigma"]], strict=True):
        print(f"{name:24}{m:8.2f}{s:8.2f}")

    options.output.mkdir(parents=True, exist_ok=True)
    posterior.plot(["beta", "sigma"]).savefig(options.output / "germination.png", dpi=90)
    draw_funnel(posterior, options.output / "germination-funnel.png")


def draw_funnel(posterior: Any, path: Path) -> None:
    """One plate's deviation from its mean against the scale of all: draws, resampled by their weights."""
    from matplotlib.figure import Figure

    draws = posterior.resample(3000)
    figure = Figure(figsize=(4.5, 3.5), layout="constrained")
    axis = figure.subplots()
    deviation = draws["logit"][:, 0] - draws["beta"][:, 0]
    axis.plot(deviation, np.log(draws["sigma"]), ".", markersize=2, alpha=0.5)
    axis.set(xlabel="deviation of the first plate, logits", ylabel="log sigma")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
