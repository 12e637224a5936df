"""Tails of three flows fitted to draws whose first coordinate is normal, and whose second has the tails of a Student-t of df 2.

    x_1 = u,  x_2 = v + 2 sin(2 u),  u ~ Normal(0, 1),  v ~ StudentT(2)

A flow keeps the tails of its base as long as its maps are affine far out. So on the normal base splines imitate the tails as far
as there are data, and beyond they end; others have a base with learned degrees of freedom, or learned tails at the flow's end. The
picture is heavy_tails.png: docs/images/heavy_tails.png when run from the root with `--output docs/images`.

    python examples/heavy_tails.py --framework jax
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from fitting import Fitted, arguments, pyplot, save, start

from flowppl import flows
from flowppl.flows import Flow, Normal, Product, StudentT

SIZE = dict(layers=4, hidden=(32, 32))
COLORS = {"normal base": "C0", "adaptive base": "C1", "tail transform": "C2"}


def main() -> None:
    """Trains, measures the tails, prints and draws."""
    options = arguments(__doc__, steps=3000, draws=10_000_000).parse_args()
    backend, rng = start(options.framework)
    data, many = draw_truth(20_000, 0), draw_truth(options.draws, 1)
    test = many[:100_000]
    print(f"{'':16}{'x_1':>8}{'x_2':>8}{'x_2 beyond':>12}{'learned':>14}{'KL(p, q)':>10}{'seconds':>9}")
    row("truth", many, "inf, 2", 0.0, 0.0)
    draws = {}
    for name, flow in candidates(hill(data[:, 1], 1e-2)).items():
        key, rng = backend.split(rng, 2)
        fitted = Fitted(backend, key, flow).maximise_likelihood(data, options.steps)
        draws[name], _ = fitted.draws(len(many))
        kl = np.mean(log_truth(test) - fitted.log_prob(test))
        row(name, draws[name], learned(fitted), kl, fitted.seconds)
    picture(many, draws, options.output)


def row(name: str, x: np.ndarray, learned: str, kl: float, seconds: float) -> None:
    """Prints the degrees of freedom that the tails look like, of x_2 also where no data were, and the rest."""
    tails = f"{hill(x[:, 0]):8.1f}{hill(x[:, 1]):8.2f}{hill(x[:, 1], 1e-5):12.2f}"
    print(f"{name:16}{tails}{learned:>14}{kl:10.4f}{seconds:9.0f}", flush=True)


def candidates(df: float) -> dict[str, Flow]:
    """Splines on a normal base, on one whose second coordinate has tails that start at `df`, and with learned tails behind them.

    The start is what the data's largest values say, as Laszkiewicz et al. 2022 do it.
    """
    base = Product((Normal(), StudentT(df, trainable=True)), (1, 1))
    return {
        "normal base": flows.nsf(**SIZE)(2),
        # Splines are the identity far out, and the last layer does not carry the heavy coordinate into the light one.
        "adaptive base": flows.nsf(base=base, light=1, affine=False, linear=False, **SIZE)(2),
        "tail transform": flows.ttf(**SIZE)(2),
    }


def draw_truth(n: int, seed: int) -> np.ndarray:
    """Draws of the truth."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal(n)
    return np.stack([u, rng.standard_t(2, n) + 2 * np.sin(2 * u)], axis=1)


def log_truth(x: np.ndarray) -> np.ndarray:
    """Its log density; that of a Student-t of two degrees of freedom is (2 + v^2)^(-3/2)."""
    v = x[:, 1] - 2 * np.sin(2 * x[:, 0])
    return -0.5 * x[:, 0] ** 2 - 0.5 * math.log(2 * math.pi) - 1.5 * np.log(2 + v**2)


def hill(x: np.ndarray, share: float = 1e-3) -> float:
    """The index a of tails Pr(|x| > t) ~ t^-a, from the largest draws. Hill 1975."""
    largest = np.sort(np.abs(x))[-max(int(share * len(x)), 2) - 1 :]
    return float(1 / np.mean(np.log(largest[1:] / largest[0])))


def learned(fitted: Fitted) -> str:
    """The degrees of freedom that the base learned, where it learns any."""
    base = fitted.flow.base
    if not isinstance(base, Product):
        return "-"
    df = base.bases[1].degrees_of_freedom(fitted.variables["params"]["base"][1])
    return f"inf, {float(df[0]):.2f}"


def picture(truth: np.ndarray, draws: dict[str, np.ndarray], folder: Path) -> None:
    """Pr(|x_i| > t) on axes where a power is a line."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, dpi=110)
    for i, axes in enumerate(panels):
        for name, x in {"truth": truth, **draws}.items():
            style = dict(color="black", lw=3, alpha=0.35) if name == "truth" else dict(color=COLORS[name], lw=1.3)
            above = np.sort(np.abs(x[:, i]))[::-1]
            ranks = np.unique(np.geomspace(1, len(above), 400).astype(int))
            axes.loglog(above[ranks - 1], ranks / len(above), label=name, **style)
        axes.set(xlabel=f"t, for $x_{i + 1}$", xlim=(0.3, (30, 1e4)[i]), ylim=(1e-7, 1.2))
    panels[0].set(ylabel="Pr(|x| > t)", title="a normal coordinate")
    panels[1].set(title="a Student-t coordinate, df 2")
    panels[1].legend(frameon=False)
    save(figure, folder / "heavy_tails.png")


if __name__ == "__main__":
    main()
