"""Covering the tails of a target: draws that reach further than the base, and a divergence that heeds what they find."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from flowppl import tree
from flowppl.backend import Array, backend_of
from flowppl.flows import Flow
from flowppl.objectives.reverse_kl import Estimate
from flowppl.weights import log_mean_exp

_SCALE = 2.0  # of the coordinate that is drawn more widely
_WIDE = 4  # one draw of so many has one
LARGEST = 2.0  # the largest log-weight beside the mean weight: beyond, single draws rule a step
_REVERSE = 0.1  # the share of the reverse Kullback-Leibler divergence, which minds draws where the target has no mass


def wider(rng: Any, z: Array, every: int) -> tuple[Array, Array]:
    """Makes one coordinate, at random, of one in `every` standard normal draws twice as large.

    A posterior's tail is mostly heavy along few directions. Widening all coordinates at once would cost, in many dimensions, more
    than it finds. Weights that count the draws as a mixture are bounded along each coordinate where the base's tails are too light.
    Hesterberg 1995, "Weighted average importance sampling and defensive mixture distributions".

    Args:
        rng: A jax key, or a `torch.Generator`.
        z: Draws of the standard normal, `(n, dim)`.
        every: See above.

    Returns:
        Draws `(n, dim)`, and the log of their density, that of the mixture, over the normal's, `(n,)`; over draws of the mixture
        its mean is at most 0.81 / every.
    """
    backend, (n, dim) = backend_of(z), z.shape
    xp = backend.xp
    which = xp.floor(dim * backend.uniform(rng, (n, 1), like=z))
    coordinates = backend.asarray(xp.arange(dim, dtype=z.dtype), z)
    chosen = backend.asarray(xp.arange(n) % every == 0, z)[:, None] & (coordinates == which)
    z = xp.where(chosen, _SCALE * z, z)
    each = 0.5 * (1 - _SCALE**-2) * z * z - math.log(_SCALE * dim)
    log_ratio = backend.logsumexp(each, axis=-1)
    both = xp.stack([xp.full_like(log_ratio, math.log(1 - 1 / every)), log_ratio - math.log(every)])
    return z, backend.logsumexp(both, axis=0)


def chi_square(
    flow: Flow, variables: dict[str, Any], log_prob: Callable[[Array], Array], rng: Any, num_particles: int
) -> tuple[Estimate, Any]:
    """The gradient of the forward chi-square divergence E_q (p / q)^2, for a flow that fits but for its tails.

    With scores s_q and s_p at x = T(z), the path gradient pulls (p / q)^2 (s_q - s_p) back through T: what reverse Kullback-Leibler
    divergence hardly sees counts by the square of its weight. Draws are of a mixture that reaches further than q, the evidence is
    estimated by the mean weight, and weights are cut off at e^2. Dieng et al. 2017, "Variational inference via chi upper bound
    minimization".

    Args:
        flow: q, with a standard normal base.
        variables: Its variables.
        log_prob: Log density of the target, unnormalised: `(n, dim)` to `(n,)`.
        rng: A jax key, or a `torch.Generator`.
        num_particles: n.

    Returns:
        ELBO and the like, and gradients like `variables["params"]`.
    """
    like = tree.leaves(variables["params"])[0]
    backend = backend_of(like)
    xp, stop = backend.xp, backend.stop
    base_rng, rng = backend.split(rng, 2)
    z, log_ratio = wider(rng, backend.normal(base_rng, (num_particles, flow.dim), like), _WIDE)

    def push(params: Any) -> tuple[Array, tuple[Array, Array]]:
        sample = flow.push({**variables, "params": params}, z, with_score=True)
        return sample.x, (sample.log_prob, sample.score)

    x, pull, (log_q, score) = backend.vjp(push, stop(variables["params"]), has_aux=True, once=True)
    x, log_q, score = stop((x, log_q, score))
    log_p, target = stop(backend.value_and_score(log_prob, x))
    gap = score - target
    fine = xp.isfinite(log_p) & xp.isfinite(log_q) & xp.all(xp.isfinite(gap), axis=-1)
    gap = xp.where(fine[:, None], gap, xp.zeros_like(gap))
    log_w = xp.where(fine, log_p - log_q, xp.full_like(log_q, -math.inf))

    of_mixture = xp.exp(-log_ratio) / num_particles  # q over the mixture
    relative = xp.clip(log_w - log_mean_exp(log_w - log_ratio), None, LARGEST)
    weight = of_mixture * (xp.exp(2 * relative) + _REVERSE)
    (grads,) = pull(weight[:, None] * gap)

    share = xp.where(fine, of_mixture, xp.zeros_like(of_mixture))
    share = share / xp.sum(share)
    elbo = xp.sum(xp.where(fine, share * log_w, xp.zeros_like(share)))
    fisher = xp.sum(share * xp.sum(gap * gap, axis=-1))
    lost = 1 - xp.mean(xp.astype(fine, x.dtype))
    return Estimate(elbo, fisher, lost, xp.zeros_like(elbo)), grads
