"""Scores of the fits against the reference posteriors, as a table and as pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
from models.data import load_reference

from comparison.fits import Fit

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"AutoNormal": "tab:gray", "AutoIAFNormal": "tab:orange", "AutoFlow": "tab:cyan", "AutoFlow path": "tab:blue"}
# What the corner plots show: site and index, with a scale on which the posterior is easy to see.
CORNERS = {
    "eight_schools": {
        "mu": lambda d: d["mu"],
        "log tau": lambda d: np.log(d["tau"]),
        "theta A": lambda d: d["theta"][:, 0],
        "theta C": lambda d: d["theta"][:, 2],
    },
    "sparse_logistic": {
        "log tau": lambda d: np.log(d["tau"]),
        "log lam 1": lambda d: np.log(d["lam"][:, 0]),
        "z 1": lambda d: d["z"][:, 0],
        "beta 1": lambda d: d["tau"] * d["lam"][:, 0] * d["z"][:, 0],
        "beta 4": lambda d: d["tau"] * d["lam"][:, 3] * d["z"][:, 3],
    },
}


@dataclass(frozen=True)
class Score:
    """One row of the table.

    Attributes:
        elbo: Mean log weight, with its standard error `elbo_se`.
        khat: Pareto shape of the weights' tail: above 0.7, importance weighting does not mend the guide.
        ess: Kish effective sample size of the weights, in percent of the draws. Blind to what the guide never visits.
        mean_error: Largest error of a posterior mean over all scalars, in reference standard deviations.
        sd_error: Largest error of a posterior standard deviation, likewise.
        seconds: Training time.
    """

    model: str
    ppl: str
    guide: str
    elbo: float
    elbo_se: float
    khat: float
    ess: float
    mean_error: float
    sd_error: float
    seconds: float


def score(fit: Fit) -> Score:
    """Scores one fit. The errors are the guide's own, without importance weights."""
    log_w = np.where(np.isfinite(fit.log_weights), fit.log_weights, -1e10)
    weights = np.exp(log_w - log_w.max())
    ess = 100 * weights.sum() ** 2 / (weights**2).sum() / len(weights)
    reference = load_reference(fit.model)
    mean_error, sd_error = (
        max(float(np.max(np.abs(of(fit.draws[site]) - truth[site]) / reference.sd[site])) for site in fit.draws)
        for of, truth in ((lambda x: x.mean(0), reference.mean), (lambda x: x.std(0), reference.sd))
    )
    elbo, elbo_se = float(log_w.mean()), float(log_w.std() / len(log_w) ** 0.5)
    return Score(
        *(fit.model, fit.ppl, fit.guide, elbo, elbo_se, khat(log_w), float(ess), mean_error, sd_error, fit.seconds)
    )


def khat(log_w: np.ndarray) -> float:
    """Pareto shape of the largest weights. Vehtari et al. 2024, "Pareto smoothed importance sampling"."""
    try:
        from arviz_stats.base import array_stats  # ArviZ 1: takes the negative of log weights
    except ModuleNotFoundError:
        from arviz import psislw

        return float(psislw(log_w.copy())[1])
    return float(array_stats.psislw(-log_w)[1])


def table(scores: list[Score]) -> str:
    """The scores as an aligned Markdown table."""
    header = ["model", "PPL", "guide", "ELBO", "k-hat", "ESS %", "mean error", "sd error", "seconds"]
    rows = [
        [
            *(s.model, s.ppl, s.guide, f"{s.elbo:.2f} ± {s.elbo_se:.2f}", f"{s.khat:.2f}", f"{s.ess:.1f}"),
            *(f"{s.mean_error:.2f}", f"{s.sd_error:.2f}", f"{s.seconds:.1f}"),
        ]
        for s in scores
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        words = [c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(words) + " |"

    rule = "|".join("-" * (w + 2) if i < 3 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def records(scores: list[Score]) -> list[dict]:
    """The scores for a JSON file."""
    return [asdict(s) for s in scores]


def plot_elbo(fits: list[Fit], path: Path) -> None:
    """ELBO of every guide during training, smoothed, one panel for each PPL."""
    ppls = sorted({fit.ppl for fit in fits})
    figure, axes = plt.subplots(1, len(ppls), figsize=(5.5 * len(ppls), 4), sharey=True, squeeze=False)
    best = max(-np.median(fit.losses[-len(fit.losses) // 10 :]) for fit in fits)
    worst = min(-np.median(fit.losses[-len(fit.losses) // 10 :]) for fit in fits)
    for axis, ppl in zip(axes[0], ppls, strict=True):
        for fit in (f for f in fits if f.ppl == ppl):
            width = max(1, len(fit.losses) // 50)
            smooth = np.convolve(-fit.losses, np.ones(width) / width, "valid")
            axis.plot(np.arange(len(smooth)) + width, smooth, color=COLORS[fit.guide], label=fit.guide)
        axis.set(title=ppl, xlabel="step", ylim=(worst - (best - worst) - 1, best + 0.15 * (best - worst)))
    axes[0, 0].set_ylabel(f"ELBO, {fits[0].model.replace('_', ' ')}")
    axes[0, -1].legend(loc="lower right")
    _save(figure, path)


def plot_corner(fits: list[Fit], path: Path) -> None:
    """Marginals and pairs of a few coordinates: the reference filled, each guide of one PPL as lines and dots."""
    reference = load_reference(fits[0].model)
    axes_of = CORNERS[fits[0].model]
    columns = {label: of(reference.draws) for label, of in axes_of.items()}
    limits = {label: np.quantile(x, [0.001, 0.999]) for label, x in columns.items()}
    n = len(axes_of)
    figure, axes = plt.subplots(n, n, figsize=(2.1 * n, 2.1 * n))
    for i, row in enumerate(axes_of):
        for j, column in enumerate(axes_of):
            axis = axes[i, j]
            axis.set(xticks=[], yticks=[], xlim=limits[column])
            if j > i:
                axis.set_visible(False)
            elif i == j:
                bins = np.linspace(*limits[row], 40)
                axis.hist(columns[row], bins, density=True, color="0.85", label="NUTS, long run")
                for fit in fits:
                    style = {"histtype": "step", "color": COLORS[fit.guide], "label": fit.guide}
                    axis.hist(axes_of[row](fit.draws), bins, density=True, **style)
            else:
                axis.plot(columns[column][::5], columns[row][::5], ",", color="0.6")
                for fit in fits:
                    x, y = (axes_of[label](fit.draws)[:700] for label in (column, row))
                    axis.plot(x, y, ".", markersize=1.5, alpha=0.5, color=COLORS[fit.guide])
                axis.set_ylim(limits[row])
            if i == n - 1:
                axis.set_xlabel(column)
            if j == 0 and i > 0:
                axis.set_ylabel(row)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", title=f"{fits[0].model.replace('_', ' ')}, {fits[0].ppl}")
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
