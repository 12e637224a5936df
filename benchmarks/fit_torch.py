"""Maximum likelihood with torch: flowppl and zuko."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.tabular import BINS, HIDDEN, LAYERS, Adam, our_flow


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class Fit:
    """A flow in training: `epoch` takes steps of Adam, `log_prob` scores rows."""

    def __init__(self, log_prob: Callable[[Tensor], Tensor], params: Sequence[Tensor], adam: Adam) -> None:
        self._log_prob, self._adam = log_prob, torch.optim.Adam(params, lr=adam.rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._adam, lambda step: _cosine(step / adam.steps))
        self.params = sum(p.numel() for p in params)

    def epoch(self, batches: np.ndarray) -> None:
        """A step for each of `(steps, batch, dim)`."""
        for x in torch.as_tensor(batches):
            self._adam.zero_grad()
            (-self._log_prob(x).mean()).backward()
            self._adam.step()
            self._schedule.step()

    @torch.no_grad()
    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """Log density of each row."""
        return self._log_prob(torch.as_tensor(x)).numpy()


def flowppl(architecture: str, dim: int, seed: int, adam: Adam) -> Fit:
    from flowppl import tree

    flow = our_flow(architecture, dim)
    variables = flow.init(torch.Generator().manual_seed(seed))
    params = tree.map(lambda p: p.requires_grad_(), variables["params"])
    return Fit(lambda x: flow.log_prob({**variables, "params": params}, x), tree.leaves(params), adam)


def zuko(architecture: str, dim: int, seed: int, adam: Adam) -> Fit:
    from zuko.flows import MAF, NSF

    torch.manual_seed(seed)
    shape = {"transforms": LAYERS, "hidden_features": HIDDEN}
    if architecture == "maf":
        flow = MAF(dim, 0, **shape)
    else:
        flow = NSF(dim, 0, bins=BINS, passes=2 if architecture == "nsf" else None, **shape)
    return Fit(lambda x: flow().log_prob(x), list(flow.parameters()), adam)


PROGRAMS = {"flowppl-torch": flowppl, "zuko": zuko}
