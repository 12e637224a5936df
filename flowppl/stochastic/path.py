"""Stochastic normalizing flows: flows and Markov kernels in turn, from a base to a target, with exact weights of whole paths.

Wu, Koehler & Noe 2020, "Stochastic normalizing flows" (arXiv:2002.06707).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from flowppl import flows, tree
from flowppl.backend import Array, backend_of, backend_of_rng
from flowppl.bijections.base import Bijection, bind
from flowppl.config import Configured
from flowppl.errors import DimensionError
from flowppl.flows import Flow, Recipe
from flowppl.flows.bases import Base, Normal
from flowppl.flows.flow import exemplar
from flowppl.kernels import Info, Walkers
from flowppl.kernels.target import LogProb
from flowppl.stochastic.annealing import Bridge
from flowppl.stochastic.diffusion import Diffusion
from flowppl.stochastic.moves import Moves
from flowppl.stochastic.walk import (
    At,
    back,
    begin,
    begin_back,
    counted,
    known,
    log_weights,
    mapped,
    moved,
    resampled,
    there,
)


class Run(NamedTuple):
    """Paths that were drawn.

    Attributes:
        x: Where they end, `(n, dim)`: points of the target going forwards, of the base going backwards.
        log_w: Log-weights `(n,)`: log p(x) - log q(z), and the log density of the way back over that of the way there. Going
            forwards their mean weight is an unbiased estimate of the target's normalising constant, going backwards from exact
            draws of the target the mean of 1 / weight is one of its inverse.
        log_choice: Log-probability of all decisions, `(n,)`; see `flowppl.kernels.Info`.
        acceptance: The mean one in each stochastic layer, `(moves,)`.
        log_prob: Log density of the target at their end there, `(n,)`.
    """

    x: Array
    log_w: Array
    log_choice: Array
    acceptance: Array
    log_prob: Array


def with_decisions(run: Run) -> Run:
    """The run with the derivative that decisions lack in its log-weights, whose values stay.

    That of the mean is E (log_w - baseline) d log_choice, with the mean of the other paths as each one's baseline.
    """
    backend = backend_of(run.log_w)
    xp = backend.xp
    known = xp.isfinite(run.log_w)
    value = xp.where(known, backend.stop(run.log_w), xp.zeros_like(run.log_w))
    weight = xp.astype(known, value.dtype)
    others = (xp.sum(value) - value) / xp.clip(xp.sum(weight) - weight, 1.0, None)
    signal = weight * (value - others)
    return run._replace(log_w=run.log_w + signal * (run.log_choice - backend.stop(run.log_choice)))


@dataclass(frozen=True)
class Path(Configured):
    """A base, and layers that take it to a target: maps between densities, and moves that leave one of them alone.

    The j-th of m stochastic layers moves at the density base^(1 - beta_j) target^beta_j. A map goes from the density before it to
    that of the moves that follow. Nothing has to be exact: a path's weight makes up for all of it.

    Attributes:
        layers: Bijections, `Moves` and `Diffusion`s; the last are maps too, that are drawn.
        dim: Length of the vectors.
        base: Density of where paths start.
        betas: Of the moves; empty for equal steps to one.
        learned: Whether training moves the betas between.

    Raises:
        DimensionError: a bijection has another dimension, or takes a context.
        ValueError: the betas are no increasing numbers from zero to one, one for each stochastic layer.
    """

    layers: tuple[Bijection | Diffusion | Moves, ...]
    dim: int
    base: Base = field(default_factory=Normal)
    betas: tuple[float, ...] = ()
    learned: bool = False

    def __post_init__(self) -> None:
        for layer in self.layers:
            if isinstance(layer, Moves):
                continue
            context_dim = getattr(layer, "context_dim", 0)
            if (layer.dim, context_dim) != (self.dim, 0):
                raise DimensionError(
                    f"layers: expected maps of dim={self.dim} without a context, got dim={layer.dim}, context_dim={context_dim}"
                )
        steps = [b - a for a, b in zip((0.0, *self.betas), self.betas, strict=False)]
        if self.betas and (len(steps) != self.num_moves or min(steps) <= 0 or self.betas[-1] > 1):
            raise ValueError(f"betas must be {self.num_moves} increasing numbers in (0, 1], got {self.betas}")

    @property
    def num_moves(self) -> int:
        """How many layers are stochastic."""
        return sum(isinstance(layer, Moves) for layer in self.layers)

    def init(self, rng: Any, like: Array | None = None) -> dict[str, Any]:
        """Draws `{"params": ..., "const": ...}`, as `Flow.init` does."""
        backend = backend_of_rng(rng)
        keys = backend.split(rng, len(self.layers) + 1)
        base = self.base.init(keys[0], self.dim)
        layers = [layer.init(key) for layer, key in zip(self.layers, keys[1:], strict=True)]
        variables: dict[str, Any] = {
            kind: {"base": base[kind], "layers": tuple(layer[kind] for layer in layers)} for kind in ("params", "const")
        }
        betas = self.betas or [(j + 1) / self.num_moves for j in range(self.num_moves)]
        steps = [b - a for a, b in zip((0.0, *betas), betas, strict=False)]
        variables["params" if self.learned else "const"]["log_steps"] = backend.xp.asarray([math.log(b) for b in steps])
        return variables if like is None else tree.map(lambda leaf: backend_of(like).asarray(leaf, like), variables)

    def ends(self, params: Any, like: Array) -> list[tuple[Array, Array]]:
        """The betas before and after each layer, scalars."""
        backend = backend_of(like)
        last = self.betas[-1] if self.betas else 1.0
        found = last * backend.xp.cumulative_sum(backend.softmax(params["log_steps"])) if self.num_moves else ()
        betas = [found[j] for j in range(self.num_moves)]
        ends, before = [], backend.asarray(0.0, like)
        for layer in self.layers:
            after = betas[0] if betas else backend.asarray(1.0, like)
            ends.append((before, after))
            before = after
            if isinstance(layer, Moves):
                betas.pop(0)
        return ends

    def bridge(self, params: Any, log_prob: LogProb, like: Array, **options: Any) -> Bridge:
        """What it goes over: from its base to a target. `options` are further fields of the `Bridge`."""

        def sample(rng: Any, n: int) -> Array:
            return self.base.sample(rng, params["base"], (n, self.dim), like)

        return Bridge(sample, partial(self.base.log_prob, params["base"]), log_prob, **options)

    def forward(
        self,
        rng: Any,
        variables: dict[str, Any],
        log_prob: LogProb,
        n: int,
        *,
        resample_below: float = 0.0,
        **options: Any,
    ) -> Run:
        """Draws n paths from the base to the target.

        Args:
            rng: A jax key, or a `torch.Generator`.
            variables: What `init` returned, trained or not.
            log_prob: Log density of the target, unnormalised: `(n, dim)` to `(n,)`.
            n: How many.
            resample_below: The effective share of the paths below which, before moves, some are dropped and others doubled, which
                then are no independent draws; 0 for never.
            options: Further fields of the `Bridge`: `powers`, and `attached` for derivatives through Langevin and HMC dynamics.
        """
        params, like = bind(variables), exemplar(variables)
        bridge = self.bridge(params, log_prob, like, **options)
        start, rng = backend_of(like).split(rng, 2)
        at = begin(bridge, bridge.sample(start, n))
        seen = []
        for i, (layer, mine, (_, beta)) in enumerate(
            zip(self.layers, params["layers"], self.ends(params, like), strict=True)
        ):
            choice, key, rng = backend_of(like).split(rng, 3)
            if isinstance(layer, Moves):
                at = resampled(choice, bridge, known(bridge, at._replace(beta=beta), self._scored(i)), resample_below)
                at, info = moved(key, bridge, at, layer, mine)
                seen.append(info)
            else:
                at = mapped(at, *there(layer, key, mine, at.x))
        return finished(bridge, at, seen)

    def backward(self, rng: Any, variables: dict[str, Any], log_prob: LogProb, x: Array, **options: Any) -> Run:
        """Draws paths back from points of the target `(n, dim)` to the base; see `forward`."""
        params, backend = bind(variables), backend_of(x)
        bridge = self.bridge(params, log_prob, x, **options)
        at = start = begin_back(bridge, x, self._scored(len(self.layers) - 1, -1))
        seen: list[Info] = []
        rows = list(enumerate(zip(self.layers, params["layers"], self.ends(params, x), strict=True)))
        for i, (layer, mine, (_, beta)) in reversed(rows):
            key, rng = backend.split(rng, 2)
            if isinstance(layer, Moves):
                at = known(bridge, at._replace(beta=beta), self._scored(i, -1))
                at, info = moved(key, bridge, at, layer, mine)
                seen.insert(0, info)
            else:
                at = mapped(at, *back(layer, key, mine, at.x))
        return _run(at, -counted(at.ratio + bridge.log_base(at.x)), start.walkers, seen)

    def _scored(self, i: int, step: int = 1) -> bool:
        """Whether the moves from a layer on, until a map, need scores."""
        while 0 <= i < len(self.layers) and isinstance(layer := self.layers[i], Moves):
            if layer.kernel != "metropolis":
                return True
            i += step
        return False


def finished(bridge: Bridge, at: At, seen: list[Info]) -> Run:
    """Paths at the target, with what was seen of the moves."""
    at = known(bridge, at._replace(beta=backend_of(at.x).xp.ones_like(at.beta)), False)
    return _run(at, log_weights(bridge, at), at.walkers, seen)


def _run(at: At, log_w: Array, at_target: Walkers, seen: list[Info]) -> Run:
    xp = backend_of(log_w).xp
    acceptance = xp.stack([xp.mean(info.acceptance) for info in seen]) if seen else xp.zeros_like(log_w[:0])
    return Run(at.x, log_w, at.log_choice, acceptance, at_target.log_probs[:, 1])


def snf(layers: Sequence[str | Recipe | Flow | Bijection | Diffusion | Moves], dim: int, **options: Any) -> Path:
    """A path from layers, among which flows stand for their bijections.

    Args:
        layers: Names of registered flows, recipes, flows or bijections; `Moves`, and `Diffusion`s.
        dim: Length of the vectors.
        options: Further fields of the `Path`.

    Raises:
        UnknownFlowError: no recipe has this name.

    Example:
        >>> from flowppl import flows
        >>> from flowppl.stochastic import Moves, snf
        >>> path = snf([flows.realnvp(layers=2), Moves("langevin", repeats=10)] * 3, dim=2)
        >>> path.num_moves
        3
    """
    ours = (
        layer if isinstance(layer, Bijection | Diffusion | Moves) else flows.get(layer)(dim).bijection
        for layer in layers
    )
    return Path(tuple(ours), dim, **options)
