"""Elements of plates that have log-weights of their own: which plates, and how sites' log densities add up."""

from __future__ import annotations

import math
from collections.abc import Collection
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
        each = (self._own(k, a) / sharers if k in self.outside else self._own(k, a) for k, a in log_probs.items())
        return sum(each, jnp.zeros(()))

    def whole(self, log_probs: Sites) -> Array:
        """The same, where each element has all of what is outside."""
        return sum((self._own(name, log_prob) for name, log_prob in log_probs.items()), jnp.zeros(()))

    def _own(self, name: str, log_prob: Array) -> Array:
        kept, shape = self.dims - self.local.keys() if name in self.outside else self.dims, log_prob.shape
        found = jnp.sum(log_prob, axis=tuple(i for i in range(1, len(shape)) if i - len(shape) not in kept))
        return found.reshape(shape[0], *(shape[dim] if dim in kept else 1 for dim in sorted(self.dims)))


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

    def plates(site: dict[str, Any]) -> set[Any]:
        return set(site["cond_indep_stack"])

    common, scale = set.intersection(*map(plates, sites)), 1.0
    for frame in set.union(*map(plates, sites)):
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
            if plates(site) - common != local:
                raise in_other_plates(summed[0]["name"], site["name"])
    dims, sizes = frozenset(frame.dim for frame in common | local), {frame.dim: frame.size for frame in local}
    return Plates(dims, scale, sizes, frozenset(site["name"] for site in sites if not local <= plates(site)))
