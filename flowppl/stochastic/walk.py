"""Paths on their way: where they are, and what each kind of layer does to them and to their weights."""

from __future__ import annotations

from typing import Any, NamedTuple

from flowppl import weights
from flowppl.backend import Array, backend_of
from flowppl.bijections.base import Bijection
from flowppl.kernels import Info, init
from flowppl.stochastic.annealing import Bridge, taken
from flowppl.stochastic.diffusion import Diffusion
from flowppl.stochastic.moves import UNADJUSTED, Moves

_MOST = 1e20  # a larger log-weight, in size, is that of a path to or from where there is no density


class At(NamedTuple):
    """Where paths are.

    Their weights are kept without the density of the bridge there, which is asked for only where moves or an end need it: a map
    between needs none.

    Attributes:
        x: Their ends, `(n, dim)`.
        ratio: Log-weights less the log density of the bridge there, `(n,)`.
        beta: Which density that is.
        log_choice: See `Run`.
        walkers: `Walkers` at x, with what is known of it; None at the base and after a map.
    """

    x: Array
    ratio: Array
    beta: Array
    log_choice: Array
    walkers: Any


def begin(bridge: Bridge, x: Array) -> At:
    """Paths of weight one at draws of the base."""
    backend = backend_of(x)
    log_base = bridge.log_base(x)
    return At(x, -log_base, backend.asarray(0.0, x), backend.xp.zeros_like(log_base), None)


def begin_back(bridge: Bridge, x: Array, with_scores: bool) -> At:
    """Paths of weight one at draws of the target."""
    backend = backend_of(x)
    zero = backend.xp.zeros_like(x[:, 0])
    at = known(bridge, At(x, zero, backend.asarray(1.0, x), zero, None), with_scores)
    return at._replace(ratio=-bridge.at(at.beta).log_prob(at.walkers))


def known(bridge: Bridge, at: At, with_scores: bool) -> At:
    """The same paths with what is to be known of their ends."""
    if at.walkers is not None:
        return at
    return at._replace(walkers=init(bridge.at(at.beta), at.x, with_scores=with_scores))


def log_weights(bridge: Bridge, at: At) -> Array:
    """The log-weights of known paths for the density of the bridge `(n,)`; -inf for those that led nowhere."""
    return counted(at.ratio + bridge.at(at.beta).log_prob(at.walkers))


def counted(log_w: Array) -> Array:
    """Log-weights; -inf where they are not a number, or where a path met a point without a density that counts."""
    xp = backend_of(log_w).xp
    return xp.where(xp.abs(log_w) < _MOST, log_w, -xp.inf)


def there(layer: Bijection | Diffusion, rng: Any, params: Any, x: Array) -> tuple[Array, Array]:
    """Where a map takes x, and its log-determinants, or what a drawn map has in their place."""
    return layer.forward(params, x) if isinstance(layer, Bijection) else layer.forward(rng, params, x)


def back(layer: Bijection | Diffusion, rng: Any, params: Any, x: Array) -> tuple[Array, Array]:
    """Where it takes x back, and the same of that."""
    return layer.inverse(params, x) if isinstance(layer, Bijection) else layer.backward(rng, params, x)


def mapped(at: At, x: Array, log_det: Array) -> At:
    """The paths after a map to x with log-determinants."""
    return at._replace(x=x, ratio=at.ratio + log_det, walkers=None)


def resampled(rng: Any, bridge: Bridge, at: At, below: float) -> At:
    """Paths of one weight, where the effective share of the known ones is below a number."""
    if below <= 0:
        return at
    backend = backend_of(at.x)
    log_w = backend.stop(log_weights(bridge, at))

    def again(at: At) -> At:
        index = weights.resample_systematic(rng, log_w)
        walkers = taken(at.walkers, index)
        ratio = weights.log_mean_exp(log_w) - bridge.at(at.beta).log_prob(walkers)
        return At(walkers.x, ratio, at.beta, at.log_choice[index], walkers)

    return backend.cond(weights.ess(log_w) < below * log_w.shape[0], again, lambda at: at, at)


def moved(rng: Any, bridge: Bridge, at: At, layer: Moves, params: Any) -> tuple[At, Info]:
    """Known paths after moves at their density, of which what is not reversible counts, backwards as well."""
    target = bridge.at(at.beta)
    walkers, info = layer.apply(rng, params, target, at.walkers)
    if layer.kernel in UNADJUSTED:
        # Zero for steps that leave the density invariant.
        excess = info.log_ratio - (target.log_prob(at.walkers) - target.log_prob(walkers))
        xp = backend_of(excess).xp
        lost = xp.isnan(excess)
        share = xp.exp(xp.clip(xp.where(lost, xp.zeros_like(excess), excess) / layer.repeats, None, 0.0))
        info = info._replace(acceptance=xp.where(lost, xp.zeros_like(share), share))
    return At(walkers.x, at.ratio + info.log_ratio, at.beta, at.log_choice + info.log_choice, walkers), info
