"""Random-walk Metropolis. Metropolis et al. 1953."""

from __future__ import annotations

from typing import Any

from flowppl.backend import Array, backend_of
from flowppl.kernels.target import Info, Target, Walkers, accept, init


def step(rng: Any, target: Target, walkers: Walkers, step_size: Array | float) -> tuple[Walkers, Info]:
    """Proposes x + step_size noise, and accepts or not. Gradients are not needed.

    Args:
        rng: A jax key, or a `torch.Generator`.
        target: What it leaves invariant.
        walkers: With scores or without.
        step_size: The sd of the noise: a scalar, `(dim,)` or `(n, 1)`.
    """
    backend = backend_of(walkers.x)
    noise_rng, accept_rng = backend.split(rng, 2)
    noise = backend.normal(noise_rng, tuple(walkers.x.shape), like=walkers.x)
    proposed = init(target, walkers.x + step_size * noise, with_scores=walkers.scores is not None)
    return accept(accept_rng, target, target.log_prob(proposed) - target.log_prob(walkers), walkers, proposed)
