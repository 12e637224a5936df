"""From a log density and first normal approximations of it to a trained flow, its draws and their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from flowppl import flows
from flowppl.backend import Array, backend_of
from flowppl.bijections.base import bind
from flowppl.checkpoint import Checkpoint
from flowppl.config import describe
from flowppl.flows import Flow, Recipe
from flowppl.flows.affine_end import place, rescaled, whitening
from flowppl.flows.bases import Normal
from flowppl.kernels.target import Placed
from flowppl.laplace import NormalApproximation
from flowppl.objectives.covering import wider
from flowppl.objectives.minibatches import minibatches_of
from flowppl.objectives.reverse_kl import reverse_kl
from flowppl.refining import Draws, evidence_of, phases
from flowppl.training import Options, Record, seed_of, train

_SMALL = 32  # dimensions up to which splines cost no more than they gain
_LARGE = 300  # dimensions beyond which a network costs more than so few draws can teach it
_WIDE = 10  # one draw of so many reaches further
_DRAWS = 1  # the stream of random numbers beside that of training
_CHUNK = 1000  # draws that are made and scored at a time
_OUTLYING = 0.05  # the share of draws, with the least weights, that say nothing of a posterior's scales
_NEGLIGIBLE = 0.02  # the share of the posterior's mass that may be missed
_MISSED = 3.0  # nats by which a flow's density is too low where it misses mass


class Problem(NamedTuple):
    """What is to be fitted.

    Attributes:
        flow: The flow; it ends with an affine layer.
        log_prob: Log density of the posterior, unnormalised: arrays `(n, dim)` to `(n,)`.
        normal: From a seed to a normal approximation.
        like: An array whose dtype and device the fit takes.
        minibatch: From a source of random numbers and points to what one random minibatch makes of `log_prob`, without bias; in
            training it stands for `log_prob`, which everything else sees. None where a step takes all of the data.
        plates: What subsamples then: full size and subsample size by name.
    """

    flow: Flow
    log_prob: Callable[[Array], Array]
    normal: Callable[[int], NormalApproximation]
    like: Array
    minibatch: Callable[[Any, Array], Array] | None = None
    plates: Mapping[str, tuple[int, int]] = MappingProxyType({})


class Fit(NamedTuple):
    """A trained flow.

    Attributes:
        variables: Of the flow.
        draws: Its draws with log-weights.
        others: Those of other runs and modes that were found.
        history: What each chunk of steps showed.
        start: Draws of the normal at the start, or of the fit that it went on from.
    """

    variables: dict[str, Any]
    draws: Draws
    others: list[Draws]
    history: list[Record]
    start: Draws | None


def default_flow(dim: int) -> Recipe:
    """The flow of `fit` in `dim` dimensions: splines, affine couplings beyond 32, one affine map where there are very many."""
    if dim > _LARGE:
        return flows.affine()
    return flows.realnvp(layers=6, hidden=(64, 64)) if dim > _SMALL else flows.nsf(layers=6, hidden=(32, 32))


def fit_flow(
    problem: Problem,
    seed: int,
    options: Options,
    *,
    restarts: int = 0,
    num_samples: int = 10_000,
    warm: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    progress: Callable[[Sequence[Record]], None] = lambda history: None,
) -> Fit:
    """Trains the flow, as often as asked, and keeps the run with the highest ELBO; none is worse than its start.

    With minibatches, training ends with the reverse divergence: those of `flowppl.refining` are not linear in the log density,
    and an estimate of one would bias the other.

    Args:
        problem: What to fit.
        seed: Of everything.
        options: How to train.
        restarts: Runs beside the first, from other seeds.
        num_samples: Draws of the result.
        warm: Variables of this flow, fitted to similar data: the start, where its ELBO is above the normal's.
        checkpoint: A file for the state of an interrupted fit; restarts add numbers to its name.
        progress: Called after each chunk of steps.
    """
    draw, backend = sampler(problem), backend_of(problem.like)
    runs: list[Fit] = []
    modes: list[dict[str, Any]] = []  # variables with which the flow is their normal
    for i in range(restarts + 1):
        own = seed_of(seed, i)
        normal = problem.normal(own)
        start = problem.flow.init(backend.rng(own, problem.like), problem.like)
        modes += [_as_normal(problem, start, mode) for mode in normal.others]
        memory = checkpoint and Checkpoint(
            f"{checkpoint}.{i}" if i else checkpoint, _task(problem, normal, own, options)
        )
        weigh = partial(draw, seed=own, n=num_samples)
        runs.append(_run(problem, start, normal, own, options, weigh, warm, memory or None, progress))
    best = max(range(len(runs)), key=lambda i: _elbo(runs[i].draws))
    fit = runs.pop(best)
    missed = _missed(problem, fit, [draw(mode, seed, num_samples) for mode in modes])
    return fit._replace(others=[run.draws for run in runs] + missed)


def sampler(problem: Problem) -> Callable[..., Draws]:
    """A function `draw(variables, seed, n)` that draws from the flow and weighs the draws.

    One draw in ten reaches further than the base along one coordinate, and weights count both kinds as draws of one mixture: so
    they stay bounded where the flow's tails are too light, whatever the flow. See `flowppl.objectives.covering.wider`.
    """
    backend = backend_of(problem.like)
    defensive = isinstance(problem.flow.base, Normal)

    @backend.jit
    def some(variables: dict[str, Any], rng: Any) -> tuple[Array, Array]:
        flow = problem.flow
        base_rng, rng = backend.split(rng, 2)
        z = flow.base.sample(base_rng, bind(variables)["base"], (_CHUNK, flow.dim), problem.like)
        z, log_ratio = wider(rng, z, _WIDE) if defensive else (z, 0.0)
        sample = flow.push(variables, z, with_log_prob=True)
        return sample.x, problem.log_prob(sample.x) - sample.log_prob - log_ratio

    def draw(variables: dict[str, Any], seed: int, n: int) -> Draws:
        parts = [some(variables, backend.rng(seed_of(seed, i, _DRAWS), problem.like)) for i in range(-(-n // _CHUNK))]
        x, log_w = (
            np.concatenate([np.asarray(backend.to_numpy(backend.stop(part[k])), np.float64) for part in parts])[:n]
            for k in (0, 1)
        )
        return x, log_w

    return draw


def in_chunks(function: Callable[[np.ndarray], dict[str, np.ndarray]], points: np.ndarray) -> dict[str, np.ndarray]:
    """A function of many points `(n, dim)`, so many at a time that memory is bounded."""
    padded = np.concatenate([points, np.repeat(points[-1:], -len(points) % _CHUNK, axis=0)])
    parts = [function(part) for part in np.split(padded, len(padded) // _CHUNK)]
    return {name: np.concatenate([part[name] for part in parts])[: len(points)] for name in parts[0]}


@contextmanager
def shown(options: Options, on: bool, objective: str = "ELBO") -> Iterator[Callable[[Sequence[Record]], None]]:
    """A progress bar over the steps of training, with the objective beside it."""
    with tqdm(total=options.max_steps, disable=not on, unit="step") as bar:

        def progress(history: Sequence[Record]) -> None:
            record = history[-1]
            bar.set_postfix_str(f"{objective} {record.elbo:.3f} ± {record.elbo_error:.3f}", refresh=False)
            bar.update(min(options.chunk, options.max_steps))

        yield progress


def _run(
    problem: Problem,
    start: dict[str, Any],
    normal: NormalApproximation,
    seed: int,
    options: Options,
    draw: Callable[[dict[str, Any]], Draws],
    warm: dict[str, Any] | None,
    memory: Checkpoint | None,
    progress: Callable[[Sequence[Record]], None],
) -> Fit:
    flow, backend = problem.flow, backend_of(problem.like)
    start = _as_normal(problem, start, normal)
    before = draw(start)
    if warm is not None and _elbo(again := draw(warm)) > _elbo(before):
        start, before = warm, again
        loc, scale_tril = _moments(again)
        normal = normal._replace(loc=loc, scale_tril=scale_tril)

    # The density is whitened by the normal, so that step sizes mean the same for all posteriors.
    loc, scale = whitening(flow, *(_like(problem, a) for a in normal[:2]))
    inverse = _like(problem, np.tril(np.linalg.inv(np.asarray(backend.to_numpy(scale), np.float64))))
    whitened = Placed(problem.log_prob, loc, scale)
    minibatches = None
    if (one := problem.minibatch) is not None:
        minibatches = minibatches_of(lambda rng, w: Placed(partial(one, rng), loc, scale)(w), whitened, problem.like)

    def gradient(variables: dict[str, Any], rng: Any, control: Any, refresh: Array) -> Any:
        rng, log_prob = minibatches(rng) if minibatches else (rng, whitened)
        return reverse_kl(flow, variables, log_prob, rng, options.num_particles, control, refresh)

    trained, history = train(gradient, rescaled(flow, start, -inverse @ loc, inverse), seed, options, memory, progress)
    after = draw(rescaled(flow, trained, loc, scale))
    if not _elbo(after) >= _elbo(before):
        return Fit(start, before, [], history, before)
    for phase in [] if minibatches else phases(flow, trained, whitened, after, seed, options, problem.like):
        beside, report = memory and memory.beside(phase.name), partial(_onwards, progress, history)
        own = seed_of(seed, phase.stream)
        found, more = train(phase.gradient, trained, own, options, beside, report, phase.moves)
        history = history + more
        again = draw(rescaled(flow, found, loc, scale))
        if phase.better(again, after) and _elbo(again) >= _elbo(before):
            trained, after = found, again
            break
    return Fit(rescaled(flow, trained, loc, scale), after, [], history, before)


def _onwards(progress: Callable[[Sequence[Record]], None], earlier: list[Record], more: Sequence[Record]) -> None:
    """Reports records that follow on earlier ones."""
    progress([*earlier, *more])


def _missed(problem: Problem, fit: Fit, modes: list[Draws]) -> list[Draws]:
    """Those of other modes' draws that show that the flow misses a share of the mass."""
    backend = backend_of(problem.like)
    log_ratio = backend.jit(lambda v, x: backend.stop(problem.log_prob(x) - problem.flow.log_prob(v, x)))
    log_z = evidence_of(fit.draws).log_evidence
    found = []
    for x, log_w in modes:
        x, log_w = x[:_CHUNK], log_w[:_CHUNK]
        mode = evidence_of((x, log_w))
        share = np.exp(min(mode.log_evidence - log_z, 0.0))
        if share > _NEGLIGIBLE:
            gap = np.asarray(backend.to_numpy(log_ratio(fit.variables, _like(problem, x))), np.float64) - log_z
            if share * (mode.weight @ ~(gap <= _MISSED)) > _NEGLIGIBLE:
                found.append((x, log_w))
    return found


def _as_normal(problem: Problem, start: dict[str, Any], normal: NormalApproximation) -> dict[str, Any]:
    """The variables of a flow that starts as the identity, with which it is the normal."""
    return place(problem.flow, start, *(_like(problem, a) for a in normal[:2]))


def _like(problem: Problem, a: np.ndarray) -> Array:
    backend = backend_of(problem.like)
    return backend.asarray(backend.xp.asarray(a), problem.like)


def _moments(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Mean and Cholesky factor of the covariance, without the draws that reach further or are where the density is least."""
    x, log_w = (a[np.arange(len(a)) % _WIDE != 0] for a in draws)
    x = x[log_w >= np.quantile(log_w, _OUTLYING)]
    centred = x - x.mean(0)
    return x.mean(0), np.linalg.cholesky(centred.T @ centred / len(x))


def _elbo(draws: Draws) -> float:
    """The ELBO without the draws that reach further: in a funnel's neck a single one of those may cost more than training gains."""
    log_w = draws[1]
    return float(log_w[np.arange(len(log_w)) % _WIDE != 0].mean())


def _task(problem: Problem, normal: NormalApproximation, seed: int, options: Options) -> dict[str, Any]:
    """What makes two fits the same, as JSON types; the ELBO of the start stands for model and data."""
    chosen = {k: v for k, v in vars(options).items() if k != "optimizer"}
    data = f"{normal.elbo:.9g}"
    plates = {"plates": sorted(map(list, problem.plates.items()))} if problem.plates else {}
    task = {"flow": describe(problem.flow), "seed": seed, "data": data, "dtype": str(problem.like.dtype)}
    return {**task, **chosen, **plates}
