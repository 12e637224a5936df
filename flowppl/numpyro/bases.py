"""The base density of a flow as a NumPyro distribution."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.util import validate_sample

from flowppl.bijections import bind
from flowppl.flows import Flow
from flowppl.flows.flow import exemplar, part_of

Array = Any


class FlowBase(Distribution):
    """The base density of a flow as a distribution of vectors; NeuTra samples it.

    Args:
        flow: The flow.
        variables: What `flow.init` returned, trained or not.
        batch_shape: Independent copies.

    Example:
        >>> import jax
        >>> from flowppl import flows
        >>> flow = flows.affine()(dim=3)
        >>> FlowBase(flow, flow.init(jax.random.key(0))).expand([7]).sample(jax.random.key(1)).shape
        (7, 3)
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True
    pytree_data_fields = ("variables",)
    pytree_aux_fields = ("base", "_dtype")

    def __init__(self, flow: Flow, variables: dict[str, Any], batch_shape: tuple[int, ...] = ()) -> None:
        self.base, self.variables = flow.base, part_of(variables, "base")
        like = exemplar(variables)
        self._dtype = str(jnp.zeros(()).dtype if like is None else like.dtype)
        super().__init__(tuple(batch_shape), (flow.dim,))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws `(*sample_shape, *batch_shape, dim)`."""
        shape = (*sample_shape, *self.shape())
        return self.base.sample(key, bind(self.variables), shape, jnp.zeros((), self._dtype))

    rsample = sample

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        """Log density of vectors."""
        return self.base.log_prob(bind(self.variables), value)
