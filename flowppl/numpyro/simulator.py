"""`npe`: from a model that can only be run to its posterior for any data."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.distributions import biject_to

from flowppl.errors import UnsupportedModelError
from flowppl.flows import Flow, Recipe
from flowppl.npe import Amortized, restored
from flowppl.npe_training import amortize
from flowppl.numpyro.sites import Layout, Trace, is_latent, refuse_moving_supports
from flowppl.simulations import Data, choose_sites, not_continuous

Array = Any


def npe(
    model: Callable,
    *args: Any,
    observed: str | Sequence[str],
    latents: str | Sequence[str] | None = None,
    summary: Callable[[dict[str, Array]], Array] | None = None,
    flow: str | Recipe | Flow = "nsf",
    embedding: int = 16,
    hidden: Sequence[int] = (64, 64),
    num_simulations: int = 20_000,
    seed: int = 0,
    batch_size: int = 256,
    max_steps: int = 8000,
    learning_rate: float = 2e-3,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Amortized:
    """Neural posterior estimation: learns the posterior for all data from simulations, where the likelihood may be intractable.

    The model is only run, all simulations at once under `jax.vmap`; masks, scales and densities of its sites do not count. A flow
    q(latents | data) is trained by maximum likelihood on the latents and data of these runs, with a tenth held out; it is the
    posterior where it is flexible enough and simulations are enough, and best where the prior puts them. Papamakarios & Murray
    2016, "Fast epsilon-free inference of simulation models"; Greenberg et al. 2019, "Automatic posterior transformation".

    Args:
        model: The model. It draws its data where arguments leave them open (`obs=None`), or names them by `numpyro.deterministic`.
        args: Its positional arguments.
        observed: The sites that are data.
        latents: The sites that are inferred; all others are averaged over. None: all that are drawn and not observed.
        summary: Statistics of the data: from `(n, *shape)` by site to `(n, num_features)`. None: the data, flat. Data that range
            over orders of magnitude need one, such as their logarithm.
        flow: A registered name, a recipe, or a `Flow` with the latents' dimension and a context.
        embedding: Length of what a network makes of the standardised data for the flow; 0 leaves them to the flow itself.
        hidden: Widths of that network.
        num_simulations: Runs of the model; those that are not finite are dropped and counted.
        seed: Of everything.
        batch_size: Simulations in each step.
        max_steps: The most steps; it stops by itself.
        learning_rate: Step size at the start, which falls by itself.
        progress_bar: Whether to show how it goes.
        kwargs: The model's keyword arguments.

    Returns:
        `.condition(data)` gives posteriors, `.calibration()` their test on fresh simulations.

    Raises:
        SiteError: a name is not a site that can be simulated.
        UnsupportedModelError: a latent is discrete, its support depends on others, or a site has a value that is only scored.
        NonFiniteError: more than half of the simulations are not finite.
        DimensionError: the summary has another shape.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from flowppl import flows
        >>> from flowppl.numpyro import npe
        >>> def model(y=None):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> amortized = npe(
        ...     model, observed="y", flow=flows.affine(hidden=(16,)), embedding=0, max_steps=500, progress_bar=False
        ... )
        >>> draws = amortized.condition(2.0).sample(1000)
        >>> draws["mean"].shape, round(float(draws["mean"].mean()), 1)
        ((1000,), 1.0)
    """
    simulator = _Simulator(model, args, kwargs, observed, latents, summary)
    return amortize(
        simulator,
        flow,
        embedding=embedding,
        hidden=hidden,
        num_simulations=num_simulations,
        seed=seed,
        batch_size=batch_size,
        max_steps=max_steps,
        learning_rate=learning_rate,
        progress_bar=progress_bar,
    )


def load_npe(
    path: str | os.PathLike[str],
    model: Callable,
    *args: Any,
    observed: str | Sequence[str],
    latents: str | Sequence[str] | None = None,
    summary: Callable[[dict[str, Array]], Array] | None = None,
    **kwargs: Any,
) -> Amortized:
    """Loads what `save` of the result of `npe` wrote, in either front: what the model is and what is observed is needed again.

    Args:
        path: The file.
        model: The model.
        args: Its positional arguments.
        observed: The sites that are data.
        latents: The sites that are inferred; None: all that are drawn and not observed.
        summary: Statistics of the data; the same as in training, which no file can tell.
        kwargs: The model's keyword arguments.

    Raises:
        FlowFileError: the file is not whole, or does not fit the model's sites or its features.
        SiteError: a name is not a site that can be simulated.
        UnsupportedModelError: see `npe`.
    """
    return restored(path, _Simulator(model, args, kwargs, observed, latents, summary))


class _Simulator:
    """A model as `flowppl.simulations.Simulator`."""

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        observed: Any,
        latents: Any,
        summary: Callable | None,
    ) -> None:
        def run(key: Array) -> Trace:
            with handlers.block(), numpyro.validation_enabled(False):  # what is not finite is dropped, not raised
                return handlers.trace(handlers.seed(model, key)).get_trace(*args, **kwargs)

        def simulate(key: Array) -> tuple[Array, dict[str, Array]]:
            trace = run(key)
            return self._layout.pack(_free(trace, names)), {name: trace[name]["value"] for name in data}

        keys = jax.random.split(jax.random.key(0))
        try:
            here, elsewhere = map(run, keys)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"the model cannot be run, and its prior has to be a proper one: {error}"
            ) from error
        drawn = [name for name, site in here.items() if is_latent(site)]
        fixed = [name for name, site in here.items() if site["type"] == "sample" and site["is_observed"]]
        computed = [name for name, site in here.items() if site["type"] == "deterministic"]
        data, names = choose_sites(drawn, fixed, computed, observed, latents)
        for name in names:
            if here[name]["fn"].support.is_discrete:
                raise not_continuous(name)
        self._sites = {name: here[name] for name in names}
        refuse_moving_supports(self._sites, elsewhere)
        self._layout = Layout(_free(here, names))
        self.shapes: Mapping[str, tuple[int, ...]] = self._layout.shapes
        self.data_shapes: Mapping[str, tuple[int, ...]] = {name: jnp.shape(here[name]["value"]) for name in data}
        self.like = jnp.zeros_like(self._layout.pack(_free(here, names)))
        self.summary: Callable[[Data], np.ndarray] | None = summary and (
            lambda data: np.asarray(summary(jax.tree.map(jnp.asarray, data)))
        )
        self._run = jax.jit(jax.vmap(simulate))
        self._constrain = jax.jit(self._values)

    def simulate(self, seed: int, n: int) -> tuple[np.ndarray, Data]:
        """See `flowppl.simulations.Simulator`."""
        u, data = self._run(jax.random.split(jax.random.key(seed), n))
        return np.asarray(u), jax.tree.map(np.asarray, data)

    def constrain(self, u: np.ndarray) -> Data:
        """See `flowppl.simulations.Simulator`."""
        return jax.tree.map(np.asarray, self._constrain(jnp.asarray(u, self.like.dtype)))

    def unconstrain(self, values: Data) -> tuple[np.ndarray, np.ndarray]:
        """See `flowppl.simulations.Simulator`."""
        u, log_det = self._layout.unconstrain(self._sites, values)
        return np.asarray(u), np.asarray(log_det)

    def _values(self, u: Array) -> dict[str, Array]:
        free = self._layout.unpack(u)
        return {name: biject_to(site["fn"].support)(free[name]) for name, site in self._sites.items()}


def _free(trace: Trace, names: Sequence[str]) -> dict[str, Array]:
    """Unconstrained values by site."""
    return {name: biject_to(trace[name]["fn"].support).inv(trace[name]["value"]) for name in names}
