"""marginal: a guide with auxiliary latents, which a reverse program integrates out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from flowppl.objectives.marginal import REVERSE, check_kept, check_reverse, densities, subsampled, without_density
from flowppl.pyro.marks import latents, point, sample_sites


def marginal(guide: Callable, keep: Sequence[str], reverse: Callable, num_particles: int = 1) -> Callable:
    """A guide for some of a guide's sites, in which its other sites are auxiliary latents.

    The guide draws x and u; what is a guide for x is its marginal, the integral of q(x, u) over u, which can be anything. Its
    density is estimated with a program that draws u given x, and learns to do so as the guide learns:
    log q(x) is replaced by log 1/M sum_m q(x, u_m) / r(u_m | x), with u_1 the one that x came from, and others from the reverse
    program. That makes of the ELBO a lower bound to it, which is tight where r is q(u | x), or M large. For `Objective` with any
    program and gradient; path gradients have no variance where q(x) is the posterior and the reverse program exact. Losses of
    Pyro's own have the same values, and plain gradients. Sites of guide and reverse program can be discrete, and marked as for
    `Objective`. Inside of plates that all of them share densities are apart, and each element has its own estimate.

    M = 1: Ranganath, Tran & Blei 2016, "Hierarchical variational models"; M > 1: Sobolev & Vetrov 2019, "Importance weighted
    hierarchical variational inference".

    Args:
        guide: Draws x and u.
        keep: The names of x, latents of the model.
        reverse: Draws u, by the same names: `reverse(kept, *args, **kwargs)` with `kept` the values of x by name.
        num_particles: M.

    Returns:
        A guide; its sites u are marked as auxiliary, and those of the m-th draw of the reverse program, m > 1, are called `u/m`.

    Raises:
        ValueError: M is not positive.
        UnsupportedModelError: when it runs: the guide does not draw what is kept, or nothing else, the reverse program draws other
            sites than the rest, a site is a `Delta`, or a plate subsamples that does not enclose all of them.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from flowppl.pyro import Objective, marginal
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x * x, 0.3), obs=torch.tensor(1.0))
        >>> def guide():
        ...     u = pyro.sample("u", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(pyro.param("a", torch.tensor(0.5)) * u, 0.3))
        >>> def reverse(kept):
        ...     pyro.sample("u", dist.Normal(pyro.param("b", torch.tensor(0.5)) * kept["x"], 1.0))
        >>> svi = SVI(model, marginal(guide, ["x"], reverse, 5), pyro.optim.Adam({"lr": 1e-2}), Objective("iwae", 4))
        >>> losses = [svi.step() for _ in range(5)]
    """
    if num_particles < 1:
        raise ValueError(f"num_particles must be positive, got {num_particles}")

    def kept(*args: Any, **kwargs: Any) -> Any:
        own = _Own(keep)
        with own:
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        check_kept(keep, [*latents(drawn)])
        values = {name: drawn.nodes[name]["value"] for name in keep}
        auxiliary = [name for name in latents(drawn) if name not in keep]

        first = _hidden(reverse, drawn, values, *args, **kwargs)
        check_reverse(auxiliary, [*latents(first)])
        for site in (*latents(drawn).values(), *latents(first).values()):
            if point(site["fn"]) is not None:
                raise without_density(site["name"])
        shared = _Shared(own.stacks, drawn, first)

        joint, backward = [drawn], [first]
        for m in range(2, num_particles + 1):
            with poutine.block(hide_fn=_is_subsample), _Own((), f"/{m}"):
                run = poutine.trace(poutine.replay(reverse, _only(drawn, ()))).get_trace(values, *args, **kwargs)
            backward.append(run)
            other = {name: run.nodes[f"{name}/{m}"]["value"] for name in auxiliary}
            joint.append(_hidden(guide, _only(drawn, keep, **other), *args, **kwargs))
        found = densities(*([shared.total(run) for run in each] for each in (joint, backward)))
        fn = dist.Unit(found.excess, has_rsample=True)
        with shared:
            pyro.sample(f"{keep[0]}/marginal", fn, obs=fn.sample(), infer={"is_auxiliary": True, REVERSE: found})
        return drawn.nodes["_RETURN"]["value"]

    return kept


class _Own(Messenger):
    """Marks and renames auxiliary sites, and knows the plates of sites that are inside of it: those outside come later."""

    def __init__(self, keep: Collection[str], suffix: str = "") -> None:
        super().__init__()
        self._keep, self._suffix = keep, suffix
        self.stacks: list[set[Any]] = []

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            self.stacks.append(set(msg["cond_indep_stack"]))
            if not msg["is_observed"] and msg["name"] not in self._keep:
                msg["infer"] = {**msg["infer"], "is_auxiliary": True}
                msg["name"] += self._suffix


class _Shared(Messenger):
    """The plates that all sites of a guide and its reverse program share, as a context for a site.

    Args:
        stacks: Plates around sites of the guide, and inside of it.
        drawn: The guide's run.
        first: The reverse program's, which sees no plates outside.

    Raises:
        UnsupportedModelError: another plate subsamples.
    """

    def __init__(self, stacks: list[set[Any]], drawn: Trace, first: Trace) -> None:
        super().__init__()
        stacks = [*stacks, *(set(site["cond_indep_stack"]) for site in sample_sites(first).values())]
        self._frames, self._scale = set.intersection(*stacks), 1.0
        for frame in set.union(*stacks):
            share = (frame.full_size or frame.size) / frame.size
            if frame in self._frames:
                self._scale *= share
            elif share != 1:
                raise subsampled(frame.name)
        outside = {f for site in sample_sites(drawn).values() for f in site["cond_indep_stack"]} - set.union(*stacks)
        self._dims = {frame.dim for frame in self._frames | outside}

    def _pyro_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"], msg["scale"] = tuple(self._frames), self._scale

    def total(self, found: Trace) -> Tensor:
        """The log density of a run, in which all other dimensions have length one."""
        return sum(map(self._total, sample_sites(found).values()))

    def _total(self, site: Any) -> Tensor:
        log_prob = scale_and_mask(
            site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]), mask=site["mask"]
        )
        others = [d for d in range(-log_prob.dim(), 0) if d not in self._dims]
        return log_prob.sum(others, keepdim=True) if others else log_prob


def _is_subsample(site: Any) -> bool:
    return site["type"] == "sample" and site_is_subsample(site)


def _only(trace: Trace, names: Collection[str], **values: Tensor) -> Trace:
    """A copy of a run with the subsamples of plates, these sites, and others with these values."""
    new = trace.copy()
    for name, site in latents(trace).items():
        if name in values:
            new.nodes[name] = {**site, "value": values[name]}
        elif name not in names:
            new.remove_node(name)
    return new


def _hidden(fn: Callable, known: Trace, *args: Any, **kwargs: Any) -> Trace:
    """A run with known values, of which only parameters are seen outside."""
    with poutine.block(hide_fn=lambda site: site["type"] == "sample"):
        return poutine.trace(poutine.replay(fn, trace=known)).get_trace(*args, **kwargs)
