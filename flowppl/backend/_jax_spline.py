"""The rational-quadratic spline with a hand-written derivative for jax: XLA's own takes several times as long.

The generic code in `flowppl.bijections.spline` is its oracle, and the notation is the same: p and q = 1 - p place x in its bin,
s is the bin's mean slope, d0 and d1 the slopes at its ends, and y = y0 + h N / D, dy/dx = s^2 M / D^2.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as xp
from jax import Array, lax


def rq_spline(
    theta: Array, x: Array, *, bound: float, log_share: float, log_slope: float, inverse: bool
) -> tuple[Array, Array, Array]:
    """The spline with parameters theta `(3 bins - 1, *shape)` at x `(*shape,)`, or its inverse.

    Args:
        theta: Raw widths, heights and inner slopes.
        x: Where to evaluate.
        bound: Half-width of the box.
        log_share: Soft bound of the raw widths and heights.
        log_slope: Soft bound of the raw slopes.
        inverse: Whether x is a value to invert.

    Returns:
        Value, log-slope and, without derivatives of its own, d log-slope / dx (of the forward map, also for the inverse).
    """
    shape = xp.broadcast_shapes(theta.shape[1:], x.shape)
    theta, x = xp.broadcast_to(theta, (theta.shape[0], *shape)), xp.broadcast_to(x, shape)
    return _rq_spline(_Options(bound, log_share, log_slope, inverse), theta, x)


class _Options(NamedTuple):
    bound: float
    log_share: float
    log_slope: float
    inverse: bool


class _Bin(NamedTuple):
    """The bin of each point, and what leads from the parameters to it."""

    inside: Array  # whether the point is in the box
    at: Array  # the point, clipped to the box
    index: Array
    left: Array  # x, y and the slope at the left knot, (3, *shape)
    right: Array
    scale: Array  # from sums of shares to knots, (2, *shape)
    shares: Array  # d share / d theta, (2, bins, *shape)
    slopes: Array  # d slope / d theta, (bins - 1, *shape)


class _Place(NamedTuple):
    """The place of each point in its bin."""

    w: Array
    h: Array
    s: Array
    p: Array
    q: Array
    n: Array
    m: Array
    r: Array  # 1 / D
    curvature: Array


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rq_spline(options: _Options, theta: Array, x: Array) -> tuple[Array, Array, Array]:
    b = _locate(options, theta, x)
    c = _place(options, b)
    log_slope = 2 * xp.log(c.s * c.r) + xp.log(c.m)
    if options.inverse:
        value, log_slope = xp.where(c.p < c.q, b.left[0] + c.p * c.w, b.right[0] - c.q * c.w), -log_slope
    else:
        value = b.left[1] + c.h * c.n * c.r
    outside = xp.zeros_like(x)
    return (
        xp.where(b.inside, value, x),
        xp.where(b.inside, log_slope, outside),
        xp.where(b.inside, c.curvature, outside),
    )


@_rq_spline.defjvp
def _derivative(options: _Options, primals: tuple, tangents: tuple) -> tuple:
    # Recomputed where it is transposed: a scan would otherwise write dozens of arrays for each layer.
    push = jax.checkpoint(partial(_push_forward, options), prevent_cse=False)
    out = _rq_spline(options, *primals)
    return out, (*push(*primals, *tangents), xp.zeros_like(out[2]))


def _locate(options: _Options, theta: Array, x: Array) -> _Bin:
    bound, log_share, log_slope, inverse = options
    k, shape = (theta.shape[0] + 1) // 3, x.shape
    raw, raw_slopes = theta[: 2 * k].reshape(2, k, *shape), theta[2 * k :]
    clip, clip_slopes = 1 / (1 + xp.abs(raw) * (1 / log_share)), 1 / (1 + xp.abs(raw_slopes) * (1 / log_slope))
    shares, slopes = xp.exp(raw * clip), xp.exp(raw_slopes * clip_slopes)
    sums = [shares[:, 0]]  # XLA's cumulative sum is no loop over bins, but one over pairs of bins
    for i in range(1, k):
        sums.append(sums[-1] + shares[:, i])
    scale = 2 * bound / sums[-1]
    knots = xp.stack(sums[:-1], axis=1) * scale[:, None] - bound
    at = xp.clip(x, -bound, bound)
    index = xp.sum(at >= knots[int(inverse)], axis=0, dtype=xp.int32)
    edge, one = xp.full((1, *shape), bound, x.dtype), xp.ones((1, *shape), x.dtype)
    table = xp.stack(
        [*(xp.concatenate([-edge, inner, edge]) for inner in knots), xp.concatenate([one, slopes, one])]
    )  # x, y and the slope at each knot

    def knot(i: Array) -> Array:
        return xp.take_along_axis(table, i[None, None], axis=1, mode="promise_in_bounds")[:, 0]

    return _Bin(
        inside=(x > -bound) & (x < bound),
        at=at,
        index=index,
        left=knot(index),
        right=knot(index + 1),
        scale=scale,
        shares=shares * clip * clip,
        slopes=slopes * clip_slopes * clip_slopes,
    )


def _place(options: _Options, b: _Bin) -> _Place:
    (x0, y0, d0), (x1, y1, d1) = b.left, b.right
    w, h = x1 - x0, y1 - y0
    s = h / w
    if options.inverse:
        t, t1 = (b.at - y0) / h, (y1 - b.at) / h
        quadratic, linear, constant = s * t1, d0 * t1 - d1 * t, s * t
        positive = linear >= 0
        root = xp.where(positive, linear, -linear) + xp.sqrt(linear * linear + 4 * quadratic * constant)
        up, down = xp.where(positive, 2 * constant, root), xp.where(positive, root, 2 * quadratic)
        p, q = up / (up + down), down / (up + down)
    else:
        p, q = (b.at - x0) / w, (x1 - b.at) / w
    pq = p * q
    m = d1 * p * p + 2 * s * pq + d0 * q * q
    r = 1 / (s * (p * p + q * q) + (d0 + d1) * pq)
    from_slope, from_denominator = (d1 * p + s * (q - p) - d0 * q) / m, (d0 + d1 - 2 * s) * (q - p) * r
    return _Place(w, h, s, p, q, s * p * p + d0 * pq, m, r, 2 * (from_slope - from_denominator) / w)


def _push_forward(options: _Options, theta: Array, x: Array, dtheta: Array, dx: Array) -> tuple[Array, Array]:
    """Tangents of value and log-slope, linear in those of theta and x."""
    b = _locate(options, theta, x)
    w, h, s, p, q, n, m, r, curvature = _place(options, b)
    d0, d1 = b.left[2], b.right[2]
    k, shape = b.shares.shape[1], x.shape
    which = lax.broadcasted_iota(xp.int32, (k, *shape), 0)
    dshares = dtheta[: 2 * k].reshape(b.shares.shape) * b.shares
    total = xp.sum(dshares, axis=1)

    def knot(before: Array, at: Array) -> Array:
        """A knot is a partial sum of shares, less its part in what normalisation takes."""
        partial_sum = xp.sum(xp.where(before, dshares, xp.zeros_like(dshares)), axis=1)
        return b.scale * (partial_sum - (at + options.bound) * (0.5 / options.bound) * total)

    (dx0, dy0), (dx1, dy1) = knot(which < b.index, b.left[:2]), knot(which <= b.index, b.right[:2])
    dslopes = dtheta[2 * k :] * b.slopes
    dd0, dd1 = (
        xp.sum(xp.where(which[:-1] == i, dslopes, xp.zeros_like(dslopes)), axis=0) for i in (b.index - 1, b.index)
    )
    inside, zero = b.inside, xp.zeros_like(x)
    pp, qq, pq = p * p, q * q, p * q
    dw, dh, dat = dx1 - dx0, dy1 - dy0, xp.where(inside, dx, zero)
    ds = (dh - s * dw) / w
    # At a fixed place in the bin
    hr = h * r
    dy = dy0 + n * r * dh + hr * pq * r * ((d1 * pp - d0 * qq) * ds + (s * qq + d1 * pq) * dd0 - n * dd1)
    dlog = 2 * (1 / s - (pp + qq) * r + pq / m) * ds
    dlog = dlog + (qq / m - 2 * pq * r) * dd0 + (pp / m - 2 * pq * r) * dd1
    # And what the place moves
    slope = hr * s * m * r  # dy/dp
    dp = (dat - dy) / slope if options.inverse else (dat - q * dx0 - p * dx1) / w
    dlog = dlog + curvature * w * dp
    dvalue = q * dx0 + p * dx1 + w * dp if options.inverse else dy + slope * dp
    return xp.where(inside, dvalue, dx), xp.where(inside, -dlog if options.inverse else dlog, zero)
