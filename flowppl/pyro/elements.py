"""Elements of plates that have log-weights of their own: which plates, and how sites' log densities add up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor

from flowppl.errors import UnsupportedModelError
from flowppl.objectives.enumeration import depends_on_summed, in_other_plates
from flowppl.pyro.marks import is_summed, sample_sites


class Plates(NamedTuple):
    """The plates whose elements have log-weights of their own."""

    dims: frozenset[int]  # of those that enclose every sample site, negative, and those of `local`
    scale: float  # what the subsampling of the former multiplies log densities by
    local: dict[int, int]  # sizes of other plates, in which sites are summed out
    outside: frozenset[str]  # sites that are not in all of `local`

    def total(self, log_probs: Mapping[str, Tensor]) -> Tensor:
        """The sum of sites' log densities, in which all plates but these have length one: `(K, *batch)`.

        What is outside of local plates is shared among their elements, so that the sum over these counts it once.
        """
        sharers = math.prod(self.local.values())
        return sum(self._own(k, a) / sharers if k in self.outside else self._own(k, a) for k, a in log_probs.items())

    def whole(self, log_probs: Mapping[str, Tensor]) -> Tensor:
        """The same, where each element has all of what is outside."""
        return sum(self._own(name, log_prob) for name, log_prob in log_probs.items())

    def _own(self, name: str, log_prob: Tensor) -> Tensor:
        kept = self.dims - self.local.keys() if name in self.outside else self.dims
        others = [d for d in range(1 - log_prob.dim(), 0) if d not in kept]
        return log_prob.sum(others, keepdim=True) if others else log_prob  # torch sums over all where it is told none


def common_plates(
    model: Trace, guide: Trace, num_particles_dim: int, linear: bool, scored: Mapping[str, Any]
) -> Plates:
    """The plates whose elements have log-weights of their own: those that enclose every sample site, and of sites summed out.

    Args:
        model: A run.
        guide: A run.
        num_particles_dim: The dimension of the particles, negative.
        linear: Whether the objective is linear in the log-weights, where it does not matter which are summed before.
        scored: The guide's scored sites, for which they are kept apart all the same.

    Raises:
        UnsupportedModelError: another plate subsamples, and the objective is not linear, or sites are summed out in different
            plates.
    """
    sites = [
        site for t in (model, guide) for site in sample_sites(t).values() if not site["infer"].get("_deterministic")
    ]
    if (linear and not scored) or not sites:
        return Plates(frozenset(), 1.0, {}, frozenset())

    def plates(site: Any) -> set[Any]:
        return {f for f in site["cond_indep_stack"] if f.dim != num_particles_dim}

    common = {f for f in set.intersection(*map(plates, sites)) if f.vectorized}
    for frame in set.union(*map(plates, sites)) - common:
        if _share(frame) != 1 and not linear:
            raise UnsupportedModelError(
                f"plate {frame.name!r} subsamples and does not enclose every sample site of the model and the guide, so that "
                'its log-weights cannot be scaled up: use the objective "elbo", or all of the data'
            )
    local, summed = set(), [site for site in scored.values() if is_summed(site)]
    if linear and summed:
        local = {f for f in plates(summed[0]) - common if f.vectorized}
        for site in summed:
            if plates(site) - common != plates(summed[0]) - common:
                raise in_other_plates(summed[0]["name"], site["name"])
    dims, sizes = frozenset(f.dim for f in common | local), {f.dim: f.size for f in local}
    outside = frozenset(site["name"] for site in sites if not local <= plates(site))
    return Plates(dims, math.prod(map(_share, common)), sizes, outside)


def _share(frame: Any) -> float:
    return (frame.full_size or frame.size) / frame.size


def check_outside(model: Trace, runs: Sequence[Trace], outside: frozenset[str]) -> None:
    """Checks that no site outside of local plates depends on what is summed out inside: it is the same in all branches.

    Raises:
        UnsupportedModelError: one does.
    """
    first, *others = (sample_sites(run) for run in runs)
    for name in outside & first.keys():
        if not all(torch.equal(first[name][key], run[name][key]) for run in others for key in ("value", "log_prob")):
            raise depends_on_summed(name, "guide")
    for name in outside & sample_sites(model).keys():
        branches = model.nodes[name]["log_prob"].unflatten(0, (-1, len(runs)))
        if not torch.equal(branches, branches[:, :1].expand_as(branches)):
            raise depends_on_summed(name, "model")
