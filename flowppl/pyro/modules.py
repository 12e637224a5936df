"""A flow's arrays as torch parameters, and as parameters of a Pyro model."""

from __future__ import annotations

import functools
from typing import Any

import pyro
import torch
from pyro.params import param_with_module_name
from torch import Tensor, nn

from flowppl import tree
from flowppl.errors import DimensionError
from flowppl.flows import Flow, Recipe
from flowppl.flows.registry import resolve
from flowppl.pyro.distributions import FlowDistribution

_SEPARATOR = "/"  # torch allows no dots in the names of parameters


class FlowParameters(nn.Module):
    """Holds a flow's arrays: trained ones as parameters, constant ones as buffers.

    Optimizers, `state_dict`, `.to(device)` and `.to(dtype)` work as for any module.

    Args:
        variables: What `flow.init` returned.

    Example:
        >>> import torch
        >>> from flowppl import flows
        >>> holder = FlowParameters(flows.affine()(dim=2).init(torch.Generator()))
        >>> [name for name, _ in holder.named_parameters()]
        ['params/bijection/bias', 'params/bijection/lu']
    """

    def __init__(self, variables: dict[str, Any]) -> None:
        super().__init__()
        self._template = tree.map(lambda _: 0, variables)
        for path, leaf in _named(variables).items():
            if _trains(path, leaf):
                self.register_parameter(path, nn.Parameter(leaf.detach().clone()))
            else:
                self.register_buffer(path, leaf.detach().clone())

    @property
    def variables(self) -> dict[str, Any]:
        """The tree that a flow's methods take, of the tensors as they are now."""
        return tree.unflatten(self._template, [getattr(self, path) for path in _named(self._template)])


def flow_module(
    name: str,
    flow: str | Recipe | Flow,
    context: Tensor | None = None,
    *,
    dim: int | None = None,
    gradient: str = "reparam",
) -> FlowDistribution:
    """Registers a learnable flow in a model or guide, and returns its distribution.

    The arrays are parameters `name$$$...` of the param store: drawn at the first call (`pyro.set_rng_seed` decides),
    saved and loaded with the store, and the same at every later call.

    Args:
        name: Name of the flow, unique in the model and guide.
        flow: A flow, or a registered name or a recipe together with `dim`.
        context: `(*batch_shape, context_dim)`, for a conditional flow.
        dim: Length of the vectors, for a name or a recipe.
        gradient: See `FlowDistribution`.

    Raises:
        TypeError: `dim` is missing for a flow given by name or recipe.
        DimensionError: `dim` or the context does not fit the flow, or the store holds another flow of this name.
        UnknownFlowError: no flow is registered under this name.

    Example:
        >>> import pyro, torch
        >>> from flowppl.pyro import flow_module
        >>> def guide():
        ...     return pyro.sample("x", flow_module("q", "nsf", dim=2))
        >>> guide().shape
        torch.Size([2])
    """
    built = resolve(flow, dim, context)
    shapes = template(built)
    # Drawn at most once, and only if the store lacks a leaf: a later call leaves the random numbers alone.
    initial = functools.cache(lambda: _named(built.init(None, torch.empty(0) if context is None else context)))

    def leaf(path: str, like: Tensor) -> Tensor:
        full_name = param_with_module_name(name, path)
        value = pyro.param(full_name, lambda: _stored(initial()[path]))
        if value.shape != like.shape:
            raise DimensionError(
                f"flow_module({name!r}, ...): the param store holds {full_name} of shape {tuple(value.shape)}, and "
                f"this flow needs {tuple(like.shape)}: give it another name, or call pyro.clear_param_store() first"
            )
        return value if like.is_floating_point() else value.detach().to(like.dtype)

    variables = tree.unflatten(shapes, [leaf(path, like) for path, like in _named(shapes).items()])
    return FlowDistribution(built, variables, context, gradient=gradient)


def _named(variables: dict[str, Any]) -> dict[str, Any]:
    return {path.replace(".", _SEPARATOR): leaf for path, leaf in tree.paths(variables).items()}


def _trains(path: str, leaf: Tensor) -> bool:
    return path.split(_SEPARATOR)[0] == "params" and leaf.is_floating_point()


def _stored(leaf: Tensor) -> Tensor:
    """The param store takes floating arrays only; a double holds any index exactly."""
    return leaf.detach().clone() if leaf.is_floating_point() else leaf.double()


@functools.lru_cache(maxsize=256)
def template(flow: Flow) -> dict[str, Any]:
    """Shapes and dtypes of a flow's arrays, without touching the global random numbers."""
    with torch.device("cpu"):
        return tree.map(lambda leaf: leaf.to("meta"), flow.init(torch.Generator()))
