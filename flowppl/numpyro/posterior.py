"""`fit`: from a model and its data to a posterior, in one call."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import init_to_median

from flowppl.fitting import Fit, fit_flow, sampler, shown
from flowppl.flows import Flow, Recipe, files
from flowppl.numpyro.files import restore
from flowppl.numpyro.guides import AutoFlow
from flowppl.numpyro.model_posterior import ModelPosterior, View
from flowppl.numpyro.modules import as_params
from flowppl.optim import Optimizer
from flowppl.training import Options

Array = Any


def fit(
    model: Callable,
    *args: Any,
    flow: str | Recipe | Flow | None = None,
    seed: int = 0,
    start: Posterior | None = None,
    restarts: int = 0,
    num_samples: int = 10_000,
    num_particles: int = 128,
    max_steps: int = 8000,
    learning_rate: float = 5e-3,
    optimizer: Optimizer | Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    init_loc_fn: Callable = init_to_median,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Posterior:
    """Fits a flow to the posterior of a model: preconditioned, trained until it gets no better, weighted and judged.

    It computes in float64 where the model allows it. A result that is not to be trusted comes with a `FitWarning`.

    Where a plate subsamples, each step of the training sees one fresh minibatch, shared by all particles. The start, the weights
    and all that is made of them take all of the data, a few draws at a time. What follows the training otherwise is left
    out: its divergences are not linear in the log density, so minibatches would bias them.

    Args:
        model: The model; discrete latents marked for enumeration are summed out.
        args: Its positional arguments.
        flow: See `AutoFlow`; None for splines, or for a normal in more than 300 dimensions.
        seed: Of everything.
        start: A fit of the same model to other data, to start from where that is better than a fresh start.
        restarts: More runs, from other seeds: the best by its ELBO is kept, and all must agree.
        num_samples: Number of weighted draws.
        num_particles: Draws in each step.
        max_steps: The most steps, before up to 2000 for what draws of the flow do not show; it stops by itself.
        learning_rate: Step size at the start, which falls by itself.
        optimizer: Another optimizer than Adam: an optax `GradientTransformation`, or one of `flowppl.optim`.
        checkpoint: A file that keeps the state: a fit that was interrupted goes on from it, and ends alike.
        init_loc_fn: How each site starts.
        progress_bar: Whether to show how it goes.
        kwargs: The model's keyword arguments.

    Raises:
        UnsupportedModelError: the model has latents that a flow cannot cover; or a plate subsamples, and has latents in it (see
            `AmortizedFlow`) or fails without subsampling.
        NonFiniteError: its log density is finite at no start.
        CheckpointError: the checkpoint is of another fit.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from flowppl.numpyro import fit
        >>> def model(y):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> posterior = fit(model, jnp.array(2.0), flow="affine", max_steps=200, progress_bar=False)
        >>> round(float(posterior.mean()["mean"]), 1)
        2.0
    """
    options = Options(num_particles, max_steps, learning_rate, optimizer)
    view = View(model, args, kwargs, flow, init_loc_fn)
    with view.precise.context(), shown(options, progress_bar) as progress:
        warm = None if start is None else jax.tree.map(jnp.asarray, start.variables)
        found = fit_flow(
            view.problem,
            seed,
            options,
            restarts=restarts,
            num_samples=num_samples,
            warm=warm,
            checkpoint=None if checkpoint is None else os.fspath(checkpoint),
            progress=progress,
        )
    posterior = Posterior(view, found)
    posterior.warn()
    return posterior


class Posterior(ModelPosterior):
    """A fitted posterior: weighted draws, the guide, and what can be asked of them. Made by `fit`.

    Attributes:
        guide: The `AutoFlow`, for `Predictive`, `NeuTraReparam` and the like.
        params: Its parameters.
        variables: Those of the flow alone.
    """

    def __init__(self, view: View, fit: Fit) -> None:
        super().__init__(view, fit)
        self.guide, self.variables = view.guide, jax.tree.map(np.asarray, fit.variables)

    @property
    def params(self) -> dict[str, Any]:
        """The guide's parameters, in jax's precision of the moment."""
        return as_params(self.guide._flow_name, jax.tree.map(jnp.asarray, self.variables))

    def log_prob(self, values: dict[str, Array]) -> Array:
        """Log density of the flow at constrained values: `(*batch, *shape)` by site to `(*batch,)`."""
        with self._view.precise.context():
            return np.asarray(self.guide.log_prob(self.params, values))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the flow; draws and weights are made anew by `load`."""
        files.write(path, self.guide._flow, self.variables, {"sites": self.guide._site_sizes})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: Callable, *args: Any, num_samples: int = 10_000, **kwargs: Any
    ) -> Posterior:
        """Loads what `save` wrote, in either front: the model and its data are needed again.

        Args:
            path: The file.
            model: The model.
            args: Its arguments.
            num_samples: Number of weighted draws.
            kwargs: Its keyword arguments.

        Raises:
            FlowFileError: the file is not whole, or does not fit the model's sites.
        """
        guide, _ = AutoFlow.load(path, model, *args, **kwargs)  # what does not fit is an error there
        _, arrays, _ = files.read(path)
        flow = guide._flow
        view = View(model, args, kwargs, flow, init_to_median)
        with view.precise.context():
            variables = restore(flow, arrays, view.problem.like)
            draws = sampler(view.problem)(variables, 0, num_samples)
        return cls(view, Fit(variables, draws, [], [], None))
