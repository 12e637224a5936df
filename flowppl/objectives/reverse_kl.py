"""The gradient of the reverse Kullback-Leibler divergence: path and plain estimators, mixed as their variances say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flowppl import tree
from flowppl.backend import backend_of
from flowppl.flows import Flow
from flowppl.objectives.control import Control

Array = Any


class Estimate(NamedTuple):
    """What one batch of draws says, all scalars."""

    elbo: Array  # its mean over the draws whose density is finite
    fisher: Array  # E |d log q / dx - d log p / dx|^2, zero where q is the posterior
    lost: Array  # the share of draws whose density or gradient is not finite; they are left out of everything
    coefficient: Array  # of the score term


def reverse_kl(
    flow: Flow,
    variables: dict[str, Any],
    log_prob: Callable[[Array], Array],
    rng: Any,
    num_particles: int,
    control: Control,
    refresh: Array,
) -> tuple[Estimate, Any, Control]:
    """Estimates KL(q | p) and its gradient in the flow's params, from one sampling pass and one call of the target.

    With s_q and s_p the scores of flow and target at x = T(z), the path gradient pulls (s_q - s_p) / n back through T. The score
    term s, of mean zero, which makes it the plain one, pulls -s_q / n back through T and 1 / n through log q. Far from the target
    the plain gradient can vary less, near to it the path gradient does. Geffner & Domke 2020, "Approximation based variance
    reduction for reparameterization gradients", mix estimators by such control variates.

    Args:
        flow: q.
        variables: Its variables.
        log_prob: Log density of the target, unnormalised: `(n, dim)` to `(n,)`.
        rng: A jax key, or a `torch.Generator`.
        num_particles: n.
        control: The last one.
        refresh: A boolean scalar (on the host, in torch): whether to look at the covariance anew, at the price of a pullback.

    Returns:
        The estimate, gradients like `variables["params"]`, and the control.
    """
    like = tree.leaves(variables["params"])[0]
    backend = backend_of(like)
    xp, stop = backend.xp, backend.stop

    def draw(params: Any) -> tuple[Any, Array]:
        sample = flow.sample(rng, {**variables, "params": params}, (num_particles,), with_score=True)
        return (sample.x, sample.log_prob), sample.score

    (x, log_q), pull, score = backend.vjp(draw, stop(variables["params"]), has_aux=True, once=True)
    x, log_q, score = stop((x, log_q, score))
    log_p, target = stop(backend.value_and_score(log_prob, x))

    gap = score - target
    fine = xp.isfinite(log_p) & xp.isfinite(log_q) & xp.all(xp.isfinite(gap), axis=-1)
    n = xp.maximum(xp.sum(xp.astype(fine, x.dtype)), xp.ones_like(log_q[0]))

    def mean(values: Array) -> Array:
        return xp.sum(xp.where(fine, values, xp.zeros_like(values)), axis=0) / n

    gap = xp.where(fine[:, None], gap, xp.zeros_like(gap))
    score = xp.where(fine[:, None], score, xp.zeros_like(score))
    each = xp.where(fine, xp.ones_like(log_q), xp.zeros_like(log_q)) / n
    c = control.coefficient
    (grads,) = pull((gap / n - c * score / n, c * each))

    def look(control: Control) -> Control:
        (term,) = pull((-score / n, each))
        return control.updated(tree.map(lambda g, s: g - c * s, grads, term), term)

    control = backend.cond(refresh, look, lambda control: control, control)
    lost = 1 - xp.mean(xp.astype(fine, x.dtype))
    return Estimate(mean(log_p - log_q), mean(xp.sum(gap * gap, axis=-1)), lost, c), grads, control
