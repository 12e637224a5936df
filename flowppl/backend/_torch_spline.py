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
) -> tuple[Tensor, Tensor, Tensor]:
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
    shape = torch.broadcast_shapes(theta.shape[1:], x.shape)
    options = (bound, log_share, log_slope, inverse)
    # Points often come as columns of a matrix, and every operation would walk along its rows.
    return _RQSpline.apply(theta.expand(-1, *shape), x.expand(shape).contiguous(), options)[:3]


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
        ctx.save_for_backward(theta, x, *output[1:])

    @staticmethod
    def backward(
        ctx: Any, grad_value: Tensor | None, grad_log_slope: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor, None]:
        theta, x, *state = ctx.saved_tensors
        grad_value = torch.zeros_like(x) if grad_value is None else grad_value.contiguous()
        grad_log_slope = torch.zeros_like(x) if grad_log_slope is None else grad_log_slope.contiguous()
        if torch.is_grad_enabled():
            state = _evaluate(theta, x, ctx.options)[1:]
        return *_pull_back(x, state, grad_value, grad_log_slope, ctx.options), None


def _evaluate(theta: Tensor, x: Tensor, options: tuple) -> tuple[Tensor, ...]:
    """Value, log-slope, its derivative, and what the pullback needs besides."""
    bound, log_share, log_slope_bound, inverse = options
    k, shape = (theta.shape[0] + 1) // 3, x.shape
    inverse_bound = torch.full((len(theta), *(1 for _ in shape)), 1 / log_slope_bound, dtype=x.dtype, device=x.device)
    inverse_bound[: 2 * k] = 1 / log_share
    # In place where arrays are large: fresh memory costs more than the arithmetic.
    clip = theta.abs().mul_(inverse_bound).add_(1).reciprocal_()
    positive = (theta * clip).exp_()
    growth = (positive * clip).mul_(clip)  # d positive / d theta
    shares, slopes = positive[: 2 * k].reshape(2, k, *shape), positive[2 * k :]
    sums = [shares[:, 0]]  # a loop over bins is several times faster here than cumsum along a leading axis
    for i in range(1, k):
        sums.append(sums[-1] + shares[:, i])
    scale = 2 * bound / sums[-1]
    inner = torch.stack(sums[:-1], dim=1).mul_(scale[:, None]).sub_(bound)
    inside = (x > -bound) & (x < bound)
    at = x.clamp(-bound, bound)
    right_of = at >= inner[int(inverse)]
    edge, one = torch.full_like(x, bound)[None], torch.ones_like(x)[None]
    knots = torch.cat([-edge, inner[0], edge, -edge, inner[1], edge, one, slopes, one]).reshape(3, k + 1, *shape)
    left = right_of.sum(0)[None, None].expand(3, 1, *shape)
    x0, y0, d0 = torch.gather(knots, 1, left)[:, 0].unbind(0)
    x1, y1, d1 = torch.gather(knots, 1, left + 1)[:, 0].unbind(0)
    w, h = x1 - x0, y1 - y0
    s = h / w
    if inverse:
        t, t1 = (at - y0) / h, (y1 - at) / h
        a, b, c = s * t1, d0 * t1 - d1 * t, s * t
        rises = b >= 0
        root = torch.where(rises, b, -b) + torch.sqrt(b * b + 4 * a * c)
        up, down = torch.where(rises, 2 * c, root), torch.where(rises, root, 2 * a)
        p, q = up / (up + down), down / (up + down)
    else:
        p, q = (at - x0) / w, (x1 - at) / w
    pq, square = p * q, p * p + q * q
    n = s * p * p + d0 * pq
    m = d1 * p * p + 2 * s * pq + d0 * q * q
    r = 1 / (s * square + (d0 + d1) * pq)
    log_slope = 2 * torch.log(s * r) + torch.log(m)
    by_place = 2 * ((d1 * p + s * (q - p) - d0 * q) / m - (d0 + d1 - 2 * s) * (q - p) * r)  # d log-slope / dp
    value = torch.where(p < q, x0 + p * w, x1 - q * w) if inverse else y0 + h * n * r
    zero = torch.zeros_like(x)
    value = torch.where(inside, value, x)
    log_slope = torch.where(inside, -log_slope if inverse else log_slope, zero)
    curvature = torch.where(inside, by_place / w, zero)
    knots_of_bin, place = (x0, x1, y0, y1, d0, d1), (p, q, pq, square, n, m, r, by_place)
    return value, log_slope, curvature, growth, right_of, scale, *knots_of_bin, *place


def _pull_back(
    x: Tensor, state: Any, grad_value: Tensor, grad_log_slope: Tensor, options: tuple
) -> tuple[Tensor, Tensor]:
    """Cotangents of theta and x from those of the value and of the log-slope."""
    bound, _, _, inverse = options
    out_log_slope, _, growth, right_of, scale, x0, x1, y0, y1, d0, d1, *place = state
    p, q, pq, square, n, m, r, by_place = place
    inside = (x > -bound) & (x < bound)
    w, h = x1 - x0, y1 - y0
    s, pp, qq = h / w, p * p, q * q
    zero = torch.zeros_like(x)
    if inverse:  # x = f^-1(y): pull back through f at x, with the cotangents that the implicit function theorem gives
        grad_log_slope = torch.where(inside, -grad_log_slope, zero)
        grad_x = torch.where(inside, grad_value + grad_log_slope * by_place / w, grad_value) * torch.exp(out_log_slope)
        grad_y = torch.where(inside, -grad_x, zero)
    else:
        grad_y, grad_log_slope = torch.where(inside, grad_value, zero), torch.where(inside, grad_log_slope, zero)
    hr = grad_y * h * r
    hpr, log_r, log_m = hr * pq * r, 2 * grad_log_slope * r, grad_log_slope / m
    grad_p = hr * s * m * r + grad_log_slope * by_place
    grad_s = hpr * (d1 * pp - d0 * qq) + 2 * (grad_log_slope / s + log_m * pq) - log_r * square
    grad_d0 = hpr * (s * qq + d1 * pq) + log_m * qq - log_r * pq
    grad_d1 = log_m * pp - hpr * n - log_r * pq
    if not inverse:
        grad_x = torch.where(inside, grad_p / w, grad_value)
    grad_h = grad_s / w + grad_y * n * r
    stretch = grad_s * s
    left = torch.stack([(stretch - grad_p * q) / w, grad_y - grad_h])
    right = torch.stack([-(grad_p * p + stretch) / w, grad_h])
    # A knot is a partial sum of shares: its cotangent reaches the shares before it, less the mean that normalisation takes.
    ends = torch.stack([x0, y0]) + bound, torch.stack([x1, y1]) + bound
    mean = (left * ends[0] + right * ends[1]) * (0.5 / bound)
    left, right, mean = left * scale, right * scale, mean * scale
    true = torch.ones_like(inside)[None]
    before = torch.cat([true, right_of, ~true]).to(x.dtype)
    before_right, before_left = before[:-1], before[1:]
    grad_shares = torch.addcmul(torch.addcmul(-mean[:, None], left[:, None], before_left), right[:, None], before_right)
    here = before_right - before_left  # one in the bin of x
    grad_slopes = torch.addcmul(grad_d0 * here[1:], grad_d1, here[:-1])
    return torch.cat([grad_shares.flatten(0, 1), grad_slopes]) * growth, grad_x
