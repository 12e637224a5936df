"""Four targets that samplers are compared on: trained flows beside sequential Monte Carlo, with bounds that they are to meet.

    python -m benchmarks samplers [--only funnel ...] [--seeds 5] [--output rows.json]

The protocol is that of Midgley et al. 2023 (arXiv:2208.01893): the mean of |log Z - truth| over 10 batches of 2000 draws, mean and
standard error over seeds of training. Each seed is a process of its own, so that seconds, of all threads, hold compilation;
float32, on the CPU. All samplers start from N(0, I) in coordinates that are divided by the target's rough width, and know nothing
else. Flows are trained by `bootstrap`, whose buffer starts with four runs of the sequential Monte Carlo. The ESS of a flow's own
draws is blind to what the flow misses; the forward one, Z / E_p[w] from exact draws, is not, and nor is EUBO - ELBO. That of
sequential Monte Carlo counts weights since particles were last resampled.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from flowppl import flows, weights
from flowppl.backend import Array, backend_of
from flowppl.bijections import Affine, Composed, RQSpline
from flowppl.kernels import hmc
from flowppl.stochastic import Annealed, Bridge, anneal, bootstrap, tune

ROOT = Path(__file__).parents[1]
BATCHES, BATCH = 10, 2000
MEANS = np.random.default_rng(0).uniform(-40, 40, (40, 2))
GRID = np.stack(np.meshgrid([-5.0, 0.0, 5.0], [-5.0, 0.0, 5.0]), -1).reshape(-1, 2)


def many_well(x: Array) -> Array:
    """Sixteen pairs of a double well and a normal coordinate."""
    wells, others = x[:, 0::2], x[:, 1::2]
    return backend_of(x).xp.sum(-(wells**4) + 6 * wells**2 + 0.5 * wells - 0.5 * others**2, axis=-1)


def funnel(x: Array) -> Array:
    """Neal's funnel: v of sd 3, and nine coordinates of variance e^v."""
    v, others = x[:, 0], x[:, 1:]
    xp, d = backend_of(x).xp, x.shape[1]
    each = -0.5 * xp.sum(others**2, axis=-1) * xp.exp(-v) - 0.5 * (d - 1) * v
    return each - v**2 / 18 - math.log(3) - 0.5 * d * math.log(2 * math.pi)


def mixture(x: Array, means: np.ndarray, sd: float) -> Array:
    """Normals of equal weights and scales in the plane."""
    backend = backend_of(x)
    means = backend.asarray(means, x)
    square = backend.xp.sum((x[:, None] - means) ** 2, axis=-1) / sd**2
    return backend.logsumexp(-0.5 * square, axis=-1) - math.log(2 * math.pi * sd**2 * len(means))


def many_well_draws(rng: np.random.Generator, n: int) -> np.ndarray:
    grid = np.linspace(-4, 4, 100_001)
    mass = np.cumsum(np.exp(-(grid**4) + 6 * grid**2 + 0.5 * grid))
    wells = np.interp(rng.random((n, 16)), mass / mass[-1], grid)
    return np.stack([wells, rng.standard_normal((n, 16))], -1).reshape(n, 32)


def funnel_draws(rng: np.random.Generator, n: int) -> np.ndarray:
    v = 3 * rng.standard_normal((n, 1))
    return np.concatenate([v, np.exp(v / 2) * rng.standard_normal((n, 9))], 1)


def mixture_draws(rng: np.random.Generator, n: int, means: np.ndarray, sd: float) -> np.ndarray:
    return means[rng.integers(len(means), size=n)] + sd * rng.standard_normal((n, 2))


class Target(NamedTuple):
    """What is sampled, in its own coordinates; `width` is what samplers know of it."""

    dim: int
    log_prob: Callable[[Array], Array]
    draws: Callable[[np.random.Generator, int], np.ndarray]
    width: float
    log_z: float
    bound: float  # on |log Z - truth|
    ess: float = 0.0  # the least effective share
    modes: np.ndarray | None = None

    def scaled(self, x: Array) -> Array:
        """The log density of x / width."""
        return self.log_prob(self.width * x) + self.dim * math.log(self.width)


_NINE = {"means": GRID, "sd": 0.5477}
_FORTY = {"means": MEANS, "sd": math.log1p(math.e)}
TARGETS = {
    "many_well": Target(32, many_well, many_well_draws, 2.0, 164.695675, 0.03),
    "funnel": Target(10, funnel, funnel_draws, 3.0, 0.0, 0.01, 0.9),
    "nine": Target(2, partial(mixture, **_NINE), partial(mixture_draws, **_NINE), 5.0, 0.0, 0.003, 0.0, GRID),
    "forty": Target(2, partial(mixture, **_FORTY), partial(mixture_draws, **_FORTY), 40.0, 0.0, math.inf, 0.95, MEANS),
}

_SPLINE = Composed(RQSpline(16), Affine())
# The flow and its training: autoregressive where a density in one pass is what counts, a mixture's base where modes lie far apart.
TRAINING: dict[str, tuple[flows.Recipe, dict[str, Any]]] = {
    "many_well": (
        flows.maf(layers=2, hidden=(64,), transformer=_SPLINE, linear=False),
        {"num_steps": 2500, "learning_rate": 5e-3},
    ),
    "funnel": (
        flows.maf(layers=2, transformer=Affine(1e3), linear=False),
        {"num_steps": 6000, "learning_rate": 3e-3},
    ),
    "nine": (flows.nsf(layers=6, bins=16), {"num_steps": 6000, "num_particles": 512}),
    "forty": (flows.affine(base=flows.Mixture(256, 1.0)), {"num_steps": 3000, "learning_rate": 1e-2}),
}
LEAPFROG, START, TEMPERATURES = 8, 4, 4


def line(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What the three samplers find for one target with one seed."""
    import jax
    import jax.numpy as jnp

    (name,) = options.only
    target, (recipe, training) = TARGETS[name], TRAINING[name]
    like, keys = jnp.zeros(1), jax.random.split(jax.random.key(options.seed), 6)
    kernel = partial(hmc.step, num_steps=LEAPFROG)
    rows: list[dict[str, Any]] = []
    begin = time.process_time()

    def seen(sampler: str, x: Any, log_w: Any, evaluations: int, **more: Any) -> None:
        x, log_w = np.concatenate([np.asarray(a, np.float64) for a in x]), np.stack([np.asarray(a) for a in log_w])
        log_w = np.where(np.isfinite(log_w), log_w, -np.inf).astype(np.float64)
        row = {"target": name, "seed": options.seed, "sampler": sampler, "evaluations": evaluations}
        row["error"] = float(np.abs(weights.log_mean_exp(log_w) - target.log_z).mean())
        row["ess"] = float(weights.ess(log_w).mean() / BATCH)
        if target.modes is not None:
            row["modes"] = _modes(target, target.width * x, log_w.reshape(-1))
        rows.append({**row, **more, "seconds": time.process_time() - begin})
        print(json.dumps(rows[-1]), flush=True)

    def annealed(key: Any, bridge: Bridge, resample_below: float, **tuning: Any) -> tuple[list[Annealed], int]:
        first, *others = jax.random.split(key, BATCHES + 1)
        schedule = tuple(jnp.asarray(a, jnp.float32) for a in tune(first, bridge, kernel, like, **tuning))
        run = jax.jit(lambda key: anneal(key, bridge, kernel, schedule, BATCH, resample_below=resample_below))
        return [run(key) for key in others], BATCHES * BATCH * (1 + LEAPFROG * len(schedule[0]))

    base = flows.Normal()
    bridge = Bridge(lambda key, n: jax.random.normal(key, (n, target.dim)), partial(base.log_prob, {}), target.scaled)
    found, count = annealed(keys[0], bridge, 0.5, n=BATCH)
    seen("SMC", [a.x for a in found], [a.log_w for a in found], count)

    begin = time.process_time() - rows[0]["seconds"] * START / BATCHES  # the flow's share of that
    flow = recipe(target.dim)
    start = tuple(jnp.concatenate([a[i] for a in found[:START]]) for i in (0, 1))
    variables = flow.init(keys[1], like)
    variables, history = bootstrap(flow, variables, target.scaled, options.seed, draws=start, **training)
    n, temperatures = training.get("num_particles", 256), history.acceptance.shape[1]
    spent = count * START // BATCHES + len(history.ess) * n * (2 + 4 * temperatures)

    @jax.jit
    def draw(key: Any) -> tuple[Any, Any]:
        sample = flow.sample(key, variables, (BATCH,), with_log_prob=True)
        return sample.x, target.scaled(sample.x) - sample.log_prob

    own = [draw(key) for key in jax.random.split(keys[2], BATCHES)]
    exact = target.draws(np.random.default_rng(options.seed), BATCHES * BATCH).reshape(BATCHES, BATCH, -1)
    ratio = jax.jit(lambda x: target.scaled(x) - flow.log_prob(variables, x))
    forward = np.concatenate([np.asarray(ratio(jnp.asarray(x / target.width, like.dtype)), np.float64) for x in exact])
    more = {
        "forward": float(np.exp(target.log_z - weights.log_mean_exp(forward))),
        "gap": float(forward.mean() - np.mean([np.asarray(log_w) for _, log_w in own])),
    }
    seen("flow", *zip(*own, strict=True), spent + BATCHES * BATCH, **more)

    bridge = Bridge(
        lambda key, n: flow.sample(key, variables, (n,)).x, partial(flow.log_prob, variables), target.scaled
    )
    found, count = annealed(keys[3], bridge, 0.0, min_temperatures=TEMPERATURES)
    seen("flow + AIS", [a.x for a in found], [a.log_w for a in found], spent + count)
    return rows


def _modes(target: Target, x: np.ndarray, log_w: np.ndarray) -> float:
    """The p-value that resampled draws spread over the modes as exact ones do."""
    rng = np.random.default_rng(1)

    def counts(x: np.ndarray) -> np.ndarray:
        nearest = ((x[:, None] - target.modes) ** 2).sum(-1).argmin(1)
        return np.bincount(nearest, minlength=len(target.modes))

    shares = sum(counts(target.draws(rng, 50_000)) for _ in range(10)) / 500_000
    chosen = rng.choice(len(x), 4000, p=weights.normalize(log_w))
    return float(stats.chisquare(counts(x[chosen]), 4000 * shares / shares.sum()).pvalue)


def main(arguments: Sequence[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks samplers", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a file for all rows, as JSON")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.seed is not None:
        line(options)
        return
    head = ["target", "sampler", "error of log Z", "bound", "ESS, %", "forward ESS, %", "EUBO - ELBO", "p of modes"]
    head += ["evaluations, millions", "CPU seconds", "met"]
    print(f"| {' | '.join(head)} |\n|---|---{'|---:' * (len(head) - 2)}|", flush=True)
    kept: list[dict[str, Any]] = []
    for name in options.only:
        rows = [row for seed in range(options.seeds) for row in _rows(name, seed)]
        for sampler in dict.fromkeys(row["sampler"] for row in rows):
            print(_shown(TARGETS[name], [row for row in rows if row["sampler"] == sampler]), flush=True)
        kept += rows
        if options.output:
            options.output.write_text(json.dumps(kept, indent=1))


def _rows(name: str, seed: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks", "samplers", "--only", name, "--seed", str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}, seed {seed}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    return [json.loads(text) for text in done.stdout.strip().splitlines()]


def _shown(target: Target, rows: list[dict[str, Any]]) -> str:
    def mean(key: str) -> float:
        return float(np.mean([row[key] for row in rows]))

    spread = f" ± {np.std([row['error'] for row in rows], ddof=1) / len(rows) ** 0.5:.4f}" if len(rows) > 1 else ""
    met = mean("error") <= target.bound and mean("ess") >= target.ess
    cells = [rows[0]["target"], rows[0]["sampler"], f"{mean('error'):.4f}{spread}"]
    wanted = [f"{target.bound}"] * (target.bound < math.inf) + [f"ESS {100 * target.ess:.0f}"] * (target.ess > 0)
    cells += [", ".join(wanted), f"{100 * mean('ess'):.1f}"]
    if "forward" in rows[0]:
        cells += [f"{100 * mean('forward'):.1f}", f"{mean('gap'):.3f}"]
        met = met and (target.bound < math.inf or abs(mean("forward") / mean("ess") - 1) < 0.15)
    else:
        cells += ["", ""]
    if "modes" in rows[0]:
        p = min(row["modes"] for row in rows)
        met = met and p > 1e-3
        cells.append(f"{p:.2g}")
    else:
        cells.append("")
    cells += [f"{mean('evaluations') / 1e6:.2f}", f"{mean('seconds'):.0f}", "yes" if met else "no"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
