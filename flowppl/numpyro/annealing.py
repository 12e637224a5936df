"""`anneal`: from a model and its data to weighted draws and the evidence, in one call."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer import init_to_median

from flowppl.annealing import Annealing, anneal_flow
from flowppl.fitting import Fit
from flowppl.numpyro.model_posterior import ModelPosterior, View
from flowppl.numpyro.posterior import Posterior


def anneal(
    model: Callable,
    *args: Any,
    start: Posterior | None = None,
    seed: int = 0,
    num_samples: int | None = None,
    num_steps: int = 8,
    step_ess: float = 0.95,
    checkpoint: str | os.PathLike[str] | None = None,
    init_loc_fn: Callable = init_to_median,
    progress_bar: bool = True,
    **kwargs: Any,
) -> AnnealedPosterior:
    """Draws from the posterior of a model by annealing, with weights and the evidence: sequential Monte Carlo with HMC.

    It starts from a normal approximation of the posterior, or a flow, and goes over densities base^(1 - beta) p^beta to the
    posterior. A first run finds the temperatures and step sizes; then they are fixed, and the weights are exact: their mean is an
    unbiased estimate of the evidence, however badly the kernel mixes. It computes in float64 where the model allows it.

    Args:
        model: The model; discrete latents marked for enumeration are summed out.
        args: Its positional arguments.
        start: A `Posterior` of `fit`, of the same model, whose flow to start from; None for a normal, by Pathfinder.
        seed: Of everything.
        num_samples: Number of weighted draws, made by islands of 100 to 500, which all local devices share; None for 10 000, in
            more than 300 dimensions 2000.
        num_steps: Leapfrog steps of HMC at each temperature.
        step_ess: The effective share of the particles that a step to the next temperature leaves: closer to one, more
            temperatures.
        checkpoint: A file that keeps what is done: a run that was interrupted goes on from it, and ends alike.
        init_loc_fn: How each site starts.
        progress_bar: Whether to show how it goes.
        kwargs: The model's keyword arguments.

    Raises:
        UnsupportedModelError: the model has latents that a flow cannot cover, or angles.
        ValueError: `num_samples` is not positive.
        NonFiniteError: its log density is finite at no start.
        CheckpointError: the checkpoint is of another run.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from flowppl.numpyro import anneal
        >>> def model(y):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 3.0))
        ...     numpyro.sample("y", dist.Normal(mean, 4.0), obs=y)
        >>> posterior = anneal(model, jnp.array(2.0), num_samples=1000, progress_bar=False)
        >>> abs(posterior.log_evidence[0] - dist.Normal(0.0, 5.0).log_prob(jnp.array(2.0)).item()) < 0.01
        True
    """
    view = View(model, args, kwargs, "affine" if start is None else start.guide._flow, init_loc_fn, angles=False)
    with view.precise.context():
        variables = None if start is None else jax.tree.map(jnp.asarray, start.variables)
        found = anneal_flow(
            view.problem,
            seed,
            variables=variables,
            num_samples=num_samples,
            num_steps=num_steps,
            step_ess=step_ess,
            checkpoint=None if checkpoint is None else os.fspath(checkpoint),
            progress_bar=progress_bar,
        )
    posterior = AnnealedPosterior(view, found)
    posterior.warn()
    return posterior


class AnnealedPosterior(ModelPosterior):
    """Weighted draws of an annealed posterior, and what can be asked of them. Made by `anneal`.

    Attributes:
        annealing: Temperatures, effective shares, acceptances, and the evidence of each island of particles.
    """

    def __init__(self, view: View, annealing: Annealing) -> None:
        super().__init__(view, Fit(annealing.variables, annealing.draws, [], [], annealing.start))
        self.annealing = annealing

    @property
    def log_evidence(self) -> tuple[float, float]:
        """The log of the posterior's normalising constant, log p(data), and its standard error, from the islands."""
        return self.annealing.log_evidence
