"""The Metropolis-adjusted Langevin algorithm: one leapfrog step of HMC. Roberts & Tweedie 1996."""

from __future__ import annotations

from typing import Any

from flowppl.backend import Array
from flowppl.kernels import hmc
from flowppl.kernels.target import Info, Target, Walkers


def step(rng: Any, target: Target, walkers: Walkers, step_size: Array | float) -> tuple[Walkers, Info]:
    """Proposes x + step_size^2 / 2 score + step_size noise, and accepts or not.

    Args:
        rng: A jax key, or a `torch.Generator`.
        target: What it leaves invariant.
        walkers: With scores.
        step_size: The sd of the noise: a scalar, `(dim,)` or `(n, 1)`.
    """
    return hmc.step(rng, target, walkers, step_size, num_steps=1)
