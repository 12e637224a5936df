"""What a model with its data is to samplers, and what their draws are to the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import Predictive, log_likelihood

from flowppl.annealing import refuse_angles
from flowppl.fitting import Fit, Problem, default_flow, in_chunks
from flowppl.numpyro.density import LogDensity
from flowppl.numpyro.guides import AutoFlow
from flowppl.numpyro.plates import FullPlates
from flowppl.numpyro.precise import Precise
from flowppl.numpyro.sites import is_angle
from flowppl.pathfinder import pathfinder
from flowppl.posterior import WeightedPosterior, coordinates

Array = Any


class ModelPosterior(WeightedPosterior):
    """Weighted draws of a model's posterior, and what can be asked of the model about them.

    Args:
        view: The model with its data.
        fit: The draws.
    """

    def __init__(self, view: View, fit: Fit) -> None:
        samples = view.constrain(fit.draws[0])
        super().__init__(fit, samples, coordinates(view.density.shapes), view.value_and_score)
        self._view = view

    def predict(self, *args: Any, num_samples: int = 1000, seed: int = 0, **kwargs: Any) -> dict[str, Array]:
        """Draws of the sites that arguments leave open, given draws of the posterior: `(num_samples, *shape)` by site.

        Args:
            args: Arguments of the model, such as new covariates, and None for what is to be predicted.
            num_samples: How many.
            seed: Of the draws.
            kwargs: Keyword arguments.
        """
        with self._view.precise.context():
            predictive = Predictive(FullPlates(self._view.model), self.resample(num_samples, seed))
            return {name: np.asarray(x) for name, x in predictive(jax.random.key(seed), *args, **kwargs).items()}

    def _log_likelihood(self, samples: dict[str, Array]) -> dict[str, Array]:
        view = self._view
        with view.precise.context():
            latent = {name: samples[name] for name in view.density.names}
            found = log_likelihood(FullPlates(view.model), latent, *view.args, **view.kwargs)
            return {name: np.asarray(x) for name, x in found.items()}


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
        density = LogDensity(model, args, kwargs, init_loc_fn=init_loc_fn)
        self.guide = AutoFlow(model, default_flow(density.dim) if flow is None else flow, init_loc_fn=init_loc_fn)
        self.guide._setup_somewhere(jax.random.key(0), args, kwargs)
        if not angles:
            refuse_angles(name for name in density.names if is_angle(self.guide.prototype_trace[name]["fn"]))
        self.density, self.precise = density, Precise(density)
        start = np.asarray(self.guide._init_latent, np.float64)
        with self.precise.context():
            like = jnp.zeros(density.dim, self.precise.dtype)
        self.problem = Problem(
            self.guide._flow,
            density.log_prob,
            lambda seed: pathfinder(self.precise, start, seed),
            like,
            density.minibatch if density.plates else None,
            density.plates,
        )

    def constrain(self, u: np.ndarray) -> dict[str, np.ndarray]:
        """Values by site, deterministic sites included, at points `(n, dim)`."""
        constrain = jax.jit(self.density.constrain)
        with self.precise.context():
            return in_chunks(lambda part: jax.tree.map(np.asarray, constrain(jnp.asarray(part))), u)

    def value_and_score(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log densities `(n,)` and gradients `(n, dim)` at points `(n, dim)`, on the host."""
        return self.precise(points, 256)
