"""Flows as a transform type and a distribution type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints

from flowppl import tree
from flowppl.bijections import Bijection, bind
from flowppl.errors import DimensionError
from flowppl.flows import Flow, Sample
from flowppl.flows.flow import part_of
from flowppl.objectives import check_gradient, path_log_prob
from flowppl.pyro.bases import FlowBase
from flowppl.pyro.memo import Memo

_SCORES: ContextVar[bool] = ContextVar("with_scores", default=False)


@contextmanager
def with_scores() -> Iterator[None]:
    """Inside, what a `FlowDistribution` draws comes with its scores, whatever its `gradient`, for `path_log_prob`."""
    token = _SCORES.set(True)
    try:
        yield
    finally:
        _SCORES.reset(token)


class FlowTransform(Transform):
    """A bijection with its arrays, as a transform of vectors for `TransformedDistribution` and all else in torch.

    A call and the `log_abs_det_jacobian` of the same two tensors cost one pass; nothing else is remembered.

    Args:
        bijection: The map; `forward` is the call.
        variables: What `bijection.init` returned, trained or not.
        context: `(*batch, context_dim)`, or None where the bijection has none.

    Raises:
        DimensionError: on use, a point or the context has another length.

    Example:
        >>> import torch
        >>> from flowppl.bijections import LULinear
        >>> transform = FlowTransform(LULinear(3), LULinear(3).init(torch.Generator()))
        >>> transform(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    bijective = True
    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, bijection: Bijection, variables: dict[str, Any], context: Tensor | None = None) -> None:
        super().__init__()
        self.bijection, self.variables, self.context = bijection, variables, context
        self._memo = Memo()

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """A copy that remembers nothing; the transform needs no cache of torch's."""
        return FlowTransform(self.bijection, self.variables, self.context)

    def clear_cache(self) -> None:
        """Forgets the last call."""
        self._memo.clear()

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the image of points of this shape: the context's batch broadcasts."""
        if tuple(shape[-1:]) != (self.bijection.dim,):
            raise DimensionError(f"expected points of shape (*batch, {self.bijection.dim}), got {tuple(shape)}")
        if self.context is None:
            return torch.Size(shape)
        return torch.broadcast_shapes(shape[:-1], self.context.shape[:-1]) + shape[-1:]

    inverse_shape = forward_shape

    def _call(self, x: Tensor) -> Tensor:
        self.forward_shape(x.shape)
        y, log_det = self.bijection.forward(bind(self.variables), x, self.context)
        self._memo.put(self._key(x, y), log_det)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        self.forward_shape(y.shape)
        x, log_det = self.bijection.inverse(bind(self.variables), y, self.context)
        self._memo.put(self._key(x, y), -log_det)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log |det dy/dx| `(*batch,)` at x."""
        log_det = self._memo.get(self._key(x, y))
        return self.bijection.forward(bind(self.variables), x, self.context)[1] if log_det is None else log_det

    def _key(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return (*tensors, *_inputs(self.variables, self.context))


class _KeepsPath:
    """`to_event` and `mask` whose results forward the score parts, which Pyro's own silently do not."""

    base_dist: Any
    batch_shape: torch.Size

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """See Pyro."""
        n = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        if isinstance(self, _IndependentFlow):
            return self.base_dist.to_event(n + self.reinterpreted_batch_ndims)
        if n < 0:
            raise ValueError(f"reinterpreted_batch_ndims is {n}: there are no event dimensions to take back")
        return _IndependentFlow(self, n) if n else self

    def mask(self, mask: Any) -> Any:
        """See Pyro."""
        return _MaskedFlow(self, mask)

    def drawn(self, value: Tensor) -> Sample | None:
        """The last draw with its scores, if it is this very tensor and was drawn `with_scores`."""
        return self.base_dist.drawn(value)

    def path_log_prob(self, value: Tensor, sample: Sample) -> Tensor:
        """The path surrogate of log q, a function of the value and the context alone.

        Args:
            value: `(*batch, dim)`, equal to the sample's draws.
            sample: What an equal distribution drew.

        Returns:
            `(*batch_shape,)`.
        """
        raise NotImplementedError


class _IndependentFlow(_KeepsPath, dist.Independent):
    def path_log_prob(self, value: Tensor, sample: Sample) -> Tensor:
        log_prob = self.base_dist.path_log_prob(value, sample)
        return log_prob.flatten(-self.reinterpreted_batch_ndims).sum(-1)

    def score_parts(self, value: Tensor) -> ScoreParts:
        n = self.reinterpreted_batch_ndims
        parts = self.base_dist.score_parts(value)
        return ScoreParts(*(p.flatten(-n).sum(-1) if isinstance(p, Tensor) else p for p in parts))


class _MaskedFlow(_KeepsPath, MaskedDistribution):
    def path_log_prob(self, value: Tensor, sample: Sample) -> Tensor:
        return scale_and_mask(self.base_dist.path_log_prob(value, sample), mask=self._mask)

    def score_parts(self, value: Tensor) -> ScoreParts:
        return self.base_dist.score_parts(value) if self._mask is True else super().score_parts(value)


class FlowDistribution(_KeepsPath, dist.TransformedDistribution):
    """A flow as a distribution of vectors, for `pyro.sample` in models and guides.

    Drawing yields log q from the same pass, so scoring the drawn tensor is free; any other value is scored by the
    inverse. `log_prob` is always the true log density. With `gradient="path"` the entropy term that Trace_ELBO,
    TraceGraph_ELBO and TraceMeanField_ELBO differentiate has the path gradient, whose variance vanishes where q is the
    posterior; other losses (RenyiELBO, ReweightedWakeSleep) do not read it and keep their plain gradients. So do the
    parameters of whatever computes the context. Roeder et al. 2017, "Sticking the landing"; Vaitl et al. 2024, "Fast
    and unified path gradient estimators".

    Args:
        flow: The flow; events have shape `(flow.dim,)`.
        variables: What `flow.init` returned, trained or not.
        context: `(*batch_shape, context_dim)`, attached to what it was computed from; None where the flow has none.
        gradient: "reparam" (the total derivative), "path", or "auto", which in Pyro's own losses is "reparam". `Objective` has
            a choice of its own, and does not look at this one.

    Raises:
        ValueError: `gradient` is none of these.
        DimensionError: the flow and the context do not fit.

    Example:
        >>> import torch
        >>> from flowppl import flows
        >>> flow = flows.nsf(layers=2)(dim=3)
        >>> q = FlowDistribution(flow, flow.init(torch.Generator(), torch.empty(0)))
        >>> x = q.rsample((10,))
        >>> x.shape, q.log_prob(x).shape
        (torch.Size([10, 3]), torch.Size([10]))
    """

    has_rsample = True

    def __init__(
        self, flow: Flow, variables: dict[str, Any], context: Tensor | None = None, *, gradient: str = "reparam"
    ) -> None:
        flow.check_context(context)
        self.flow, self.variables, self.context, self.gradient = flow, variables, context, check_gradient(gradient)
        self._memo = Memo()
        transform = FlowTransform(flow.bijection, part_of(variables, "bijection"), context)
        super().__init__(FlowBase(flow, variables), [transform])

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """The same flow over `batch_shape`, to which the context broadcasts."""
        new = self._get_checked_instance(FlowDistribution, _instance)
        batch_shape = torch.Size(batch_shape)
        context = None if self.context is None else self.context.expand(*batch_shape, -1)
        new.flow, new.variables, new.context, new.gradient = self.flow, self.variables, context, self.gradient
        new._memo, new.has_rsample = Memo(), self.has_rsample
        new.base_dist = self.base_dist.expand(batch_shape)
        new.transforms = [FlowTransform(self.flow.bijection, part_of(self.variables, "bijection"), context)]
        Distribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def clear_cache(self) -> None:
        """Forgets the last draw."""
        self._memo.clear()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws `(*sample_shape, *batch_shape, dim)`, attached to the variables and the context."""
        shape = (*sample_shape, *(() if self.context is not None else self.batch_shape))
        with_score = (self.gradient == "path" or _SCORES.get()) and torch.is_grad_enabled()
        sample = self.flow.sample(None, self.variables, shape, self.context, with_log_prob=True, with_score=with_score)
        self._memo.put(self._key(sample.x), sample)
        return sample.x

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws without derivatives."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of vectors `(*batch, dim)`, `(*batch,)`."""
        sample = self._memo.get(self._key(value))
        if sample is not None:
            return sample.log_prob
        if self._validate_args:
            self._validate_sample(value)
        log_prob = self.flow.log_prob(self.variables, value, self.context)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def score_parts(self, value: Tensor) -> ScoreParts:
        """The true log density, no score function and, of a drawn value with `gradient="path"`, the path surrogate."""
        sample = self.drawn(value)
        if self.gradient != "path" or sample is None:
            return super().score_parts(value)
        return ScoreParts(sample.log_prob, 0, path_log_prob(sample, context=self.context))

    def drawn(self, value: Tensor) -> Sample | None:
        sample = self._memo.get(self._key(value))
        return None if sample is None or sample.score is None else sample

    def path_log_prob(self, value: Tensor, sample: Sample) -> Tensor:
        return path_log_prob(sample, value, self.context)

    def _key(self, value: Tensor) -> tuple[Tensor, ...]:
        return (value, *_inputs(self.variables, self.context))


def _inputs(variables: dict[str, Any], context: Tensor | None) -> list[Tensor]:
    return tree.leaves(variables) if context is None else [*tree.leaves(variables), context]
