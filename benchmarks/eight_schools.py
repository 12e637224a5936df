"""Centred Eight Schools, five seeds in each PPL: how far a flow guide is from the reference posterior.

    python -m benchmarks eight_schools [--ppl numpyro|pyro] [--seeds 5]

Bounds: every mean within 0.15 reference standard deviations, every standard deviation within 15 %, the 5 % quantile of tau within
15 %, and k-hat of 10 000 importance weights below 0.7.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from models.data import load_data, load_reference

from flowppl import flows

FLOW = flows.nsf(layers=6, hidden=(32, 32))
STEPS, PARTICLES, RATE, CLIP_NORM, DRAWS = 4000, 256, 5e-3, 10.0, 10_000


def fit_numpyro(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Draws by site and log-weights of a trained guide."""
    import jax
    import optax
    from models.in_numpyro import eight_schools
    from numpyro.infer import SVI, Trace_ELBO

    from flowppl.numpyro import AutoFlow, LogDensity

    args = [np.asarray(a, np.float32) for a in load_data("eight_schools")]
    start, train, draw = jax.random.split(jax.random.key(seed), 3)
    guide = AutoFlow(eight_schools, FLOW, gradient="path")
    init = guide.precondition(start, *args)
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM), optax.adam(optax.cosine_decay_schedule(RATE, STEPS, 0.01))
    )
    svi = SVI(eight_schools, guide, optimizer, Trace_ELBO(num_particles=PARTICLES))
    result = svi.run(train, STEPS, *args, progress_bar=False, init_params=init)
    posterior, density = guide.get_posterior(result.params), LogDensity(eight_schools, tuple(args))
    u = posterior.sample(draw, (DRAWS,))
    log_weights = density.log_prob(u) - posterior.log_prob(u)
    return {k: np.asarray(v) for k, v in density.constrain(u).items()}, np.asarray(log_weights)


def fit_pyro(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The same in Pyro."""
    import pyro
    import torch
    from models.in_pyro import eight_schools
    from pyro.infer import SVI, Trace_ELBO

    from flowppl.pyro import AutoFlow, LogDensity

    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    args = [torch.as_tensor(a, dtype=torch.float32) for a in load_data("eight_schools")]
    guide = AutoFlow(eight_schools, FLOW, gradient="path").precondition(None, *args)
    adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": RATE}, "T_max": STEPS, "eta_min": 0.01 * RATE}
    optimizer = pyro.optim.CosineAnnealingLR(adam, clip_args={"clip_norm": CLIP_NORM})
    loss = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(eight_schools, guide, optimizer, loss)
    for _ in range(STEPS):
        svi.step(*args)
        optimizer.step()
    with torch.no_grad():
        posterior, density = guide.get_posterior(), LogDensity(eight_schools, tuple(args))
        u = posterior.sample((DRAWS,))
        log_weights = density.log_prob(u) - posterior.flow.log_prob(posterior.variables, u)
        return {k: v.numpy() for k, v in density.constrain(u).items()}, log_weights.numpy()


def assess(draws: dict[str, np.ndarray], log_weights: np.ndarray) -> dict[str, float]:
    """The errors that the bounds are on, and the ELBO."""
    import arviz

    reference = load_reference("eight_schools")
    low = np.flatnonzero(np.isclose(reference.probabilities, 0.05))[0]
    sites = ("mu", "tau", "theta")
    return {
        "ELBO": float(log_weights.mean()),
        "mean": max(float(np.max(np.abs(draws[s].mean(0) - reference.mean[s]) / reference.sd[s])) for s in sites),
        "sd": max(float(np.max(np.abs(draws[s].std(0) / reference.sd[s] - 1))) for s in sites),
        "tau 5 %": float(np.quantile(draws["tau"], 0.05) / reference.quantiles["tau"][low] - 1),
        "k-hat": float(arviz.psislw(log_weights.astype(float))[1]),
    }


def main(arguments: Sequence[str]) -> None:
    """Runs all seeds of each PPL in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks eight_schools", description=__doc__)
    parser.add_argument("--ppl", choices=["numpyro", "pyro"])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(arguments)
    if options.ppl is None:
        columns = ["PPL", "seed", "ELBO", "worst mean, sds", "worst sd", "tau's 5 % quantile", "k-hat", "seconds"]
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
        for ppl in ("numpyro", "pyro"):
            command = [sys.executable, "-m", "benchmarks", "eight_schools", "--ppl", ppl, "--seeds", str(options.seeds)]
            subprocess.run(command, check=True)
        return
    for seed in range(options.seeds):
        start = time.perf_counter()
        found = assess(*(fit_numpyro if options.ppl == "numpyro" else fit_pyro)(seed))
        print(
            f"| {options.ppl} | {seed} | {found['ELBO']:.3f} | {found['mean']:.3f} | {found['sd']:.1%} | {found['tau 5 %']:+.1%} | "
            f"{found['k-hat']:.2f} | {time.perf_counter() - start:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
