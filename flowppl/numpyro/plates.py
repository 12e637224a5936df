"""Plates: latents in one and beside it, the sizes that a model asks for, and plates that have all of their data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.util import sum_rightmost
from numpyro.infer.initialization import init_to_uniform
from numpyro.primitives import Messenger

from flowppl.errors import UnsupportedModelError
from flowppl.numpyro.sites import Layout, is_angle
from flowppl.plates import differs

Array = Any


class Part(NamedTuple):
    """The global latents, or the local ones of one element: where each site lives, and how it comes to its support."""

    sites: dict[str, Any]
    layout: Layout
    start: Array  # (dim,)
    bijections: dict[str, Any]

    @property
    def angles(self) -> list[bool]:
        """Whether each site is one of angles."""
        return [is_angle(self.sites[name]["fn"]) for name in self.layout.names]

    def constrain(self, u: Array) -> dict[str, tuple[Array, Array]]:
        """Values and log-determinants, which have the batch of the values, by site, from `(*batch, dim)`."""
        values = {}
        for name, free in self.layout.unpack(u).items():
            x = self.bijections[name](free)
            term = self.bijections[name].log_abs_det_jacobian(free, x)
            values[name] = x, sum_rightmost(term, jnp.ndim(term) - jnp.ndim(x) + self.sites[name]["fn"].event_dim)
        return values


def bijection_of_one(site: dict[str, Any], dim: int) -> Any:
    """The bijection onto the support that a site has in each element of the plate at `dim`.

    Raises:
        UnsupportedModelError: elements differ.
    """
    of_all, axis = biject_to(site["fn"].support), dim - site["fn"].event_dim
    of_one = jax.tree.map(lambda a: jnp.take(a, jnp.array([0]), axis) if jnp.ndim(a) >= -axis else a, of_all)
    u = of_all.inv(site["value"])
    differ = ~jnp.all(jnp.isclose(of_all(u), of_one(u), rtol=1e-4, equal_nan=True))
    if not isinstance(differ, jax.core.Tracer) and differ:
        raise differs(site["name"])
    return of_one


class _Opened(Exception):
    """Ends a run of a model at a plate."""


class _StopAt(Messenger):
    """Reads off a plate's full size and how much of it is asked for."""

    sizes: tuple[int, int | None] | None = None

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.plate = plate

    def process_message(self, msg: dict[str, Any]) -> None:
        """See NumPyro."""
        if msg["type"] == "plate" and msg["name"] == self.plate:
            self.sizes = msg["args"]
            raise _Opened


def plate_sizes(model: Callable, plate: str, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int | None]:
    """The full size of a plate and how much of it the model asks for, given its arguments; it runs up to the plate.

    Raises:
        UnsupportedModelError: it opens no such plate.
    """
    stop = _StopAt(plate)
    quiet = handlers.block(), handlers.substitute(substitute_fn=init_to_uniform), handlers.seed(rng_seed=0)
    with contextlib.suppress(_Opened), quiet[0], quiet[1], quiet[2], stop:
        model(*args, **kwargs)
    if stop.sizes is None:
        raise UnsupportedModelError(f"plate: with these arguments the model opens no plate {plate!r}")
    return stop.sizes


class FullPlates(Messenger):
    """Gives plates their full size where a model would subsample, around the model.

    Attributes:
        found: What would have subsampled: its full size, and how much of it is asked for, by name.
    """

    def __init__(self, fn: Callable | None = None) -> None:
        super().__init__(fn)
        self.found: dict[str, tuple[int, int]] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        """See NumPyro."""
        if msg["type"] == "plate" and msg["args"][1] not in (None, msg["args"][0]):
            size, _ = self.found[msg["name"]] = msg["args"]
            with jax.ensure_compile_time_eval():  # numbers, which may index numpy's arrays
                msg["args"], msg["value"] = (size, size), jnp.arange(size)
