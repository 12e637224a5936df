"""Particles of a guide and a model: what they draw, their log densities, and the guide's with its parameters frozen."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

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
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Log densities of reverse programs at what a guide drew, as functions of parameters alone; see `densities`."""
    still = replayed(trace, lambda _, value: value.detach())
    again = poutine.trace(poutine.replay(guide, trace=still)).get_trace(*args, **kwargs)
    sites = {name: site for name, site in sample_sites(again).items() if REVERSE in site["infer"]}
    of = {name: (site["infer"][REVERSE], site["scale"]) for name, site in sites.items()}
    reverse = {name: scale_and_mask(found.reverse, scale) for name, (found, scale) in of.items()}
    return reverse, {name: scale_and_mask(found.others, scale) for name, (found, scale) in of.items()}


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
) -> dict[str, Tensor]:
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
    log_probs = {}
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
            log_probs[name] = scale_and_mask(log_prob, site["scale"], site["mask"])
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
