"""Stochastic flows on a double well: how well they know the free energy along it, beside plain flows and annealing.

    python -m benchmarks double_well [--seeds 5] [--only NAME ...] [--iterations 600]

The target of Wu, Koehler & Noe 2020, "Stochastic normalizing flows", section 5: u(x, y) = -x / 2 - 6 x^2 + x^4 + y^2 / 2, with
three blocks of maps, each followed by twenty Metropolis steps of 0.25 or by what the row says. All are trained by energy alone,
map by map, for 600 iterations of 256 paths at a learning rate of 0.005; theirs for 300 by samples and 300 by both. Columns: the
root mean square error of the free energy F(x) = -log p(x) in kT against quadrature, in bins of 0.1 where it is less than 5 kT above
its minimum, of raw draws and of reweighted ones; the error of F(left) - F(right) alike; the effective share of 100 000 paths;
seconds of training on this machine, compilation included. Mean and standard error over seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowppl import flows, weights
from flowppl.stochastic import Moves, snf, train_path
from flowppl.training import Options

DRAWS, BATCH = 100_000, 10_000
EDGES = np.linspace(-2.5, 2.5, 51)
_GRID = np.linspace(-4, 4, 400_001)
_DENSITY = np.exp(0.5 * _GRID + 6 * _GRID**2 - _GRID**4)
EXACT = np.histogram(_GRID, EDGES, weights=_DENSITY / _DENSITY.sum())[0]
DIFFERENCE = float(np.log(_DENSITY[_GRID > 0].sum() / _DENSITY[_GRID < 0].sum()))
KNOWN = -np.log(EXACT) < 5 - np.log(EXACT.max())

METROPOLIS = Moves("metropolis", repeats=20, step_size=0.25)
COUPLINGS = flows.realnvp(layers=4, hidden=(32, 32))
SPLINES = flows.nsf(layers=2, hidden=(32, 32))
PATHS: dict[str, list[Any]] = {
    "couplings": [COUPLINGS] * 3,
    "splines": [SPLINES] * 3,
    "couplings + Metropolis": [COUPLINGS, METROPOLIS] * 3,
    "splines + Metropolis": [SPLINES, METROPOLIS] * 3,
    "couplings + Langevin": [COUPLINGS, Moves("langevin", repeats=20, step_size=0.2)] * 3,
    "couplings + HMC": [COUPLINGS, Moves("hmc", repeats=5, step_size=0.2, leapfrog=4)] * 3,
    "HMC alone (annealing)": [Moves("hmc", repeats=5, step_size=0.2, leapfrog=4)] * 3,
}


def log_prob(x: jax.Array) -> jax.Array:
    """Log density, unnormalised."""
    return 0.5 * x[:, 0] + 6 * x[:, 0] ** 2 - x[:, 0] ** 4 - 0.5 * x[:, 1] ** 2


def run(name: str, seed: int, iterations: int) -> list[float]:
    """The numbers of one row."""
    like, path = jnp.zeros(()), snf(PATHS[name], dim=2)
    variables = path.init(jax.random.key(seed), like)
    began = time.perf_counter()
    options = Options(num_particles=256, max_steps=iterations, chunk=iterations // 6, learning_rate=5e-3)
    variables, _ = train_path(path, variables, log_prob, seed=seed, options=options)
    seconds = time.perf_counter() - began
    draw = jax.jit(lambda key: path.forward(key, variables, log_prob, BATCH)[:2])
    draws = [draw(key) for key in jax.random.split(jax.random.key(seed + 1000), DRAWS // BATCH)]
    x, log_w = (np.concatenate([np.asarray(part[i], np.float64) for part in draws]) for i in (0, 1))
    even, w = np.full(DRAWS, 1 / DRAWS), weights.normalize(log_w)
    return [*_errors(x[:, 0], even), *_errors(x[:, 0], w), float(weights.ess(log_w)) / DRAWS, seconds]


def _errors(x: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """Of the profile, and of the difference between both sides."""
    found = np.histogram(x, EDGES, weights=w)[0][KNOWN]
    gap = np.log(np.maximum(found, 0.5 / DRAWS)) - np.log(EXACT[KNOWN])
    sides = np.maximum([w[x > 0].sum(), w[x < 0].sum()], 0.5 / DRAWS)
    return float(np.sqrt(np.mean(gap**2))), abs(float(np.log(sides[0] / sides[1])) - DIFFERENCE)


def main(arguments: Sequence[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks double_well", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(PATHS), choices=list(PATHS))
    parser.add_argument("--iterations", type=int, default=600)
    options = parser.parse_args(arguments)
    print("| path | raw: RMSE, kT | difference, kT | reweighted: RMSE, kT | difference, kT | ESS | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in options.only:
        rows = np.array([run(name, seed, options.iterations) for seed in range(options.seeds)])
        mean, error = rows.mean(0), rows.std(0, ddof=1) / len(rows) ** 0.5 if len(rows) > 1 else 0 * rows[0]
        cells = [f"{m:.3f} ± {e:.3f}" for m, e in zip(mean[:4], error[:4], strict=True)]
        print(f"| {name} | {' | '.join(cells)} | {mean[4]:.0%} ± {error[4]:.0%} | {mean[5]:.0f} |", flush=True)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
