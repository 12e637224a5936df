"""What a model with its data is to samplers, and what their draws are to the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

from flowppl.annealing import refuse_angles
from flowppl.fitting import Fit, Problem, default_flow, in_chunks
from flowppl.pathfinder import one_turn, pathfinder
from flowppl.posterior import WeightedPosterior, coordinates
from flowppl.pyro.density import seeded
from flowppl.pyro.guides import AutoFlow
from flowppl.pyro.plates import chosen
from flowppl.pyro.precise import Precise
from flowppl.pyro.sites import is_angle

Array = np.ndarray


class ModelPosterior(WeightedPosterior):
    """Weighted draws of a model's posterior, and what can be asked of the model about them.

    Args:
        view: The model with its data.
        fit: The draws.
    """

    def __init__(self, view: View, fit: Fit) -> None:
        super().__init__(fit, view.constrain(fit.draws[0]), coordinates(view.precise.density.shapes), view.precise)
        self._view = view

    def predict(self, *args: Any, num_samples: int = 1000, seed: int = 0, **kwargs: Any) -> dict[str, Array]:
        """Draws of the sites that arguments leave open, given draws of the posterior: `(num_samples, *shape)` by site.

        Args:
            args: Arguments of the model, such as new covariates, and None for what is to be predicted.
            num_samples: How many.
            seed: Of the draws.
            kwargs: Keyword arguments.
        """
        draws = self._latent(self.resample(num_samples, seed))
        with seeded(torch.Generator().manual_seed(seed)), torch.no_grad(), chosen():
            found = Predictive(self._view.model, draws)(*args, **kwargs)
        return {name: x.cpu().numpy() for name, x in found.items()}

    def _log_likelihood(self, samples: dict[str, Array]) -> dict[str, Array]:
        draws, rows = self._latent(samples), []
        view = self._view
        for i in range(len(next(iter(draws.values())))):
            one = {k: v[i] for k, v in draws.items()}
            with torch.no_grad(), chosen(), poutine.condition(data=one), poutine.block():
                trace = poutine.trace(view.model).get_trace(*view.args, **view.kwargs)
                trace.compute_log_prob(lambda name, site: name not in draws)
            rows.append({k: s["log_prob"] for k, s in trace.nodes.items() if k not in draws and "log_prob" in s})
        return {name: np.stack([row[name].cpu().numpy() for row in rows]) for name in rows[0]}

    def _latent(self, samples: dict[str, Array]) -> dict[str, Tensor]:
        """The latent sites alone, as tensors of the model's own precision."""
        return {
            k: torch.as_tensor(samples[k]).to(self._view.guide._layout.start) for k in self._view.precise.density.names
        }


class View:
    """A model with its data as a problem for a fit, with angles or without."""

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        flow: Any,
        init_loc_fn: Callable,
        *,
        angles: bool = True,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.precise = Precise(model, args, kwargs, init_loc_fn=init_loc_fn)
        if not angles:
            sites = self.precise.density._sites
            refuse_angles(name for name in self.precise.density.names if is_angle(sites[name]["fn"]))
        dim = self.precise.density.dim
        self.guide = AutoFlow(model, default_flow(dim) if flow is None else flow, init_loc_fn=init_loc_fn)
        self.guide.setup(*args, **kwargs)
        start = self.precise.start
        at = start.double().cpu().numpy()
        turns: Array = np.repeat(self.guide._angles, self.guide._layout.sizes)
        density = one_turn(self.precise, turns, at)
        self.problem = Problem(
            self.guide._flow,
            self.precise.density.log_prob,
            lambda seed: pathfinder(density, at, seed),
            start,
            self.precise.density.minibatch if self.precise.density.plates else None,
            self.precise.density.plates,
        )

    def constrain(self, u: Array) -> dict[str, Array]:
        """Values by site, deterministic sites included, at points `(n, dim)`."""

        def part(u: Array) -> dict[str, Array]:
            found = self.precise.density.constrain(torch.as_tensor(u).to(self.precise.start))
            return {name: x.cpu().numpy() for name, x in found.items()}

        with self.precise.context(), torch.no_grad():
            return in_chunks(part, u)


def to_like(a: Any, like: Tensor) -> Tensor:
    """A tensor on the device of `like`, and of its dtype if it is one of floats."""
    a = torch.as_tensor(a)
    return a.to(like) if a.is_floating_point() else a.to(like.device)
