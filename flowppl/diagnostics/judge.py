"""From the numbers of all checks to a verdict: what speaks against the raw draws, against the reweighted ones, against both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from flowppl.diagnostics.compare import TINY, Evidence, Restart, Reweighting
from flowppl.diagnostics.hmc import Drift

Array = np.ndarray
_TOLERANCE = 0.25  # posterior sds: no mean may be off by 0.3, and the bounds leave out some of slow chains' bias
_SD_TOLERANCE = 0.25  # of the log sd
_TAIL_TOLERANCE = 0.04  # of the probability of a 5 % tail
_DRIFT_ALARM = 0.01  # false alarms of the HMC check
_ALARMS = 0.001  # false alarms of all coordinates' comparisons together


class Judgement(NamedTuple):
    """The fields of a `Verdict` that follow from the others."""

    verdict: str
    reasons: tuple[str, ...]
    advice: str
    mean_error: Array


def judge(
    names: Sequence[str],
    undefined: float,
    own: Evidence,
    table: Reweighting,
    hmc: Drift | None,
    runs: Sequence[Restart],
) -> Judgement:
    """Weighs the checks; `diagnose` says by which rules.

    Args:
        names: The coordinates of `table`; those of `hmc` come first.
        undefined: The share of draws that had to be left out.
        own: What the weights say.
        table: What reweighting changes.
        hmc: What HMC changes.
        runs: What other runs say.
    """
    z = -float(ndtri(_ALARMS / 2 / len(names)))
    unit = _unit(own, table, hmc)
    blur = _known(z * table.mean_reweighted_error / unit)
    by_weights = _known(np.abs(table.mean - table.mean_reweighted) / unit)
    bound = by_weights + blur
    raw: list[str] = []
    weighted: list[str] = []
    both = _against_runs(names, z, own, runs)

    if undefined:
        (both if undefined > 0.01 else raw).append(f"{undefined:.2%} of the draws have no finite log-weight")
    if not own.weight.any():
        both.append("the model has no density at any draw")
    elif not own.reliable:
        what = "the weights have no mean" if own.khat > 1 else f"weights are reliable up to {own.khat_limit:.2f}"
        (both if own.khat > 1 else weighted).append(f"k-hat is {own.khat:.2f}: {what}")
    elif blur.max() > _TOLERANCE:
        j = int(blur.argmax())
        weighted.append(f"the reweighted mean of {names[j]} is unsure by {blur[j]:.2f} sds")
    if bound.max() > _TOLERANCE:
        raw.append(_off("by the weights", names, by_weights, bound))
    if own.reliable:
        raw += _against_shape(names, z, table)

    if hmc is None:
        raw.append("there is no HMC check, which looks where the guide does not draw")
    else:
        d = hmc.mean.size
        gap = _known(np.abs(table.mean[:d] - hmc.mean) / unit[:d])
        reach = _known(gap + z * hmc.mean_error / unit[:d])
        bound[:d] = np.maximum(bound[:d], reach)
        if reach.max() > _TOLERANCE:
            raw.append(_off("by HMC", names, gap, reach))
        # Raw means have to be shown right, reweighted ones not to be shown wrong.
        gap = np.abs(table.mean_reweighted[:d] - hmc.mean) / unit[:d]
        gap = np.where(gap > z * np.hypot(hmc.mean_error, table.mean_reweighted_error[:d]) / unit[:d], gap, 0.0)
        if gap.max() > _TOLERANCE:
            weighted.append(f"HMC takes the reweighted mean of {names[int(gap.argmax())]} {gap.max():.2f} sds away")
        if hmc.pvalue < _DRIFT_ALARM:
            what = "reweighted" if own.reliable else "raw"
            both.append(f"HMC carries {what} draws away: p = {hmc.pvalue:.1g}, log p {hmc.log_density:+.2g} on average")

    for i, run in enumerate(runs):
        better = run.evidence.elbo - own.elbo
        if better > 0.5 + 4 * math.hypot(run.evidence.elbo_error, own.elbo_error):
            raw.append(f"restart {i} fits better: its ELBO is {better:.2f} higher")

    if not both and not raw:
        verdict, reasons = "good", []
    elif not both and not weighted:
        verdict, reasons = "usable after reweighting", raw
    else:
        verdict, reasons = "not to be trusted", both + weighted + raw
    return Judgement(verdict, tuple(reasons), _advice(verdict, undefined, own, hmc, runs, z, float(blur.max())), bound)


def _known(sds: Array) -> Array:
    """What overflowed counts as infinitely wrong."""
    return np.where(np.isnan(sds), np.inf, sds)


def _unit(own: Evidence, table: Reweighting, hmc: Drift | None) -> Array:
    """The posterior's sds: the smallest of those at hand, so that errors look large rather than small."""
    unit = np.minimum(table.sd, table.sd_reweighted) if own.reliable else table.sd.copy()
    if hmc:
        unit[: hmc.sd.size] = np.minimum(unit[: hmc.sd.size], hmc.sd)
    return np.maximum(unit, TINY)


def _against_shape(names: Sequence[str], z: float, table: Reweighting) -> list[str]:
    """Spreads and tails that reweighting changes both visibly and beyond their Monte-Carlo error."""
    reasons = []
    for what, shift, score, limit in (
        ("log sd", table.sd_shift, table.sd_z, _SD_TOLERANCE),
        ("lower 5 % tail", table.tail_shift[0], table.tail_z[0], _TAIL_TOLERANCE),
        ("upper 5 % tail", table.tail_shift[1], table.tail_z[1], _TAIL_TOLERANCE),
    ):
        size = np.where(np.abs(score) > z, np.abs(shift), 0.0)
        j = int(size.argmax())
        if size[j] > limit:
            reasons.append(f"reweighting changes the {what} of {names[j]} by {-shift[j]:+.2f} (z = {-score[j]:+.1f})")
    return reasons


def _against_runs(names: Sequence[str], z: float, own: Evidence, runs: Sequence[Restart]) -> list[str]:
    """Other runs that are elsewhere or find more mass."""
    reasons = []
    for i, run in enumerate(runs):
        size = np.where(run.differs(z), np.abs(run.mean_shift), 0.0)
        j = int(size.argmax())
        if size[j]:
            reasons.append(f"restart {i} has the mean of {names[j]} {size[j]:.2f} sds elsewhere")
        gain = run.evidence.log_evidence - own.log_evidence
        error = math.hypot(run.evidence.log_evidence_error, own.log_evidence_error)
        if own.reliable and run.evidence.reliable and gain > 0.1 + 4 * error:
            reasons.append(f"restart {i} finds more mass: its log evidence is {gain:.2f} higher, error {error:.2f}")
    return reasons


def _off(witness: str, names: Sequence[str], gap: Array, bound: Array) -> str:
    j = int(bound.argmax())
    return f"{witness}, the raw mean of {names[j]} is off by {gap[j]:.2f} sds, at worst by {bound[j]:.2f}"


def _advice(
    verdict: str, undefined: float, own: Evidence, hmc: Drift | None, runs: Sequence[Restart], z: float, blur: float
) -> str:
    n = own.weight.size
    if any(run.differs(z).any() for run in runs):
        return "`anneal`: the runs are in different modes, whose weights no single one can tell"
    if verdict == "good":
        return "use the draws; " + (
            "modes that no run found stay unseen"
            if runs
            else "a mode it missed stays unseen: pass restarts, fits from other seeds"
        )
    if verdict == "usable after reweighting":
        return "use the smoothed weights; more layers or longer training would help the raw draws"
    if undefined > 0.01 or not own.weight.any():
        return "find out where the model's log density is not finite, or the draws overflow"
    if own.reliable and 0.3 < blur < 1.5:
        return f"draw about {math.ceil(n * (blur / 0.2) ** 2 / 1000) * 1000} instead of {n}"
    if hmc and hmc.acceptance > 0.5 and hmc.persistence.max() < 0.5:
        return "NUTS: HMC moves well here; or more layers and longer training"
    return "`anneal`: HMC hardly moves here; or more layers, and NUTS to compare with"
