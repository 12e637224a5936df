"""A variational autoencoder of handwritten digits whose posterior is a flow, trained by two bounds with two gradients.

The encoder's output is the context of the flow: a planar flow, a neural spline flow, or for comparison a normal. All images share
one plate, so that the importance-weighted bound (IWAE) is one for each image, and "path" is its doubly reparametrised gradient.
Every fifth image is held out, and its log-likelihood estimated by importance sampling from the posterior that it was encoded to.
The picture is docs/images/vae.png when run from the root with `--output docs/images`.

    python examples/vae.py --ppl numpyro --seeds 3
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flowppl import flows

DATA = Path(__file__).resolve().parent / "data" / "digits.csv.gz"
LATENTS, CONTEXT, HIDDEN = 8, 32, 64
BATCH, PARTICLES, RATE = 64, 8, 2e-3
POSTERIORS = {
    "normal": flows.affine(hidden=(32,)),
    "planar": flows.planar(layers=8, hidden=(32,)),
    "spline": flows.nsf(layers=2, hidden=(32,)),
}


class Fit(NamedTuple):
    """Log-likelihoods of held-out images `(n,)`, the chance of ink in draws of new images `(m, 64)`, and seconds of training."""

    held_out: np.ndarray  # of several seeds: `(seeds, n)`
    drawn: np.ndarray
    seconds: float


def load() -> tuple[np.ndarray, np.ndarray]:
    """Images of 64 pixels, ink or none: for training and held out."""
    ink = np.loadtxt(DATA, delimiter=",", skiprows=1)[:, :64] >= 8
    held_out = np.arange(len(ink)) % 5 == 4
    return ink[~held_out].astype(np.float32), ink[held_out].astype(np.float32)


def in_numpyro(
    images: np.ndarray,
    test: np.ndarray,
    flow: flows.Recipe,
    bound: str,
    gradient: str,
    steps: int,
    draws: int,
    seed: int,
) -> Fit:
    """Trains an autoencoder and judges it."""
    import jax
    import numpyro
    import numpyro.distributions as dist
    import optax
    from jax.example_libraries import stax
    from numpyro.infer import SVI, RenyiELBO

    from flowppl.numpyro import Objective, flow_module

    encoder = stax.serial(stax.Dense(HIDDEN), stax.Softplus, stax.Dense(CONTEXT))
    decoder = stax.serial(stax.Dense(HIDDEN), stax.Softplus, stax.Dense(64))

    def model(images, batch_size=None):
        decode = numpyro.module("decoder", decoder, (LATENTS,))
        with numpyro.plate("images", len(images), subsample_size=batch_size):
            x = numpyro.subsample(images, event_dim=1)
            z = numpyro.sample("z", dist.Normal().expand([LATENTS]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(images, batch_size=None):
        encode = numpyro.module("encoder", encoder, (64,))
        with numpyro.plate("images", len(images), subsample_size=batch_size):
            x = numpyro.subsample(images, event_dim=1)
            numpyro.sample("z", flow_module("posterior", flow, encode(x), dim=LATENTS))

    start = time.perf_counter()
    train, weigh, draw = jax.random.split(jax.random.key(seed), 3)
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    svi = SVI(model, guide, optimizer, Objective(bound, PARTICLES, gradient=gradient))
    params = svi.run(train, steps, images, batch_size=BATCH, progress_bar=False).params
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start

    loss = RenyiELBO(alpha=0.0, num_particles=draws).loss  # of one image: minus the logarithm of the mean weight
    one = lambda key_and_image: -loss(key_and_image[0], params, model, guide, key_and_image[1][None])
    held_out = jax.jit(lambda: jax.lax.map(one, (jax.random.split(weigh, len(test)), test)))()
    logits = decoder[1](params["decoder$params"], jax.random.normal(draw, (20, LATENTS)))
    return Fit(np.asarray(held_out), np.asarray(jax.nn.sigmoid(logits)), seconds)


def in_pyro(
    images: np.ndarray,
    test: np.ndarray,
    flow: flows.Recipe,
    bound: str,
    gradient: str,
    steps: int,
    draws: int,
    seed: int,
) -> Fit:
    """The same in Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro import poutine
    from pyro.infer import SVI
    from torch import nn

    from flowppl.pyro import Objective, flow_module

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    images, test = torch.as_tensor(images), torch.as_tensor(test)
    encoder = nn.Sequential(nn.Linear(64, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, CONTEXT))
    decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, 64))

    def model(images, batch_size=None):
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(images), subsample_size=batch_size):
            x = pyro.subsample(images, event_dim=1)
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENTS]).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(images, batch_size=None):
        pyro.module("encoder", encoder)
        with pyro.plate("images", len(images), subsample_size=batch_size):
            x = pyro.subsample(images, event_dim=1)
            pyro.sample("z", flow_module("posterior", flow, encoder(x), dim=LATENTS))

    start = time.perf_counter()
    cosine = {"optimizer": torch.optim.Adam, "optim_args": {"lr": RATE}, "T_max": steps}
    scheduler = pyro.optim.CosineAnnealingLR(cosine)
    svi = SVI(model, guide, scheduler, Objective(bound, PARTICLES, gradient=gradient, max_plate_nesting=1))
    for _ in range(steps):
        svi.step(images, batch_size=BATCH)
        scheduler.step()
    seconds = time.perf_counter() - start

    def log_likelihood(images):
        with pyro.plate("draws", draws, dim=-2):
            guided = poutine.trace(guide).get_trace(images)
            modelled = poutine.trace(poutine.replay(model, guided)).get_trace(images)
        for trace in (guided, modelled):
            trace.compute_log_prob()
        log_p = modelled.nodes["z"]["log_prob"] + modelled.nodes["x"]["log_prob"]
        return (log_p - guided.nodes["z"]["log_prob"]).logsumexp(0) - np.log(draws)

    with torch.no_grad():
        held_out = torch.cat([log_likelihood(some) for some in test.split(32)]).numpy()
        drawn = decoder(torch.randn(20, LATENTS)).sigmoid().numpy()
    return Fit(held_out, drawn, seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fits all, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ppl", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=500, help="of the posterior of each held-out image")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--posteriors", nargs="+", choices=list(POSTERIORS), default=list(POSTERIORS))
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    options = parser.parse_args(arguments)
    images, test = load()
    run = {"numpyro": in_numpyro, "pyro": in_pyro}[options.ppl]
    over = "images" if options.seeds == 1 else f"{options.seeds} seeds"
    print(f"{options.ppl}: log-likelihood of {len(test)} held-out images in nats, ± standard errors over {over}\n")
    print("posterior  bound  gradient   log-likelihood   to the first, paired   seconds")
    fits: dict[str, Fit] = {}
    for posterior in options.posteriors:
        for bound in ("elbo", "iwae"):
            for gradient in ("reparam", "path"):
                chosen = POSTERIORS[posterior], bound, gradient, options.steps, options.draws
                fit = _together([run(images, test, *chosen, seed) for seed in range(options.seeds)])
                fits[f"{posterior}, {bound}, {gradient}"] = fit
                mean, error = _mean(fit.held_out)
                more, more_error = _mean(fit.held_out - next(iter(fits.values())).held_out)
                print(
                    f"{posterior:10s} {bound:6s} {gradient:8s} {mean:9.2f} ± {error:4.2f} {more:+14.2f} ± {more_error:4.2f} "
                    f"{fit.seconds:13.0f}",
                    flush=True,
                )
    _draw(test, fits, options.output)


def _together(fits: Sequence[Fit]) -> Fit:
    """All seeds' log-likelihoods, the first one's draws and the mean of the seconds."""
    held_out, drawn, seconds = zip(*fits, strict=True)
    return Fit(np.stack(held_out), drawn[0], float(np.mean(seconds)))


def _mean(x: np.ndarray) -> tuple[float, float]:
    """Of `(seeds, n)`, with the standard error over seeds, or over images where there is one seed."""
    each = x.mean(1) if len(x) > 1 else x[0]
    return float(each.mean()), float(each.std(ddof=1) / len(each) ** 0.5)


def _draw(test: np.ndarray, fits: dict[str, Fit], folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    bars, *pictures = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    first, best = next(iter(fits.values())), max(fits, key=lambda name: fits[name].held_out.mean())
    for i, (name, fit) in enumerate(fits.items()):
        mean, error = _mean(fit.held_out - first.held_out)
        color = "C0" if "elbo" in name else "C1"
        bars.errorbar(mean, i, xerr=error, fmt="o" if "path" in name else "s", color=color, capsize=2)
    bars.set_yticks(range(len(fits)), list(fits))
    bars.invert_yaxis()
    bars.set(xlabel="held-out log-likelihood, to the first, nats")
    for axis, images, title in (
        (pictures[0], test[:20], "held out"),
        (pictures[1], fits[best].drawn, f"drawn: {best}"),
    ):
        axis.imshow(_grid(images), cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "vae.png", dpi=110)


def _grid(images: np.ndarray) -> np.ndarray:
    """Twenty images, four beside each other, with a margin."""
    framed = np.pad(images.reshape(5, 4, 8, 8), ((0, 0), (0, 0), (1, 1), (1, 1)))
    return framed.transpose(0, 2, 1, 3).reshape(50, 40)


if __name__ == "__main__":
    main()
