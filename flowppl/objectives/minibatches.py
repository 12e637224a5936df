"""A log density as one minibatch of the data estimates it, and how to make such an estimate vary less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowppl.backend import Array, backend_of

Density = Callable[[Array], Array]  # points (n, dim) to log densities (n,)


def minibatches_of(
    estimate: Callable[[Any, Array], Array], log_prob: Density, like: Array
) -> Callable[[Any], tuple[Any, Density]]:
    """What draws a minibatch: from a source of random numbers to one for other uses, and `anchored` estimates of a log density.

    Args:
        estimate: From random numbers and points `(n, dim)` to what one random minibatch makes of their log densities, `(n,)`.
        log_prob: The log densities, from all of the data; seen once, at zero.
        like: An array `(dim,)` of the points' kind.
    """
    backend = backend_of(like)
    origin = backend.xp.zeros_like(like)[None]
    value, score = backend.jit(lambda x: backend.value_and_score(log_prob, x))(origin)

    def draw(rng: Any) -> tuple[Any, Density]:
        rng, own = backend.split(rng, 2)
        return rng, anchored(lambda x: estimate(own, x), value[0], score[0])

    return draw


def anchored(estimate: Density, value: Array, score: Array) -> Density:
    """An estimate that is exact at zero, gradient included, and varies little where a posterior is narrow around zero.

    With p_b the density as a minibatch b estimates it, this is log p_b(x) less the error at zero, log p_b(0) - log p(0), and less
    x . (d log p_b(0) - d log p(0)): without bias as log p_b is, and as noisy as the curvature of the data's terms and not as their
    slopes. Baker et al. 2019, "Control variates for stochastic gradient MCMC". A minibatch with no finite density at zero is taken
    as it is.

    Args:
        estimate: log p_b, one minibatch for all points: `(n, dim)` to `(n,)`.
        value: log p(0), a scalar.
        score: Its gradient, `(dim,)`.

    Returns:
        A function of points `(n, dim)`, whose values `(n,)` have a gradient, once.
    """

    def log_prob(x: Array) -> Array:
        backend = backend_of(x)
        xp, stop = backend.xp, backend.stop
        here = stop(x)
        values, scores = stop(backend.value_and_score(estimate, xp.concat([here, xp.zeros_like(here[:1])])))
        excess, slope = values[-1] - value, scores[-1] - score
        fine = xp.isfinite(excess) & xp.all(xp.isfinite(slope))
        excess, slope = (xp.where(fine, a, xp.zeros_like(a)) for a in (excess, slope))
        # One run of the model gives values and gradients: what follows has both, and runs nothing.
        return values[:-1] - excess - here @ slope + xp.sum((scores[:-1] - slope) * (x - here), axis=-1)

    return log_prob
