"""Elements of plates that have log-weights of their own: which plates, and how sites' log densities add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Set
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.ops.provenance import get_provenance, track_provenance
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
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
        inside = [_sum(log_prob, self.dims) for name, log_prob in log_probs.items() if name not in self.outside]
        outside = [self.whole({name: log_probs[name]}) / sharers for name in log_probs if name in self.outside]
        return sum(inside + outside)

    def whole(self, log_probs: Mapping[str, Tensor]) -> Tensor:
        """The same, where each element of local plates has all of every site, since a score may be felt outside."""
        return sum(_sum(log_prob, self.dims - self.local.keys()) for log_prob in log_probs.values())


def _sum(log_prob: Tensor, dims: Set[int]) -> Tensor:
    others = [d for d in range(1 - log_prob.dim(), 0) if d not in dims]
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
    every = [site for trace in (model, guide) for site in sample_sites(trace).values()]
    sites = [site for site in every if not site["infer"].get("_deterministic")]
    if (linear and not scored) or not sites:
        return Plates(frozenset(), 1.0, {}, frozenset())
    stacks = [{f for f in site["cond_indep_stack"] if f.dim != num_particles_dim} for site in sites]
    common = {f for f in set.intersection(*stacks) if f.vectorized}
    for frame in set.union(*stacks) - common:
        if _share(frame) != 1 and not linear:
            raise UnsupportedModelError(
                f"plate {frame.name!r} subsamples and does not enclose every sample site of the model and the guide, so that "
                'its log-weights cannot be scaled up: use the objective "elbo", or all of the data'
            )
    local, summed = set(), [site for site in scored.values() if is_summed(site)]
    if linear and summed:
        local = {f for f in plates(summed[0]) - common if f.dim != num_particles_dim}
        for site in summed:
            if plates(site) != plates(summed[0]):
                raise in_other_plates(summed[0]["name"], site["name"])
    dims, sizes = frozenset(f.dim for f in common | local), {f.dim: f.size for f in local}
    outside = frozenset(site["name"] for site in every if not local <= plates(site))
    return Plates(dims, math.prod(map(_share, common)), sizes, outside)


def plates(site: Any) -> set[Any]:
    """The plates around a site whose elements are side by side, where there are several."""
    return {f for f in site["cond_indep_stack"] if f.vectorized and f.size > 1}


def _share(frame: Any) -> float:
    return (frame.full_size or frame.size) / frame.size


def check_outside(
    model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any], summed: Collection[str], outside: Set[str]
) -> None:
    """Checks that no site outside of local plates depends on what is summed out inside, by the provenance of its numbers.

    Raises:
        UnsupportedModelError: one does.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.no_grad(), torch.random.fork_rng(devices), pyro.validation_enabled(False):
        with _Tracked(summed):
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        scored = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
        for front, trace in (("guide", drawn), ("model", scored)):
            for name, site in sample_sites(trace).items():
                if name in outside and get_provenance([site["mask"], site["scale"], site["value"], _log_prob(site)]):
                    raise depends_on_summed(name, front)


def _log_prob(site: Any) -> Any:
    try:
        return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except (KeyError, NotImplementedError):  # no inverse: but then its value is a draw, and says where it comes from
        return None


class _Tracked(Messenger):
    """Marks what sites draw; around `trace`, which sees messages after it."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = names

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._names:
            msg["value"] = track_provenance(msg["value"], frozenset({msg["name"]}))
