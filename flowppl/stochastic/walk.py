"""Paths on their way: where they are, and what each kind of layer does to them and to their weights."""

from __future__ import annotations

from typing import Any, NamedTuple

from flowppl import weights
from flowppl.backend import Array, backend_of
from flowppl.bijections.base import Bijection
from flowppl.kernels import Info, Walkers, init
from flowppl.stochastic.annealing import Bridge, taken
from flowppl.stochastic.diffusion import Diffusion
from flowppl.stochastic.moves import UNADJUSTED, Moves


class At(NamedTuple):
    """Where paths are.

    Attributes:
        walkers: Their ends.
        log_w: Log-weights for the density of the bridge there, `(n,)`.
        beta: Which that is.
        log_choice: See `Run`.
    """

    walkers: Walkers
    log_w: Array
    beta: Array
    log_choice: Array


def begin(bridge: Bridge, x: Array, beta: float, with_scores: bool) -> At:
    """Paths of weight one at draws of the bridge's density at beta."""
    backend = backend_of(x)
    here = backend.asarray(beta, x)
    walkers = init(bridge.at(here), x, with_scores=with_scores)
    zero = backend.xp.zeros_like(walkers.log_probs[:, 0])
    return At(walkers, zero, here, zero)


def to(bridge: Bridge, at: At, beta: Array) -> At:
    """The same paths, weighted for another density."""
    return at._replace(log_w=at.log_w + bridge.step(at.walkers, at.beta, beta), beta=beta)


def there(layer: Bijection | Diffusion, rng: Any, params: Any, x: Array) -> tuple[Array, Array]:
    """Where a map takes x, and its log-determinants, or what a drawn map has in their place."""
    return layer.forward(params, x) if isinstance(layer, Bijection) else layer.forward(rng, params, x)


def back(layer: Bijection | Diffusion, rng: Any, params: Any, x: Array) -> tuple[Array, Array]:
    """Where it takes x back, and the same of that."""
    return layer.inverse(params, x) if isinstance(layer, Bijection) else layer.backward(rng, params, x)


def mapped(bridge: Bridge, at: At, beta: Array, x: Array, log_det: Array, with_scores: bool) -> At:
    """The paths after a map to x with log-determinants, weighted for the density at beta."""
    target = bridge.at(beta)
    walkers = init(target, x, with_scores=with_scores)
    ratio = target.log_prob(walkers) - bridge.at(at.beta).log_prob(at.walkers) + log_det
    return at._replace(walkers=walkers, log_w=at.log_w + ratio, beta=beta)


def resampled(rng: Any, at: At, below: float) -> At:
    """Paths of one weight, where the effective share of them is below a number."""
    if below <= 0:
        return at
    backend = backend_of(at.log_w)
    log_w = backend.stop(at.log_w)

    def again(at: At) -> At:
        index = weights.resample_systematic(rng, log_w)
        level = backend.xp.zeros_like(log_w) + weights.log_mean_exp(log_w)
        return At(taken(at.walkers, index), level, at.beta, at.log_choice[index])

    return backend.cond(weights.ess(log_w) < below * log_w.shape[0], again, lambda at: at, at)


def moved(rng: Any, bridge: Bridge, at: At, layer: Moves, params: Any) -> tuple[At, Info]:
    """The paths after moves at their density. What of these is not reversible counts, backwards as well."""
    target = bridge.at(at.beta)
    walkers, info = layer.apply(rng, params, target, at.walkers)
    # Zero for steps that leave the density invariant.
    excess = info.log_ratio - (target.log_prob(at.walkers) - target.log_prob(walkers))
    if layer.kernel in UNADJUSTED:
        xp = backend_of(excess).xp
        lost = xp.isnan(excess)
        share = xp.exp(xp.clip(xp.where(lost, xp.zeros_like(excess), excess) / layer.repeats, None, 0.0))
        info = info._replace(acceptance=xp.where(lost, xp.zeros_like(share), share))
    return At(walkers, at.log_w + excess, at.beta, at.log_choice + info.log_choice), info
