"""A flow: a base density pushed through a bijection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flowppl import tree
from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.base import Array, Bijection, bind, broadcast
from flowppl.config import Configured
from flowppl.errors import DimensionError
from flowppl.flows.bases import Base, Normal


class Sample(NamedTuple):
    """Draws of a flow and, where asked for, their log density and scores (else None).

    `x` and `log_prob` are attached to the parameters and the context; the scores carry no derivative.
    """

    x: Array  # (*shape, dim)
    log_prob: Array | None = None  # (*shape,)
    score: Array | None = None  # d log q / dx, (*shape, dim)
    score_context: Array | None = None  # d log q / d context at fixed x, (*shape, context_dim)


@dataclass(frozen=True)
class Flow(Configured):
    """The density of x = T(z; context), z ~ base.

    Attributes:
        bijection: T; its `dim` and `context_dim` are the flow's.
        base: Density of z.

    Example:
        >>> import numpy as np
        >>> from flowppl import flows
        >>> flow = flows.nsf(layers=2)(dim=3)
        >>> flow.dim, flow.context_dim
        (3, 0)
    """

    bijection: Bijection
    base: Base = field(default_factory=Normal)

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.bijection.dim

    @property
    def context_dim(self) -> int:
        """Length of the context, 0 for none."""
        return self.bijection.context_dim

    def check_context(self, context: Array | None) -> None:
        """Checks that there is a context `(*batch, context_dim)` where the flow takes one, and none where it does not.

        Raises:
            DimensionError: it is not so.
        """
        expected = f"shape (*batch, {self.context_dim})" if self.context_dim else "none, since the flow takes none"
        fits = (
            context is None
            if not self.context_dim
            else context is not None and context.shape[-1:] == (self.context_dim,)
        )
        if not fits:
            got = "none" if context is None else f"shape {tuple(context.shape)}"
            raise DimensionError(f"context: expected {expected}, got {got}")

    def init(self, rng: Any, like: Array | None = None) -> dict[str, Any]:
        """Draws `{"params": ..., "const": ...}`, each of them `{"base": ..., "bijection": ...}`.

        Args:
            rng: A jax key, or a `torch.Generator` (None: torch's global one).
            like: An array whose dtype and device the floating leaves get; None for the framework's defaults.
        """
        base_key, key = backend_of_rng(rng).split(rng, 2)
        parts = {"base": self.base.init(base_key, self.dim), "bijection": self.bijection.init(key)}
        variables = {kind: {name: part[kind] for name, part in parts.items()} for kind in ("params", "const")}
        return variables if like is None else tree.map(lambda leaf: backend_of(like).asarray(leaf, like), variables)

    def sample(
        self,
        rng: Any,
        variables: dict[str, Any],
        shape: tuple[int, ...] = (),
        context: Array | None = None,
        *,
        with_log_prob: bool = False,
        with_score: bool = False,
    ) -> Sample:
        """Draws x and, from the same pass, log q(x) and its score.

        Args:
            rng: A jax key, or a `torch.Generator` (None: torch's global one).
            variables: What `init` returned, trained or not.
            shape: Shape of the draws, in front of the context's batch.
            context: `(*batch, context_dim)` or None.
            with_log_prob: Also return log q(x).
            with_score: Also return the scores (and log q).
        """
        batch = shape if context is None or not self.context_dim else (*shape, *context.shape[:-1])
        z = self.base.sample(rng, bind(variables)["base"], (*batch, self.dim), exemplar(variables))
        return self.push(variables, z, context, with_log_prob=with_log_prob, with_score=with_score)

    def push(
        self,
        variables: dict[str, Any],
        z: Array,
        context: Array | None = None,
        *,
        with_log_prob: bool = False,
        with_score: bool = False,
    ) -> Sample:
        """Maps base draws z `(*shape, dim)` to x, with what `sample` returns beside it."""
        params = bind(variables)
        base, params = params["base"], params["bijection"]
        z, context = broadcast(z, context, self.context_dim)
        if with_score:
            backend = backend_of(z)
            start = None if context is None else backend.xp.zeros_like(context)
            score = backend.stop(self.base.score(base, z))
            x, log_det, score, score_context = self.bijection.forward_with_score(params, z, score, context, start)
            return Sample(x, self.base.log_prob(base, z) - log_det, score, score_context)
        x, log_det = self.bijection.forward(params, z, context)
        return Sample(x, self.base.log_prob(base, z) - log_det if with_log_prob else None)

    def log_prob(self, variables: dict[str, Any], x: Array, context: Array | None = None) -> Array:
        """Log density of any x `(*batch, dim)`, `(*batch,)`.

        Raises:
            DimensionError: x or the context has another length.
        """
        if x.shape[-1:] != (self.dim,):
            raise DimensionError(f"x: expected shape (*batch, {self.dim}), got {tuple(x.shape)}")
        params = bind(variables)
        z, log_det = self.bijection.inverse(params["bijection"], x, context)
        return self.base.log_prob(params["base"], z) + log_det


def part_of(variables: dict[str, Any], name: str) -> dict[str, Any]:
    """The variables of a flow's "base" or "bijection" alone."""
    return {kind: variables[kind][name] for kind in ("params", "const")}


def exemplar(variables: dict[str, Any]) -> Array | None:
    """An array whose dtype and device a flow's draws get."""
    leaves = [*tree.leaves(variables["params"]), *tree.leaves(variables["const"])]
    return next((a for a in leaves if "float" in str(a.dtype)), None)
