"""The base density of a flow as a Pyro distribution."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from flowppl.bijections import bind
from flowppl.flows import Flow
from flowppl.flows.flow import exemplar, part_of


class FlowBase(TorchDistribution):
    """The base density of a flow as a distribution of vectors.

    Args:
        flow: The flow.
        variables: What `flow.init` returned, trained or not.

    Example:
        >>> import torch
        >>> from flowppl import flows
        >>> flow = flows.affine()(dim=3)
        >>> FlowBase(flow, flow.init(torch.Generator())).expand([7]).sample().shape
        torch.Size([7, 3])
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, flow: Flow, variables: dict[str, Any]) -> None:
        self.base, self.variables = flow.base, part_of(variables, "base")
        like = exemplar(variables)
        self._like = torch.empty(0) if like is None else like.detach().new_empty(0)
        super().__init__(torch.Size(), torch.Size([flow.dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowBase:
        """The same density, independent over `batch_shape`."""
        new = self._get_checked_instance(FlowBase, _instance)
        new.base, new.variables, new._like = self.base, self.variables, self._like
        Distribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws `(*sample_shape, *batch_shape, dim)`."""
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        return self.base.sample(None, bind(self.variables), shape, self._like)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of vectors."""
        log_prob = self.base.log_prob(bind(self.variables), value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))
