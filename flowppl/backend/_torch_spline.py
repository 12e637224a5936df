"""The rational-quadratic spline with hand-written derivatives for eager torch, where every small operation costs.

The generic code in `flowppl.bijections.spline` is its oracle, and the notation is the same: p and q = 1 - p place x in
its bin, s is the bin's mean slope, d0 and d1 the slopes at its ends, and y = y0 + h N / D, dy/dx = s^2 M / D^2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rq_spline(
    theta: Tensor, x: Tensor, *, bound: float, log_share: float, log_slope: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The spline with parameters theta `(3 bins - 1, *shape)` at x `(*shape,)`, or its inverse: value and log-slope.

    Args:
        theta: Raw widths, heights and inner slopes.
        x: Where to evaluate.
        bound: Half-width of the box.
        log_share: Soft bound of the raw widths and heights.
        log_slope: Soft bound of the raw slopes.
        inverse: Whether x is a value to invert.
    """
    shape = torch.broadcast_shapes(theta.shape[1:], x.shape)
    options = (bound, log_share, log_slope, inverse)
    return _RQSpline.apply(theta.expand(-1, *shape), x.expand(shape), options)[:2]


class _RQSpline(torch.autograd.Function):
    """The map and its pullback. Backward reuses what forward computed, unless it is to be differentiated itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor, x: Tensor, options: tuple) -> tuple[Tensor, ...]:
        return _evaluate(theta, x, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        theta, x, ctx.options = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(theta, x, *output)

    @staticmethod
    def backward(
        ctx: Any, grad_value: Tensor | None, grad_log_slope: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor, None]:
        theta, x, *state = ctx.saved_tensors
        grad_value = torch.zeros_like(x) if grad_value is None else grad_value
        grad_log_slope = torch.zeros_like(x) if grad_log_slope is None else grad_log_slope
        if torch.is_grad_enabled():
            state = _evaluate(theta, x, ctx.options)
        return *_pull_back(theta, x, state, grad_value, grad_log_slope, ctx.options), None


def _evaluate(theta: Tensor, x: Tensor, options: tuple) -> tuple[Tensor, ...]:
    """Value, log-slope, and what the pullback needs: shares of the bins, inner slopes, which knots lie left of x, and its bin."""
    bound, log_share, log_slope_bound, inverse = options
    k, shape = (theta.shape[0] + 1) // 3, x.shape
    raw = theta[: 2 * k].reshape(2, k, *shape)
    shares = torch.exp(raw / (1 + raw.abs() * (1 / log_share)))
    slopes = theta[2 * k :]
    slopes = torch.exp(slopes / (1 + slopes.abs() * (1 / log_slope_bound)))
    sums = [shares[:, 0]]  # a loop over bins is several times faster here than cumsum along a leading axis
    for i in range(1, k):
        sums.append(sums[-1] + shares[:, i])
    scale = 2 * bound / sums[-1]
    edge = torch.full_like(scale, bound)
    knots = torch.stack([-edge, *(c * scale - bound for c in sums[:-1]), edge], dim=1)
    inside = (x > -bound) & (x < bound)
    at = x.clamp(-bound, bound)
    right_of = at >= knots[int(inverse), 1:-1]
    one = torch.ones_like(slopes[:1])
    table = torch.stack([knots[0], knots[1], torch.cat([one, slopes, one])])
    left = right_of.sum(0)[None, None].expand(3, 1, *shape)
    x0, y0, d0 = torch.gather(table, 1, left)[:, 0].unbind(0)
    x1, y1, d1 = torch.gather(table, 1, left + 1)[:, 0].unbind(0)
    w, h = x1 - x0, y1 - y0
    s = h / w
    if inverse:
        t, t1 = (at - y0) / h, (y1 - at) / h
        a, b, c = s * t1, d0 * t1 - d1 * t, s * t
        positive = b >= 0
        root = torch.where(positive, b, -b) + torch.sqrt(b * b + 4 * a * c)
        up, down = torch.where(positive, 2 * c, root), torch.where(positive, root, 2 * a)
        p, q = up / (up + down), down / (up + down)
    else:
        p, q = (at - x0) / w, (x1 - at) / w
    pq = p * q
    n = s * p * p + d0 * pq
    d = s * (p * p + q * q) + (d0 + d1) * pq
    m = d1 * p * p + 2 * s * pq + d0 * q * q
    log_slope = 2 * torch.log(s / d) + torch.log(m)
    value = torch.where(p < q, x0 + p * w, x1 - q * w) if inverse else y0 + h * n / d
    value = torch.where(inside, value, x)
    log_slope = torch.where(inside, -log_slope if inverse else log_slope, torch.zeros_like(x))
    return value, log_slope, shares, slopes, right_of, scale, p, q, x0, x1, y0, y1, d0, d1


def _pull_back(
    theta: Tensor, x: Tensor, state: Any, grad_value: Tensor, grad_log_slope: Tensor, options: tuple
) -> tuple[Tensor, Tensor]:
    """Cotangents of theta and x from those of the value and of the log-slope."""
    bound, log_share, log_slope_bound, inverse = options
    _, out_log_slope, shares, slopes, right_of, scale, p, q, x0, x1, y0, y1, d0, d1 = state
    inside = (x > -bound) & (x < bound)
    w, h = x1 - x0, y1 - y0
    s, pp, qq, pq = h / w, p * p, q * q, p * q
    n, m = s * pp + d0 * pq, d1 * pp + 2 * s * pq + d0 * qq
    r = 1 / (s * (pp + qq) + (d0 + d1) * pq)
    pq_r, inverse_m = pq * r, 1 / m
    log_slope_p = 2 * ((d1 * p + s * (q - p) - d0 * q) * inverse_m - (d0 + d1 - 2 * s) * (q - p) * r)
    zero = torch.zeros_like(x)
    if inverse:  # x = f^-1(y): pull back through f at x, with the cotangents that the implicit function theorem gives
        grad_log_slope = torch.where(inside, -grad_log_slope, zero)
        grad_x = torch.where(inside, grad_value + grad_log_slope * log_slope_p / w, grad_value) * torch.exp(
            out_log_slope
        )
        grad_y = torch.where(inside, -grad_x, zero)
    else:
        grad_y, grad_log_slope = torch.where(inside, grad_value, zero), torch.where(inside, grad_log_slope, zero)
    hr = grad_y * h * r
    grad_p = hr * s * m * r + grad_log_slope * log_slope_p
    grad_s = hr * pq_r * (d1 * pp - d0 * qq) + 2 * grad_log_slope * (1 / s - (pp + qq) * r + pq * inverse_m)
    grad_d0 = hr * pq_r * (s * qq + d1 * pq) + grad_log_slope * (qq * inverse_m - 2 * pq_r)
    grad_d1 = -hr * pq_r * n + grad_log_slope * (pp * inverse_m - 2 * pq_r)
    if not inverse:
        grad_x = torch.where(inside, grad_p / w, grad_value)
    grad_h = grad_s / w + grad_y * n * r
    left = torch.stack([(grad_s * s - grad_p * q) / w, grad_y - grad_h])
    right = torch.stack([-(grad_p * p + grad_s * s) / w, grad_h])
    # A knot is a partial sum of shares: its cotangent reaches the shares before it, less the mean that normalisation takes.
    ends = torch.stack([x0 + bound, y0 + bound]), torch.stack([x1 + bound, y1 + bound])
    mean = (left * ends[0] + right * ends[1]) / (2 * bound)
    mask = right_of.to(x.dtype)
    before_left = torch.cat([mask, torch.zeros_like(mask[:1])])
    before_right = torch.cat([torch.ones_like(mask[:1]), mask])
    raw = theta[: shares.shape[0] * shares.shape[1]].reshape(shares.shape)
    clip = 1 / torch.square(1 + raw.abs() * (1 / log_share))
    grad_shares = (left[:, None] * before_left + right[:, None] * before_right - mean[:, None]) * scale[:, None]
    grad_raw = (grad_shares * shares * clip).reshape(-1, *x.shape)
    here = before_right - before_left
    raw = theta[grad_raw.shape[0] :]
    clip = 1 / torch.square(1 + raw.abs() * (1 / log_slope_bound))
    grad_slopes = (grad_d0 * here[1:] + grad_d1 * here[:-1]) * slopes * clip
    return torch.cat([grad_raw, grad_slopes]), grad_x
