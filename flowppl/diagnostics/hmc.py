"""Does a short run of Hamiltonian Monte Carlo carry draws away? From draws of the target itself it cannot."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from flowppl.errors import DimensionError

Array = np.ndarray
Density = Callable[[Array], tuple[Array, Array]]
_TRANSITIONS = 30
_TRAJECTORY = math.pi / 2  # forgets the start of a normal target, in units of its sds
_SHARES = (1.0, 0.3, 0.1)  # of the step size, at random: short steps enter what the draws miss, as a funnel's neck
_MAX_STEPS = 32
_FLIPS = 1999


class Drift(NamedTuple):
    """What a short run of HMC does to draws; arrays are `(d,)`, in the coordinates of the draws."""

    pvalue: float  # of "the draws are from the target": means, spreads and log densities of the ends against the starts
    log_density: float  # mean change of log p
    acceptance: float
    step_size: float  # in sds of the draws
    mean: Array  # the target's, extrapolated to a chain that forgets its start
    mean_error: Array  # its standard error; inf where the chains forget nothing
    sd: Array  # of the chains' second halves
    persistence: Array  # how much of a start's offset is left in the second half: 0 forgotten, 1 stuck


def drift(
    value_and_score: Density, starts: Array, groups: Array, loc: Array, scale_tril: Array, rng: np.random.Generator
) -> Drift:
    """Runs one HMC chain from each start and compares where they end with where they began.

    If the starts are independent draws of the target, (start, end) and (end, start) are alike, since HMC is reversible. So the
    change of any function is symmetric about zero, and flipping the signs of whole chains at random gives the exact null
    distribution of sum_j t_j^2 and of max_j t_j^2, in any dimension and for any tails. Here t_j^2 = (sum_i D_ij)^2 / sum_i D_ij^2
    for the changes D in the whitened coordinates z_j, their |z_j| and log p. The p-value is twice the smaller of the two.

    The target's mean follows from the straight line E[second half | start] = alpha + beta (start - loc), alpha from loc: its fixed
    point is loc + alpha / (1 - beta). The chains look only near their starts: modes that none of them reaches stay unseen, and slow
    directions show as a beta near one and a large error.

    Args:
        value_and_score: Maps points `(m, d)` to log densities `(m,)` and gradients `(m, d)`, in float64.
        starts: Points `(m, d)` of finite density.
        groups: Integers `(m,)`: chains of one group share their start, and flip together.
        loc: The mean `(d,)` of the population of the starts.
        scale_tril: Its covariance's Cholesky factor `(d, d)`; chains run in the coordinates that it whitens.
        rng: Source of momenta, accept steps and flips.

    Raises:
        DimensionError: `value_and_score` gives arrays of other shapes.
    """

    def density(z: Array) -> tuple[Array, Array]:
        value, score = (np.asarray(a, np.float64) for a in value_and_score(loc + z @ scale_tril.T))
        expected = z.shape[:1], z.shape
        if (value.shape, score.shape) != expected:
            raise DimensionError(
                f"value_and_score gave shapes {value.shape}, {score.shape} at {z.shape}: expected {expected}"
            )
        dead = ~(np.isfinite(value) & np.isfinite(score).all(1))
        return np.where(dead, -math.inf, value), np.where(dead[:, None], 0.0, score) @ scale_tril

    with np.errstate(over="ignore", invalid="ignore"):
        z = np.linalg.solve(scale_tril, (starts - loc).T).T
        first = _State(z, *density(z))
        step_size = _find_step_size(density, first, rng)
        state, rates, second_half = first, [], []
        for i in range(_TRANSITIONS):
            state, rate = _transition(density, state, step_size * rng.choice(_SHARES) * rng.uniform(0.8, 1.2), rng)
            rates.append(rate)
            if 2 * i >= _TRANSITIONS:
                second_half.append(loc + state.z @ scale_tril.T)

    alive = first.value > -math.inf
    change = np.concatenate(
        [
            state.z - first.z,
            np.abs(state.z) - np.abs(first.z),
            np.where(alive, state.value - first.value, 0.0)[:, None],
        ],
        axis=1,
    )
    mean, error, slope = _fixed_point(starts - loc, np.mean(second_half, 0) - loc)
    return Drift(
        pvalue=_sign_flip_test(change, groups, rng),
        log_density=float(change[:, -1].mean()),
        acceptance=float(np.mean(rates)),
        step_size=step_size,
        mean=loc + mean,
        mean_error=error,
        sd=np.concatenate(second_half).std(0),
        persistence=slope,
    )


class _State(NamedTuple):
    z: Array
    value: Array
    score: Array


def _transition(density: Density, start: _State, step_size: float, rng: np.random.Generator) -> tuple[_State, float]:
    """One trajectory of leapfrog steps with its accept step, for all chains; and the mean acceptance probability."""
    momentum = rng.standard_normal(start.z.shape)
    z, value, score = start
    p = momentum
    for _ in range(min(math.ceil(_TRAJECTORY / step_size), _MAX_STEPS)):
        p = p + step_size / 2 * score
        z = z + step_size * p
        value, score = density(z)
        p = p + step_size / 2 * score
    log_ratio = value - start.value - ((p * p).sum(1) - (momentum * momentum).sum(1)) / 2
    rate = np.exp(np.minimum(np.where(np.isnan(log_ratio), -math.inf, log_ratio), 0.0))
    accept = rng.random(rate.shape) < rate
    moved = (
        np.where(accept[:, None], z, start.z),
        np.where(accept, value, start.value),
        np.where(accept[:, None], score, start.score),
    )
    return _State(*moved), float(rate.mean())


def _find_step_size(density: Density, start: _State, rng: np.random.Generator) -> float:
    """A step size of about 0.8 acceptance, by doubling, halving and bisection; at most as long as a trajectory."""
    low, high, step = 0.0, _TRAJECTORY, 1.0
    for _ in range(10):
        rate = _transition(density, start, step, rng)[1]
        if 0.75 < rate < 0.85:
            break
        low, high = (step, high) if rate > 0.8 else (low, step)
        step = math.sqrt(low * high) if low else step / 2
        if high / step < 1.05:
            break
    return step


def _fixed_point(start: Array, end: Array) -> tuple[Array, Array, Array]:
    """The fixed point x = alpha + beta x of the least-squares lines end = alpha + beta start, its standard error, and beta."""
    m = len(start)
    centred = start - start.mean(0)
    square = np.maximum((centred**2).sum(0), np.finfo(np.float64).tiny)
    beta = (centred * end).sum(0) / square
    alpha = end.mean(0) - beta * start.mean(0)
    residual = np.sqrt(((end - alpha - beta * start) ** 2).sum(0) / max(m - 2, 1))
    stuck = beta > 0.99
    rest = np.where(stuck, 1.0, 1 - beta)
    fixed = np.where(stuck, end.mean(0), alpha / rest)
    # alpha + beta x has the variance residual^2 (1/m + (x - mean start)^2 / square) at x, here the fixed point.
    error = residual * np.sqrt(1 / m + (fixed - start.mean(0)) ** 2 / square) / rest
    return fixed, np.where(stuck, math.inf, error), beta


def _sign_flip_test(change: Array, groups: Array, rng: np.random.Generator) -> float:
    """The p-value of "the changes `(m, f)` are symmetric about zero", by random signs of whole groups."""
    total = np.zeros((groups.max() + 1, change.shape[1]))
    np.add.at(total, groups, change)
    total = total[np.any(total != 0, axis=1)]
    if not len(total):
        return 1.0
    total = total / np.maximum(np.sqrt((total**2).sum(0)), np.finfo(np.float64).tiny)
    signs = np.concatenate([np.ones((1, len(total))), rng.choice([-1.0, 1.0], (_FLIPS, len(total)))])
    square = (signs @ total) ** 2
    ranks = [float((s >= s[0] * (1 - 1e-12)).mean()) for s in (square.sum(1), square.max(1))]
    return min(1.0, 2 * min(ranks))
