"""Laplace's approximation, and the normal of the highest ELBO around it, from log densities and scores alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from scipy.special import gammaincinv

Array = np.ndarray
_WIDTH = 0.1  # of the differences of scores, in standard deviations: narrow for curvature, wide for float32
_MAX_SCALE = 1e7  # a direction in which the density is flat has to end somewhere
_MAX_STEPS = 30
_MAX_CLIMB = 20
_PATIENCE = 3  # steps of Newton without a higher ELBO
_SAMPLES = 128  # at least so many draws estimate an ELBO's gradient
_GAIN = 1e-5  # of the ELBO, a step, for each dimension: less is none
_BLOCK = 1000  # points at a time


class NormalApproximation(NamedTuple):
    """A normal approximation N(loc, scale_tril scale_tril^T) of an unnormalised density.

    Attributes:
        loc: `(d,)`.
        scale_tril: `(d, d)`, lower triangular with a positive diagonal.
        elbo: E log p(x) + the entropy of the normal, estimated from draws that only chose among the last few.
        num_evals: How many points the density and its gradient were evaluated at to find it.
        others: Those of other modes that were found on the way.
    """

    loc: Array
    scale_tril: Array
    elbo: float
    num_evals: int
    others: tuple[NormalApproximation, ...] = ()


class Normal(Protocol):
    """Anything with draws and the log-determinant of a root of its covariance."""

    @property
    def log_det(self) -> float: ...

    def draws(self, noise: Array) -> Array: ...


class Evaluations:
    """A log density with its score, counted; -inf and a zero score wherever one of them is not finite.

    Args:
        value_and_score: Maps points `(n, d)` to log densities `(n,)` and gradients `(n, d)`.
    """

    def __init__(self, value_and_score: Callable[[Array], tuple[Array, Array]]) -> None:
        self._value_and_score = value_and_score
        self.num_evals = 0

    def __call__(self, points: Array) -> tuple[Array, Array]:
        """Log densities `(n,)` and scores `(n, d)` at points `(n, d)`."""
        self.num_evals += len(points)
        blocks = [self._value_and_score(points[i : i + _BLOCK]) for i in range(0, len(points), _BLOCK)]
        values, scores = map(np.concatenate, zip(*blocks, strict=True))
        fine = np.isfinite(values) & np.isfinite(scores).all(-1)
        return np.where(fine, values, -np.inf), np.where(fine[:, None], scores, 0.0)

    def elbo(self, normal: Normal, noise: Array) -> float:
        """The mean of log p - log q at the draws that standard normal ones `(n, d)` become: no noise where they are parallel."""
        log_q = -0.5 * (noise * noise).sum(-1) - normal.log_det - 0.5 * noise.shape[1] * np.log(2 * np.pi)
        return float(np.mean(self(normal.draws(noise))[0] - log_q))


class Root(NamedTuple):
    """N(loc, root root^T): loc `(d,)` and any square root of the covariance, `(d, d)`."""

    loc: Array
    root: Array

    def draws(self, noise: Array) -> Array:
        """Points `(n, d)` from standard normal ones."""
        return self.loc + noise @ self.root.T

    @property
    def log_det(self) -> float:
        """The log-determinant of the root."""
        return float(np.linalg.slogdet(self.root)[1])

    def scale_tril(self) -> Array:
        """The Cholesky factor of the covariance: a QR decomposition of the root, which squares nothing."""
        upper = np.linalg.qr(self.root.T, mode="r")
        return (upper * np.where(np.diagonal(upper) < 0, -1.0, 1.0)[:, None]).T


def antithetic(rng: np.random.Generator, samples: int, d: int, orthogonal: bool = True) -> Array:
    """Standard normal draws `(n, d)` with their negatives, of n >= samples.

    Orthogonal ones come in turned frames, each at a quantile of the normal's radius: means of quadratic functions are exact. There
    are at least 2 d of them.
    """
    if not orthogonal:
        half = rng.standard_normal((samples // 2, d))
        return np.concatenate([half, -half])
    frames = -(-samples // (2 * d))
    squares = 2 * gammaincinv(d / 2, (np.arange(frames) + 0.5) / frames)
    radii = np.sqrt(squares * (d / squares.mean()))
    half = np.concatenate([r * np.linalg.qr(rng.standard_normal((d, d)))[0] for r in radii])
    return np.concatenate([half, -half])


def newton(density: Evaluations, start: Root, noise: Array) -> Root:
    """The Laplace approximation of the highest ELBO on the way of damped Newton steps to a mode.

    The Hessian comes from differences of scores along the columns of the last approximation's root. In these coordinates it is
    near the identity, whatever the units and correlations, and the differences lose nothing to rounding. Its spectrum is made
    positive; where it vanishes the scale grows a hundredfold a step, up to a bound.

    Args:
        density: The density.
        start: The first approximation.
        noise: Standard normal draws `(n, d)`, for the ELBO.
    """
    (loc, root), best, elbo, worse = start, start, density.elbo(start, noise), 0
    values, scores = density(loc[None])
    for _ in range(_MAX_STEPS):
        precision = _precision(density, loc, root)
        if precision is None:
            root = 0.1 * root
            continue
        root = _bounded(root @ _inverse_root(precision))
        reached = density.elbo(Root(loc, root), noise)
        worse = worse + 1 if -np.inf < reached <= elbo + 1e-3 else 0
        if reached > elbo:
            best, elbo = Root(loc, root), reached
        slope = root.T @ scores[0]
        if worse == _PATIENCE:
            break
        ends = loc + (0.25 ** np.arange(8))[:, None] * (root @ slope)
        end_values, end_scores = density(ends)
        i = int(np.argmax(end_values))
        if end_values[i] > values[0]:
            loc, values, scores = ends[i], end_values[[i]], end_scores[[i]]
    return best


def climb_elbo(density: Evaluations, start: Root, rng: np.random.Generator, diagonal: bool = False) -> Root:
    """Climbs the ELBO over all normals by damped natural-gradient steps, on common draws.

    With x = loc + root z: loc += root P^-1 E[root^T score] and root <- root P^-1/2, where P = -E[z (root^T score)^T] is the
    expected negative Hessian in whitened coordinates, by Stein's identity. Draws in orthogonal frames, with their negatives, make
    the step exact for a normal density. Opper & Archambeau 2009, "The variational Gaussian approximation revisited".

    Args:
        density: The density.
        start: Where it starts.
        rng: Of the draws.
        diagonal: Takes P to be diagonal, for many dimensions.
    """
    noise = antithetic(rng, _SAMPLES, start.loc.size, orthogonal=not diagonal)
    best, trial, elbo, damping = start, start, float(-np.inf), 1.0
    for _ in range(_MAX_CLIMB):
        values, scores = density(trial.draws(noise))
        reached = float(np.mean(values)) + trial.log_det
        if reached > elbo:
            small = reached - elbo < max(1e-3, _GAIN * best.loc.size)
            best, elbo = trial, reached
            if small:
                break
            whitened, axes = scores @ best.root, best.root
            precision = -(noise * whitened).mean(0)
            if not diagonal:
                full = -(noise.T @ whitened) / len(noise)
                precision, vectors = np.linalg.eigh((full + full.T) / 2)
                axes = axes @ vectors
            precision = np.clip(np.abs(precision), 0.1, 10.0)
            slope = (scores @ axes).mean(0)
        elif not np.isfinite(elbo) or damping < 0.1:
            break
        else:
            damping *= 0.5
        trial = Root(best.loc + damping * axes @ (slope / precision), _bounded(axes * precision ** (-damping / 2)))
    return best


def _precision(density: Evaluations, loc: Array, root: Array) -> Array | None:
    """-root^T Hessian root `(d, d)`, from central differences; None where the density ends."""
    values, scores = density(np.concatenate([loc + _WIDTH * root.T, loc - _WIDTH * root.T]))
    if not np.isfinite(values).all():
        return None
    ahead, behind = np.split(scores, 2)
    precision = (behind - ahead) @ root / (2 * _WIDTH)
    return (precision + precision.T) / 2


def _inverse_root(precision: Array) -> Array:
    """C with C C^T the inverse of a matrix whose spectrum, in units of its diagonal, is made positive."""
    unit = 1 / np.sqrt(np.maximum(np.abs(np.diagonal(precision)), 1e-4))
    values, vectors = np.linalg.eigh(precision * np.outer(unit, unit))
    return unit[:, None] * vectors / np.sqrt(np.maximum(np.abs(values), 1e-4))


def _bounded(root: Array) -> Array:
    return root / np.maximum(np.linalg.norm(root, axis=0) / _MAX_SCALE, 1.0)
