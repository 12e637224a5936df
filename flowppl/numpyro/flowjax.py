"""Flows from flowjax: a trained or untrained one becomes a flow of ours, for all that takes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from flowppl.bijections.base import Bijection, Params, broadcast
from flowppl.errors import MissingExtraError, UnsupportedFlowError
from flowppl.flows import Flow

Array = Any


@dataclass(frozen=True, eq=False)
class FlowjaxBijection(Bijection):
    """The bijection of a distribution of flowjax, which maps latents to data.

    Attributes:
        distribution: A transformed distribution; it is compared by identity, since its arrays have no hash.
        dim: Length of the vectors.
        context_dim: Length of the context, 0 for none.
    """

    distribution: Any
    dim: int
    context_dim: int = 0
    unwritable = (
        "a flow from flowjax cannot be written to a flow file, which holds no code of other libraries: save its arrays as "
        "jax's users do, for example with equinox.tree_serialise_leaves(path, params)"
    )

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, FlowjaxBijection) and self.distribution is other.distribution

    def __hash__(self) -> int:
        return id(self.distribution)

    def init(self, rng: Any) -> dict[str, Any]:
        """The distribution's arrays, so that a trained flow starts trained; `rng` is not used.

        What paramax marks as not trainable is constant, as integers and booleans are.
        """
        trained, constant, _ = self._parts
        return {
            kind: {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(part)}
            for kind, part in (("params", trained), ("const", constant))
        }

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        return self._over_batch(self._bound(params).transform_and_log_det, x, context)

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`."""
        return self._over_batch(self._bound(params).inverse_and_log_det, y, context)

    def _over_batch(self, f: Callable, x: Array, context: Array | None) -> tuple[Array, Array]:
        x, context = broadcast(x, context, self.context_dim)
        if context is None:
            return jnp.vectorize(f, signature="(d)->(d),()")(x)
        return jnp.vectorize(f, signature="(d),(c)->(d),()")(x, context)

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        """The bijection as trees of one structure: the arrays that train, those that do not, and what is no array."""
        import equinox
        from paramax import NonTrainable

        bijection = self.distribution.merge_transforms().bijection
        frozen = lambda node: isinstance(node, NonTrainable)
        trained, rest = equinox.partition(bijection, equinox.is_inexact_array, is_leaf=frozen)
        return trained, *equinox.partition(rest, equinox.is_array)

    def _bound(self, params: Params) -> Any:
        """The bijection with other arrays in the place of its own."""
        import equinox
        import paramax

        trained, constant, static = self._parts
        filled = [jax.tree_util.tree_map_with_path(lambda p, _: params[_name(p)], part) for part in (trained, constant)]
        return paramax.unwrap(equinox.combine(filled[0], equinox.combine(filled[1], static)))


def from_flowjax(distribution: Any) -> Flow:
    """Turns a distribution of flowjax into a flow that every guide, distribution, transform and module here takes.

    Its `init` gives the distribution's arrays, trained or not. Its log density and draws are flowjax's; gradients with
    respect to its arrays flow, and to the condition too, which flowjax's own bridge to NumPyro stops. What flowjax has no
    inverse for (a planar flow of tanh in one direction) cannot score points, or cannot draw; and no gradient to the
    condition goes through the numerical inverse of its block neural autoregressive flow, which raises an error.

    Args:
        distribution: A `flowjax.distributions.Transformed` of vectors, over a standard normal base or transforms of one
            (`Normal` too), whose bijection is of unbounded real vectors.

    Raises:
        TypeError: it is no transformed distribution.
        UnsupportedFlowError: its base is another, or its draws or its condition are no vectors.
        MissingExtraError: flowjax is not installed.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro
        >>> from flowjax.distributions import StandardNormal
        >>> from flowjax.flows import masked_autoregressive_flow
        >>> from numpyro.handlers import seed
        >>> from flowppl.numpyro import flow_module, from_flowjax
        >>> base = StandardNormal((2,))
        >>> flow = from_flowjax(
        ...     masked_autoregressive_flow(jax.random.key(0), base_dist=base, cond_dim=3, flow_layers=1)
        ... )
        >>> flow.dim, flow.context_dim
        (2, 3)
        >>> guide = lambda context: numpyro.sample("x", flow_module("q", flow, context))
        >>> seed(guide, 0)(jnp.zeros((5, 3))).shape
        (5, 2)
    """
    try:
        from flowjax.distributions import AbstractTransformed, StandardNormal
    except ModuleNotFoundError as error:
        raise MissingExtraError("flowjax", "flowjax") from error
    if not isinstance(distribution, AbstractTransformed):
        raise TypeError(
            "distribution: expected a flowjax.distributions.Transformed, such as those that flowjax.flows makes, got "
            f"{type(distribution).__name__}"
        )
    base = distribution.merge_transforms().base_dist
    if not isinstance(base, StandardNormal):
        raise UnsupportedFlowError(
            f"distribution: expected a base_dist that is a StandardNormal, or made of one, got a {type(base).__name__}"
        )
    shape, condition = distribution.shape, distribution.cond_shape
    if len(shape) != 1 or (condition is not None and len(condition) != 1):
        raise UnsupportedFlowError(
            f"distribution: expected vectors, got a distribution of shape {shape} and cond_shape {condition}"
        )
    return Flow(FlowjaxBijection(distribution, shape[0], 0 if condition is None else condition[0]))


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").replace(".", "/")  # a tree's keys have no dots
