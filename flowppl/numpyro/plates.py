"""Plates: the bijection of one element, the sizes that a model asks for, and plates that have all of their data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.initialization import init_to_uniform
from numpyro.primitives import Messenger

from flowppl.errors import UnsupportedModelError
from flowppl.plates import differs


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
