"""What the sites of a guide are marked for: scores, and values that are summed out."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from numpyro.distributions import Delta, ExpandedDistribution, Independent, MaskedDistribution
from numpyro.primitives import Messenger

from flowppl.errors import UnsupportedModelError
from flowppl.objectives.enumeration import Assignments, no_support
from flowppl.objectives.score import is_scored

Trace = dict[str, dict[str, Any]]


def sampled(found: Trace) -> Trace:
    """Its sample sites."""
    return {name: site for name, site in found.items() if site["type"] == "sample"}


def latents(found: Trace) -> Trace:
    """The sites that were drawn."""
    return {name: site for name, site in sampled(found).items() if not site["is_observed"]}


class StillScored(Messenger):
    """Takes the derivatives off what scored sites draw; around `trace`, which sees messages after it."""

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not msg["is_observed"] and is_scored_site(msg):
            msg["value"], msg["intermediates"] = lax.stop_gradient(msg["value"]), []


class Assigned(Messenger):
    """Gives sites that are summed out their values in an assignment; around `seed`, whose keys are then the same in each."""

    def __init__(self, assignments: Assignments, number: Any) -> None:
        super().__init__()
        self._assignments, self._number = assignments, number
        self._met: set[str] = set()

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not msg["is_observed"] and is_summed(msg):
            fn, name = msg["fn"], msg["name"]
            self._met.add(name)
            try:
                support = jnp.asarray(fn.enumerate_support(expand=False))
            except NotImplementedError as error:
                raise no_support(name, type(fn).__name__) from error
            if support.shape[support.ndim - fn.event_dim :] != fn.event_shape:  # of one element, where there are more
                raise no_support(name, type(unmasked(fn)).__name__)
            value = support[self._assignments.digit(name, len(support), self._number)]
            msg["value"] = jnp.broadcast_to(value, fn.shape())

    def check(self, found: Trace) -> None:
        """Checks that messages of all marked sites came by."""
        for name, site in latents(found).items():
            if is_summed(site) and name not in self._met:
                raise UnsupportedModelError(
                    f'site {name!r} of the guide is marked "enum" inside control flow, such as scan, where it cannot be summed '
                    'out: mark it "score"'
                )


def is_summed(site: dict[str, Any]) -> bool:
    """Whether a site of the guide is summed out."""
    return site["infer"].get("grad") == "enum"


def unmasked(fn: Any) -> Any:
    """The distribution without masks, and without what expands it."""
    while isinstance(fn, ExpandedDistribution | MaskedDistribution):
        fn = fn.base_dist
    return fn


def is_scored_site(site: dict[str, Any]) -> bool:
    """Whether a site of the guide has its score for a gradient, and not the derivatives of its draws.

    Raises:
        ValueError: it is marked for what there is not.
        UnsupportedModelError: it cannot be what it is marked for.
    """
    moves = site["fn"].has_rsample and jnp.issubdtype(jnp.result_type(site["value"]), jnp.floating)
    point = isinstance(innermost(site["fn"]), Delta)
    return is_scored(site["name"], site["infer"].get("grad"), type(site["fn"]).__name__, moves=moves, point=point)


def innermost(fn: Any) -> Any:
    """The distribution that others are made from."""
    while isinstance(fn, ExpandedDistribution | Independent | MaskedDistribution):
        fn = fn.base_dist
    return fn
