"""One verdict on a fitted guide, with the numbers behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from flowppl import weights
from flowppl.diagnostics.compare import Evidence, Restart, Reweighting, evidence, restart, reweighting
from flowppl.diagnostics.hmc import Density, Drift, drift
from flowppl.diagnostics.report import report
from flowppl.errors import DimensionError, NonFiniteError

Array = np.ndarray
TOLERANCE = 0.3  # posterior sds by which no mean may be off
_CHAINS = 256
_DRIFT_ALARM = 0.01  # false alarms of the HMC check
_ALARMS = 0.001  # false alarms of all comparisons of means together


@dataclass(frozen=True)
class Verdict:
    """What `diagnose` found; `str` of it is a table.

    Attributes:
        verdict: "good": use the draws as they are. "usable after reweighting": use them with the smoothed weights
            `evidence.weight`. "not to be trusted": neither.
        reasons: Why it is not better, each with its number; empty if good.
        advice: What to do next, in a line.
        names: The coordinates, `d` unconstrained ones first, then the constrained ones that differ from them.
        num_draws: How many draws there were.
        num_undefined: How many of them were left out: not finite, or of weight NaN or inf.
        evidence: ELBO, log evidence, effective sample size, k-hat and smoothed weights.
        reweighting: What reweighting changes in each coordinate of `names`.
        drift: The HMC check, over the first `d` of the names; None if it could not run.
        mean_error: A bound on the error of the raw means in posterior sds, by all checks that could tell; one for each name. inf
            where none could.
        restarts: The other runs beside this one.
    """

    verdict: str
    reasons: tuple[str, ...]
    advice: str
    names: tuple[str, ...]
    num_draws: int
    num_undefined: int
    evidence: Evidence
    reweighting: Reweighting
    drift: Drift | None
    mean_error: Array
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

    No check sees everything, so "good" takes the word of two that are blind to different things:

    - The weights p / q see every region where q draws, however far apart, and nothing elsewhere. Where their k-hat allows, they must
      bound the error of every mean below 0.3 posterior sds. A narrow q, or one that misses a tail, may have even weights.
    - HMC leaves the draws for where p has mass, but only as far as it gets in some thirty transitions. Draws must not drift, and
      the mean to which the chains tend must be within 0.3 sds too: slow chains, in a funnel or between modes, prove nothing.
    - Other runs of the fit, `restarts`, see modes that this one missed, if they found them.

    "Usable after reweighting" takes reliable weights whose means are precise, and no drift of the reweighted draws. Under an exact q
    the alarms are false in about 1 % (drift) and 0.1 % (means) of the calls, if there are draws enough for the bounds, about 1000.

    Not seen by any check: a mode, far from all draws, that no run has found. All can then look perfect.

    Args:
        draws: Independent draws `(n, d)` of q in unconstrained coordinates.
        log_weights: Their log p - log q `(n,)`, where -inf counts as weight zero; draws of weight NaN or inf are left out and counted.
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
    x, log_w, defined = _defined("draws", draws, log_weights)
    dim = x.shape[1]
    others = [_defined(f"restarts[{i}]", *pair, dim=dim)[:2] for i, pair in enumerate(restarts)]
    names, wide = _columns(names, draws.shape[1], x, constrained or {}, defined)
    rng = np.random.default_rng(seed)
    own = evidence(log_w)
    table = reweighting(wide, own.weight if own.weight.any() else np.full(len(x), 1 / len(x)))
    hmc = _drift(value_and_score, x, log_w, own, rng) if value_and_score and own.weight.any() else None
    runs = tuple(restart(own, x, evidence(w), y) for y, w in others)
    return _judge(names, len(draws), int((~defined).sum()), own, table, hmc, runs)


def _judge(
    names: tuple[str, ...], n: int, undefined: int, own: Evidence, table: Reweighting, hmc: Drift | None, runs: tuple[Restart, ...]
) -> Verdict:
    """The verdict from the numbers."""
    z = -float(ndtri(_ALARMS / 2 / len(names)))
    unit = table.sd if not own.reliable else np.minimum(table.sd, table.sd_reweighted)
    if hmc:
        unit = np.concatenate([np.minimum(unit[: hmc.sd.size], hmc.sd), unit[hmc.sd.size :]])
    unit = np.maximum(unit, np.finfo(np.float64).tiny)
    raw: list[str] = []  # against the draws as they are
    weighted: list[str] = []  # against the reweighted ones
    modes: list[str] = []  # against both

    if undefined:
        (raw if undefined < 0.01 * n else modes).append(f"{undefined} of {n} draws have no finite log-weight")
    if not own.reliable:
        weighted.append(f"k-hat is {own.khat:.2f}: above {own.khat_limit:.2f} weights are not reliable")
    blur = z * table.mean_reweighted_error / unit
    if own.reliable and blur.max() > TOLERANCE:
        weighted.append(f"an effective sample size of {own.ess:.0f} leaves the reweighted {_worst(names, blur)} sds unsure")

    bound = np.full(len(names), np.inf)
    if own.reliable:
        bound = np.abs(table.mean - table.mean_reweighted) / unit + blur
        if bound.max() > TOLERANCE:
            raw.append(f"by the weights, the raw {_worst(names, bound)} sds off at worst")
        for label, shift, score, limit in (
            ("sd", table.sd_shift, table.sd_z, 0.25),
            ("5 % tail", table.tail_shift[0], table.tail_z[0], 0.04),
            ("95 % tail", table.tail_shift[1], table.tail_z[1], 0.04),
        ):
            bad = np.where(np.abs(score) > z, np.abs(shift), 0.0)
            if bad.max() > limit:
                j = int(bad.argmax())
                raw.append(f"reweighting changes the {label} of {names[j]} by {-shift[j]:+.2g} (z = {-score[j]:.1f})")
    if hmc is None:
        raw.append("there is no HMC check, which looks where q does not draw")
    else:
        d = hmc.sd.size
        reach = np.abs(table.mean[:d] - hmc.mean) / unit[:d] + z * hmc.mean_error / unit[:d]
        bound[:d] = np.where(np.isinf(bound[:d]), reach, np.maximum(bound[:d], reach))
        if reach.max() > TOLERANCE:
            raw.append(f"by HMC, the raw {_worst(names, reach)} sds off at worst")
        if hmc.pvalue < _DRIFT_ALARM:
            kind = "reweighted" if own.reliable else "raw"
            modes.append(f"{kind} draws drift in {d}-dimensional HMC: p = {hmc.pvalue:.2g}, log p by {hmc.log_density:+.2g}")
        gap = np.abs(table.mean_reweighted[:d] - hmc.mean)
        bad = np.where(gap > z * np.hypot(hmc.mean_error, table.mean_reweighted_error[:d]), gap / unit[:d], 0.0)
        if bad.max() > TOLERANCE:
            weighted.append(f"HMC leaves the reweighted {_worst(names, bad)} sds off")

    for i, run in enumerate(runs):
        apart = run.differs(z)
        if apart.any():
            shift = np.where(apart, np.abs(run.mean_shift), 0.0)
            modes.append(f"restart {i} has the {_worst(names, shift)} sds elsewhere")
        gain = run.evidence.log_evidence - own.log_evidence
        error = float(np.hypot(run.evidence.log_evidence_error, own.log_evidence_error))
        if own.reliable and run.evidence.reliable and gain > 0.1 + 4 * error:
            modes.append(f"restart {i} finds more mass: log evidence {gain:+.2f} beyond an error of {error:.2f}")
        better = run.evidence.elbo - own.elbo
        if better > 0.5 + 4 * float(np.hypot(run.evidence.elbo_error, own.elbo_error)):
            raw.append(f"restart {i} fits better: ELBO {better:+.2f}")

    if not modes and not raw:
        verdict, reasons = "good", []
    elif not modes and not weighted:
        verdict, reasons = "usable after reweighting", raw
    else:
        verdict, reasons = "not to be trusted", modes + weighted + raw
    return Verdict(
        verdict, tuple(reasons), "advice", names, n, undefined, own, table, hmc, bound, runs
    )


def _worst(names: Sequence[str], sds: Array) -> str:
    j = int(sds.argmax())
    return f"mean of {names[j]} {sds[j]:.2f}"


def _defined(what: str, draws: Array, log_w: Array, dim: int | None = None) -> tuple[Array, Array, Array]:
    """The draws and log-weights that are defined, in float64, and a mask of them."""
    draws, log_w = np.asarray(draws, np.float64), np.asarray(log_w, np.float64)
    if draws.ndim != 2 or 0 in draws.shape or (dim is not None and draws.shape[1] != dim):
        raise DimensionError(f"{what} has shape {draws.shape}: expected (n, {'d' if dim is None else dim})")
    if log_w.shape != draws.shape[:1]:
        raise DimensionError(f"log-weights of {what} have shape {log_w.shape}: expected {draws.shape[:1]}, one for each draw")
    defined = np.isfinite(draws).all(1) & ~np.isnan(log_w) & (log_w != np.inf)
    if defined.sum() < 2:
        raise NonFiniteError(f"{what}: {defined.sum()} of {len(draws)} are finite and have a log-weight: at least two are needed")
    return draws[defined], log_w[defined], defined


def _columns(
    names: Sequence[str] | None, dim: int, x: Array, sites: Mapping[str, Array], defined: Array
) -> tuple[tuple[str, ...], Array]:
    """Names and columns: the unconstrained coordinates, then those of the sites that differ from them."""
    labels = [f"x[{i}]" for i in range(dim)] if names is None else list(names)
    if len(labels) != dim:
        raise DimensionError(f"names has length {len(labels)}: expected {dim}, one for each coordinate of the draws")
    columns = list(x.T)
    for site, values in sites.items():
        values = np.asarray(values, np.float64)
        if values.shape[:1] != defined.shape:
            raise DimensionError(f"constrained[{site!r}] has shape {values.shape}: expected ({defined.size}, ...)")
        for index in np.ndindex(values.shape[1:]):
            column = values[(slice(None), *index)][defined]
            if not any(np.array_equal(column, c) for c in x.T):
                columns.append(column)
                labels.append(site + (f"[{', '.join(map(str, index))}]" if index else ""))
    return tuple(labels), np.stack(columns, 1)


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
