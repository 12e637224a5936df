"""marginal: a guide with auxiliary latents, which a reverse program integrates out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.numpy as jnp
import numpyro
from numpyro.distributions import Delta, Unit
from numpyro.handlers import block, replay, seed, trace
from numpyro.primitives import Messenger

from flowppl.numpyro.marks import Trace, innermost, latents, sampled
from flowppl.objectives.marginal import REVERSE, check_kept, check_reverse, densities, subsampled, without_density

Array = Any


def marginal(guide: Callable, keep: Sequence[str], reverse: Callable, num_particles: int = 1) -> Callable:
    """A guide for some of a guide's sites, in which its other sites are auxiliary latents.

    The guide draws x and u; what is a guide for x is its marginal, the integral of q(x, u) over u, which can be anything. Its
    density is estimated with a program that draws u given x, and learns to do so as the guide learns:
    log q(x) is replaced by log 1/M sum_m q(x, u_m) / r(u_m | x), with u_1 the one that x came from, and others from the reverse
    program. That makes of the ELBO a lower bound to it, which is tight where r is q(u | x), or M large. For `Objective` with any
    program and gradient; path gradients have no variance where q(x) is the posterior and the reverse program exact. Losses of
    NumPyro's own have the same values, and plain gradients. Sites of guide and reverse program can be discrete, and marked as for
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
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import SVI
        >>> from flowppl.numpyro import Objective, marginal
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x * x, 0.3), obs=1.0)
        >>> def guide():
        ...     u = numpyro.sample("u", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("x", dist.Normal(numpyro.param("a", 0.5) * u, 0.3))
        >>> def reverse(kept):
        ...     numpyro.sample("u", dist.Normal(numpyro.param("b", 0.5) * kept["x"], 1.0))
        >>> svi = SVI(
        ...     model, marginal(guide, ["x"], reverse, 5), numpyro.optim.Adam(1e-2), Objective("iwae", num_particles=4)
        ... )
        >>> svi.run(jax.random.key(0), 10, progress_bar=False).losses.shape
        (10,)
    """
    if num_particles < 1:
        raise ValueError(f"num_particles must be positive, got {num_particles}")

    def kept(*args: Any, **kwargs: Any) -> Any:
        own = _Own(keep)
        with own:
            tracer = trace(guide)
            out = tracer(*args, **kwargs)
        drawn = tracer.trace
        check_kept(keep, [*latents(drawn)])
        values = {name: drawn[name]["value"] for name in keep}
        plates = {name: site for name, site in drawn.items() if site["type"] == "plate"}
        auxiliary = {name: site for name, site in latents(drawn).items() if name not in keep}

        first = _hidden(replay(reverse, {**plates, **auxiliary}), values, *args, **kwargs)
        check_reverse([*auxiliary], [*latents(first)])
        for site in (*latents(drawn).values(), *latents(first).values()):
            if isinstance(innermost(site["fn"]), Delta):
                raise without_density(site["name"])
        shared = _Shared(own.stacks, drawn, first)

        joint, backward = [drawn], [first]
        for m in range(2, num_particles + 1):
            with block(hide_fn=lambda site: site["type"] in ("plate", "deterministic")), _Own((), f"/{m}"):
                found = trace(replay(reverse, plates)).get_trace(values, *args, **kwargs)
            backward.append({name.removesuffix(f"/{m}"): site for name, site in found.items()})
            joint.append(_hidden(replay(guide, {**drawn, **latents(backward[-1])}), *args, **kwargs))
        found = densities(*([shared.total(run) for run in each] for each in (joint, backward)))
        fn = Unit(found.excess)
        with shared:
            numpyro.sample(f"{keep[0]}/marginal", fn, obs=fn.sample(None), infer={"is_auxiliary": True, REVERSE: found})
        return out

    return kept


class _Own(Messenger):
    """Marks and renames auxiliary sites, and knows the plates of sites that are inside of it: those outside come later."""

    def __init__(self, keep: Collection[str], suffix: str = "") -> None:
        super().__init__()
        self._keep, self._suffix = keep, suffix
        self.stacks: list[set[Any]] = []

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample":
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
        stacks = [*stacks, *(set(site["cond_indep_stack"]) for site in sampled(first).values())]
        self._frames, self._scale = set.intersection(*stacks), 1.0
        for frame in set.union(*stacks):
            share = {**first, **drawn}[frame.name]["args"][0] / frame.size
            if frame in self._frames:
                self._scale *= share
            elif share != 1:
                raise subsampled(frame.name)
        outside = {frame for site in sampled(drawn).values() for frame in site["cond_indep_stack"]} - set.union(*stacks)
        self._dims = {frame.dim for frame in self._frames | outside}

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample":
            msg["cond_indep_stack"], msg["scale"] = [*self._frames], self._scale

    def total(self, found: Trace) -> Array:
        """The log density of a run, in which all other dimensions have length one."""

        def total(log_prob: Array) -> Array:
            axes = tuple(d for d in range(-log_prob.ndim, 0) if d not in self._dims)
            return jnp.sum(log_prob, axis=axes, keepdims=True)

        return sum(total(site["fn"].log_prob(site["value"])) for site in sampled(found).values())


def _hidden(fn: Callable, *args: Any, **kwargs: Any) -> Trace:
    """A run of which only parameters are seen outside."""
    with block(hide_fn=lambda site: site["type"] in ("sample", "plate", "deterministic")):
        return trace(seed(fn, 0, hide_types=["prng_key", "control_flow"])).get_trace(*args, **kwargs)
