"""Flows as NumPyro transforms and distributions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import ExpandedDistribution, Independent, TransformedDistribution, constraints
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import validate_sample

from flowppl.bijections import Bijection, bind
from flowppl.flows import Flow, Sample
from flowppl.flows.flow import part_of
from flowppl.numpyro.bases import FlowBase
from flowppl.objectives import check_gradient, path_log_prob

Array = Any


_asked_for: ContextVar[str | None] = ContextVar("gradient of draws", default=None)


@contextmanager
def gradient_of_draws(gradient: str) -> Iterator[None]:
    """Inside, flows draw and score their draws as if they had been made with this gradient."""
    token = _asked_for.set(gradient)
    try:
        yield
    finally:
        _asked_for.reset(token)


def flow_of(fn: Any) -> FlowDistribution | None:
    """The flow that a distribution is, expanded or turned into an event, or None."""
    while isinstance(fn, ExpandedDistribution | Independent):
        fn = fn.base_dist
    return fn if isinstance(fn, FlowDistribution) else None


class FlowTransform(Transform):
    """A bijection with its arrays as a transform of real vectors; the arrays are its pytree leaves.

    Args:
        bijection: The bijection, of dimension d.
        variables: What its `init` returned, trained or not.
        context: `(*batch, context_dim)` or None.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, bijection: Bijection, variables: dict[str, Any], context: Array | None = None) -> None:
        self.bijection = bijection
        self.variables = variables
        self.context = context

    def __call__(self, x: Array) -> Array:
        """Maps x `(*batch, d)` to y `(*batch, d)`."""
        return self.call_with_intermediates(x)[0]

    def _inverse(self, y: Array) -> Array:
        return self.bijection.inverse(bind(self.variables), y, self.context)[0]

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        """Returns y and, as the intermediate, log |det dy/dx| from the same pass."""
        return self.bijection.forward(bind(self.variables), x, self.context)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Array | None = None) -> Array:
        """log |det dy/dx| `(*batch,)`."""
        return self.call_with_intermediates(x)[1] if intermediates is None else intermediates

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of y."""
        batch = () if self.context is None else self.context.shape[:-1]
        return (*jnp.broadcast_shapes(shape[:-1], batch), shape[-1])

    inverse_shape = forward_shape

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """The arrays are children, the bijection is static."""
        return (self.variables, self.context), (("variables", "context"), {"bijection": self.bijection})

    def eq(self, other: Any, static: bool = False) -> Any:
        """Whether another transform is this one; `static` compares arrays by identity, as NumPyro's own do."""
        if not isinstance(other, FlowTransform) or self.bijection != other.bijection:
            return False
        mine, theirs = (jax.tree.leaves((t.variables, t.context)) for t in (self, other))
        if len(mine) != len(theirs):
            return False
        if static:
            return all(a is b for a, b in zip(mine, theirs, strict=True))
        return jnp.all(jnp.stack([jnp.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)]))


class FlowDistribution(TransformedDistribution):
    """The distribution of a flow: as a prior, a likelihood or a guide; any point can be scored.

    Drawing and scoring the draw is one pass. In a guide, `gradient="path"` makes the log density of a draw a surrogate
    with the same value and the path gradient (`flowppl.objectives.path_log_prob`): of lower variance near the
    posterior, and unbiased in losses that are linear in log q, such as `Trace_ELBO`. In `RenyiELBO` it is biased.
    NumPyro's masks drop what is drawn beside a value: under a mask "path" is "reparam".

    Args:
        flow: The flow, of dimension d.
        variables: What `flow.init` returned, trained or not.
        context: `(*batch, context_dim)` or None; its batch is the distribution's batch shape.
        gradient: "reparam" or "path"; "auto" leaves the choice to a loss of flowppl, and is "reparam" elsewhere.

    Raises:
        ValueError: `gradient` is none of these.
        DimensionError: the context does not fit the flow.

    Example:
        >>> import jax
        >>> from flowppl import flows
        >>> from flowppl.numpyro import FlowDistribution
        >>> flow = flows.nsf(layers=2)(dim=3)
        >>> q = FlowDistribution(flow, flow.init(jax.random.key(0)))
        >>> q.log_prob(q.sample(jax.random.key(1), (5,))).shape
        (5,)
    """

    pytree_aux_fields = ("flow", "gradient")

    def __init__(
        self,
        flow: Flow,
        variables: dict[str, Any],
        context: Array | None = None,
        *,
        gradient: str = "reparam",
        validate_args: bool | None = None,
    ) -> None:
        flow.check_context(context)
        self.flow = flow
        self.gradient = check_gradient(gradient)
        batch_shape = () if context is None else context.shape[:-1]
        super().__init__(
            FlowBase(flow, variables, batch_shape),
            FlowTransform(flow.bijection, part_of(variables, "bijection"), context),
            validate_args=validate_args,
        )

    @property
    def variables(self) -> dict[str, Any]:
        """The flow's arrays."""
        parts = {"base": self.base_dist.variables, "bijection": self.transforms[0].variables}
        return {kind: {name: part[kind] for name, part in parts.items()} for kind in ("params", "const")}

    @property
    def context(self) -> Array | None:
        """What the flow is conditioned on."""
        return self.transforms[0].context

    @property
    def _present(self) -> str:
        return _asked_for.get() or self.gradient

    def sample_with_intermediates(self, key: Array, sample_shape: tuple[int, ...] = ()) -> tuple[Array, list[Any]]:
        """Draws `(*sample_shape, *batch_shape, d)`; the intermediates are log density and scores of the same pass."""
        path = self._present == "path"
        draw = self.flow.sample(key, self.variables, sample_shape, self.context, with_log_prob=True, with_score=path)
        return draw.x, [draw[1:] if path else draw[1:2]]

    @validate_sample
    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        """Log density of any value `(*batch, d)`, `(*batch,)`; given a draw's intermediates, without another pass."""
        if not intermediates:
            return self.flow.log_prob(self.variables, value, self.context)
        if self._present == "path" and len(intermediates[0]) > 1:
            return path_log_prob(Sample(value, *intermediates[0]), value, self.context)
        return intermediates[0][0]
