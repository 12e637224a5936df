"""A posterior for any data: a flow over a model's latents whose context is the data, trained on simulations of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flowppl import flows, tree
from flowppl.backend import backend_of
from flowppl.bijections import bind
from flowppl.diagnostics import Calibration
from flowppl.errors import DimensionError, NonFiniteError
from flowppl.fitting import shown
from flowppl.flows import Flow, Recipe, part_of
from flowppl.networks import MLP
from flowppl.objectives.reverse_kl import Estimate
from flowppl.posterior import coordinates
from flowppl.simulations import Data, Scale, Simulator, features_of, simulated
from flowppl.training import Options, Record, State, seed_of, train

__all__ = ["Amortized", "AmortizedPosterior", "amortize"]

Array = np.ndarray
_HELD_OUT = 10  # every tenth simulation is for judging the others' fit
_STEPS = 500  # between two looks at how it goes: the noise of held-out batches hides what fewer steps gain
_TRAINING, _CALIBRATION, _DRAWS = range(3)  # streams of random numbers that one seed gives


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
            a = _numpy(data[name])
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
        return backend_of(self.simulator.like).jit(lambda variables, u, x: _log_q(self.flow, self.net, variables, u, x))


class AmortizedPosterior:
    """The posterior given data; of a batch of data, all of their posteriors.

    Args:
        amortized: The flow.
        features: What it sees of the data, `(*batch, num_features)`.
    """

    def __init__(self, amortized: Amortized, features: Array) -> None:
        self._amortized = amortized
        self._features = _like(amortized.scales[1].standardise(features), amortized.simulator.like)

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
        u, log_det = amortized.simulator.unconstrain({name: _numpy(v) for name, v in values.items()})
        scale, like = amortized.scales[0], amortized.simulator.like
        log_q = amortized._log_prob(amortized.variables, _like(scale.standardise(u), like), self._features)
        return _numpy(log_q) - log_det - np.log(scale.sd).sum()

    def unconstrained(self, num_samples: int = 1000, seed: int = 0) -> Array:
        """The same draws in unconstrained space, `(num_samples, *batch, dim)`."""
        amortized = self._amortized
        flow, like, variables = amortized.flow, amortized.simulator.like, amortized.variables
        rng = backend_of(like).rng(seed_of(seed, _DRAWS), like)
        shape = (num_samples, *self._features.shape[:-1], flow.dim)
        z = flow.base.sample(rng, bind(part_of(variables, "flow"))["base"], shape, like)
        scale = amortized.scales[0]
        return _numpy(amortized._push(variables, z, self._features)) * scale.sd + scale.mean


def amortize(
    simulator: Simulator,
    flow: str | Recipe | Flow,
    *,
    embedding: int,
    hidden: Sequence[int],
    num_simulations: int,
    seed: int,
    batch_size: int,
    max_steps: int,
    learning_rate: float,
    progress_bar: bool,
) -> Amortized:
    """Simulates, standardises, and trains q(latents | data) by maximum likelihood; the best state by held-out simulations is kept.

    See `npe` for the arguments.

    Raises:
        ValueError: there are fewer than 20 simulations.
    """
    if num_simulations < 2 * _HELD_OUT:
        raise ValueError(f"num_simulations must be at least {2 * _HELD_OUT}, got {num_simulations}")
    options = Options(batch_size, max_steps, learning_rate, chunk=min(_STEPS, max_steps))
    u, features, dropped = simulated(simulator, num_simulations, (seed, _TRAINING))
    scales = Scale.of(u), Scale.of(features)
    like = simulator.like
    backend = backend_of(like)
    rows = [_like(scale.standardise(a), like) for scale, a in zip(scales, (u, features), strict=True)]
    cut = len(u) - max(len(u) // _HELD_OUT, 1)
    seen, held_out = ([a[:cut] for a in rows], [a[cut:] for a in rows])
    net = MLP(features.shape[-1], (embedding,), tuple(hidden)) if embedding else None
    q = flows.get(flow)(u.shape[-1], embedding or features.shape[-1])

    def init(rng: Any) -> dict[str, Any]:
        keys = backend.split(rng, 2)
        made = q.init(keys[0], like)
        weights = tree.map(lambda a: backend.asarray(a, like), net.init(keys[1]) if net else {})
        return {"params": {"flow": made["params"], "net": weights}, "const": {"flow": made["const"], "net": {}}}

    def mean_log_q(variables: dict[str, Any], rows: list) -> Any:
        return backend.xp.mean(_log_q(q, net, variables, *rows))

    def gradient(variables: dict[str, Any], rng: Any, control: Any, refresh: Any) -> Any:
        # The record's objective is that of held-out simulations, so training sees when it no longer learns what is general.
        keys = backend.split(rng, 2)
        batch = _choose(seen, keys[0], options.num_particles)
        _, grads = backend.value_and_grad(lambda p: -mean_log_q({**variables, "params": p}, batch), variables["params"])
        value = mean_log_q(backend.stop(variables), _choose(held_out, keys[1], max(options.num_particles // 2, 1)))
        return Estimate(value, 0 * value, 0 * value, 0 * value), grads, control

    start = backend.jit(init)(backend.rng(seed_of(seed, _TRAINING), like))
    best = _Best(backend.jit(lambda params: mean_log_q({**start, "params": params}, held_out)))
    with shown(options, progress_bar, "log q") as progress:
        _, history = train(gradient, start, seed, options, best, progress)
    variables = {**start, "params": best.params}
    each = _numpy(backend.jit(lambda v: _log_q(q, net, v, *held_out))(variables)) - np.log(scales[0].sd).sum()
    error = float(each.std() / np.sqrt(len(each)))
    return Amortized(simulator, q, net, variables, scales, history, (float(each.mean()), error), dropped)


class _Best:
    """A memory of training that keeps the averaged parameters with the highest score."""

    def __init__(self, score: Callable[[Any], Any]) -> None:
        self._score, self._highest, self.params = score, -np.inf, None

    def load(self, template: State) -> None:
        self.params = template.params

    def save(self, state: State, history: Sequence[Record]) -> None:
        score = float(self._score(state.average))
        if score > self._highest:
            self._highest, self.params = score, state.average


def _context(net: MLP | None, params: dict[str, Any], x: Any) -> Any:
    """What the flow is conditioned on, `(*batch, context_dim)`, from standardised features."""
    return x if net is None else backend_of(x).xp.moveaxis(net(params["net"], x), 0, -1)


def _log_q(flow: Flow, net: MLP | None, variables: dict[str, Any], u: Any, x: Any) -> Any:
    """Log density of standardised latents `(*batch, dim)` given standardised features, `(*batch,)`."""
    return flow.log_prob(part_of(variables, "flow"), u, _context(net, variables["params"], x))


def _choose(rows: list, rng: Any, num: int) -> list:
    """The same random rows of each array."""
    backend, n = backend_of(rows), len(rows[0])
    at = backend.uniform(rng, (num,), rows[0]) * n
    at = backend.xp.clip(backend.xp.astype(at, backend.xp.int32), 0, n - 1)  # n itself by rounding
    return [backend.xp.take(a, at, axis=0) for a in rows]


def _like(a: Array, like: Any) -> Any:
    backend = backend_of(like)
    return backend.asarray(backend.xp.asarray(a), like)


def _numpy(a: Any) -> Array:
    return np.asarray(backend_of(a).to_numpy(a) if hasattr(a, "dtype") else a)
