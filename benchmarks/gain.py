"""What path gradients gain in equal time: reverse KL by the plain estimator and by "auto", on hard targets and on posteriors.

    python -m benchmarks gain [--seeds 5] [--targets product phi4 ...] [--scale 1.0]

The same flow, start, batches, optimizer and schedule. A step of either estimator is timed first, in turns. Then "plain" takes its
steps, and "auto" as many as fit into two thirds of that time and into all of it, each along its own cosine schedule, so that no run
is cut short. Judged by the ESS of 50 000 draws (targets), or the ELBO of as many (posteriors). "Path" is the estimator without the
mixture, in all of the time. jax, float32 (posteriors: float64), one thread.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TARGETS = ("product", "banana", "phi4", "u1")
ESTIMATORS = ("plain", "auto", "path")
ROOT = Path(__file__).parents[1]
JUDGED, CHUNK = 50_000, 5000
SITES = 8  # of a lattice, in each direction
Array = Any


class Case(NamedTuple):
    """A target and how it is fitted.

    Attributes:
        name: Of the target.
        flow: The flow.
        log_prob: Log density, unnormalised: `(n, dim)` to `(n,)`.
        steps: Of the plain estimator.
        batch: Draws in each step.
        rate: Step size of Adam at the start.
        log_z: Log of the normalising constant, None where it is not known.
    """

    name: str
    flow: Any
    log_prob: Callable[[Array], Array]
    steps: int
    batch: int
    rate: float
    log_z: float | None = None


def targets() -> dict[str, Callable[[], Case]]:
    """The four targets."""
    return {"product": product, "banana": banana, "phi4": phi4, "u1": u1}


def product() -> Case:
    """Six coordinates of two modes each, normal of sd 0.5 at 1 and -1: 64 modes."""
    import jax.numpy as jnp

    from flowppl.fitting import default_flow

    def log_prob(x: Array) -> Array:
        modes = jnp.logaddexp(-2 * (x - 1) ** 2, -2 * (x + 1) ** 2) - math.log(2 * 0.5 * math.sqrt(2 * math.pi))
        return jnp.sum(modes, axis=-1)

    return Case("product", default_flow(6)(6), log_prob, 4000, 64, 2e-3, 0.0)


def banana() -> Case:
    """Ten coordinates, each normal of sd 1 around a parabola of the one before that flattens far out: normalised."""
    import jax.numpy as jnp

    from flowppl.fitting import default_flow

    def log_prob(x: Array) -> Array:
        before = x[..., :-1]
        mean = before**2 / (1 + 0.2 * before**2) - 0.5
        residual = jnp.concatenate([x[..., :1], x[..., 1:] - mean], -1)
        return -0.5 * jnp.sum(residual**2, axis=-1) - 5 * math.log(2 * math.pi)

    return Case("banana", default_flow(10)(10), log_prob, 12_000, 32, 2e-3, 0.0)


def phi4() -> Case:
    """The scalar field with two wells on a periodic lattice of 8 x 8, m^2 = -4 and lambda = 6.008. Albergo et al. 2019.

    The couplings' halves are the colours of a checkerboard.
    """
    import jax.numpy as jnp

    from flowppl import flows

    i, j = np.indices((SITES, SITES)).reshape(2, -1)
    place = np.argsort(np.argsort((i + j) % 2, kind="stable"))

    def log_prob(x: Array) -> Array:
        field = x[..., place].reshape(*x.shape[:-1], SITES, SITES)
        neighbours = sum(jnp.roll(field, 1, axis) for axis in (-1, -2))  # each bond once
        action = (4.0 - 4.0) * field**2 - 2 * field * neighbours + 6.008 * field**4
        return -jnp.sum(action, axis=(-1, -2))

    return Case("phi4", flows.nsf(layers=6, hidden=(64,), linear=False)(SITES * SITES), log_prob, 6000, 64, 2e-3)


def u1() -> Case:
    """Angles on the links of a periodic lattice of 8 x 8, beta = 1, in the gauge where those of a spanning tree are zero.

    The couplings' halves are the links of even rows and of odd ones.
    """
    import jax.numpy as jnp
    from scipy.special import ive

    from flowppl import flows

    free = _free_links()
    beta, free = 1.0, free[np.argsort(free // SITES % 2, kind="stable")]

    def log_prob(x: Array) -> Array:
        links = jnp.zeros((*x.shape[:-1], 2 * SITES * SITES), x.dtype).at[..., free].set(x)
        a, b = jnp.moveaxis(links.reshape(*x.shape[:-1], 2, SITES, SITES), -3, 0)
        plaquettes = a + jnp.roll(b, -1, -2) - jnp.roll(a, -1, -1) - b
        return beta * jnp.sum(jnp.cos(plaquettes), axis=(-1, -2))

    # Z of the free links is their volume times the sum over characters of (I_n(beta))^plaquettes.
    orders = np.arange(-50, 51)
    log_z = len(free) * math.log(2 * math.pi) + np.log(np.sum(ive(orders, beta) ** (SITES**2))) + beta * SITES**2
    flow = flows.nsf(layers=2, hidden=(256,), bins=4, circular=tuple(range(len(free))))(len(free))
    return Case("u1", flow, log_prob, 32_000, 32, 3e-3, float(log_z))


def _free_links() -> np.ndarray:
    """The links outside of a spanning tree: 2 V - (V - 1) of them."""
    in_tree = np.zeros((2, SITES, SITES), bool)  # [direction, i, j]: from (i, j) to (i + 1, j), or to (i, j + 1)
    in_tree[0, :-1, :] = True
    in_tree[1, 0, :-1] = True
    return np.flatnonzero(~in_tree.reshape(-1))


def posterior(name: str) -> Case:
    """A posterior of `benchmarks.posteriors`, whitened by the normal that `fit` starts from, with the flow that it takes."""
    import jax.numpy as jnp

    from benchmarks import posteriors
    from flowppl.fitting import default_flow
    from flowppl.numpyro.density import LogDensity
    from flowppl.numpyro.precise import Precise
    from flowppl.pathfinder import pathfinder

    density = LogDensity(posteriors.numpyro_model(name), tuple(map(jnp.asarray, posteriors.load(name))), {})
    normal = pathfinder(Precise(density), np.asarray(density.init, np.float64), 0)
    loc, scale = jnp.asarray(normal.loc), jnp.asarray(normal.scale_tril)
    log_det = jnp.sum(jnp.log(jnp.diagonal(scale)))
    return Case(
        name,
        default_flow(density.dim)(density.dim),
        lambda w: density.log_prob(loc + w @ scale.T) + log_det,
        2000,
        128,
        5e-3,
    )


class Run:
    """Training of one case by one estimator, all seeds at once."""

    def __init__(self, case: Case, estimator: str, seeds: int) -> None:
        import jax
        import jax.numpy as jnp

        from flowppl import optim
        from flowppl.objectives.control import REFRESH, Control, no_control
        from flowppl.objectives.reverse_kl import reverse_kl

        self.case, self._jax = case, jax
        optimizer = optim.skip_nonfinite(optim.chain(optim.clip_by_global_norm(10.0), optim.adam(case.rate)))
        wide = jnp.zeros(())

        def gradient(variables: Any, key: Array, control: Control, look: Array) -> tuple[Any, Control]:
            if estimator != "plain":
                _, grads, new = reverse_kl(case.flow, variables, case.log_prob, key, case.batch, control, look)
                return grads, new if estimator == "auto" else control

            def loss(params: Any) -> Array:
                draws = case.flow.sample(key, {**variables, "params": params}, (case.batch,), with_log_prob=True)
                return jnp.mean(draws.log_prob - case.log_prob(draws.x))

            return jax.grad(loss)(variables["params"]), control

        def chunk(const: Any, state: Any, keys: Array, factors: Array, looks: Array) -> Any:
            def step(carry: Any, row: Any) -> tuple[Any, None]:
                (params, inner, control), (key, factor, look) = carry, row
                grads, control = gradient({"params": params, "const": const}, key, control, look)
                updates, inner = optimizer.update(grads, inner)
                return (optim.apply(params, jax.tree.map(lambda u: factor * u, updates)), inner, control), None

            return jax.lax.scan(step, state, (keys, factors, looks))[0]

        def start(seed: Array) -> tuple[Any, Any]:
            variables = case.flow.init(jax.random.key(seed), like=wide)
            params = variables["params"]
            return variables["const"], (params, optimizer.init(params), no_control(wide))

        def judge(const: Any, state: Any, key: Array) -> Array:
            def some(key: Array) -> Array:
                draws = case.flow.sample(key, {"params": state[0], "const": const}, (CHUNK,), with_log_prob=True)
                return case.log_prob(draws.x) - draws.log_prob

            return jax.lax.map(some, jax.random.split(key, JUDGED // CHUNK)).reshape(-1)

        over = partial(jax.vmap, in_axes=(0, 0, 0, None, None))
        self.const, self.start = jax.vmap(start)(jnp.arange(seeds))
        self._looks = jnp.arange(STEPS) % REFRESH == 0
        self._chunk, self._judge, self._seeds = jax.jit(over(chunk)), jax.jit(jax.vmap(judge)), seeds

    def advance(self, state: Any, number: int, factors: np.ndarray) -> Any:
        """One chunk of steps."""
        jax = self._jax
        keys = jax.vmap(lambda s: jax.random.split(jax.random.fold_in(jax.random.key(s), number), STEPS))(
            jax.numpy.arange(self._seeds) + 1000
        )
        return jax.block_until_ready(
            self._chunk(self.const, state, keys, jax.numpy.asarray(factors, self._dtype(state)), self._looks)
        )

    def trained(self, chunks: int) -> tuple[Any, float]:
        """The state at the end of a schedule of so many chunks, and the seconds that it took."""
        t = (np.arange(chunks * STEPS) + 0.5) / (chunks * STEPS)
        factors = 0.5 * (1 + np.cos(np.pi * t))
        state, begin = self.start, time.perf_counter()
        for i in range(chunks):
            state = self.advance(state, i, factors[i * STEPS : (i + 1) * STEPS])
        return state, time.perf_counter() - begin

    def log_weights(self, state: Any) -> np.ndarray:
        """`(seeds, draws)`."""
        jax = self._jax
        keys = jax.vmap(jax.random.key)(jax.numpy.arange(self._seeds) + 5000)
        return np.asarray(self._judge(self.const, state, keys), np.float64)

    @staticmethod
    def _dtype(state: Any) -> Any:
        return state[2].square.dtype


STEPS = 50  # of a chunk


def costs(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """The time of a step of each estimator over that of "plain": medians over rounds in which all take turns."""
    factors = np.zeros(STEPS)
    for run in runs.values():
        run.advance(run.start, 0, factors)
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        seconds = {}
        for name, run in runs.items():
            begin = time.perf_counter()
            run.advance(run.start, 0, factors)
            seconds[name] = time.perf_counter() - begin
        for name, value in seconds.items():
            ratios[name].append(value / seconds["plain"])
    return {name: float(np.median(values)) for name, values in ratios.items()}


def ess(log_w: np.ndarray) -> np.ndarray:
    w = np.exp(log_w - log_w.max(-1, keepdims=True))
    return w.sum(-1) ** 2 / (w**2).sum(-1) / w.shape[-1]


def elbo(log_w: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(log_w), log_w, 0.0).sum(-1) / np.isfinite(log_w).sum(-1)


def shown(values: np.ndarray, digits: int, unit: float = 1.0) -> str:
    """Mean and standard error over seeds."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{unit * values.mean():.{digits}f} ± {unit * error:.{digits}f}"


def worker(options: argparse.Namespace) -> None:
    """Prints the lines of one table."""
    import jax

    if options.posteriors:
        jax.config.update("jax_enable_x64", True)
    gains = []
    for name in options.targets:
        case = posterior(name) if options.posteriors else targets()[name]()
        runs = {kind: Run(case, kind, options.seeds) for kind in ESTIMATORS}
        cost = costs(runs, options.rounds)
        chunks = max(1, round(options.scale * case.steps / STEPS))
        plain, seconds = runs["plain"].trained(chunks)
        found = {"plain": runs["plain"].log_weights(plain)}
        for kind, share in (("auto", 2 / 3), ("auto", 1.0), ("path", 1.0)):
            if options.posteriors and share < 1:
                continue
            state, _ = runs[kind].trained(max(1, round(share * chunks / cost[kind])))
            found[kind if share == 1 else "auto, 2/3"] = runs[kind].log_weights(state)
        if options.posteriors:
            gain = elbo(found["auto"]) - elbo(found["plain"])
            gains.append(gain)
            cells = [shown(elbo(found[kind]), 3) for kind in found] + [shown(gain, 3)]
        else:
            cells = [shown(ess(log_w), 1, 100.0) for log_w in found.values()]
            cells += [shown(elbo(found[kind]) - (case.log_z or 0.0), 3) for kind in ("plain", "auto, 2/3", "auto")]
        row = [name, str(case.flow.dim), f"{cost['auto']:.2f}", *cells, f"{seconds:.0f}"]
        print(f"| {' | '.join(row)} |", flush=True)
    if options.posteriors:
        total = np.sum(gains, axis=0)
        print(f"\nSum of the gains over {len(gains)} posteriors: {shown(total, 3)} (over {options.seeds} seeds).")


def main(arguments: Sequence[str]) -> None:
    """Prints both tables, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gain", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of steps")
    parser.add_argument("--rounds", type=int, default=7, help="of timing a step")
    parser.add_argument("--targets", nargs="*", help="all of them, without this")
    parser.add_argument("--posteriors", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        heads = ["posterior", "dim", "step"] if options.posteriors else ["target", "dim", "step"]
        if options.posteriors:
            heads += ["ELBO: plain", "auto", "path", "auto - plain"]
        else:
            heads += [
                "ESS, %: plain",
                "auto in 2/3 of the time",
                "auto",
                "path",
                "ELBO - log Z: plain",
                "auto in 2/3",
                "auto",
            ]
        heads += ["seconds"]
        print(f"| {' | '.join(heads)} |\n|---{'|---:' * (len(heads) - 1)}|", flush=True)
        worker(options)
        return
    from benchmarks.posteriors import POSTERIORS as known

    chosen = options.targets or [*TARGETS, *known]
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    common = ["--seeds", str(options.seeds), "--scale", str(options.scale), "--rounds", str(options.rounds)]
    for names, extra in (
        ([n for n in chosen if n in TARGETS], []),
        ([n for n in chosen if n in known], ["--posteriors"]),
    ):
        if names:
            command = [sys.executable, "-m", "benchmarks", "gain", "--worker", *common, *extra, "--targets", *names]
            subprocess.run(command, cwd=ROOT, env=environment, check=True)
            print(flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
