"""Unbiased estimates of the log-determinant of a residual map, by its power series."""

from __future__ import annotations

import math
from typing import Any

from flowppl.backend import backend_of
from flowppl.bijections.base import Array, Params, broadcast
from flowppl.bijections.residual import Residual

_LEFT_OUT = 1e-12


def roulette_log_det(
    rng: Any, bijection: Residual, params: Params, x: Array, context: Array | None = None, *, exact_terms: int = 4
) -> Array:
    """An unbiased estimate of log |det dy/dx| `(*batch,)`, whose gradients in params, x and context are unbiased too.

    With J = dg/dx and N = exact_terms + a geometric number of terms, one for the whole batch, and v of random signs

        sum_{k=1}^N (-1)^(k+1) / k v^T J^k v / P(N >= k)

    estimates log det(I + J). Its gradient is that of u^T J v with fixed u = sum_{k=0}^N (-1)^k (J^T)^k v / P(N >= k), which takes
    memory for one pass only. Chen et al. 2019, "Residual flows for invertible generative modeling", equations 6 and 8.

    A term follows another with the probability c, the bijection's `contraction`, so that terms shrink at least as fast as P(N >= k)
    and the variance is finite. N is c / (1 - c) larger than `exact_terms` on average. It has a largest value, of probability
    1e-12 (6e-8 in float32, where a uniform number is no finer): what is never added is less than that times dim / (1 - c).

    Args:
        rng: A jax key, or a `torch.Generator` (None: torch's global one).
        bijection: The residual map.
        params: Its bound parameters.
        x: Points `(*batch, dim)`.
        context: `(*batch, context_dim)` or None.
        exact_terms: How many terms are always there; with more of them the variance is smaller.
    """
    backend = backend_of(x)
    xp = backend.xp
    x, context = broadcast(x, context, bijection.context_dim)
    layers = bijection.layers(params, context)
    _, slopes = bijection._g.apply(layers, x)
    (fixed, fixed_slopes), pull = backend.stop((layers, slopes)), bijection._g.pull
    v_key, n_key = backend.split(rng, 2)
    v = xp.where(backend.uniform(v_key, tuple(x.shape), like=x) < 0.5, -xp.ones_like(x), xp.ones_like(x))
    keep = bijection.contraction
    most = exact_terms + math.ceil(math.log(_LEFT_OUT) / math.log(keep))
    u = 1 - backend.uniform(n_key, (), like=x)  # in (0, 1]
    number = xp.clip(exact_terms + xp.floor(xp.log(u) / math.log(keep)), 0, most)

    def unfinished(state: tuple[Array, ...]) -> Array:
        return state[0] < number

    def add(state: tuple[Array, ...]) -> tuple[Array, ...]:
        k, weight, term, value, neumann = state
        k = k + 1
        weight = -xp.where(k > exact_terms, weight / keep, weight)  # (-1)^k / P(N >= k)
        term = pull(fixed, fixed_slopes, term)
        return k, weight, term, value - weight / k * xp.sum(term * v, axis=-1), neumann + weight * term

    start = (xp.zeros_like(u), xp.ones_like(u), v, xp.zeros_like(x[..., 0]), v)
    *_, value, neumann = backend.while_loop(unfinished, add, start, max_steps=most)
    attached = xp.sum(pull(layers, slopes, backend.stop(neumann)) * v, axis=-1)
    return backend.stop(value) + attached - backend.stop(attached)
