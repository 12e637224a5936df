"""ActNorm: an affine map of each coordinate that is set once, from data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowppl import tree
from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections.base import Array, Bijection, Params, bind
from flowppl.bijections.compose import Chain, Inverse
from flowppl.bijections.stack import Stack
from flowppl.errors import DimensionError


@dataclass(frozen=True)
class ActNorm(Bijection):
    """y = scale x + shift, constants that `calibrate` sets from data and no training moves.

    Kingma and Dhariwal 2018, "Glow", section 3.1, who train them from there on: a linear layer beside it does so here.

    Attributes:
        dim: Length of the vectors.
    """

    dim: int
    context_dim: int = 0

    def init(self, rng: Any) -> dict[str, Any]:
        """Starts as the identity."""
        xp = backend_of_rng(rng).xp
        return {"params": {}, "const": {"scale": xp.ones((self.dim,)), "shift": xp.zeros((self.dim,))}}

    def forward(self, params: Params, x: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.forward`."""
        return params["scale"] * x + params["shift"], _log_det(params, x)

    def inverse(self, params: Params, y: Array, context: Array | None = None) -> tuple[Array, Array]:
        """See `Bijection.inverse`."""
        return (y - params["shift"]) / params["scale"], -_log_det(params, y)

    def forward_with_score(
        self,
        params: Params,
        x: Array,
        score: Array,
        context: Array | None = None,
        score_context: Any = None,
    ) -> tuple[Array, Array, Array, Array | None]:
        """g' = g / scale."""
        return *self.forward(params, x), backend_of(x).stop(score / params["scale"]), score_context


def _log_det(params: Params, x: Array) -> Array:
    xp = backend_of(x).xp
    return xp.sum(xp.log(params["scale"])) + xp.zeros_like(x[..., 0])


def calibrate(
    bijection: Bijection, variables: dict[str, Any], y: Array, context: Array | None = None
) -> dict[str, Any]:
    """Sets every `ActNorm` inside `Chain`, `Stack` and `Inverse` so that data leave it, on their way to the base, standardised.

    Each coordinate gets mean zero and standard deviation one; one that is constant up to rounding is centred alone.

    Args:
        bijection: What `variables` belong to.
        variables: What its `init` returned, trained or not.
        y: Data `(n, dim)`.
        context: Their contexts, `(n, context_dim)` or None.

    Returns:
        The variables with other constants.

    Raises:
        DimensionError: y is no matrix of vectors of length `dim`, or has no rows.

    Example:
        >>> import numpy as np
        >>> from flowppl.bijections import ActNorm, bind, calibrate
        >>> y = np.asarray([[1.0, 20.0], [3.0, 60.0]])
        >>> variables = calibrate(ActNorm(2), ActNorm(2).init(np.random.default_rng(0)), y)
        >>> x, _ = ActNorm(2).inverse(bind(variables), y)
        >>> x.tolist()
        [[-1.0, -1.0], [1.0, 1.0]]
    """
    if y.ndim != 2 or y.shape[-1] != bijection.dim or not y.shape[0]:
        raise DimensionError(f"y: expected shape (n, {bijection.dim}) with n >= 1, got {tuple(y.shape)}")
    return _calibrate(bijection, variables, backend_of(y).stop(y), context, inverted=False)[0]


def _calibrate(
    bijection: Bijection, variables: dict[str, Any], y: Array, context: Array | None, inverted: bool
) -> tuple[dict[str, Any], Array]:
    """The new variables, and the data behind the bijection; `inverted`: the way to the base is its forward map."""
    if isinstance(bijection, Inverse):
        return _calibrate(bijection.bijection, variables, y, context, not inverted)
    if isinstance(bijection, Chain | Stack):
        contexts = [context] * (bijection.depth if isinstance(bijection, Stack) else len(bijection.bijections))
        if isinstance(bijection, Chain):
            pairs = zip(variables["params"], variables["const"], strict=True)
            parts, layers = [{"params": p, "const": c} for p, c in pairs], bijection.bijections
        elif bijection.embedding:
            parts, contexts = bijection.unstack(variables, y, context)
            layers = (bijection.layer,) * bijection.depth
        else:
            parts = [tree.index(variables, i) for i in range(bijection.depth)]
            layers = (bijection.layer,) * bijection.depth
        order = range(len(parts))
        for i in order if inverted else reversed(order):
            parts[i], y = _calibrate(layers[i], parts[i], y, contexts[i], inverted)
        if isinstance(bijection, Stack) and bijection.embedding:
            return {**variables, "const": {"own": tree.stack([part["const"] for part in parts])}}, y
        if isinstance(bijection, Stack):
            return tree.stack(parts), y
        return {kind: tuple(part[kind] for part in parts) for kind in variables}, y
    if isinstance(bijection, ActNorm):
        variables = {**variables, "const": _standardising(y, inverted)}
    step = bijection.forward if inverted else bijection.inverse
    return variables, backend_of(y).stop(step(bind(variables), y, context)[0])


def _standardising(y: Array, inverted: bool) -> dict[str, Array]:
    xp = backend_of(y).xp
    mean, std = xp.mean(y, axis=0), xp.std(y, axis=0)
    rounding = 8 * xp.finfo(y.dtype).eps * xp.max(xp.abs(y), axis=0)
    std = xp.where(std > rounding, std, xp.ones_like(std))
    return {"scale": 1 / std, "shift": -mean / std} if inverted else {"scale": std, "shift": mean}
