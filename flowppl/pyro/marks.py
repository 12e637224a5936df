"""What the sites of a guide are marked for: scores, and values that are summed out."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from flowppl.objectives.enumeration import Assignments, no_support
from flowppl.objectives.score import is_scored


def sample_sites(trace: Trace) -> dict[str, Any]:
    """The sites that have a log density."""
    return {k: site for k, site in trace.nodes.items() if site["type"] == "sample" and not site_is_subsample(site)}


def latents(trace: Trace) -> dict[str, Any]:
    """The sites that were drawn."""
    return {k: site for k, site in sample_sites(trace).items() if not site["is_observed"]}


def scored_sites(trace: Trace) -> dict[str, Any]:
    """The sites of a guide that get their gradients from their scores, and not from the derivatives of their draws.

    Raises:
        ValueError: one is marked for what there is not.
        UnsupportedModelError: one cannot be what it is marked for.
    """
    return {k: site for k, site in latents(trace).items() if is_scored_site(site)}


def is_scored_site(site: Any) -> bool:
    """Whether a site of the guide has its score for a gradient, and not the derivatives of its draws; see `is_scored`."""
    fn, marked = site["fn"], site["infer"].get("grad")
    return is_scored(site["name"], marked, type(fn).__name__, moves=fn.has_rsample, point=point(fn) is not None)


def point(fn: Any) -> dist.Delta | None:
    """The `Delta` that a distribution is made from."""
    while not isinstance(fn, dist.Delta):
        if not hasattr(fn, "base_dist"):
            return None
        fn = fn.base_dist
    return fn


class StillScored(Messenger):
    """Takes the derivatives off what scored sites draw; around `trace`, which sees messages after it."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg) and is_scored_site(msg):
            msg["value"] = msg["value"].detach()


class Assigned(Messenger):
    """Gives sites that are summed out their values in an assignment; around plates, which expand distributions before."""

    def __init__(self, assignments: Assignments, number: int) -> None:
        self._assignments, self._number = assignments, number

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or not is_summed(msg):
            return
        fn, name = msg["fn"], msg["name"]
        try:
            support = fn.enumerate_support(expand=False)
        except NotImplementedError as error:
            raise no_support(name, type(fn).__name__) from error
        value = support[self._assignments.digit(name, len(support), self._number)]
        msg["value"], msg["done"] = value.expand(fn.batch_shape + fn.event_shape), True


def is_summed(site: Any) -> bool:
    """Whether a site of a guide is summed out."""
    return site["infer"].get("grad") == "enum"


def unmasked(site: Any) -> Tensor:
    """The log probability of a site, whatever its mask and scale."""
    fn = site["fn"]
    while isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    return fn.log_prob(site["value"])
