"""Elements of plates that have log-weights of their own: which plates, and how sites' log densities add up."""

from __future__ import annotations

import math
from collections.abc import Collection, Set
from typing import Any, NamedTuple

import jax.numpy as jnp

from flowppl.errors import UnsupportedModelError
from flowppl.numpyro.marks import Trace, is_summed, sampled
from flowppl.objectives.enumeration import in_other_plates

Array = Any
Sites = dict[str, Array]  # arrays by site, (K, *batch, *event); where sites are summed out, K * M


class Plates(NamedTuple):
    """The plates whose elements have log-weights of their own."""

    dims: frozenset[int]  # of those that enclose every sample site, negative, and those of `local`
    scale: float  # what the subsampling of the former multiplies log densities by
    local: dict[int, int]  # sizes of other plates, in which sites are summed out
    outside: frozenset[str]  # sites that are not in all of `local`

    def total(self, log_probs: Sites) -> Array:
        """The sum of sites' log densities `(K, *batch)`.

        What is outside of local plates is shared among their elements, so that the sum over these counts it once.
        """
        sharers = math.prod(self.local.values())
        inside = {name: log_prob for name, log_prob in log_probs.items() if name not in self.outside}
        outside = {name: log_prob for name, log_prob in log_probs.items() if name in self.outside}
        return self._sum(inside, self.dims) + self.whole(outside) / sharers

    def whole(self, log_probs: Sites) -> Array:
        """The same, where each element of local plates has all of every site, since a score may be felt outside."""
        return self._sum(log_probs, self.dims - self.local.keys())

    def _sum(self, log_probs: Sites, dims: Set[int]) -> Array:
        def total(a: Array) -> Array:
            found = jnp.sum(a, axis=tuple(i for i in range(1, a.ndim) if i - a.ndim not in dims))
            return found.reshape(len(a), *(a.shape[dim] if dim in dims else 1 for dim in sorted(self.dims)))

        return sum(map(total, log_probs.values()), jnp.zeros(()))


def common_plates(model: Trace, guide: Trace, linear: bool, scored: Collection[str] = ()) -> Plates:
    """The plates whose elements have log-weights of their own: those that enclose every sample site, and of sites summed out.

    Args:
        model: A run.
        guide: A run.
        linear: Whether the objective is linear in the log-weights, where it does not matter which are summed before.
        scored: The guide's scored sites, for which they are kept apart all the same.

    Raises:
        UnsupportedModelError: another plate subsamples, and the objective is not linear, or sites are summed out in different
            plates.
    """
    if linear and not scored:
        return Plates(frozenset(), 1.0, {}, frozenset())
    sites = [site for found in (model, guide) for site in sampled(found).values()]
    stacks = [set(site["cond_indep_stack"]) for site in sites]
    common, scale = set.intersection(*stacks), 1.0
    for frame in set.union(*stacks):
        share = {**guide, **model}[frame.name]["args"][0] / frame.size
        if frame in common:
            scale *= share
        elif share != 1 and not linear:
            raise UnsupportedModelError(
                f"plate {frame.name!r} subsamples and does not enclose every sample site of the model and the guide, so that "
                'its log-weights cannot be scaled up: use the objective "elbo", or all of the data'
            )
    local, summed = set(), [guide[name] for name in scored if is_summed(guide[name])]
    if linear and summed:
        local = plates(summed[0]) - common
        for site in summed:
            if plates(site) != plates(summed[0]):
                raise in_other_plates(summed[0]["name"], site["name"])
    dims, sizes = frozenset(frame.dim for frame in common | local), {frame.dim: frame.size for frame in local}
    return Plates(dims, scale, sizes, frozenset(site["name"] for site in sites if not local <= plates(site)))


def plates(site: dict[str, Any]) -> set[Any]:
    """The plates around a site, where they have several elements."""
    return {frame for frame in site["cond_indep_stack"] if frame.size > 1}
