"""Draws of a path as guides have them: in coordinates in which a posterior is about standard normal, with log q from the weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flowppl import flows
from flowppl.backend import Array, backend_of
from flowppl.bijections.base import Bijection, bind
from flowppl.errors import DimensionError
from flowppl.flows import Flow, Recipe
from flowppl.kernels.target import LogProb, Placed
from flowppl.stochastic.diffusion import Diffusion
from flowppl.stochastic.moves import UNADJUSTED, Moves
from flowppl.stochastic.path import Path, Run, snf, with_decisions

Layers = Path | Sequence[str | Recipe | Flow | Bijection | Diffusion | Moves]
GRADIENTS = ("reparam", "score")
LAYERS = (flows.realnvp(layers=2, hidden=(32,)), Moves("underdamped", step_size=0.3, leapfrog=4)) * 3
PLACE = ("shift", "log_scale", "loc", "scale_tril")  # what `placed` adds
_CHUNK = 1000  # paths at a time


class Draw(NamedTuple):
    """Where paths end, and how likely that was.

    Attributes:
        x: `(n, dim)`.
        log_w: Log-weights of the paths, `(n,)`.
        log_q: log p(x) - log_w, `(n,)`, so that an ELBO is the mean of log_w; infinite for a path that led nowhere, of which
            nothing has derivatives.
    """

    x: Array
    log_w: Array
    log_q: Array


def check_gradient(gradient: str) -> str:
    """Returns it.

    Raises:
        ValueError: it is neither "reparam" nor "score".
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    return gradient


def path_of(layers: Layers, dim: int) -> Path:
    """The path of a guide over vectors of this length, from its layers or a ready one.

    Raises:
        UnknownFlowError: no recipe has this name.
        DimensionError: the path, or a flow, has another dimension.
    """
    if not isinstance(layers, Path):
        return snf(layers, dim)
    if layers.dim != dim:
        raise DimensionError(f"layers: expected a path of dim={dim}, got one of dim={layers.dim}")
    return layers


def check_layers(layers: Layers) -> Layers:
    """Returns them.

    Raises:
        UnknownFlowError: no recipe has this name.
    """
    for layer in () if isinstance(layers, Path) else layers:
        if not isinstance(layer, Bijection | Diffusion | Moves):
            flows.get(layer)
    return layers


def draw(
    rng: Any,
    path: Path,
    variables: dict[str, Any],
    log_prob: LogProb,
    n: int,
    loc: Array | None = None,
    scale_tril: Array | None = None,
    *,
    gradient: str = "reparam",
) -> Draw:
    """Draws n paths to a density of x = loc + scale_tril w, the path being one of w.

    With "score", log_w gets the derivative that decisions lack: E (log_w - baseline) d log_choice, the baseline being the mean of
    the other paths. A single path is drawn with another one beside it, for a baseline. The value is the same.

    Args:
        rng: A jax key, or a `torch.Generator`.
        path: The path.
        variables: Its arrays; there may be others beside them.
        log_prob: Log density of x, unnormalised: `(n, dim)` to `(n,)`. Twice differentiable, where derivatives are taken.
        n: How many.
        loc: `(dim,)`; None for zero.
        scale_tril: `(dim, dim)`, lower triangular; None for one.
        gradient: "reparam" or "score".
    """
    run = _run(rng, path, variables, log_prob, n, loc, scale_tril, gradient)
    backend = backend_of(run.x)
    xp = backend.xp
    known = xp.isfinite(run.log_w)
    x = xp.where(known[:, None], run.x, backend.stop(run.x))  # whoever scores it there gets no derivative that is one
    log_q = xp.where(known, run.log_prob - xp.where(known, run.log_w, xp.zeros_like(run.log_w)), xp.inf)
    return Draw(x, run.log_w, log_q)


def weighted(
    rng: Any, path: Path, variables: dict[str, Any], log_prob: LogProb, n: int, loc: Array, scale_tril: Array
) -> tuple[np.ndarray, np.ndarray]:
    """Points `(n, dim)` and log-weights `(n,)` on the host, a thousand paths at a time; see `draw`."""
    backend = backend_of(loc)
    size = min(n, _CHUNK)

    def chunk(rng: Any) -> tuple[Array, Array]:
        return _run(rng, path, variables, log_prob, size, loc, scale_tril, "reparam")[:2]

    chunk, found = backend.jit(chunk), []
    for key in backend.split(rng, -(-n // size)):
        found.append([np.asarray(backend.to_numpy(a), np.float64) for a in backend.stop(chunk(key))])
    x, log_w = (np.concatenate(parts)[:n] for parts in zip(*found, strict=True))
    return x, log_w


def placed(variables: dict[str, Any], loc: Array, scale_tril: Array) -> dict[str, Any]:
    """A path's arrays with those of x = loc + scale_tril w beside them.

    These are constant, and what trains is relative to them: a shift and scales of w, which move the base along.
    """
    xp = backend_of(loc).xp
    extra = {
        "params": {"shift": xp.zeros_like(loc), "log_scale": xp.zeros_like(loc)},
        "const": {"loc": loc, "scale_tril": scale_tril},
    }
    return {kind: {**variables[kind], **extra[kind]} for kind in extra}


def ends(variables: dict[str, Any]) -> tuple[Array, Array]:
    """The loc and scale_tril that arrays of `placed` stand for."""
    at = bind(variables)
    scale_tril = at["scale_tril"] * backend_of(at["loc"]).xp.exp(at["log_scale"])
    return at["loc"] + at["scale_tril"] @ at["shift"], scale_tril


def _run(
    rng: Any,
    path: Path,
    variables: dict[str, Any],
    log_prob: LogProb,
    n: int,
    loc: Array | None,
    scale_tril: Array | None,
    gradient: str,
) -> Run:
    """Paths, where they end in x, and the log density there."""
    at = Placed(log_prob, loc, scale_tril)
    scored = gradient == "score" and any(isinstance(m, Moves) and m.kernel not in UNADJUSTED for m in path.layers)
    run = path.forward(rng, variables, at, max(n, 2) if scored else n, attached=True)
    run = run._replace(x=at.there(run.x), log_prob=run.log_prob - at.log_det)
    if not scored:
        return run
    run = with_decisions(run)
    return run._replace(x=run.x[:n], log_w=run.log_w[:n], log_choice=run.log_choice[:n], log_prob=run.log_prob[:n])
