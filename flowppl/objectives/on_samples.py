"""Objectives for a flow where samples of the target are given, and with them, for some, the scores of its density."""

from __future__ import annotations

import math
from typing import Any

from flowppl.backend import backend_of
from flowppl.bijections.base import Array, bind
from flowppl.errors import DimensionError
from flowppl.flows import Flow, Sample
from flowppl.objectives.path import path_log_prob


def forward_kl(
    flow: Flow, variables: dict[str, Any], x: Array, score: Array | None = None, context: Array | None = None
) -> Array:
    """The mean negative log-likelihood, KL(p | q) up to a constant; with scores of the target, with its path gradient.

    With z = T^-1(x), s_q = d log q / dx and s_p = d log p / dx, integration by parts over x ~ p turns the gradient into

        d KL / d theta = E_p <s_q - s_p, dT(z) / d theta>,

    which is zero where q is the target, whatever the points: the fit stops at p, and does not go on to fit the sample's noise.
    One inversion without derivatives and one sampling pass with scores. Vaitl et al. 2024, "Fast and unified path gradient
    estimators for normalizing flows"; Bauer & Mnih 2021, "Generalized doubly reparameterized gradient estimators".

    Parameters of the base have this gradient too, through z, where the base knows how its draws move with them (`Base.attach`);
    where it does not, theirs is the plain one, which is unbiased but not zero at the target. So has the context, and whatever it is
    computed from, if p is the density of x given that. Draws of a mixture move fast between its modes: while points lie where
    the flow has hardly any mass, that gradient varies much. The identity needs samples of p itself, and densities without jumps.

    Args:
        flow: q.
        variables: Its variables.
        x: Points `(n, dim)` or any batch of them; no derivative flows to them.
        score: d log p / dx at x, like x, of a density that need not be normalised; None for the gradient of maximum likelihood.
        context: `(*batch, context_dim)` or None.

    Returns:
        A scalar to minimise. Its value is the same with and without scores; only first derivatives are meaningful.

    Raises:
        DimensionError: x, the scores or the context have a shape that does not fit.

    Example:
        >>> import torch
        >>> from flowppl import flows
        >>> from flowppl.objectives import forward_kl
        >>> flow = flows.affine()(2)
        >>> variables = flow.init(torch.Generator().manual_seed(0))
        >>> x = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
        >>> forward_kl(flow, variables, x, score=-x)
        tensor(3.0879)
    """
    backend = _check(flow, x, score, context)
    stop, mean = backend.stop, backend.xp.mean
    x = stop(x)
    if score is None:
        return -mean(flow.log_prob(variables, x, context))
    params = bind(variables)
    fixed = stop(params)
    z, log_det = flow.bijection.inverse(fixed["bijection"], x, None if context is None else stop(context))
    log_q = flow.base.log_prob(fixed["base"], z) + log_det
    z = stop(z)
    attached = flow.base.attach(params["base"], z)
    pushed = flow.push(variables, z if attached is None else attached, context, with_score=True)
    loss = path_log_prob(Sample(pushed.x, -log_q, pushed.score - score))
    if attached is None:
        log_base = flow.base.log_prob(params["base"], z)
        loss = loss - (log_base - stop(log_base))
    return mean(loss)


def fisher_divergence(
    flow: Flow, variables: dict[str, Any], x: Array, score: Array, context: Array | None = None
) -> Array:
    """The mean of |d log q / dx - d log p / dx|^2 at given points: zero where q is the target, wherever they lie.

    Neither a normaliser of p nor derivatives in the parameters of x or of the scores are needed, and x need not come from p; but
    modes apart from one another can have any weights. Hyvarinen 2005, "Estimation of non-normalized statistical models by
    score matching". The derivative in the parameters is a second one, through the flow's inverse.

    Args:
        flow: q.
        variables: Its variables.
        x: Points `(n, dim)` or any batch of them; no derivative flows to them.
        score: d log p / dx at x, like x; no derivative flows to it.
        context: `(*batch, context_dim)` or None.

    Returns:
        A scalar to minimise.

    Raises:
        DimensionError: x, the scores or the context have a shape that does not fit.

    Example:
        >>> import torch
        >>> from flowppl import flows
        >>> from flowppl.objectives import fisher_divergence
        >>> flow = flows.affine()(2)
        >>> variables = flow.init(torch.Generator().manual_seed(0))
        >>> x = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
        >>> fisher_divergence(flow, variables, x, score=-2 * x)
        tensor(2.5000)
    """
    backend = _check(flow, x, score, context)
    log_q, pull = backend.vjp(lambda x: flow.log_prob(variables, x, context), backend.stop(x))
    gap = pull(backend.xp.ones_like(log_q))[0] - backend.stop(score)
    return backend.xp.mean(backend.xp.sum(gap * gap, axis=-1))


def sliced_mmd(x: Array, y: Array, rng: Any, num_projections: int = 64) -> Array:
    """The energy distance of two samples, the squared MMD with kernel -|x - y|, from random projections to a line.

    Its mean over directions is E|x - y| - 1/2 E|x - x'| - 1/2 E|y - y'|, with means over all pairs, a point and itself included
    (the V-statistic): never negative, and zero for two samples alike; between samples of one law it is of order 1/n + 1/m. On a
    line that is the integral of (F - G)^2, with F and G the two distribution functions, and takes one sort of n + m numbers;
    (d, num_projections) and (num_projections, n + m) are the sizes in memory. Szekely & Rizzo 2013, "Energy statistics"; Hertrich
    et al. 2024, "Generative sliced MMD flows with Riesz kernels".

    Args:
        x: Points `(n, d)`.
        y: Points `(m, d)`.
        rng: A jax key, or a `torch.Generator` (None: torch's global one).
        num_projections: Number of directions, uniform on the sphere; on a line one would do.

    Returns:
        A scalar, differentiable in x and y; where points coincide by one of the subgradients.

    Raises:
        DimensionError: x and y are not two samples of at least one vector, of one length.
        ValueError: there is no projection.

    Example:
        >>> import torch
        >>> from flowppl.objectives import sliced_mmd
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]])
        >>> sliced_mmd(x, y, torch.Generator().manual_seed(0))  # 2.5 - 1/2 * 0.5 - 1/2 * 0
        tensor(2.2500)
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or 0 in (*x.shape, *y.shape):
        raise DimensionError(
            f"x, y: expected shapes (n, d) and (m, d), none of them empty, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if num_projections < 1:
        raise ValueError(f"num_projections must be positive, got {num_projections}")
    backend = backend_of(x, y)
    xp = backend.xp
    n, m, d = x.shape[0], y.shape[0], x.shape[1]
    directions = backend.normal(rng, (d, num_projections), x)
    directions = directions / xp.sqrt(xp.sum(directions * directions, axis=0))
    line = (xp.concat([x, y], axis=0) @ directions).T  # (num_projections, n + m)
    order = xp.argsort(backend.stop(line), axis=-1)
    line = backend.gather(line, order, -1)
    of_x = xp.cumulative_sum(xp.astype(order < n, x.dtype), axis=-1)
    of_y = xp.cumulative_sum(xp.astype(order >= n, x.dtype), axis=-1)
    gap = (of_x / n - of_y / m)[:, :-1]  # F - G, between one point and the next
    distances = xp.sum(gap * gap * (line[:, 1:] - line[:, :-1]), axis=-1)
    # The mean of |<v, direction>| is |v| divided by this.
    scale = math.sqrt(math.pi) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    return scale * xp.mean(distances)


def _check(flow: Flow, x: Array, score: Array | None, context: Array | None) -> Any:
    """The backend of x, if everything has a shape that fits the flow."""
    flow.check_context(context)
    if x.shape[-1:] != (flow.dim,):
        raise DimensionError(f"x: expected shape (*batch, {flow.dim}), got {tuple(x.shape)}")
    if score is not None and score.shape != x.shape:
        raise DimensionError(f"score: expected the shape of x, {tuple(x.shape)}, got {tuple(score.shape)}")
    return backend_of(x)
