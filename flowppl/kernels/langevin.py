"""Langevin dynamics without acceptance: not exact, but with the ratio of the ways there and back, which makes paths exact.

Rossky et al. 1978; the ratios as in Wu, Koehler & Noe 2020, "Stochastic normalizing flows", equations 15 to 20.
"""

from __future__ import annotations

from typing import Any

from flowppl.backend import Array, backend_of
from flowppl.kernels.target import Info, Target, Walkers, init


def step(rng: Any, target: Target, walkers: Walkers, step_size: Array | float) -> tuple[Walkers, Info]:
    """Overdamped: x' = x + step_size^2 / 2 score(x) + step_size noise.

    Args:
        rng: A jax key, or a `torch.Generator`.
        target: What the dynamics follow.
        walkers: With scores.
        step_size: The sd of the noise: a scalar, `(dim,)` or `(n, 1)`.
    """
    backend = backend_of(walkers.x)
    xp = backend.xp
    noise = backend.normal(rng, tuple(walkers.x.shape), like=walkers.x)
    new = init(target, walkers.x + 0.5 * step_size * step_size * target.score(walkers) + step_size * noise)
    back = (walkers.x - new.x) / step_size - 0.5 * step_size * target.score(new)
    ratio = 0.5 * (xp.sum(noise * noise, axis=-1) - xp.sum(back * back, axis=-1))
    return new, Info(ratio, xp.ones_like(ratio), xp.zeros_like(ratio))


def underdamped(
    rng: Any,
    target: Target,
    walkers: Walkers,
    step_size: Array | float,
    *,
    friction: Array | float = 1.0,
    num_steps: int = 8,
) -> tuple[Walkers, Info]:
    """Draws velocities of unit mass and follows the dynamics with friction; velocities are left behind at the end.

    A step draws a part of the velocities anew, makes one leapfrog step, and draws again (OBABO; Bussi & Parrinello 2007). Drawing
    is reversible for normal velocities and the leapfrog keeps volumes, so what it takes from the kinetic energy is the ratio.

    Args:
        rng: A jax key, or a `torch.Generator`.
        target: What the dynamics follow.
        walkers: With scores.
        step_size: Of time: a scalar, `(dim,)` or `(n, 1)`.
        friction: The rate at which velocities are forgotten, per unit of time.
        num_steps: Steps, each of them one evaluation of all factors.
    """
    backend = backend_of(walkers.x)
    xp = backend.xp
    keep = xp.exp(-0.5 * friction * step_size * xp.ones_like(walkers.x))
    fresh = xp.sqrt(1 - keep * keep)
    start, rng = backend.split(rng, 2)

    def draw(rng: Any) -> Array:
        return backend.normal(rng, tuple(walkers.x.shape), like=walkers.x)

    def kinetic(velocity: Array) -> Array:
        return 0.5 * xp.sum(velocity * velocity, axis=-1)

    def one(state: Any, _: Array) -> tuple[Any, Array]:
        at, velocity, ratio, rng = state
        first, second, rng = backend.split(rng, 3)
        before = keep * velocity + fresh * draw(first)
        half = before + 0.5 * step_size * target.score(at)
        at = init(target, at.x + step_size * half)
        after = half + 0.5 * step_size * target.score(at)
        return (at, keep * after + fresh * draw(second), ratio + kinetic(before) - kinetic(after), rng), _

    zero = xp.zeros_like(walkers.log_probs[:, 0])
    steps = backend.asarray(xp.zeros(num_steps), walkers.x)
    (new, _, ratio, _), _ = backend.scan(one, (walkers, draw(start), zero, rng), steps)
    return new, Info(ratio, xp.ones_like(ratio), xp.zeros_like(ratio))
