"""Raw draws beside reweighted ones, and one run beside another: differences in posterior sds, with their Monte-Carlo errors."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flowppl import weights

Array = np.ndarray
TINY = 1e-150  # in place of sds that vanish: squares of it do not


class Evidence(NamedTuple):
    """What log-weights log p - log q of draws of q say about the whole; errors are standard errors."""

    elbo: float
    elbo_error: float
    log_evidence: float
    log_evidence_error: float
    ess: float
    khat: float
    khat_limit: float
    reliable: bool  # whether the tail of the weights allows to reweight
    weight: Array  # (n,), summing to one, smoothed if reliable; zeros if no draw counts


def evidence(log_w: Array) -> Evidence:
    """ELBO, log evidence, effective sample size and k-hat of log-weights `(n,)` of which some may be -inf."""
    n = log_w.size
    limit = weights.psis_limit(n)
    smooth, khat = weights.psis(log_w)
    # The tail of weights that differ little more than by rounding does not matter.
    reliable = khat <= limit or 0 < n * weights.normalize(log_w).max() < 1.05
    # Beyond its limit the fit may smooth away just the few weights that count.
    used = smooth if reliable else log_w
    weight = weights.normalize(used)
    finite = bool(np.isfinite(log_w).all())
    return Evidence(
        elbo=float(log_w.mean()),
        elbo_error=float(log_w.std(ddof=1)) / math.sqrt(n) if finite else math.inf,
        log_evidence=float(weights.log_mean_exp(used)),
        log_evidence_error=float((n * weight).std(ddof=1)) / math.sqrt(n) if weight.any() else math.inf,
        ess=float(weights.ess(used)),
        khat=khat,
        khat_limit=limit,
        reliable=bool(reliable),
        weight=weight,
    )


class Reweighting(NamedTuple):
    """What reweighting changes, coordinate by coordinate, in arrays `(d,)`; shifts are raw minus reweighted."""

    mean: Array
    sd: Array
    mean_reweighted: Array
    sd_reweighted: Array
    mean_reweighted_error: Array  # standard error of the reweighted mean
    mean_shift: Array  # in posterior sds, the smaller of the two
    mean_z: Array  # in its own Monte-Carlo error, which is smaller than that of either mean: the draws are the same
    sd_shift: Array  # log of the ratio
    sd_z: Array
    tail_shift: Array  # (2, d): mass below the raw 5 % quantile and above the 95 % quantile
    tail_z: Array  # (2, d)


def reweighting(x: Array, weight: Array) -> Reweighting:
    """Compares draws `(n, d)` with themselves under weights `(n,)` that sum to one, by the delta method."""
    n, w = len(x), weight[:, None]
    mean, mean_w = x.mean(0), weight @ x
    square, square_w = (x - mean) ** 2, (x - mean_w) ** 2
    sd, sd_w = np.sqrt(square.mean(0)), np.sqrt(weight @ square_w)
    safe, safe_w = np.maximum(sd, TINY), np.maximum(sd_w, TINY)
    unit = np.minimum(safe, safe_w)
    low, high = np.quantile(x, [0.05, 0.95], axis=0)
    tails = [(x < low).astype(np.float64), (x > high).astype(np.float64)]
    masses = [(t.mean(0), weight @ t) for t in tails]
    # The influence of each draw on a difference; their squares add up to its variance.
    mean_se = _root_sum(w * (x - mean_w) - (x - mean) / n)
    sd_se = _root_sum(w * (square_w / safe_w**2 - 1) / 2 - (square / safe**2 - 1) / (2 * n))
    tail_se = np.stack([_root_sum(w * (t - b) - (t - a) / n) for t, (a, b) in zip(tails, masses, strict=True)])
    tail_shift = np.stack([a - b for a, b in masses])
    sd_shift = np.log(safe / safe_w)
    return Reweighting(
        mean=mean,
        sd=sd,
        mean_reweighted=mean_w,
        sd_reweighted=sd_w,
        mean_reweighted_error=_root_sum(w * (x - mean_w)),
        mean_shift=(mean - mean_w) / unit,
        mean_z=_z(mean - mean_w, mean_se, unit),
        sd_shift=sd_shift,
        sd_z=_z(sd_shift, sd_se, 1.0),
        tail_shift=tail_shift,
        tail_z=_z(tail_shift, tail_se, 1.0),
    )


class Restart(NamedTuple):
    """Another run beside the one that is judged."""

    evidence: Evidence
    mean_shift: Array  # (d,), its mean minus the judged one's, in sds of the judged one
    mean_shift_error: Array  # (d,)
    share: float  # its mass over the judged one's, as far as the weights tell; one if they do not

    def differs(self, z: float) -> Array:
        """Coordinates `(d,)` in which it is elsewhere, with a share of the mass that moves the posterior mean visibly."""
        shift = np.abs(self.mean_shift)
        return (shift > 0.3) & (shift > z * self.mean_shift_error) & (shift * self.share > 0.1)


def restart(own: Evidence, own_x: Array, other: Evidence, other_x: Array) -> Restart:
    """Compares two runs of draws `(n, d)` by their means, reweighted where the weights allow."""
    means, errors = [], []
    for e, x in ((own, own_x), (other, other_x)):
        w = e.weight if e.reliable else np.full(len(x), 1 / len(x))
        means.append(w @ x)
        errors.append(_root_sum(w[:, None] * (x - means[-1])))
    unit = np.maximum(own_x.std(0), TINY)
    share = 1.0
    if own.reliable and other.reliable:
        error = math.hypot(own.log_evidence_error, other.log_evidence_error)
        share = math.exp(min(other.log_evidence - own.log_evidence + 4 * error, 0.0))
    return Restart(other, (means[1] - means[0]) / unit, np.hypot(*errors) / unit, share)


def _root_sum(influence: Array) -> Array:
    return np.sqrt((influence**2).sum(0))


def _z(difference: Array, error: Array, unit: Array | float) -> Array:
    """The difference over its error; zero where both vanish up to rounding, as they do where all weights are equal."""
    rounding = 1e-9 * unit
    return np.where(np.abs(difference) <= rounding, 0.0, difference / np.maximum(error, rounding))
