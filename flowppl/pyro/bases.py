"""The base density of a flow as a Pyro distribution."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from flowppl.flows import Base


class FlowBase(TorchDistribution):
    """The base density of a flow as a distribution of vectors.

    Args:
        base: The density.
        dim: Length of the vectors.
        like: A tensor whose dtype and device the draws get; None for torch's defaults.

    Example:
        >>> from flowppl.flows import Normal
        >>> FlowBase(Normal(), 3).expand([7]).sample().shape
        torch.Size([7, 3])
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, base: Base, dim: int, like: Tensor | None = None) -> None:
        self.base = base
        self._like = torch.empty(0) if like is None else like.detach().new_empty(0)
        super().__init__(torch.Size(), torch.Size([dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowBase:
        """The same density, independent over `batch_shape`."""
        new = self._get_checked_instance(FlowBase, _instance)
        new.base, new._like = self.base, self._like
        Distribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws `(*sample_shape, *batch_shape, dim)`."""
        return self.base.sample(None, (*sample_shape, *self.batch_shape, *self.event_shape), self._like)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of vectors."""
        log_prob = self.base.log_prob(value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))
