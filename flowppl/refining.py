"""After the reverse divergence: phases of training for what draws of the flow do not show, each kept only where it helps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flowppl.backend import Array, backend_of
from flowppl.diagnostics.compare import Evidence, evidence
from flowppl.flows import Flow
from flowppl.flows.bases import Normal
from flowppl.objectives.covering import chi_square
from flowppl.objectives.neutra import both_ways, visited
from flowppl.training import Move, Options, Target, annealed, seed_of

_FEW = 0.5  # share of effective draws below which chains show where the others should be
_CHAINS, _TRANSITIONS = 500, 100  # of those
_LARGE = 300  # dimensions beyond which they would take too much memory, and a flow could learn little from so few
_LEARNING = annealed(chunks=8, level=0.1)  # from where they were
_HEAVY = 0.4  # k-hat above which training goes on with the tails in view
_COVERING = [annealed(chunks=4, level=level) for level in (0.2, 0.05)]  # the second if the first fails
_PRICE = 0.5  # the share of the effective sample size that a lighter tail of the weights may cost
_COVER, _WALK, _LEARN = 2, 3, 4  # streams of random numbers, beside those of `fitting`

Draws = tuple[np.ndarray, np.ndarray]  # points (n, dim) and log-weights (n,), in float64


class Phase(NamedTuple):
    """More training.

    Attributes:
        name: Of its checkpoint.
        gradient: What to train with.
        stream: Of random numbers.
        moves: The step sizes.
        better: Whether new draws are better than old ones.
    """

    name: str
    gradient: Target
    stream: int
    moves: list[Move]
    better: Callable[[Draws, Draws], bool]


def phases(
    flow: Flow,
    variables: dict[str, Any],
    log_prob: Callable[[Array], Array],
    draws: Draws,
    seed: int,
    options: Options,
    like: Array,
) -> list[Phase]:
    """What to try, in this order, until one is kept; none where draws are good, or steps too few to tell.

    Where few draws count, the flow misses where most of the mass is: Markov chains go there, and it learns from them. Where most
    count, but the weights' tail is heavy, it misses little: draws that reach further find that.

    Args:
        flow: A trained flow.
        variables: Its variables.
        log_prob: Log density of the target in the coordinates of training: `(n, dim)` to `(n,)`.
        draws: Weighted draws of the flow.
        seed: Of everything.
        options: How it was trained.
        like: An array whose dtype and device the target takes.
    """
    if not isinstance(flow.base, Normal) or options.max_steps < 2 * len(_COVERING[0]) * options.chunk:
        return []
    state, n = evidence_of(draws), options.num_particles
    if state.ess < _FEW * len(draws[1]) and flow.dim <= _LARGE:
        backend = backend_of(like)
        walk = backend.jit(lambda v, rng: visited(flow, v, log_prob, rng, _CHAINS, _TRANSITIONS))
        points = backend.stop(walk(variables, backend.rng(seed_of(seed, _WALK), like)))

        def learn(variables: dict[str, Any], rng: Any, control: Any, refresh: Array) -> Any:
            return both_ways(flow, variables, log_prob, rng, n, control, refresh, points, state.log_evidence)

        return [Phase("chains", learn, _LEARN, _LEARNING, _fuller)]
    if state.khat > _HEAVY:

        def cover(variables: dict[str, Any], rng: Any, control: Any, refresh: Array) -> Any:
            return *chi_square(flow, variables, log_prob, rng, 2 * n), control

        return [Phase(f"tails-{moves[0].level:g}", cover, _COVER, moves, _lighter) for moves in _COVERING]
    return []


def evidence_of(draws: Draws) -> Evidence:
    """What the weights say."""
    log_w = draws[1]
    return evidence(np.where(np.isnan(log_w) | (log_w == np.inf), -np.inf, log_w))


def _lighter(new: Draws, old: Draws) -> bool:
    """Whether the weights' tail is lighter, not at the price of most draws."""
    found, before = evidence_of(new), evidence_of(old)
    return found.khat < before.khat and found.ess > _PRICE * before.ess


def _fuller(new: Draws, old: Draws) -> bool:
    """Whether more of the draws count."""
    return evidence_of(new).ess > evidence_of(old).ess
