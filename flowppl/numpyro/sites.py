"""Which sites of a model a flow can cover, and how a flat vector becomes their values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.util import sum_rightmost
from numpyro.infer.initialization import init_to_uniform

from flowppl.errors import DimensionError, UnsupportedModelError

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


def is_angle(fn: Any) -> bool:
    """Whether the values of a distribution are angles, by its support."""
    support = fn.support
    while isinstance(support, type(constraints.independent(constraints.real, 1))):
        support = support.base_constraint
    return support is constraints.circular


class Layout:
    """Sites in the order of their names, each raveled.

    Args:
        example: One array per site, as shapes and dtype.

    Attributes:
        names: The sites.
        sizes: Their numbers of elements.
        dim: Their sum.
    """

    def __init__(self, example: dict[str, Array]) -> None:
        self.names = sorted(example)
        self.shapes = {name: tuple(jnp.shape(example[name])) for name in self.names}
        self.sizes = [math.prod(self.shapes[name]) for name in self.names]
        self.dim = sum(self.sizes)

    @property
    def description(self) -> list[list[Any]]:
        """Sites and sizes, as JSON types: what a file has to fit."""
        return [[name, size] for name, size in zip(self.names, self.sizes, strict=True)]

    def pack(self, values: dict[str, Array]) -> Array:
        """`(*batch, dim)` from arrays `(*batch, *shape)`."""
        batches = {name: jnp.shape(v)[: jnp.ndim(v) - len(self.shapes[name])] for name, v in values.items()}
        return jnp.concatenate([jnp.reshape(values[n], (*batches[n], -1)) for n in self.names], axis=-1)

    def unpack(self, vector: Array) -> dict[str, Array]:
        """Arrays `(*batch, *shape)` from `(*batch, dim)`."""
        batch, values, start = vector.shape[:-1], {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            values[name] = vector[..., start : start + size].reshape(*batch, *self.shapes[name])
            start += size
        return values

    def unconstrain(self, sites: Trace, values: dict[str, Array]) -> tuple[Array, Array]:
        """The flat vectors `(*batch, dim)` of constrained values `(*batch, *shape)`, and log |d value / d u| `(*batch,)`.

        Raises:
            DimensionError: a site is missing or has another shape.
        """
        flat, log_det = {}, 0.0
        for name in self.names:
            shape = jnp.shape(sites[name]["value"])
            value = jnp.asarray(values[name]) if name in values else None
            if value is None or value.shape[value.ndim - len(shape) :] != shape:
                got = "none" if value is None else f"shape {value.shape}"
                raise DimensionError(
                    f"values[{name!r}]: expected shape (*batch, {', '.join(map(str, shape))}), got {got}"
                )
            transform = biject_to(sites[name]["fn"].support)
            flat[name] = transform.inv(value)
            term = transform.log_abs_det_jacobian(flat[name], value)
            log_det = log_det + sum_rightmost(term, term.ndim - (value.ndim - len(shape)))
        return self.pack(flat), log_det
