"""Log-weights of particles: means, effective sample sizes, resampling. A particle of log-weight -inf does not count."""

from __future__ import annotations

import math

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
