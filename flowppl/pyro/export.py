"""Draws of guides and of MCMC for ArviZ."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer import MCMC, Predictive
from pyro.infer.autoguide.guides import AutoGuide
from torch import Tensor

from flowppl.diagnostics import inference_data
from flowppl.pyro.density import seeded
from flowppl.pyro.guides import AutoFlow


def to_arviz(
    source: Any,
    *args: Any,
    params: None = None,
    rng: torch.Generator | None = None,
    num_samples: int = 1000,
    **kwargs: Any,
) -> Any:
    """Exports a guide's draws or an MCMC run to ArviZ.

    Args:
        source: An `AutoFlow` or another autoguide of Pyro, or a `pyro.infer.MCMC` that has run.
        args: The model's arguments, for a guide.
        params: As in the NumPyro front; Pyro's guides hold their parameters, so None.
        rng: A `torch.Generator` for a guide's draws (None: torch's global one).
        num_samples: Number of draws from a guide, in one chain.
        kwargs: The model's keyword arguments.

    Returns:
        `InferenceData` (ArviZ 0.x) or a `DataTree` (1.x) with the groups posterior and, for MCMC, sample_stats.

    Raises:
        TypeError: the source is neither, or `params` is given.
        MissingExtraError: ArviZ is not installed.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from flowppl.pyro import AutoFlow, to_arviz
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> data = to_arviz(AutoFlow(model).setup(), num_samples=20)  # doctest: +SKIP
        >>> data.posterior["x"].shape  # doctest: +SKIP
        (1, 20)
    """
    if params is not None:
        raise TypeError("params: Pyro's guides hold their parameters, so leave it out")
    if isinstance(source, MCMC):
        return inference_data({"posterior": _host(source.get_samples(group_by_chain=True)), **_stats(source)})
    if not isinstance(source, AutoGuide):
        raise TypeError(
            f"source is {type(source).__name__}: expected an AutoFlow, another autoguide of Pyro or a pyro.infer.MCMC"
        )
    if isinstance(source, AutoFlow):
        draws = source.setup(*args, **kwargs).sample_posterior(rng, (num_samples,))
    else:
        draws = _predictive(source, rng, num_samples, args, kwargs)
    return inference_data({"posterior": _host({name: x[None] for name, x in draws.items()})})


def _predictive(guide: AutoGuide, rng: Any, num_samples: int, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Draws of a guide's sites, in their own shapes: `Predictive` adds axes for plates, and auxiliary sites."""
    with seeded(rng):
        draws = Predictive(guide, num_samples=num_samples)(*args, **kwargs)
    sites = dict(guide.prototype_trace.iter_stochastic_nodes())
    return {name: draws[name].reshape((num_samples, *site["value"].shape)) for name, site in sites.items()}


def _stats(mcmc: MCMC) -> dict[str, dict[str, Any]]:
    """Divergences, where the kernel counts them."""
    counted = mcmc.diagnostics().get("divergences")
    if not counted:
        return {}
    draws = len(next(iter(mcmc.get_samples().values()))) // len(counted)
    diverging = torch.zeros(len(counted), draws, dtype=torch.bool)
    for chain, where in enumerate(counted.values()):
        diverging[chain, list(where)] = True
    return {"sample_stats": {"diverging": diverging.numpy()}}


def _host(draws: dict[str, Tensor]) -> dict[str, Any]:
    return {name: x.detach().cpu().numpy() for name, x in draws.items()}
