"""From a log density and a normal approximation of it, or a flow, to weighted draws and the evidence, by annealing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from flowppl import weights
from flowppl.backend import Array, backend_of
from flowppl.bijections.base import bind
from flowppl.checkpoint import Checkpoint
from flowppl.config import describe
from flowppl.errors import UnsupportedModelError
from flowppl.fitting import Draws, Problem
from flowppl.flows.affine_end import place
from flowppl.flows.bases import Normal, StudentT
from flowppl.kernels import Known, hmc
from flowppl.kernels.target import LogProb, Placed
from flowppl.stochastic import Bridge, Schedule, anneal, tune
from flowppl.training import seed_of

Push = Callable[[Array], Array]  # from where the base lives to where the posterior does, (n, dim)
_MANY, _HIGH, _FEWER = 10_000, 300, 2000  # draws where none are asked for, and those beyond so many dimensions
_ISLANDS = 20  # independent runs, at least, where each has particles enough
_SMALLEST, _LARGEST = 100, 500  # particles of one
_TEMPERATURES = 8  # at least
_TUNING, _BASE, _RUNS = 0, 1, 2  # streams of random numbers


class Annealing(NamedTuple):
    """What annealing gave.

    Attributes:
        variables: Of the flow that it started from.
        draws: Points `(n, dim)` and log-weights `(n,)`.
        start: Draws of the base, with their log-weights.
        log_z: The evidence that each island of particles found, `(islands,)`.
        schedule: Temperatures and step sizes.
        ess: Effective share of an island at each temperature, the mean over islands.
        acceptance: Of the kernel at each temperature.
        resampled: The share of islands that were resampled at each temperature.
    """

    variables: dict[str, Any]
    draws: Draws
    start: Draws
    log_z: np.ndarray
    schedule: Schedule
    ess: np.ndarray
    acceptance: np.ndarray
    resampled: np.ndarray

    @property
    def log_evidence(self) -> tuple[float, float]:
        """Log of the mean over islands of what is unbiased, and its standard error by the delta method."""
        n = len(self.log_z)
        error = (n * weights.normalize(self.log_z)).std(ddof=1) / n**0.5 if n > 1 else np.inf
        return float(weights.log_mean_exp(self.log_z)), float(error)


def refuse_angles(names: Iterable[str], why: str = "annealing starts from a flow of real vectors: use fit") -> None:
    """Raises an error that names the first of these sites, which are angles: HMC and a normal base go over real vectors."""
    for name in names:
        raise UnsupportedModelError(f"{name!r} is an angle, and {why}")


def anneal_flow(
    problem: Problem,
    seed: int,
    *,
    variables: dict[str, Any] | None = None,
    num_samples: int | None = None,
    num_steps: int = 8,
    step_ess: float = 0.95,
    checkpoint: str | None = None,
    progress_bar: bool = False,
) -> Annealing:
    """Anneals from the flow to the posterior, in the space of the flow's base.

    There the flow is standard normal, whatever it is, and the posterior is p(T(z)) |det dT / dz|: well-scaled for HMC where the
    flow is anything like the posterior, and without a need for the flow's inverse.

    Args:
        problem: The posterior, and a flow that ends with an affine layer.
        seed: Of everything.
        variables: Of the flow; None for the normal approximation of the posterior.
        num_samples: Draws, made by islands of particles, whose evidences tell the error; None for 10 000, in more than 300
            dimensions 2000.
        num_steps: Leapfrog steps at each temperature.
        step_ess: See `flowppl.stochastic.tune`.
        checkpoint: A file that keeps the islands that are done.
        progress_bar: Whether to show how it goes.

    Raises:
        UnsupportedModelError: the flow's base is not normal or Student-t.
        ValueError: `num_samples` is not positive.
    """
    flow, like, backend = problem.flow, problem.like, backend_of(problem.like)
    n = (_FEWER if flow.dim > _HIGH else _MANY) if num_samples is None else num_samples
    if n < 1:
        raise ValueError(f"num_samples must be positive, got {n}")
    size = min(max(-(-n // _ISLANDS), _SMALLEST), _LARGEST)
    islands = range(-(-n // size))
    variables, target, push = _start(problem, seed, variables)
    bridge, kernel = _bridge(problem, variables, target), partial(hmc.step, num_steps=num_steps)

    def together(x: np.ndarray, log_w: np.ndarray) -> Draws:
        return x.reshape(-1, flow.dim)[:n], log_w.reshape(-1)[:n]

    def first(rng: Any) -> tuple[Array, Array]:
        z = bridge.sample(rng, size)
        return push(z), bridge.log_prob(z) - bridge.log_base(z)

    with tqdm(total=len(islands) + 1, disable=not progress_bar, unit="run") as bar:
        bar.set_description_str("temperatures")
        schedule = tune(
            backend.rng(seed_of(seed, _TUNING), like),
            bridge,
            kernel,
            like,
            n=size,
            step_ess=step_ess,
            min_temperatures=_TEMPERATURES,
            progress=lambda beta: bar.set_postfix_str(f"beta {beta:.3g}"),
        )
        bar.update()
        bar.set_description_str(f"{len(schedule.betas)} temperatures")
        fixed = tuple(backend.asarray(backend.xp.asarray(a), like) for a in schedule)

        def island(rng: Any) -> tuple:
            found = anneal(rng, bridge, kernel, fixed, size)
            return push(found.x), *found[1:]

        starts = _each(first, like, (seed_of(seed, _BASE, i) for i in islands))
        start = together(*map(np.stack, zip(*starts, strict=True)))
        # The start stands for model and data, whose schedules may be alike.
        data = [f"{a[np.isfinite(a)].mean():.9g}" for a in start]
        task = {"flow": describe(flow), "seed": seed, "num_samples": n, "num_steps": num_steps}
        memory = checkpoint and Checkpoint(checkpoint, {**task, "step_ess": step_ess, "data": data})
        shapes = [(size, flow.dim), (size,), *[schedule.betas.shape] * 3]
        found = [np.zeros((len(islands), *shape)) for shape in shapes]
        found = _collected(
            lambda done: _each(island, like, (seed_of(seed, _RUNS, i) for i in islands[done:])),
            found,
            memory or None,
            bar,
        )
    x, log_w, *seen = found
    log_z = weights.log_mean_exp(log_w)
    return Annealing(variables, together(x, log_w), start, log_z, schedule, *(a.mean(0) for a in seen))


def _start(problem: Problem, seed: int, variables: dict[str, Any] | None) -> tuple[dict[str, Any], LogProb, Push]:
    """The flow to start from, or without one the normal approximation: its variables, the posterior where its base lives, and T."""
    flow, like, backend = problem.flow, problem.like, backend_of(problem.like)
    if not isinstance(flow.base, Normal | StudentT):
        raise UnsupportedModelError(
            f"annealing starts from a flow whose base is Normal or StudentT, and this one's is {type(flow.base).__name__}: fit "
            "with another flow, or leave out start"
        )
    if variables is None:
        normal = problem.normal(seed)
        loc, scale_tril = (backend.asarray(backend.xp.asarray(a), like) for a in normal[:2])
        variables = backend.stop(place(flow, flow.init(backend.rng(seed, like), like), loc, scale_tril))
        # Its one product does what the flow's own map does by one for each factor.
        at = Placed(problem.log_prob, loc, scale_tril)
        return variables, at, at.there
    variables = backend.stop(variables)
    base = bind(variables)["base"]

    def log_prob(z: Array) -> Array:
        sample = flow.push(variables, z, with_log_prob=True)
        return problem.log_prob(sample.x) - sample.log_prob + flow.base.log_prob(base, z)

    return variables, log_prob, lambda z: flow.push(variables, z).x


def _each(f: Callable[[Any], Any], like: Array, seeds: Iterable[int]) -> Iterator[list[np.ndarray]]:
    """What f gives for the random numbers of each seed."""
    backend = backend_of(like)
    for arrays in backend.each(f, [backend.rng(seed, like) for seed in seeds]):
        yield [np.asarray(backend.to_numpy(a), np.float64) for a in arrays]


def _collected(
    make: Callable[[int], Iterator[list[np.ndarray]]], found: list[np.ndarray], memory: Checkpoint | None, bar: tqdm
) -> list[np.ndarray]:
    """The arrays of all islands, filled in by `make(done)` from the first one on that an interrupted run has not kept."""
    done = 0
    if memory and (state := memory.load({"done": np.zeros(()), "found": found})):
        done, found = int(state[0]["done"]), state[0]["found"]
        bar.update(done)
    for i, arrays in enumerate(make(done), done):
        for all_of_them, one in zip(found, arrays, strict=True):
            all_of_them[i] = one
        if memory:
            memory.save({"done": np.asarray(i + 1.0), "found": found}, [])
        bar.update()
    return found


def _bridge(problem: Problem, variables: dict[str, Any], target: LogProb) -> Bridge:
    """From the flow's base to the target."""
    flow, base = problem.flow, bind(variables)["base"]

    def sample(rng: Any, n: int) -> Array:
        return flow.base.sample(rng, base, (n, flow.dim), problem.like)

    return Bridge(sample, Known(partial(flow.base.log_prob, base), partial(flow.base.score, base)), target)
