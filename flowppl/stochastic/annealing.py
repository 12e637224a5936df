"""Annealed importance sampling and sequential Monte Carlo: from a base that can be drawn from to a target, with exact weights.

Neal 2001, "Annealed importance sampling"; Del Moral, Doucet & Jasra 2006, "Sequential Monte Carlo samplers".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flowppl import tree, weights
from flowppl.backend import Array, backend_of
from flowppl.kernels import Info, Target, Walkers, init
from flowppl.kernels.target import LogProb, is_possible

Kernel = Callable[[Any, Target, Walkers, Array], tuple[Walkers, Info]]  # rng, target, walkers, step_size
_BISECTIONS = 30
_GAIN = 1.0  # of the step size's logarithm, per step, times the error of the acceptance


def geometric(beta: Array) -> Array:
    """Powers of base and target: base^(1 - beta) target^beta."""
    return backend_of(beta).xp.stack([1 - beta, beta])


class Bridge(NamedTuple):
    """The densities between a base and a target.

    Attributes:
        sample: `sample(rng, n)` draws from the base, `(n, dim)`.
        log_base: Its log density, `(n, dim)` to `(n,)`, normalised.
        log_prob: Log density of the target, unnormalised.
        powers: From beta, from zero to one, to the powers of both in the density there, `(2,)`.
        attached: Whether derivatives flow through the dynamics of kernels; see `flowppl.kernels.Target`.
    """

    sample: Callable[[Any, int], Array]
    log_base: LogProb
    log_prob: LogProb
    powers: Callable[[Array], Array] = geometric
    attached: bool = False

    def at(self, beta: Array) -> Target:
        """The density at beta, what kernels take."""
        return Target((self.log_base, self.log_prob), self.powers(beta), self.attached)

    def step(self, walkers: Walkers, last: Array, beta: Array) -> Array:
        """The log density at beta over that at the last one, `(n,)`."""
        return walkers.log_probs @ (self.powers(beta) - self.powers(last))


class Schedule(NamedTuple):
    """Where annealing stops on its way, as numpy arrays `(temperatures,)`.

    Attributes:
        betas: Increasing, the last one is one; the base, at zero, is left out.
        step_sizes: Of the kernel at each.
    """

    betas: np.ndarray
    step_sizes: np.ndarray


class Annealed(NamedTuple):
    """Weighted draws.

    Attributes:
        x: `(n, dim)`.
        log_w: Log-weights `(n,)`: the mean weight is an unbiased estimate of the target's normalising constant.
        ess: Effective share of the particles before each temperature's step, `(temperatures,)`.
        acceptance: Mean acceptance of the step at each, `(temperatures,)`.
        resampled: Whether particles were resampled at each, `(temperatures,)`.
    """

    x: Array
    log_w: Array
    ess: Array
    acceptance: Array
    resampled: Array


def anneal(
    rng: Any, bridge: Bridge, kernel: Kernel, schedule: tuple[Array, Array], n: int, *, resample_below: float = 0.5
) -> Annealed:
    """Takes n particles from the base to the target along a schedule that is fixed.

    Each temperature first multiplies the weights by the ratio of its density to the one before, and then moves the particles by a
    kernel. The mean weight is unbiased whatever the kernel and the schedule; one that does not leave its density invariant, such
    as `langevin.step`, says by how much, and that counts. Where the effective share of the particles has fallen, they are
    resampled; if that never happens, this is annealed importance sampling, and the weights are independent.

    Args:
        rng: A jax key, or a `torch.Generator`.
        bridge: From where to where.
        kernel: `kernel(rng, target, walkers, step_size)`, such as `hmc.step`.
        schedule: Betas and step sizes, arrays `(temperatures,)` of the framework.
        n: Particles.
        resample_below: The effective share below which particles are resampled; 0 for never.
    """
    backend = backend_of(schedule[0])
    xp = backend.xp
    start, rng = backend.split(rng, 2)
    walkers = init(bridge.at(xp.zeros_like(schedule[0][0])), bridge.sample(start, n))

    def stage(carry: Any, row: tuple[Array, Array]) -> tuple[Any, Any]:
        (walkers, log_w, last, rng), (beta, step_size) = carry, row
        choice, move, rng = backend.split(rng, 3)
        log_w = log_w + bridge.step(walkers, last, beta)
        ess = weights.ess(log_w) / n
        low = ess < resample_below

        def resampled(walkers: Walkers, log_w: Array) -> tuple[Walkers, Array]:
            at = weights.resample_systematic(choice, log_w)
            return taken(walkers, at), xp.zeros_like(log_w) + weights.log_mean_exp(log_w)

        if resample_below > 0:
            walkers, log_w = backend.cond(low, resampled, lambda *same: same, walkers, log_w)
        target = bridge.at(beta)
        moved, info = kernel(move, target, walkers, step_size)
        # Zero for kernels that leave their target invariant.
        log_w = log_w + (info.log_ratio - (target.log_prob(walkers) - target.log_prob(moved)))
        log_w = xp.where(xp.isnan(log_w), -xp.inf, log_w)  # of steps that led nowhere
        return (moved, log_w, beta, rng), (ess, xp.mean(info.acceptance), low)

    zero = xp.zeros_like(walkers.x[:, 0])
    carry = (walkers, zero, xp.zeros_like(schedule[0][0]), rng)
    (walkers, log_w, _, _), seen = backend.scan(stage, carry, schedule)
    log_w = xp.where(is_possible(walkers.log_probs), log_w, -xp.inf)
    return Annealed(walkers.x, log_w, *seen)


def tune(
    rng: Any,
    bridge: Bridge,
    kernel: Kernel,
    like: Array,
    *,
    n: int = 512,
    step_ess: float = 0.95,
    acceptance: float = 0.8,
    moves: int = 6,
    min_temperatures: int = 1,
    max_temperatures: int = 1000,
    progress: Callable[[float], None] = lambda beta: None,
) -> Schedule:
    """Finds a schedule by a run of sequential Monte Carlo that adapts, whose draws are not used.

    Each temperature is as far from the one before as leaves this effective share of the particles; there the kernel's step size
    is led to an acceptance. The schedule is then fixed: adaptation never touches an estimate. Jasra et al. 2011, "Inference for
    Levy-driven stochastic volatility models via adaptive sequential Monte Carlo".

    Args:
        rng: A jax key, or a `torch.Generator`.
        bridge: From where to where.
        kernel: See `anneal`.
        like: An array whose dtype and device particles have.
        n: Particles.
        step_ess: The effective share that a temperature leaves.
        acceptance: Mean acceptance to be reached.
        moves: Steps of the kernel at each temperature.
        min_temperatures: The fewest temperatures: a base whose tails are lighter than the target's may have an effective share that
            is high, and weights without a mean; each of m equal steps has the m-th root of them.
        max_temperatures: The most temperatures; the last ones are equally spaced if it takes more.
        progress: Called with each beta.
    """
    backend = backend_of(like)
    xp = backend.xp
    start, rng = backend.split(rng, 2)

    def begin(rng: Any) -> Walkers:
        return init(bridge.at(backend.asarray(0.0, like)), bridge.sample(rng, n))

    def advance(rng: Any, walkers: Walkers, last: Array, log_step: Array) -> tuple:
        choice, rng = backend.split(rng, 2)

        def halve(bounds: tuple[Array, Array], _: Array) -> tuple[tuple[Array, Array], Array]:
            low, high = bounds
            middle = 0.5 * (low + high)
            enough = weights.ess(bridge.step(walkers, last, middle)) >= step_ess * n
            return (xp.where(enough, middle, low), xp.where(enough, high, middle)), _

        one = xp.ones_like(last)
        most = xp.minimum(last + 1 / min_temperatures, one)
        bounds, _ = backend.scan(halve, (last, most), backend.asarray(xp.zeros(_BISECTIONS), like))
        whole = weights.ess(bridge.step(walkers, last, most)) >= step_ess * n
        beta = xp.where(whole, most, xp.minimum(xp.maximum(bounds[0], last + 1 / max_temperatures), one))
        walkers = taken(walkers, weights.resample_systematic(choice, bridge.step(walkers, last, beta)))

        def move(carry: tuple, _: Array) -> tuple[tuple, Array]:
            walkers, log_step, rng = carry
            key, rng = backend.split(rng, 2)
            walkers, info = kernel(key, bridge.at(beta), walkers, xp.exp(log_step))
            return (walkers, log_step + _GAIN * (xp.mean(info.acceptance) - acceptance), rng), log_step

        (walkers, log_step, _), steps = backend.scan(
            move, (walkers, log_step, rng), backend.asarray(xp.zeros(moves), like)
        )
        return walkers, beta, log_step, xp.mean(steps[moves // 2 :])

    begin, advance = backend.jit(begin), backend.jit(advance)
    walkers, beta = backend.stop(begin(start)), backend.asarray(0.0, like)
    log_step = backend.asarray(-0.25 * np.log(walkers.x.shape[-1]), like)
    betas: list[float] = []
    step_sizes: list[float] = []
    while not betas or betas[-1] < 1:
        key, rng = backend.split(rng, 2)
        walkers, beta, log_step, used = backend.stop(advance(key, walkers, beta, log_step))
        betas.append(float(backend.to_numpy(beta)))
        step_sizes.append(float(np.exp(backend.to_numpy(used))))
        progress(betas[-1])
    return Schedule(np.array(betas), np.array(step_sizes))


def taken(walkers: Walkers, at: Array) -> Walkers:
    """The walkers of these indices."""
    return tree.map(lambda a: a[at], walkers)
