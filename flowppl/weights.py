"""Log-weights of particles: means, effective sample sizes, resampling. A particle of log-weight -inf does not count."""

from __future__ import annotations

import math

import numpy as np

from flowppl.backend import Array, Rng, backend_of


def log_mean_exp(log_w: Array, axis: int = -1) -> Array:
    """Log of the mean weight; -inf, with zero derivatives, if no particle counts."""
    xp = backend_of(log_w).xp
    log_w, dead = _revive(log_w, axis)
    out = backend_of(log_w).logsumexp(log_w, axis=axis)
    return xp.where(xp.squeeze(dead, axis=axis), -math.inf, out - math.log(log_w.shape[axis]))


def normalize(log_w: Array, axis: int = -1) -> Array:
    """Weights that sum to one; zeros if no particle counts."""
    backend = backend_of(log_w)
    log_w, dead = _revive(log_w, axis)
    w = backend.softmax(log_w, axis=axis)
    return backend.xp.where(dead, backend.xp.zeros_like(w), w)


def ess(log_w: Array, axis: int = -1) -> Array:
    """Kish's effective sample size (sum w)^2 / sum w^2, between 1 and the number of particles; 0 if none counts."""
    xp = backend_of(log_w).xp
    w = normalize(log_w, axis)
    square = xp.sum(w * w, axis=axis)
    return xp.where(square > 0, 1 / xp.where(square > 0, square, xp.ones_like(square)), xp.zeros_like(square))


def resample_systematic(rng: Rng, log_w: Array, n: int | None = None, axis: int = -1) -> Array:
    """Indices of n particles (None: as many as there are), along `axis`: each floor(n w) or ceil(n w) times, in order.

    One uniform draw per row of weights. Where no particle counts, all do alike. Kitagawa 1996.
    """
    backend = backend_of(log_w)
    log_w = backend.xp.moveaxis(log_w, axis, -1)
    n = log_w.shape[-1] if n is None else n
    u = backend.uniform(rng, (*log_w.shape[:-1], 1), like=log_w)
    steps = backend.asarray(backend.xp.arange(n, dtype=log_w.dtype), like=log_w)
    return backend.xp.moveaxis(_pick(log_w, (steps + u) / n), -1, axis)


def resample_multinomial(rng: Rng, log_w: Array, n: int | None = None, axis: int = -1) -> Array:
    """Indices of n independent draws of particles (None: as many as there are), along `axis`.

    Where no particle counts, all do alike.
    """
    backend = backend_of(log_w)
    log_w = backend.xp.moveaxis(log_w, axis, -1)
    n = log_w.shape[-1] if n is None else n
    return backend.xp.moveaxis(_pick(log_w, backend.uniform(rng, (*log_w.shape[:-1], n), like=log_w)), -1, axis)


def psis(log_w: Array) -> tuple[Array, float]:
    """Pareto-smoothed importance sampling: the largest weights replaced by quantiles of a generalized Pareto fitted to them.

    The fit's shape k says how far the weights can be trusted: moments of order 1/k and above do not exist. Estimates from n draws
    hold up to k = `psis_limit(n)`. Works on the values, in float64, without derivatives. Vehtari et al. 2024, "Pareto smoothed
    importance sampling", section 2 and appendix C.

    Args:
        log_w: Log-weights `(n,)` of independent draws; -inf counts as weight zero.

    Returns:
        The smoothed log-weights `(n,)`, a numpy array on the scale of log_w, and k. -inf if the largest weights are all equal,
        so that there is no tail; inf if fewer than five draws are in it, which tells nothing.
    """
    out = np.array(backend_of(log_w).to_numpy(log_w), np.float64)
    order = np.argsort(out, kind="stable")
    size = math.ceil(min(out.size / 5, 3 * math.sqrt(out.size)))
    if size < 5 or out[order[-5]] == -math.inf:
        return out, math.inf
    top = out[order[-1]]
    cut = max(out[order[-size - 1]] - top, math.log(np.finfo(np.float64).tiny))
    tail = order[out[order] - top > cut]
    if tail.size < 5:
        return out, math.inf if tail.size else -math.inf
    shape, sigma = _fit_pareto(math.exp(cut) * np.expm1(out[tail] - top - cut))
    # Quantiles in the tail's own order; none may pass the largest weight seen.
    log_survival = np.log1p(-np.arange(0.5, tail.size) / tail.size)
    with np.errstate(over="ignore"):  # none may pass the largest weight anyway
        excess = sigma * (np.expm1(-shape * log_survival) / shape if shape else -log_survival)
    out[tail] = top + np.minimum(np.log(excess + math.exp(cut)), 0.0)
    return out, shape


def psis_limit(n: int) -> float:
    """The largest k of `psis` at which n draws suffice: min(1 - 1 / log10 n, 0.7). Vehtari et al. 2024, equation 15."""
    return min(1 - 1 / math.log10(max(n, 2)), 0.7)


def _fit_pareto(x: np.ndarray) -> tuple[float, float]:
    """Shape and scale of a generalized Pareto for the sorted excesses x > 0, by the quasi-Bayes of Zhang & Stephens 2009.

    The shape is drawn a little towards one half, as ten more observations would, which steadies small tails.
    """
    n, grid = x.size, 30 + int(math.sqrt(x.size))
    b = 1 / x[-1] + (1 - np.sqrt(grid / (np.arange(grid) + 0.5))) / (3 * x[int(n / 4 + 0.5) - 1])
    k = np.log1p(-b[:, None] * x).mean(1)
    rate = np.divide(-b, k, out=np.full_like(b, 1 / x.mean()), where=k != 0)  # 1 / sigma; b = 0 is an exponential tail
    b = float(normalize(n * (np.log(rate) - k - 1)) @ b)
    k = float(np.log1p(-b * x).mean())
    return (n * k + 5) / (n + 10), -k / b if b else float(x.mean())


def _revive(log_w: Array, axis: int) -> tuple[Array, Array]:
    """log_w with zeros in the rows where every entry is -inf, and a mask of these rows (the axis kept)."""
    xp = backend_of(log_w).xp
    dead = xp.max(log_w, axis=axis, keepdims=True) == -math.inf
    return xp.where(dead, xp.zeros_like(log_w), log_w), dead


def _pick(log_w: Array, points: Array) -> Array:
    """The particles whose steps of the distribution function cover the points in [0, 1), along the last axis."""
    backend = backend_of(log_w)
    xp = backend.xp
    w = backend.stop(backend.softmax(_revive(log_w, -1)[0]))
    cdf = xp.cumulative_sum(w, axis=-1)
    cdf = cdf / cdf[..., -1:]
    # A point rounded up to one would lie beyond the last step, and could pick a particle of weight zero.
    points = xp.minimum(points, xp.full_like(points, 1 - float(xp.finfo(points.dtype).eps)))
    if cdf.ndim == 1:
        return xp.searchsorted(cdf, points, side="right")
    rows = backend.vmap(lambda c, p: xp.searchsorted(c, p, side="right"))
    return xp.reshape(
        rows(xp.reshape(cdf, (-1, cdf.shape[-1])), xp.reshape(points, (-1, points.shape[-1]))), points.shape
    )
