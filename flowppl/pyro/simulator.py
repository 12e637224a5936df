"""`npe`: from a model that can only be run to its posterior for any data."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from flowppl.errors import UnsupportedModelError
from flowppl.flows import Flow, Recipe
from flowppl.npe import Amortized, restored
from flowppl.npe_training import amortize
from flowppl.pyro.density import seeded
from flowppl.pyro.sites import Layout, hide_enumerated, is_latent, refuse_moving_supports, unconstrained
from flowppl.simulations import Data, choose_sites, not_continuous

Array = np.ndarray
Values = dict[str, Tensor]
_RUNS = "_flowppl_runs"


def npe(
    model: Callable,
    *args: Any,
    observed: str | Sequence[str],
    latents: str | Sequence[str] | None = None,
    summary: Callable[[dict[str, Tensor]], Tensor] | None = None,
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

    The model is only run, many simulations at once in an outermost plate as `Predictive(parallel=True)` runs it, or, with a
    warning, one by one where that would change it; masks, scales and densities of its sites do not count. A flow q(latents | data)
    is trained by maximum likelihood on the latents and data of these runs, with a tenth held out; it is the posterior where it is
    flexible enough and simulations are enough, and best where the prior puts them. Papamakarios & Murray 2016, "Fast epsilon-free
    inference of simulation models"; Greenberg et al. 2019, "Automatic posterior transformation".

    Args:
        model: The model. It draws its data where arguments leave them open (`obs=None`), or names them by `pyro.deterministic`.
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
        >>> import pyro, pyro.distributions as dist
        >>> from flowppl import flows
        >>> from flowppl.pyro import npe
        >>> def model(y=None):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> amortized = npe(
        ...     model, observed="y", flow=flows.affine(hidden=(16,)), embedding=0, max_steps=500, progress_bar=False
        ... )
        >>> draws = amortized.condition(2.0).sample(1000)
        >>> draws["mean"].shape, round(float(draws["mean"].mean()), 1)
        ((1000,), 1.0)
    """
    with seeded(torch.Generator().manual_seed(seed)):
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
    summary: Callable[[dict[str, Tensor]], Tensor] | None = None,
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
    with seeded(torch.Generator().manual_seed(0)):
        simulator = _Simulator(model, args, kwargs, observed, latents, summary)
    return restored(path, simulator)


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
        self._model, self._args, self._kwargs = model, args, kwargs
        try:
            here = self._trace(model)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"the model cannot be run, and its prior has to be a proper one: {error}"
            ) from error
        drawn = [name for name, site in here.items() if is_latent(site)]
        computed = [name for name, site in here.items() if site["infer"].get("_deterministic")]
        fixed = [name for name, site in here.items() if site["is_observed"] and name not in computed]
        data, names = choose_sites(drawn, fixed, computed, observed, latents)
        for name in names:
            if here[name]["fn"].support.is_discrete:
                raise not_continuous(name)
            hide_enumerated(here[name])  # which refuses what else a flow cannot cover
        inferred = {name: here[name] for name in names}
        with torch.no_grad():
            refuse_moving_supports(model, args, kwargs, inferred)
        self._sites = {name: here[name] for name in (*names, *data)}
        self._plates = max((-f.dim for s in here.values() for f in s["cond_indep_stack"] if f.vectorized), default=0)
        self._layout = Layout(unconstrained(inferred))
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(self._layout.shapes[name]) for name in names}
        self.data_shapes: Mapping[str, tuple[int, ...]] = {name: tuple(here[name]["value"].shape) for name in data}
        self.like = torch.zeros_like(self._layout.start)
        self.summary = summary and self._in_numpy(summary)
        self._shapes = {name: site["value"].shape for name, site in here.items()}
        self._values = self._together
        if not self._agrees():
            self._values = self._one_by_one
            warnings.warn(
                "the model does not do the same in an outermost plate, and runs once for each simulation, which is slow: avoid "
                ".item(), branches on values, axes counted from the left, and noise that is not drawn by pyro.sample",
                stacklevel=3,
            )

    def simulate(self, seed: int, n: int) -> tuple[Array, Data]:
        """See `flowppl.simulations.Simulator`."""
        with seeded(torch.Generator().manual_seed(seed)):
            values = self._values(n)
        u, _ = self._layout.unconstrain(self._sites, values)
        return u.cpu().numpy(), {name: values[name].cpu().numpy() for name in self.data_shapes}

    def constrain(self, u: Array) -> Data:
        """See `flowppl.simulations.Simulator`."""
        free = self._layout.unpack(torch.as_tensor(u).to(self.like))
        return {name: biject_to(self._sites[name]["fn"].support)(x).cpu().numpy() for name, x in free.items()}

    def unconstrain(self, values: Data) -> tuple[Array, Array]:
        """See `flowppl.simulations.Simulator`."""
        tensors = {name: self._tensor(name, a) for name, a in values.items() if name in self._sites}
        u, log_det = self._layout.unconstrain(self._sites, tensors)
        return u.cpu().numpy(), torch.as_tensor(log_det).cpu().numpy()

    def _in_numpy(self, summary: Callable) -> Callable[[Data], Array]:
        @torch.no_grad()
        def function(data: Data) -> Array:
            return summary({name: self._tensor(name, a) for name, a in data.items()}).cpu().numpy()

        return function

    def _tensor(self, name: str, a: Array) -> Tensor:
        return torch.as_tensor(a).to(self._sites[name]["value"])

    @torch.no_grad()
    def _trace(self, model: Callable) -> dict[str, Any]:
        with poutine.block(), pyro.validation_enabled(False):  # what is not finite is dropped, not raised
            nodes = poutine.trace(model).get_trace(*self._args, **self._kwargs).nodes
        return {name: s for name, s in nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}

    # Two ways to run a model many times

    def _together(self, n: int) -> Values:
        trace = self._trace(pyro.plate(_RUNS, n, dim=-self._plates - 1)(self._model))
        return {name: trace[name]["value"].reshape((n, *s["value"].shape)) for name, s in self._sites.items()}

    def _one_by_one(self, n: int) -> Values:
        traces = [self._trace(self._model) for _ in range(n)]
        return {name: torch.stack([trace[name]["value"] for trace in traces]) for name in self._sites}

    def _agrees(self) -> bool:
        """Whether two runs in a plate have the sites of two runs on their own, given what is drawn in them."""
        try:
            both = self._trace(pyro.plate(_RUNS, 2, dim=-self._plates - 1)(self._model))
            for i in range(2):
                rows = {k: s["value"].reshape((2, *self._shapes[k]))[i] for k, s in both.items() if is_latent(s)}
                alone = self._trace(poutine.condition(self._model, rows))
                if not all(_same(both[name], site, i) for name, site in alone.items()):
                    return False
            return self._together(2) is not None
        except Exception:  # anything may happen in a model that was not written for plates
            return False


def _same(both: Any, alone: Any, i: int) -> bool:
    """Whether a site is row i of one of two rows, as far as the parameters of its distribution tell."""
    rows, own = _parameters(both), _parameters(alone)
    return all(
        torch.allclose(
            rows[k][i].reshape(x.shape) if rows[k].numel() == 2 * x.numel() else rows[k], x, rtol=1e-4, equal_nan=True
        )
        for k, x in own.items()
    )


def _parameters(site: Any) -> Values:
    if site["infer"].get("_deterministic"):
        return {"value": site["value"]}  # in a plate, its distribution has a batch that the value lacks
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return {name: x for name, x in vars(fn).items() if isinstance(x, Tensor)}
