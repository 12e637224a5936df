"""Which sites of a model a flow can cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.initialization import init_to_uniform

from flowppl.errors import UnsupportedModelError

Array = Any
Trace = dict[str, Any]


def is_latent(site: dict[str, Any]) -> bool:
    """Whether a site is a random variable that the data leave open."""
    return site["type"] == "sample" and not site["is_observed"]


def look(model: Callable, key: Array, args: tuple, kwargs: dict[str, Any]) -> Trace:
    """Runs the model once, at a random point of its unconstrained space."""
    somewhere = handlers.substitute(handlers.seed(model, key), substitute_fn=init_to_uniform)
    with handlers.block():
        return handlers.trace(somewhere).get_trace(*args, **kwargs)


def hide_enumerated(model: Callable, trace: Trace) -> Callable:
    """Hides discrete latents that the loss will enumerate.

    Raises:
        UnsupportedModelError: a discrete latent is not marked for enumeration.
    """
    discrete = [site for site in trace.values() if is_latent(site) and site["fn"].support.is_discrete]
    for site in discrete:
        if site["infer"].get("enumerate") != "parallel":
            raise UnsupportedModelError(
                f"site {site['name']!r} is discrete, and a flow covers continuous sites: sum it out by "
                "numpyro.sample(..., infer={'enumerate': 'parallel'}) with the loss TraceEnum_ELBO, or hide it with "
                f"handlers.block(model, hide=[{site['name']!r}]) and give it a guide of its own"
            )
    names = [site["name"] for site in discrete]
    return handlers.block(model, hide=names) if names else model


def refuse_moving_supports(here: Trace, elsewhere: Trace) -> None:
    """Compares two runs of a model at different latents.

    Raises:
        UnsupportedModelError: a support depends on other latents.
    """
    for name, site in here.items():
        if not is_latent(site):
            continue
        bijection = biject_to(site["fn"].support)
        u = bijection.inv(site["value"])
        if not jnp.allclose(biject_to(elsewhere[name]["fn"].support)(u), bijection(u), rtol=1e-3, equal_nan=True):
            raise UnsupportedModelError(
                f"the support of site {name!r} depends on other latents, and NumPyro's guides map onto a fixed one: "
                "sample a standardised variable instead, such as Uniform(0, 1), and scale it with numpyro.deterministic"
            )
