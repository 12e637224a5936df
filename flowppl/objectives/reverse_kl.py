"""The gradient of the reverse Kullback-Leibler divergence: path and plain estimators, mixed as their variances say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flowppl import tree
from flowppl.backend import backend_of
from flowppl.flows import Flow

Array = Any
REFRESH = 10  # steps between two looks at the estimators' covariance
_MEMORY = 0.9  # of its running means


class Control(NamedTuple):
    """Running means of <g_path, s> and <s, s>, with s the score term that the plain estimator has and the path one lacks."""

    cross: Array
    square: Array

    @property
    def coefficient(self) -> Array:
        """c of g_path + c s: zero is the path estimator, one the plain one, and this has the least variance between them."""
        xp = backend_of(self.square).xp
        known = self.square > 0
        return xp.clip(xp.where(known, -self.cross / xp.where(known, self.square, 1.0), 0.0), 0.0, 1.0)


class Estimate(NamedTuple):
    """What one batch of draws says, all scalars."""

    elbo: Array  # its mean over the draws whose density is finite
    fisher: Array  # E |d log q / dx - d log p / dx|^2, zero where q is the posterior
    lost: Array  # the share of draws whose density or gradient is not finite; they are left out of everything
    coefficient: Array  # of the score term


def no_control(like: Array) -> Control:
    """A control that has seen nothing: path gradients."""
    zero = backend_of(like).asarray(0.0, like)
    return Control(zero, zero)


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
        cross = sum(xp.sum((g - c * s) * s) for g, s in _pairs(grads, term))
        square = sum(xp.sum(s * s) for _, s in _pairs(grads, term))
        return Control(
            *(_MEMORY * old + (1 - _MEMORY) * new for old, new in zip(control, (cross, square), strict=True))
        )

    control = backend.cond(refresh, look, lambda control: control, control)
    lost = 1 - xp.mean(xp.astype(fine, x.dtype))
    return Estimate(mean(log_p - log_q), mean(xp.sum(gap * gap, axis=-1)), lost, c), grads, control


def _pairs(a: Any, b: Any) -> Any:
    return zip(tree.leaves(a), tree.leaves(b), strict=True)
