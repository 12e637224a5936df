"""Proposals that do not depend on where a walker is, such as draws of a flow: Metropolis's rule, or a choice among many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowppl import tree, weights
from flowppl.backend import Array, backend_of
from flowppl.kernels.target import Info, Target, Walkers, accept, init

Propose = Callable[[Any, int], tuple[Array, Array]]  # rng, n -> points (n, dim) and their log densities (n,)


def step(
    rng: Any, target: Target, walkers: Walkers, propose: Propose, log_proposal: Callable[[Array], Array]
) -> tuple[Walkers, Info]:
    """Proposes a draw of the proposal, and accepts it or not. Tierney 1994, "independence chains".

    Args:
        rng: A jax key, or a `torch.Generator`.
        target: What it leaves invariant.
        walkers: With scores or without.
        propose: `propose(rng, n)` gives n independent draws, `(n, dim)`, and their log densities, `(n,)`.
        log_proposal: Their log density at any point, `(n, dim)` to `(n,)`. It is asked for where walkers are, in every step:
            what other steps did in between does not matter.
    """
    draw_rng, accept_rng = backend_of(walkers.x).split(rng, 2)
    x, log_q = propose(draw_rng, walkers.x.shape[0])
    proposed = init(target, x, with_scores=walkers.scores is not None)
    ratio = target.log_prob(proposed) - log_q - (target.log_prob(walkers) - log_proposal(walkers.x))
    return accept(accept_rng, target, ratio, walkers, proposed)


def isir(
    rng: Any,
    target: Target,
    walkers: Walkers,
    propose: Propose,
    log_proposal: Callable[[Array], Array],
    *,
    num_proposals: int = 32,
) -> tuple[Walkers, Info]:
    """Iterated sampling importance resampling: goes to one of many proposals, or stays, by their weights.

    Andrieu, Lee & Vihola 2018, "Uniform ergodicity of the iterated conditional SMC".

    Args:
        rng: A jax key, or a `torch.Generator`.
        target: What it leaves invariant.
        walkers: With scores or without.
        propose: See `step`.
        log_proposal: See `step`.
        num_proposals: For each walker; all of them are evaluated at once.

    Returns:
        The walkers, and as acceptance the probability of leaving.
    """
    backend = backend_of(walkers.x)
    xp, n = backend.xp, walkers.x.shape[0]
    draw_rng, choice_rng = backend.split(rng, 2)
    x, log_q = propose(draw_rng, n * num_proposals)
    proposed = init(target, x, with_scores=walkers.scores is not None)
    before = target.log_prob(walkers)
    own = before - log_proposal(walkers.x)
    log_w = xp.concat([own[:, None], xp.reshape(target.log_prob(proposed) - log_q, (n, num_proposals))], axis=1)
    at = weights.resample_multinomial(choice_rng, log_w, n=1)[:, 0]

    rows = backend.asarray(xp.arange(n), walkers.x)

    def chosen(own: Array, others: Array) -> Array:
        others = xp.reshape(others, (n, num_proposals, *own.shape[1:]))
        return xp.concat([own[:, None], others], axis=1)[rows, at]

    new = tree.map(chosen, walkers, proposed)
    shares = weights.normalize(log_w, axis=1)
    log_choice = xp.log(shares[rows, at])
    return new, Info(before - target.log_prob(new), 1 - shares[:, 0], log_choice)
