"""Path gradients: the derivative of log q(x(theta)) through x alone."""

from __future__ import annotations

from typing import Any

from flowppl.backend import backend_of
from flowppl.flows import Sample

Array = Any
GRADIENTS = ("reparam", "path", "auto")  # the last one mixes the others, in losses that can


def check_gradient(gradient: str) -> str:
    """Returns the name of an estimator if there is one of this name.

    Raises:
        ValueError: there is none.
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    return gradient


def path_log_prob(sample: Sample, x: Array | None = None, context: Array | None = None) -> Array:
    """The surrogate stop(log q) + <stop(g), x - stop(x)> + <stop(s_c), c - stop(c)>: the value of log q, the path gradient.

    The score term of the total derivative has mean zero and is left out, so the estimator of the ELBO's gradient stays unbiased
    and its variance vanishes where q is the posterior. Roeder et al. 2017, "Sticking the landing". Only first derivatives are
    meaningful, and only in losses that are linear in log q.

    Args:
        sample: Draws with log density and scores.
        x: The draws `(*shape, dim)`, attached (default: the sample's own).
        context: The context, attached to whatever it was computed from; None where the flow has none.

    Returns:
        `(*shape,)`.
    """
    x = sample.x if x is None else x
    backend = backend_of(x)
    surrogate = backend.stop(sample.log_prob) + _zero(backend, sample.score, x)
    if sample.score_context is not None and context is not None:
        surrogate = surrogate + _zero(backend, sample.score_context, context)
    return surrogate


def _zero(backend: Any, score: Array, x: Array) -> Array:
    """<stop(score), x - stop(x)>: zero, with the derivative `score` with respect to x."""
    return backend.xp.sum(backend.stop(score) * (x - backend.stop(x)), axis=-1)
