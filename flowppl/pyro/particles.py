"""Particles of a guide and a model: what they draw, their log densities, and the guide's with its parameters frozen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from flowppl.errors import UnsupportedModelError
from flowppl.objectives.enumeration import Assignments
from flowppl.objectives.marginal import REVERSE
from flowppl.pyro.distributions import with_scores
from flowppl.pyro.marks import Assigned, StillScored, latents, point, sample_sites


class Plates(NamedTuple):
    """Over which dimensions log-weights are kept apart."""

    dims: frozenset[int]  # of the plates that enclose every sample site, negative
    scale: float  # what their subsampling multiplies log densities by

    def total(self, log_probs: Iterable[Tensor]) -> Tensor:
        """The sum of sites' log densities, in which all plates but these have length one: `(K, *batch)`."""
        return sum(map(self._total, log_probs))

    def _total(self, log_prob: Tensor) -> Tensor:
        others = [d for d in range(1 - log_prob.dim(), 0) if d not in self.dims]
        return log_prob.sum(others, keepdim=True) if others else log_prob  # torch sums over all where it is told none


class Reweighted(torch.autograd.Function):
    """The identity, whose gradient is multiplied by the `(K, *batch)` that a list holds when the gradient arrives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ratio: list[Tensor], event_dim: int) -> Tensor:
        ctx.ratio, ctx.event_dim = ratio, event_dim
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ratio = ctx.ratio[0][(..., *(None,) * ctx.event_dim)]
        return grad * ratio.to(grad.dtype), None, None


def unscaled(site: Any) -> Tensor:
    """The log density of a site without the scale of plates, masked."""
    return scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])


def common_plates(traces: Iterable[Trace], num_particles_dim: int, linear: bool, apart: bool) -> Plates:
    """The plates, beside that of the particles, that enclose every sample site.

    Args:
        traces: Of the model and of the guide.
        num_particles_dim: The dimension of the particles, negative.
        linear: Whether the objective is linear in the log-weights, where it does not matter which are summed before.
        apart: Whether they are to be kept apart all the same.

    Raises:
        UnsupportedModelError: another plate subsamples, and the objective is not linear.
    """
    sites = [site for t in traces for site in sample_sites(t).values() if not site["infer"].get("_deterministic")]
    if (linear and not apart) or not sites:
        return Plates(frozenset(), 1.0)
    stacks = [{f for f in site["cond_indep_stack"] if f.dim != num_particles_dim} for site in sites]
    common = {f for f in set.intersection(*stacks) if f.vectorized}
    for frame in set.union(*stacks) - common:
        if _share(frame) != 1 and not linear:
            raise UnsupportedModelError(
                f"plate {frame.name!r} subsamples and does not enclose every sample site of the model and the guide, so that "
                'its log-weights cannot be scaled up: use the objective "elbo", or all of the data'
            )
    return Plates(frozenset(f.dim for f in common), math.prod(map(_share, common)))


def _share(frame: Any) -> float:
    return (frame.full_size or frame.size) / frame.size


def replayed(trace: Trace, change: Callable[[Any, Tensor], Tensor]) -> Trace:
    """A copy of a trace to replay against, in which what was drawn is changed: `change(site, value)`."""
    new = trace.copy()
    for name, site in latents(trace).items():
        new.nodes[name] = {**site, "value": change(site, site["value"])}
    return new


def draw(guide: Callable, args: tuple, kwargs: dict[str, Any], *, scores: bool) -> list[Trace]:
    """Runs a guide, once for each assignment of values to sites that are summed out, with the same noise for other sites.

    Raises:
        ValueError: a site is marked for what there is not.
        UnsupportedModelError: the guide is a messenger, or a site cannot be what it is marked for.
    """
    if isinstance(poutine.unwrap(guide), poutine.messenger.Messenger):
        raise UnsupportedModelError("a guide that is a messenger cannot be run without its model: use a plain guide")
    assignments = Assignments()

    def one(number: int) -> Trace:
        with with_scores() if scores else nullcontext(), StillScored(), Assigned(assignments, number):
            return poutine.trace(guide).get_trace(*args, **kwargs)

    first = one(0)
    if len(assignments) == 1:
        return [first]
    noise, runs = _noise(), []  # the first run made sites known, and may have drawn what parameters start from
    for number in range(len(assignments)):
        _set_noise(noise)
        runs.append(one(number))
    return runs


def _noise() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_noise(noise: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(noise[0])
    if noise[1]:
        torch.cuda.set_rng_state_all(noise[1])


def has_reverse(trace: Trace) -> bool:
    """Whether a guide has marginal parts, with reverse programs."""
    return any(REVERSE in site["infer"] for site in sample_sites(trace).values())


def log_reverse(
    guide: Callable, args: tuple, kwargs: dict[str, Any], trace: Trace
) -> tuple[list[Tensor], list[Tensor]]:
    """Log densities of reverse programs at what a guide drew, as functions of parameters alone; see `densities`."""
    still = replayed(trace, lambda _, value: value.detach())
    again = poutine.trace(poutine.replay(guide, trace=still)).get_trace(*args, **kwargs)
    sites = [site for site in sample_sites(again).values() if REVERSE in site["infer"]]
    of = [(site["infer"][REVERSE], site["scale"]) for site in sites]
    return [scale_and_mask(d.reverse, s) for d, s in of], [scale_and_mask(d.others, s) for d, s in of]


def beside(of: Sequence[Tensor], dim: int) -> Tensor:
    """What branches have at this dimension, that of particles, `K` each: `K * M`, the branches of a particle beside one another."""
    if len(of) == 1:
        return of[0]
    dim = dim % of[0].dim()
    return torch.stack([*of], dim + 1).flatten(dim, dim + 1)


def leaves_of(*outputs: Tensor) -> list[Tensor]:
    """The leaf tensors that derivatives of these outputs reach."""
    stack, seen, found = [out.grad_fn for out in outputs if out.grad_fn is not None], set(), []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return found


def registered(trace: Trace) -> list[Tensor]:
    """The parameters that a run met, unconstrained."""
    return [site["value"].unconstrained() for site in trace.nodes.values() if site["type"] == "param"]


def unregistered(trace: Trace) -> list[Tensor]:
    """What else a guide's draws and log densities depend on, such as the weights of a network that Pyro does not know."""
    known = set(map(id, registered(trace)))
    sites = sample_sites(trace).values()
    found = leaves_of(*(site["log_prob"] for site in sites), *(site["value"] for site in sites))
    return [leaf for leaf in found if id(leaf) not in known]


@contextmanager
def frozen(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Inside, nothing has derivatives with respect to these leaf tensors."""
    mine = [leaf for leaf in leaves if leaf.is_leaf and leaf.requires_grad]
    try:
        for leaf in mine:
            leaf.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*was not registered in the param store")
            yield
    finally:
        for leaf in mine:
            leaf.requires_grad_(True)


def frozen_log_q(
    guide: Callable, args: tuple, kwargs: dict[str, Any], trace: Trace, leaves: Iterable[Tensor]
) -> list[Tensor]:
    """Log densities of what a guide drew, by site, as functions of the drawn values alone: the guide's parameters are frozen.

    Args:
        guide: The guide.
        args: Its arguments.
        kwargs: Its keyword arguments.
        trace: Of its run, one of `draw(..., scores=True)`.
        leaves: Its parameters.

    Raises:
        UnsupportedModelError: a site's distribution cannot score a value.
    """
    samples = {k: site["fn"].drawn(site["value"]) for k, site in latents(trace).items() if hasattr(site["fn"], "drawn")}
    # Another tensor of the same value: transforms would find the drawn one in their caches, and not be frozen.
    views = replayed(trace, lambda _, value: value.view_as(value))
    log_probs = []
    with frozen(leaves):
        again = poutine.trace(poutine.replay(guide, trace=views)).get_trace(*args, **kwargs)
        for name, site in sample_sites(again).items():
            fn, value = site["fn"], site["value"]
            try:
                if samples.get(name) is not None:
                    log_prob = fn.path_log_prob(value, samples[name])
                else:
                    log_prob = fn.log_prob(value, *site["args"], **site["kwargs"])
            except (KeyError, NotImplementedError) as error:
                raise UnsupportedModelError(
                    f"site {name!r} of the guide has the distribution {type(fn).__name__}, which cannot score a value (it has "
                    'no inverse), as path gradients need: use gradient="reparam", or a flow of flowppl'
                ) from error
            log_probs.append(scale_and_mask(log_prob, site["scale"], site["mask"]))
    return log_probs


def check_densities(guide: Callable, args: tuple, kwargs: dict[str, Any], trace: Trace, scale: float | None) -> None:
    """Checks that parameters move a guide's draws through densities alone, which count once: else path gradients are wrong.

    Args:
        guide: The guide.
        args: Its arguments.
        kwargs: Its keyword arguments.
        trace: Of its run.
        scale: What multiplies its log densities because plates subsample; None if the objective is linear in the log-weights, where
            other scales, and points without a density, do no harm.

    Raises:
        UnsupportedModelError: a `Delta` site moves with parameters, or a site has another scale.
    """
    values = replayed(trace, lambda _, value: value.detach())
    again = poutine.trace(poutine.replay(guide, trace=values)).get_trace(*args, **kwargs)
    for name, site in latents(again).items():
        at = point(site["fn"])
        if at is not None and (at.log_density.requires_grad or (at.v.requires_grad and scale is not None)):
            raise UnsupportedModelError(
                f"site {name!r} of the guide is a Delta that the guide's parameters move, for which there is no path gradient "
                'of this objective: use gradient="reparam"'
            )
        if scale is not None and not _equal(site["scale"], scale):
            raise UnsupportedModelError(
                f"site {name!r} of the guide has its log density scaled (by poutine.scale), for which there is no path gradient "
                'of this objective: use gradient="reparam", or the objective "elbo"'
            )


def _equal(scale: Any, expected: float) -> bool:
    return bool((torch.as_tensor(scale, dtype=torch.float64) / expected - 1).abs().max() < 1e-6)
