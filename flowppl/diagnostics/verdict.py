"""One verdict on a fitted guide, with the numbers behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flowppl import weights
from flowppl.diagnostics.compare import Evidence, Restart, Reweighting, evidence, restart, reweighting
from flowppl.diagnostics.hmc import Density, Drift, drift
from flowppl.diagnostics.judge import judge
from flowppl.diagnostics.report import report
from flowppl.errors import DimensionError, NonFiniteError

Array = np.ndarray
_CHAINS = 256


@dataclass(frozen=True)
class Verdict:
    """What `diagnose` found; `str` of it is a table.

    Attributes:
        verdict: "good": use the draws as they are. "usable after reweighting": use them with the smoothed weights
            `evidence.weight`. "not to be trusted": neither.
        reasons: Why it is not better, each with its number; empty if good.
        advice: What to do next, in a line.
        mean_error: A bound `(len(names),)` on the error of each raw mean, in posterior sds, by the weights and by HMC.
        names: The coordinates, `d` unconstrained ones first, then the constrained ones that differ from them.
        num_draws: How many draws there were.
        num_undefined: How many of them were left out: not finite, or of weight NaN or inf.
        evidence: ELBO, log evidence, effective sample size, k-hat and weights, smoothed where k-hat allows.
        reweighting: What reweighting changes in each coordinate of `names`.
        drift: The HMC check, over the first `d` of the names; None if it could not run.
        restarts: The other runs beside this one.
    """

    verdict: str
    reasons: tuple[str, ...]
    advice: str
    mean_error: Array
    names: tuple[str, ...]
    num_draws: int
    num_undefined: int
    evidence: Evidence
    reweighting: Reweighting
    drift: Drift | None
    restarts: tuple[Restart, ...]

    def __str__(self) -> str:
        return report(self)


def diagnose(
    draws: Array,
    log_weights: Array,
    names: Sequence[str] | None = None,
    *,
    constrained: Mapping[str, Array] | None = None,
    restarts: Sequence[tuple[Array, Array]] = (),
    value_and_score: Density | None = None,
    seed: int = 0,
) -> Verdict:
    """Judges whether draws of a guide q can stand for the posterior p.

    "Good" means that no raw mean is off by more than 0.3 posterior sds. No check sees everything, so it takes the word of two that
    are blind to different things:

    - The weights p / q see every region where q draws, however far apart, and nothing elsewhere: a q that is too narrow, or misses
      a tail, may have even weights. They must bound the error of every mean below 0.25 posterior sds, their k-hat must not exceed
      one, and reweighting must not change spreads and tails visibly.
    - HMC leaves the draws for where p has mass, but only as far as some thirty transitions carry it, hence not to another mode. No
      draws may drift, and the means to which the chains tend must confirm the bound. Slow chains prove nothing.
    - Other runs of the fit, `restarts`, see modes that this one missed if they found them.

    "Usable after reweighting" takes a reliable k-hat, reweighted means that are precise, and no drift of reweighted draws; where
    HMC is slow, it leans on the weights alone. Under an exact q, about 1 % of the calls raise a false alarm of drift and 0.1 % one
    of reweighting; but where HMC is slow, as between modes or in a strong funnel, "usable" is the best verdict, and such
    bounds take about 1000 draws.

    Not seen by any check: a mode, far from all draws, that no run has found. Everything can then look perfect.

    Args:
        draws: Independent draws `(n, d)` of q in unconstrained coordinates.
        log_weights: Their log p - log q `(n,)`. -inf counts as weight zero; draws of weight NaN or inf are left out and counted.
        names: Names of the d coordinates, such as "theta[3]"; by default "x[0]", ...
        constrained: The same draws in constrained space, `(n, ...)` by site. Their means are compared too.
        restarts: Draws `(m, d)` and log-weights `(m,)` of other runs.
        value_and_score: Maps points `(m, d)` to log p `(m,)` and its gradients `(m, d)`, in float64. Without it there is no HMC
            check, and nothing is "good".
        seed: Of the HMC check.

    Raises:
        DimensionError: an array has a shape that does not fit the draws.
        NonFiniteError: fewer than two draws are defined.

    References:
        Yao et al. 2018, "Yes, but did it work?: Evaluating variational inference". Dhaka et al. 2021, "Challenges and opportunities
        in high-dimensional variational inference".

    Example:
        >>> import numpy as np
        >>> from flowppl.diagnostics import diagnose
        >>> draws = np.random.default_rng(0).standard_normal((2000, 2))
        >>> result = diagnose(draws, np.zeros(2000), value_and_score=lambda u: (-(u**2).sum(1) / 2, -u))
        >>> result.verdict
        'good'
    """
    labels, wide = _columns(np.asarray(draws, np.float64), names, constrained or {})
    wide, log_w = _defined("draws", wide, log_weights)
    x = wide[:, : np.shape(draws)[1]]
    own = evidence(log_w)
    table = reweighting(wide, own.weight if own.weight.any() else np.full(len(x), 1 / len(x)))
    hmc = None
    if value_and_score and own.weight.any():
        hmc = _drift(value_and_score, x, log_w, own, np.random.default_rng(seed))
    runs = []
    for i, (y, w) in enumerate(restarts):
        y, w = _defined(f"restarts[{i}]", y, w, dim=x.shape[1])
        runs.append(restart(own, x, evidence(w), y))
    n, undefined = len(draws), len(draws) - len(x)
    judgement = judge(labels, undefined / n, own, table, hmc, runs)
    return Verdict(*judgement, labels, n, undefined, own, table, hmc, tuple(runs))


def _columns(draws: Array, names: Sequence[str] | None, sites: Mapping[str, Array]) -> tuple[tuple[str, ...], Array]:
    """Names and columns `(n, ...)`: the unconstrained coordinates, then those of the sites that vary and differ from them."""
    if draws.ndim != 2 or 0 in draws.shape:
        raise DimensionError(f"draws has shape {draws.shape}: expected (n, d)")
    labels = [f"x[{i}]" for i in range(draws.shape[1])] if names is None else list(names)
    if len(labels) != draws.shape[1]:
        raise DimensionError(
            f"names has length {len(labels)}: expected {draws.shape[1]}, one for each coordinate of the draws"
        )
    columns = list(draws.T)
    seen = {c.tobytes() for c in columns}
    for site, values in sites.items():
        values = np.asarray(values, np.float64)
        if values.shape[:1] != draws.shape[:1]:
            raise DimensionError(f"constrained[{site!r}] has shape {values.shape}: expected ({len(draws)}, ...)")
        for index in np.ndindex(values.shape[1:]):
            column = values[(slice(None), *index)]
            # Some coordinates are fixed, such as those above a triangular matrix's diagonal.
            if np.any(column != column[0]) and column.tobytes() not in seen:
                columns.append(column)
                labels.append(site + (f"[{', '.join(map(str, index))}]" if index else ""))
    return tuple(labels), np.stack(columns, 1)


def _defined(what: str, draws: Array, log_w: Array, dim: int | None = None) -> tuple[Array, Array]:
    """The draws that are finite and have a log-weight, and their log-weights, in float64."""
    draws, log_w = np.asarray(draws, np.float64), np.asarray(log_w, np.float64)
    if draws.ndim != 2 or (dim is not None and draws.shape[1] != dim):
        raise DimensionError(f"{what} has shape {draws.shape}: expected (n, {dim})")
    if log_w.shape != draws.shape[:1]:
        raise DimensionError(
            f"log-weights of {what} have shape {log_w.shape}: expected {draws.shape[:1]}, one for each draw"
        )
    defined = np.isfinite(draws).all(1) & ~np.isnan(log_w) & (log_w != np.inf)
    if defined.sum() < 2:
        raise NonFiniteError(
            f"{what}: {defined.sum()} of {len(draws)} are finite and have a log-weight: two are needed at least"
        )
    return draws[defined], log_w[defined]


def _drift(value_and_score: Density, x: Array, log_w: Array, own: Evidence, rng: np.random.Generator) -> Drift:
    """The HMC check from reweighted draws where the weights allow, from raw ones otherwise."""
    alive = np.flatnonzero(log_w > -np.inf)
    if own.reliable:
        with np.errstate(divide="ignore"):
            at = weights.resample_systematic(rng, np.log(own.weight), n=min(_CHAINS, len(x)))
        w, size = own.weight, own.ess
    else:
        at = rng.choice(alive, min(_CHAINS, alive.size), replace=False)
        w, size = np.where(log_w > -np.inf, 1 / alive.size, 0.0), float(alive.size)
    loc = w @ x
    sd = np.sqrt(w @ (x - loc) ** 2)
    sd = np.where(sd > 0, sd, 1.0)
    scaled = (x - loc) / sd
    correlation = (scaled * w[:, None]).T @ scaled
    # Any matrix will do as a metric; with few draws, the identity is better than noise.
    dim = x.shape[1]
    shrink = 1e-10 if size > 5 * dim else dim / (dim + size)
    scale_tril = sd[:, None] * np.linalg.cholesky((1 - shrink) * correlation + shrink * np.eye(dim))
    return drift(value_and_score, x[at], np.unique(at, return_inverse=True)[1], loc, scale_tril, rng)
