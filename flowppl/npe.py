"""A posterior for any data: a flow over a model's latents whose context is the data, trained on simulations of both."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flowppl import tree
from flowppl.backend import backend_of
from flowppl.bijections import bind
from flowppl.diagnostics import Calibration
from flowppl.errors import DimensionError, FlowFileError, NonFiniteError
from flowppl.flows import Flow, files, part_of
from flowppl.networks import MLP
from flowppl.posterior import coordinates
from flowppl.simulations import Data, Scale, Simulator, features_of, simulated
from flowppl.training import Record, seed_of

__all__ = ["Amortized", "AmortizedPosterior"]

Array = np.ndarray
_KIND = "npe"  # of its files
TRAINING, _CALIBRATION, _DRAWS = range(3)  # streams of random numbers that one seed gives


@dataclass(frozen=True)
class Amortized:
    """A posterior for any data: a flow over the latents whose context is made of the data. Made by `npe`.

    Attributes:
        simulator: The model.
        flow: The flow over standardised unconstrained latents.
        net: The network between standardised data and the flow, or None.
        variables: Theirs, "flow" and "net".
        scales: Of the latents and of the data's features.
        history: What each chunk of training steps showed; `elbo` is the mean of log q over held-out simulations.
        held_out: The mean of log q(unconstrained latents | data) over held-out simulations, and its standard error.
        num_dropped: How many simulations had numbers that are not finite.
    """

    simulator: Simulator
    flow: Flow
    net: MLP | None
    variables: dict[str, Any]
    scales: tuple[Scale, Scale]
    history: list[Record]
    held_out: tuple[float, float]
    num_dropped: int

    def condition(self, data: Any) -> AmortizedPosterior:
        """The posterior given data, or several posteriors given several data sets.

        Args:
            data: An array `(*batch, *shape)` for each observed site, or the array alone where there is one site.

        Raises:
            DimensionError: a site is missing, unknown or of another shape.
            NonFiniteError: the data, or what the user's summary made of them, are not finite.
        """
        arrays, batch = self._checked(data)
        flat = {name: a.reshape(-1, *self.simulator.data_shapes[name]) for name, a in arrays.items()}
        features = features_of(self.simulator, flat)
        if not np.isfinite(features).all():
            raise NonFiniteError("data: expected finite numbers, got NaN or infinity; impute them, or use a summary")
        return AmortizedPosterior(self, features.reshape(*batch, -1))

    def calibration(self, num: int = 1000, *, num_draws: int = 99, seed: int = 0) -> Calibration:
        """Simulation-based calibration: ranks of true values among draws of their posteriors, uniform if these are right.

        Talts et al. 2018, "Validating Bayesian inference algorithms with simulation-based calibration".

        Args:
            num: Number of fresh simulations; those that are not finite are left out.
            num_draws: Draws of each posterior.
            seed: Of simulations and draws.
        """
        u, features, _ = simulated(self.simulator, num, (seed, _CALIBRATION))
        draws = AmortizedPosterior(self, features).unconstrained(num_draws, seed)
        return Calibration((draws < u).sum(0), num_draws, coordinates(self.simulator.shapes))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves flow, network and scales; `load_npe` of either front loads them, for a model with the same sites.

        Args:
            path: Where to; an older file is replaced only when the new one is whole.

        Raises:
            FlowFileError: the flow is of another library.
        """
        parts = {"flow": self.flow, **({} if self.net is None else {"net": self.net})}
        scales = {name: scale._asdict() for name, scale in zip(("latents", "features"), self.scales, strict=True)}
        extra = {**_sites(self.simulator), "held out": list(self.held_out), "dropped": self.num_dropped}
        files.write_parts(path, _KIND, parts, {"variables": self.variables, "scales": scales}, extra)

    def _checked(self, data: Any) -> tuple[Data, tuple[int, ...]]:
        shapes = self.simulator.data_shapes
        if not isinstance(data, Mapping):
            if len(shapes) > 1:
                raise DimensionError(f"data: expected a dictionary with the sites {', '.join(shapes)}, got one array")
            data = {next(iter(shapes)): data}
        if set(data) != set(shapes):
            raise DimensionError(f"data: expected the sites {', '.join(shapes)}, got {', '.join(data) or 'none'}")
        arrays, batches = {}, set()
        for name, shape in shapes.items():
            a = on_host(data[name])
            at = a.ndim - len(shape)
            if at < 0 or a.shape[at:] != shape:
                expected = ", ".join(["*batch", *map(str, shape)])
                raise DimensionError(f"data[{name!r}]: expected shape ({expected}), got {a.shape}")
            arrays[name] = a
            batches.add(a.shape[:at])
        if len(batches) > 1:
            raise DimensionError(f"data: expected the same batch for all sites, got {sorted(batches)}")
        return arrays, batches.pop()

    @cached_property
    def _push(self) -> Callable:
        """Compiled once: base draws `(*shape, dim)` and features `(*batch, n)` to standardised latents."""
        return backend_of(self.simulator.like).jit(
            lambda variables, z, x: (
                self.flow.push(part_of(variables, "flow"), z, _context(self.net, variables["params"], x)).x
            )
        )

    @cached_property
    def _log_prob(self) -> Callable:
        return backend_of(self.simulator.like).jit(lambda variables, u, x: log_q(self.flow, self.net, variables, u, x))


class AmortizedPosterior:
    """The posterior given data; of a batch of data, all of their posteriors.

    Args:
        amortized: The flow.
        features: What it sees of the data, `(*batch, num_features)`.
    """

    def __init__(self, amortized: Amortized, features: Array) -> None:
        self._amortized = amortized
        self._features = like_of(amortized.scales[1].standardise(features), amortized.simulator.like)

    def sample(self, num_samples: int = 1000, seed: int = 0) -> dict[str, Array]:
        """Draws by site, constrained: `(num_samples, *batch, *shape)`."""
        return self._amortized.simulator.constrain(self.unconstrained(num_samples, seed))

    def log_prob(self, values: Mapping[str, Any]) -> Array:
        """Log density at constrained values, `(*sample, *batch)`.

        Args:
            values: Arrays `(*sample, *batch, *shape)` of every latent site.

        Raises:
            DimensionError: a site is missing or has another shape.
        """
        amortized = self._amortized
        u, log_det = amortized.simulator.unconstrain({name: on_host(v) for name, v in values.items()})
        scale, like = amortized.scales[0], amortized.simulator.like
        value = amortized._log_prob(amortized.variables, like_of(scale.standardise(u), like), self._features)
        return on_host(value) - log_det - np.log(scale.sd).sum()

    def unconstrained(self, num_samples: int = 1000, seed: int = 0) -> Array:
        """The same draws in unconstrained space, `(num_samples, *batch, dim)`."""
        amortized = self._amortized
        flow, like, variables = amortized.flow, amortized.simulator.like, amortized.variables
        rng = backend_of(like).rng(seed_of(seed, _DRAWS), like)
        shape = (num_samples, *self._features.shape[:-1], flow.dim)
        z = flow.base.sample(rng, bind(part_of(variables, "flow"))["base"], shape, like)
        scale = amortized.scales[0]
        return on_host(amortized._push(variables, z, self._features)) * scale.sd + scale.mean


def restored(path: str | os.PathLike[str], simulator: Simulator) -> Amortized:
    """Loads what `Amortized.save` wrote, for a model that is simulated anew.

    Raises:
        FlowFileError: the file is not whole, or does not fit the model's sites or its features.
    """
    parts, arrays, extra = files.read_parts(path, _KIND, {"flow": Flow, "net": MLP})
    files.require(path, extra, _sites(simulator))
    flow, net, like = parts["flow"], parts.get("net"), simulator.like
    backend, dim = backend_of(like), sum(map(math.prod, simulator.shapes.values()))
    some = {name: np.ones((1, *shape)) for name, shape in simulator.data_shapes.items()}
    num, taken = features_of(simulator, some).shape[-1], flow.context_dim if net is None else net.inputs
    if (flow.dim, taken) != (dim, num) or (net is not None and net.outputs != (flow.context_dim,)):
        raise FlowFileError(
            f"{path} does not fit the model: its flow has {flow.dim} dimensions and sees {taken} features, the model has {dim} and "
            f"{num}; the summary has to be that of the training"
        )
    lengths = {"latents": dim, "features": num}
    vectors = {name: {"mean": backend.xp.zeros(n), "sd": backend.xp.zeros(n)} for name, n in lengths.items()}
    template = lambda: {"variables": initial(flow, net, backend.rng(0, like), like), "scales": vectors}
    variables = files.restore(arrays, template, like)["variables"]
    kept = lambda name: Scale(*(np.asarray(arrays[f"scales.{name}.{k}"], np.float64) for k in Scale._fields))
    try:
        mean, error = map(float, extra["held out"])
        dropped = int(extra["dropped"])
    except (KeyError, TypeError, ValueError) as missing:
        raise FlowFileError(f"{path} does not say how the training went: {missing}") from missing
    return Amortized(simulator, flow, net, variables, (kept("latents"), kept("features")), [], (mean, error), dropped)


def initial(flow: Flow, net: MLP | None, rng: Any, like: Any) -> dict[str, Any]:
    """Untrained variables of a flow and the network before it."""
    backend = backend_of(like)
    keys = backend.split(rng, 2)
    made = flow.init(keys[0], like=like)
    weights = tree.map(lambda a: backend.asarray(a, like), net.init(keys[1]) if net else {})
    return {"params": {"flow": made["params"], "net": weights}, "const": {"flow": made["const"], "net": {}}}


def _sites(simulator: Simulator) -> dict[str, Any]:
    """What of a model a file has to fit, as JSON types."""
    latents, data = ([[k, list(s)] for k, s in shapes.items()] for shapes in (simulator.shapes, simulator.data_shapes))
    return {"latents": latents, "data": data}


def _context(net: MLP | None, params: dict[str, Any], x: Any) -> Any:
    """What the flow is conditioned on, `(*batch, context_dim)`, from standardised features."""
    return x if net is None else backend_of(x).xp.moveaxis(net(params["net"], x), 0, -1)


def log_q(flow: Flow, net: MLP | None, variables: dict[str, Any], u: Any, x: Any) -> Any:
    """Log density of standardised latents `(*batch, dim)` given standardised features, `(*batch,)`."""
    return flow.log_prob(part_of(variables, "flow"), u, _context(net, variables["params"], x))


def like_of(a: Array, like: Any) -> Any:
    """An array of the framework of `like`, with its dtype and device."""
    backend = backend_of(like)
    return backend.asarray(backend.xp.asarray(a), like)


def on_host(a: Any) -> Array:
    """An array in numpy."""
    return np.asarray(backend_of(a).to_numpy(a) if hasattr(a, "dtype") else a)
