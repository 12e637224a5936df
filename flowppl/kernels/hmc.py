"""Hamiltonian Monte Carlo. Duane et al. 1987; Neal 2011, "MCMC using Hamiltonian dynamics"."""

from __future__ import annotations

from typing import Any

from flowppl.backend import Array, backend_of
from flowppl.kernels.target import Info, Target, Walkers, accept, init


def step(
    rng: Any, target: Target, walkers: Walkers, step_size: Array | float, *, num_steps: int = 8
) -> tuple[Walkers, Info]:
    """Draws momenta, follows the dynamics by leapfrog, and accepts or not.

    Args:
        rng: A jax key, or a `torch.Generator`.
        target: What it leaves invariant.
        walkers: With scores.
        step_size: Of the leapfrog: a scalar, `(dim,)` or `(n, 1)`.
        num_steps: Leapfrog steps, each of them one evaluation of all factors.
    """
    backend = backend_of(walkers.x)
    xp = backend.xp
    momentum_rng, accept_rng = backend.split(rng, 2)
    momentum = backend.normal(momentum_rng, tuple(walkers.x.shape), like=walkers.x)
    half = momentum + 0.5 * step_size * target.score(walkers)

    def leap(state: tuple[Walkers, Array], _: Array) -> tuple[tuple[Walkers, Array], Array]:
        at, momentum = state
        at = init(target, at.x + step_size * momentum)
        return (at, momentum + step_size * target.score(at)), _

    steps = backend.asarray(xp.zeros(num_steps), walkers.x)
    (end, momentum_end), _ = backend.scan(leap, (walkers, half), steps)
    momentum_end = momentum_end - 0.5 * step_size * target.score(end)
    before, after = target.log_prob(walkers), target.log_prob(end)
    kinetic = 0.5 * (xp.sum(momentum * momentum, axis=-1) - xp.sum(momentum_end * momentum_end, axis=-1))
    return accept(accept_rng, target, after - before + kinetic, walkers, end)
