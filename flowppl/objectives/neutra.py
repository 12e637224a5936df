"""Learning from Markov chains of the target that move in the coordinates of the flow's base, where its density is simpler."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from flowppl import tree
from flowppl.backend import Array, backend_of
from flowppl.bijections.base import bind
from flowppl.flows import Flow
from flowppl.kernels import Walkers, hmc, init, target
from flowppl.objectives.control import Control
from flowppl.objectives.covering import LARGEST
from flowppl.objectives.reverse_kl import Estimate, reverse_kl
from flowppl.weights import log_mean_exp, resample_systematic

_CANDIDATES = 2  # draws for each chain to start from
_LEAPS = 10  # leapfrog steps of a transition
_FIRST = 0.3  # its step size
_SHORTER = math.log(10.0)  # by which it may be shorter, at random
_ACCEPTANCE, _GAIN = 0.8, 0.2  # what it is led to, and how fast

LogProb = Callable[[Array], Array]


class Points(NamedTuple):
    """What chains have visited.

    Attributes:
        x: `(n, dim)`.
        log_p: The target's log density, unnormalised, `(n,)`.
        score: Its gradient, `(n, dim)`.
    """

    x: Array
    log_p: Array
    score: Array


def visited(
    flow: Flow, variables: dict[str, Any], log_prob: LogProb, rng: Any, chains: int, transitions: int
) -> Points:
    """Runs Hamiltonian Monte Carlo in the coordinates of the flow's base, from draws of the flow that are chosen by their weights.

    Each transition has a random step size, since short steps enter what the flow misses, as a funnel's neck. The largest follows
    the acceptance. Hoffman et al. 2019, "NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural transport".

    Args:
        flow: q.
        variables: Its variables.
        log_prob: Log density of the target, unnormalised: `(n, dim)` to `(n,)`.
        rng: A jax key, or a `torch.Generator`.
        chains: How many.
        transitions: Of each chain.

    Returns:
        Where the chains were after each of the last three quarters of the transitions.
    """
    like = tree.leaves(variables["params"])[0]
    backend = backend_of(like)
    xp = backend.xp
    base = bind(variables)["base"]
    start_rng, choice_rng, rng = backend.split(rng, 3)

    def latent(z: Array) -> Array:
        sample = flow.push(variables, z, with_log_prob=True)
        return log_prob(sample.x) - sample.log_prob + flow.base.log_prob(base, z)

    z = flow.base.sample(start_rng, base, (_CANDIDATES * chains, flow.dim), like)
    log_w = latent(z) - flow.base.log_prob(base, z)
    log_w = xp.where(xp.isfinite(log_w), log_w, -math.inf)
    z = z[resample_systematic(choice_rng, xp.clip(log_w, None, log_mean_exp(log_w) + LARGEST), chains)]
    density = target(latent, z)

    def transition(state: tuple[Walkers, Array, Any], _: Array) -> tuple[tuple[Walkers, Array, Any], Array]:
        walkers, log_step, rng = state
        size_rng, move_rng, rng = backend.split(rng, 3)
        shorter = _SHORTER * backend.uniform(size_rng, (chains, 1), like=z)
        walkers, info = hmc.step(move_rng, density, walkers, xp.exp(log_step - shorter), num_steps=_LEAPS)
        return (walkers, log_step + _GAIN * (xp.mean(info.acceptance) - _ACCEPTANCE), rng), walkers.x

    state = (init(density, z), backend.asarray(math.log(_FIRST), like), rng)
    _, z = backend.scan(transition, state, backend.asarray(xp.zeros(transitions), like))
    z = z[transitions // 4 :]

    def look(carry: Array, z: Array) -> tuple[Array, Points]:
        x = flow.push(variables, z).x
        return carry, Points(x, *backend.value_and_score(log_prob, x))

    _, points = backend.scan(look, log_w, z)
    return tree.map(lambda a: xp.reshape(a, (-1, *a.shape[2:])), points)


def both_ways(
    flow: Flow,
    variables: dict[str, Any],
    log_prob: LogProb,
    rng: Any,
    num_particles: int,
    control: Control,
    refresh: Array,
    points: Points,
    log_z: float,
) -> tuple[Estimate, Any, Control]:
    """The gradient of KL(q | p) + chi-square(p | q) / 2: the first by draws of q, the second by points of p.

    Draws of q do not show what it misses; points of p do. With scores s_q and s_p, the path gradient of the second term pulls
    p / q (s_q - s_p) at the points back through the flow, as `objectives.forward_kl` does with weights of one. The weights are cut
    off at e^2.

    Args:
        flow: q.
        variables: Its variables.
        log_prob: Log density of the target, unnormalised: `(n, dim)` to `(n,)`.
        rng: A jax key, or a `torch.Generator`.
        num_particles: Draws of q. The points are twice as many, a random choice.
        control: See `reverse_kl`.
        refresh: See `reverse_kl`.
        points: Of p.
        log_z: About the log of the normalising constant of p.

    Returns:
        What `reverse_kl` gives, with gradients of the sum.
    """
    like = tree.leaves(variables["params"])[0]
    backend = backend_of(like)
    xp, stop = backend.xp, backend.stop
    choice_rng, rng = backend.split(rng, 2)
    estimate, reverse, control = reverse_kl(flow, variables, log_prob, rng, num_particles, control, refresh)

    n, many = 2 * num_particles, points.log_p.shape[0]
    at = xp.astype(xp.floor(many * backend.uniform(choice_rng, (n,), like=like)), xp.int32) % many
    x, log_p, score = (a[at] for a in points)
    z = stop(flow.bijection.inverse(bind(stop(variables))["bijection"], x)[0])

    def push(params: Any) -> tuple[Array, tuple[Array, Array]]:
        sample = flow.push({**variables, "params": params}, z, with_score=True)
        return sample.x, (sample.log_prob, sample.score)

    _, pull, (log_q, own) = backend.vjp(push, stop(variables["params"]), has_aux=True, once=True)
    weight = xp.exp(xp.clip(log_p - stop(log_q) - log_z, None, LARGEST))
    (forward,) = pull(weight[:, None] * (stop(own) - score) / n)
    return estimate, tree.map(lambda a, b: a + b, reverse, forward), control
