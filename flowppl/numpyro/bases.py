"""The base density of a flow as a NumPyro distribution."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.util import validate_sample

from flowppl.flows import Base

Array = Any


class FlowBase(Distribution):
    """The base density of a flow as a distribution of vectors; NeuTra samples it.

    Args:
        base: The density.
        dim: Length of the vectors.
        like: An array whose dtype the draws get; None for jax's default.
        batch_shape: Independent copies.

    Example:
        >>> import jax
        >>> from flowppl.flows import Normal
        >>> FlowBase(Normal(), 3).expand([7]).sample(jax.random.key(0)).shape
        (7, 3)
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True
    pytree_aux_fields = ("base", "_dtype")

    def __init__(self, base: Base, dim: int, like: Array | None = None, batch_shape: tuple[int, ...] = ()) -> None:
        self.base = base
        self._dtype = str(jnp.zeros(()).dtype if like is None else like.dtype)
        super().__init__(tuple(batch_shape), (dim,))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws `(*sample_shape, *batch_shape, dim)`."""
        return self.base.sample(key, (*sample_shape, *self.shape()), jnp.zeros((), self._dtype))

    rsample = sample

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        """Log density of vectors."""
        return self.base.log_prob(value)
