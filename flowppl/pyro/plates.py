"""Plates: latents in one and beside it, the sizes that a model asks for, and plates that have all of their data."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from flowppl.errors import UnsupportedModelError
from flowppl.plates import differs
from flowppl.pyro.sites import Layout, is_angle


class Part(NamedTuple):
    """The global latents, or the local ones of one element: where each site lives, and how it comes to its support."""

    sites: dict[str, Any]
    layout: Layout
    bijections: dict[str, Any]

    @property
    def angles(self) -> list[bool]:
        """Whether each site is one of angles."""
        return [is_angle(self.sites[name]["fn"]) for name in self.layout.names]

    def constrain(self, free: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Values and log-determinants, which have the batch of the values, by site, from unconstrained values."""
        values = {}
        for name, u in free.items():
            x = self.bijections[name](u)
            term = self.bijections[name].log_abs_det_jacobian(u, x)
            values[name] = x, sum_rightmost(term, term.dim() - x.dim() + self.sites[name]["fn"].event_dim)
        return values


def bijection_of_one(site: Any, dim: int) -> Any:
    """The bijection onto the support that a site has in each element of the plate at `dim`.

    Raises:
        UnsupportedModelError: elements differ.
    """
    support = site["fn"].support
    of_all, of_one = biject_to(support), biject_to(_of_one(support, dim - site["fn"].event_dim))
    u = of_all.inv(site["value"])
    if not torch.allclose(of_all(u), of_one(u), rtol=1e-4, equal_nan=True):
        raise differs(site["name"])
    return of_one


def _of_one(constraint: Any, axis: int) -> Any:
    """A constraint with the first entry of every bound along an axis: torch expands the bounds of what is in a plate."""
    if isinstance(constraint, Tensor):
        return constraint.narrow(axis, 0, 1) if constraint.dim() >= -axis else constraint
    if not isinstance(constraint, Constraint):
        return constraint
    new = copy.copy(constraint)
    vars(new).update({name: _of_one(part, axis) for name, part in vars(constraint).items()})
    return new


class _Opened(Exception):
    """Ends a run of a model at a plate."""


class _StopAt(Messenger):
    """Reads off a plate's full size, how much of it is asked for and, where given, which elements."""

    opened: tuple[int, int | None, Any] | None = None

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.plate = plate

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.plate and site_is_subsample(msg):
            self.opened = msg["fn"].size, msg["fn"].subsample_size, msg["value"]
            raise _Opened


def plate_sizes(model: Callable, plate: str, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int | None, Any]:
    """The full size of a plate, how much of it the model asks for and, where it says so, which elements, given its arguments.

    The model runs up to the plate.

    Raises:
        UnsupportedModelError: it opens no such plate.
    """
    stop = _StopAt(plate)
    with contextlib.suppress(_Opened), torch.no_grad(), poutine.block(), stop:
        model(*args, **kwargs)
    if stop.opened is None:
        raise UnsupportedModelError(f"plate: with these arguments the model opens no plate {plate!r}")
    return stop.opened


@contextlib.contextmanager
def chosen(indices: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, tuple[int, int]]]:
    """Chooses what plates that would subsample have inside the context, in whatever model: all of their data, or what is given.

    Pyro compares what a handler gives to a plate with how much of it was asked for, so that no handler could make it full.

    Args:
        indices: By the names of the plates, as many as they ask for; None for all.

    Yields:
        Full sizes and subsample sizes by name, of plates as they open.
    """
    found: dict[str, tuple[int, int]] = {}
    before = SubsampleMessenger._subsample

    def choose(
        name: str, size: Any = None, subsample_size: Any = None, subsample: Any = None, *rest: Any
    ) -> tuple[int, int, Any]:
        if size is not None and subsample is None and subsample_size is not None and subsample_size < size:
            found[name] = size, subsample_size
            if indices is None:
                subsample_size = size
            else:
                subsample = indices.get(name)
        return before(name, size, subsample_size, subsample, *rest)

    SubsampleMessenger._subsample = staticmethod(choose)
    try:
        yield found
    finally:
        SubsampleMessenger._subsample = staticmethod(before)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, plates and enumerated sites have all dimensions to themselves, though the run is one inside of another's plates."""
    plates, enumerated = runtime._DIM_ALLOCATOR, vars(runtime._ENUM_ALLOCATOR)
    stack, state = plates._stack, dict(enumerated)
    plates._stack = []
    try:
        yield
    finally:
        plates._stack = stack
        enumerated.clear()
        enumerated.update(state)
