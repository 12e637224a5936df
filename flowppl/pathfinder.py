"""Multi-path Pathfinder: a normal approximation of an unnormalised density, found robustly, where a flow guide starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_triangular

from flowppl.errors import NonFiniteError
from flowppl.laplace import Evaluations, NormalApproximation, Root, antithetic, climb_elbo, newton

Array = np.ndarray
NUM_PATHS = 8
_SPREADS = (2.0, 5.0, 10.0, 30.0)  # half-widths of the starts, in turn; 2 is Stan's
_ROUNDS = 16  # of starts, until as many as there are paths have a density
_MAX_STEPS = 300
_MAX_TRIALS = 20  # of a line search
_HISTORY = 10  # pairs of L-BFGS
_SNAPSHOTS = {1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233}  # steps whose approximations compete, beside the last
_DRAWS = 16  # for the ELBO of one of them
_FINAL_DRAWS = 256
_DENSE = 2000  # the largest dimension in which a normal of the highest ELBO is sought among all of them
_POLISHED = 500  # the largest in which modes are, several of them
_MODES = 3  # how many are polished
_POWERS = (0.3, 0.5, 0.7, 0.85, 1.0)  # of the density, on the way from a wide one to itself
_WORTH = 1.0  # nats by which what that finds has to be better: a normal elsewhere, not the same one


def pathfinder(
    value_and_score: Callable[[Array], tuple[Array, Array]], start: Array, seed: int | Sequence[int] = 0
) -> NormalApproximation:
    """Finds a normal approximation of an unnormalised density.

    L-BFGS climbs from `start` and from overdispersed points at once. Along each path its inverse Hessian, low rank plus diagonal,
    makes normals that compete by their ELBO, for the mode is not always where a normal fits best: it may lie at infinity (the neck
    of a funnel). Zhang et al. 2022, "Pathfinder: Parallel quasi-Newton variational inference", algorithms 1 to 4. In up to 500
    dimensions the best are polished: Newton steps with dense curvature, then steps along the natural gradient of the ELBO; in up
    to 2000 the best one takes the latter alone, beyond with a diagonal scale. Where a path runs into a spike of little mass, all of
    that stays there: so the best one also climbs the ELBO of low powers of the density, whose mass is where volume is, and from
    there that of higher ones. Mandt et al. 2016, "Variational tempering".

    Args:
        value_and_score: Maps points `(n, d)` to log densities `(n,)` and gradients `(n, d)`, best in float64.
        start: A point `(d,)`.
        seed: Of the starts and draws.

    Raises:
        NonFiniteError: the log density or its gradient is finite at no start.
    """
    density, rng = Evaluations(value_and_score), np.random.default_rng(seed)
    start = np.asarray(start, np.float64)
    starts = _starts(density, start, rng)
    dense, polished = start.size <= _DENSE, start.size <= _POLISHED
    noise = antithetic(rng, _DRAWS, start.size, orthogonal=False)
    paths = [max(path, key=lambda scored: scored[0]) for path in _paths(density, starts, noise) if path]
    ranked = [normal for _, normal in sorted(paths, key=lambda scored: -scored[0])]
    found = [Root(starts[0], np.eye(start.size)), *(normal.dense() for normal in ranked[:1])]
    if not polished:
        found += [climb_elbo(density, found[-1], rng, diagonal=not dense)]
    noise = antithetic(rng, 2 * _DRAWS, start.size, polished)
    modes: list[Root] = []
    for normal in ranked if polished else ():
        if len(modes) < _MODES and not any(_near(normal.loc, mode) for mode in modes):
            laplace = newton(density, normal.dense(), noise)
            modes.append(climb_elbo(density, laplace, rng))
            found += [laplace, modes[-1]]
    noise = antithetic(rng, _FINAL_DRAWS, start.size, dense)
    best = _best(density, found, noise)
    if polished:
        wide = _best(density, [_tempered(density, Root(best.loc, best.scale_tril), rng.spawn(1)[0])], noise)
        best = wide if wide.elbo > best.elbo + _WORTH else best
    apart: list[Root] = [Root(best.loc, best.scale_tril)]
    for mode in modes:
        if not any(_near(mode.loc, other) and _near(other.loc, mode) for other in apart):
            apart.append(mode)
    others = [NormalApproximation(m.loc, m.scale_tril(), density.elbo(m, noise), 0) for m in apart[1:]]
    return best._replace(others=tuple(m for m in others if np.isfinite(m.elbo)), num_evals=density.num_evals)


def one_turn(value_and_score: Callable[[Array], tuple[Array, Array]], angles: Array, centre: Array) -> Callable:
    """The density with each angle counted once, where it is periodic on the whole line: there, any normal gains by growing.

    The window s(u + pi) - s(u - pi) = sinh(pi) / (cosh(u) + cosh(pi)), s the logistic function, adds up to one over all turns.

    Args:
        value_and_score: As for `pathfinder`.
        angles: Which coordinates are angles, `(d,)`.
        centre: The middle of the turn, `(d,)`.
    """

    def evaluate(points: Array) -> tuple[Array, Array]:
        values, scores = value_and_score(points)
        u = np.where(angles, points - centre, 0.0)
        small = np.exp(-np.abs(u))
        sums = (1 + small**2) / 2 + np.cosh(np.pi) * small  # exp(-|u|) (cosh(u) + cosh(pi)), which does not overflow
        window = np.log(np.sinh(np.pi)) - np.abs(u) - np.log(sums)
        return values + window @ angles, scores - np.sign(u) * (1 - small**2) / (2 * sums)

    return evaluate


def _best(density: Evaluations, normals: list[Root], noise: Array) -> NormalApproximation:
    """The best of a few by fresh draws."""
    for shrink in 0.1 ** np.arange(8):  # no normal fits a density that ends, but the draws of a small one stay inside
        smaller = [Root(loc, shrink * root) for loc, root in normals]
        elbo, i = max((density.elbo(n, noise), i) for i, n in enumerate(smaller))
        if np.isfinite(elbo):
            break
    return NormalApproximation(smaller[i].loc, smaller[i].scale_tril(), elbo, density.num_evals)


def _tempered(density: Evaluations, start: Root, rng: np.random.Generator) -> Root:
    """The normal to which those of the powers of the density lead."""
    for power in _POWERS:

        def powered(points: Array, power: float = power) -> tuple[Array, Array]:
            values, scores = density(points)
            return power * values, power * scores

        start = climb_elbo(Evaluations(powered), start, rng)
    return start


def _near(loc: Array, mode: Root) -> bool:
    distance = np.linalg.lstsq(mode.root, loc - mode.loc)[0]
    return bool(distance @ distance < 4 * loc.size)


def _starts(density: Evaluations, start: Array, rng: np.random.Generator) -> Array:
    """The start and points around it and around zero, as far as the density is finite there: `(NUM_PATHS, d)`."""
    points = np.empty((0, start.size))
    # A start that far out, such as the median of a prior over scales of all sizes, may be where nothing else is.
    far = np.abs(start).max(initial=0.0) > max(_SPREADS)
    for k in range(_ROUNDS):
        spread: Array = np.resize(_SPREADS, (NUM_PATHS // 2, 1)) * 0.5 ** (k // 2)
        half = spread * rng.uniform(-1, 1, (NUM_PATHS // 2, start.size))
        turns = k + far * np.arange(NUM_PATHS // 2)[:, None]
        centre = start * (turns % 2 == 0)
        trial = np.concatenate([centre + half, centre - half])  # opposite points seldom share a basin
        if k == 0:
            trial[0] = start
        points = np.concatenate([points, trial[np.isfinite(density(trial)[0])]])
        if len(points) >= NUM_PATHS:
            break
    if not len(points):
        raise NonFiniteError(
            f"the model's log density or its gradient is not finite at the start, nor at {density.num_evals - 1} points "
            "around it and around zero: choose another init_loc_fn (init_to_value, init_to_median) or check the model for "
            "parameters outside their support"
        )
    return np.resize(points[:NUM_PATHS], (NUM_PATHS, start.size))


class _LowRank(NamedTuple):
    """N(loc, T T^T) with T = diag(scale) (I + basis core basis^T): scale `(d,)`, basis `(d, k)` with orthonormal columns."""

    loc: Array
    scale: Array
    basis: Array
    core: Array

    def draws(self, noise: Array) -> Array:
        return self.loc + self.scale * (noise + noise @ self.basis @ self.core @ self.basis.T)

    @property
    def log_det(self) -> float:
        return float(np.log(self.scale).sum() + np.linalg.slogdet(np.eye(len(self.core)) + self.core)[1])

    def dense(self) -> Root:
        return Root(self.loc, self.draws(np.eye(self.loc.size)).T - self.loc[:, None])


def _low_rank(x: Array, score: Array, alpha: Array, steps: Array, changes: Array) -> _LowRank:
    """The normal of one iterate of L-BFGS: its inverse Hessian H, and x + H score. Zhang et al. 2022, algorithms 3 and 4.

    Args:
        x: `(d,)`.
        score: `(d,)`.
        alpha: The diagonal of H without the pairs, `(d,)`.
        steps: `(m, d)`.
        changes: Those of the negative score, scaled with the steps such that their products are one, `(m, d)`.
    """
    scale = np.sqrt(alpha)
    upper = np.triu(steps @ changes.T)
    middle = np.eye(len(steps)) + (changes * alpha) @ changes.T
    inverse = solve_triangular(upper, np.eye(len(steps)))
    gamma = np.block([[np.zeros_like(upper), -inverse], [-inverse.T, inverse.T @ middle @ inverse]])
    basis, r = np.linalg.qr(np.concatenate([changes * scale, steps / scale]).T)
    values, vectors = np.linalg.eigh(np.eye(len(r)) + r @ gamma @ r.T)
    core = vectors * (np.sqrt(np.maximum(values, 1e-16)) - 1) @ vectors.T
    normal = _LowRank(x, scale, basis, core)
    root_score = scale * score
    root_score = root_score + basis @ (core @ (basis.T @ root_score))  # T^T score
    return normal._replace(loc=normal.draws(root_score[None])[0])


def _paths(density: Evaluations, x: Array, noise: Array) -> list[list[tuple[float, _LowRank]]]:
    """L-BFGS from every row of x `(NUM_PATHS, d)` in lockstep, which batches evaluations; normals along each path with ELBOs."""
    value, score = density(x)
    alpha = np.ones_like(x)
    pairs: list[tuple[Array, Array, Array]] = []
    found: list[list[tuple[float, _LowRank]]] = [[] for _ in x]
    alive: Array = np.ones(len(x), bool)

    def snapshot(path: int) -> None:
        mine = [(s[path], y[path]) for s, y, kept in pairs if kept[path]]
        if mine:
            normal = _low_rank(x[path], score[path], alpha[path], *map(np.array, zip(*mine, strict=True)))
            found[path].append((density.elbo(normal, noise), normal))

    for step in range(1, _MAX_STEPS + 1):
        direction = _direction(score, alpha, pairs)
        if step == 1:
            direction /= np.maximum(np.linalg.norm(direction, axis=-1, keepdims=True), 1.0)
        moved, (new_value, new_score) = _line_search(density, x, value, score, direction, alive)
        s, y = moved - x, score - new_score
        product = (s * y).sum(-1)
        kept = product > 1e-14 * np.linalg.norm(s, axis=-1) * np.linalg.norm(y, axis=-1)
        s, y = (np.where(kept[:, None], a / np.sqrt(np.where(kept, product, 1.0))[:, None], 0.0) for a in (s, y))
        alpha = np.where(kept[:, None], _diagonal(alpha, s, y), alpha)
        pairs = [*pairs[-_HISTORY + 1 :], (s, y, kept)]
        gained = new_value - value
        x, value, score = moved, new_value, new_score
        ends = alive & ~(gained > 1e-9 * np.maximum(1.0, 1e-4 * np.abs(value)))
        alive &= ~ends
        for path in np.flatnonzero(ends | (alive & (step in _SNAPSHOTS or step == _MAX_STEPS))).tolist():
            snapshot(path)
        if not alive.any():
            break
    return found


def _direction(score: Array, alpha: Array, pairs: list) -> Array:
    """H score `(paths, d)`, by the two loops of L-BFGS; a pair of zeros changes nothing."""
    q, weights = score.copy(), []
    for s, y, _ in reversed(pairs):
        weights.append((s * q).sum(-1, keepdims=True))
        q -= weights[-1] * y
    r = alpha * q
    for (s, y, _), weight in zip(pairs, reversed(weights), strict=True):
        r += (weight - (y * r).sum(-1, keepdims=True)) * s
    return r


def _diagonal(alpha: Array, s: Array, y: Array) -> Array:
    """The update of the inverse Hessian's diagonal for s^T y = 1. Gilbert & Lemaréchal 1989; Zhang et al. 2022, algorithm 3."""
    a = (y * y * alpha).sum(-1, keepdims=True)
    c = (s * s / alpha).sum(-1, keepdims=True)
    with np.errstate(all="ignore"):
        new = 1 / (a / alpha + y * y - a * (s / alpha) ** 2 / c)
    return np.where(np.isfinite(new) & (new > 0), new, alpha)


def _line_search(
    density: Evaluations, x: Array, value: Array, score: Array, direction: Array, alive: Array
) -> tuple[Array, tuple[Array, Array]]:
    """Weak Wolfe conditions by bisection, on each path; one that finds no rise stays. Lewis & Overton 2013, section 2."""
    slope = (score * direction).sum(-1)
    low, high, t = np.zeros(len(x)), np.full(len(x), np.inf), np.ones(len(x))
    best, best_value, best_score = x.copy(), value.copy(), score.copy()
    open_ = alive & (slope > 0)
    for _ in range(_MAX_TRIALS):
        if not open_.any():
            break
        trial = np.where(open_[:, None], x + t[:, None] * direction, best)
        new_value, new_score = density(trial)
        rises = new_value > value + 1e-4 * t * slope
        steep = (new_score * direction).sum(-1) > 0.9 * slope
        take = open_ & rises
        best[take], best_value[take], best_score[take] = trial[take], new_value[take], new_score[take]
        low, high = np.where(open_ & rises, t, low), np.where(open_ & ~rises, t, high)
        open_ &= ~(rises & ~steep)
        # A point without density lies far off: come back faster.
        down = np.where(np.isneginf(new_value), 0.1, 0.5)
        t = np.where(np.isfinite(high), low + down * (high - low), 2 * t)
    return best, (best_value, best_score)
