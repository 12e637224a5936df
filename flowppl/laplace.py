"""Laplace's approximation, found robustly: where a flow guide starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

from flowppl.errors import NonFiniteError

Array = np.ndarray
_SAMPLES = 64  # draws that compare the candidates by their ELBO
_MAX_CANDIDATES = 8
_MAX_NEWTON_STEPS = 20


def laplace(
    value_and_score: Callable[[Array], tuple[Array, Array]],
    hessian: Callable[[Array], Array],
    start: Array,
) -> tuple[Array, Array]:
    """Finds a normal approximation N(loc, scale_tril scale_tril^T) of an unnormalised density.

    L-BFGS climbs from `start`. The mode is not always where a normal fits best: it may lie at infinity (the neck of a funnel).
    So points along the climb are candidates too; at each, the negative Hessian with its spectrum made positive gives a covariance,
    and the candidate with the highest ELBO, estimated from common draws, wins. Zhang et al. 2022, "Pathfinder", choose likewise.
    From there Newton's method goes on while the ELBO rises: where coordinates differ in scale by many orders, L-BFGS stops short.

    Args:
        value_and_score: Maps points `(n, d)` to log densities `(n,)` and gradients `(n, d)`, in float64.
        hessian: Maps a point `(d,)` to the Hessian of the log density `(d, d)`.
        start: A point `(d,)` of finite log density.

    Returns:
        loc `(d,)` and scale_tril `(d, d)`.

    Raises:
        NonFiniteError: the log density or its gradient at `start` is not finite.
    """
    start = np.asarray(start, np.float64)
    value, score = value_and_score(start[None])
    if not (np.isfinite(value).all() and np.isfinite(score).all()):
        raise NonFiniteError(
            f"the model's log density at the start is {value[0]:g} and its gradient has "
            f"{int((~np.isfinite(score)).sum())} non-finite entries of {score.size}: choose another init_loc_fn "
            "(init_to_value, init_to_median) or check the model for parameters outside their support"
        )
    noise = np.random.default_rng(0).standard_normal((_SAMPLES, start.size))

    def fit(loc: Array) -> _Fit:
        scale_tril = _scale_tril(hessian(loc))
        if scale_tril is None:
            return _Fit(-np.inf, loc, 0.1 * np.eye(loc.size))
        values, _ = value_and_score(loc + noise @ scale_tril.T)
        return _Fit(np.mean(values) + np.log(np.diagonal(scale_tril)).sum(), loc, scale_tril)

    best = max(map(fit, _climb(value_and_score, start)), key=lambda found: found.elbo)
    for _ in range(_MAX_NEWTON_STEPS):
        found = fit(_newton_step(value_and_score, best))
        if not found.elbo > best.elbo:
            break
        best = found
    return best.loc, best.scale_tril


class _Fit(NamedTuple):
    """A normal approximation and its ELBO up to a constant; -inf where there is none."""

    elbo: float
    loc: Array
    scale_tril: Array


def _newton_step(value_and_score: Callable, fit: _Fit) -> Array:
    """The end of a Newton step, halved until the log density rises; the same point if it does not."""
    value, score = value_and_score(fit.loc[None])
    step = fit.scale_tril @ (fit.scale_tril.T @ score[0])
    ends = fit.loc + step * 0.5 ** np.arange(10)[:, None]
    better = np.flatnonzero(value_and_score(ends)[0] > value[0])
    return ends[better[0]] if better.size else fit.loc


def _climb(value_and_score: Callable, start: Array) -> list[Array]:
    """The start, the end and points between them on the path of L-BFGS."""
    path = [start]

    def objective(x: Array) -> tuple[float, Array]:
        value, score = value_and_score(x[None])
        finite = np.isfinite(value[0]) and np.isfinite(score).all()
        return (-float(value[0]), -score[0]) if finite else (1e300, np.zeros_like(x))

    minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        callback=lambda x: path.append(x.copy()),
        options={"maxiter": 500, "maxcor": 20},
    )
    keep = np.unique(np.geomspace(1, len(path), min(_MAX_CANDIDATES, len(path))).round().astype(int)) - 1
    return [path[i] for i in keep]


def _scale_tril(hessian: Array) -> Array | None:
    """The Cholesky factor of the inverse of the negative Hessian, its eigenvalues made positive; None if it is not finite."""
    if not np.isfinite(hessian).all():
        return None
    unit = 1 / np.sqrt(np.maximum(np.abs(np.diagonal(hessian)), 1e-12))  # free of the coordinates' units
    values, vectors = np.linalg.eigh(-(hessian + hessian.T) / 2 * np.outer(unit, unit))
    floor = 1e-8 * np.abs(values).max()
    root = vectors / np.sqrt(np.maximum(np.abs(values), floor))
    # (unit * root)(unit * root)^T is the covariance; the QR factor of its root is the Cholesky factor, squaring nothing.
    upper = np.linalg.qr((unit[:, None] * root).T, mode="r")
    return (upper * np.sign(np.diagonal(upper))[:, None]).T
