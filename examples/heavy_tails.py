"""Tails of three flows fitted to draws whose first coordinate is normal, and whose second has the tails of a Student-t of df 2.

    x_1 = u,  x_2 = v + u^2,  u ~ Normal(0, 1),  v ~ StudentT(2)

A flow keeps the tails of its base as long as its maps are affine far out. So on the normal base they are too light, whatever
was seen; a base with learned degrees of freedom, or learned tails at the flow's end, have them right. The picture is
heavy_tails.png: docs/images/heavy_tails.png when run from the root with `--output docs/images`.

    python examples/heavy_tails.py --framework jax
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from fitting import Fitted, arguments, pyplot, save, start

from flowppl import flows
from flowppl.bijections import Chain, LULinear
from flowppl.flows import Flow, Normal, Product, StudentT

SIZE = dict(layers=4, hidden=(32, 32))
COLORS = {"normal base": "C0", "adaptive base": "C1", "tail transform": "C2"}


def main() -> None:
    """Trains, measures the tails, prints and draws."""
    options = arguments(__doc__, steps=3000).parse_args()
    backend, rng = start(options.framework)
    data = draw_truth(20_000, 0)
    test, many = draw_truth(100_000, 1), draw_truth(1_000_000, 2)
    print(f"{'':16}{'df of x_1':>10}{'df of x_2':>10}{'KL(p, q)':>10}{'learned df':>16}{'seconds':>9}")
    print(f"{'truth':16}{hill(many[:, 0]):10.1f}{hill(many[:, 1]):10.2f}{0:10.3f}{'inf, 2':>16}")
    draws = {}
    for name, flow in candidates().items():
        key, rng = backend.split(rng, 2)
        fitted = Fitted(backend, key, flow).maximise_likelihood(data, options.steps)
        x, _ = fitted.draws(len(many))
        kl = np.mean(log_truth(test) - fitted.log_prob(test))
        seconds = f"{fitted.seconds:.0f}"
        row = f"{name:16}{hill(x[:, 0]):10.1f}{hill(x[:, 1]):10.2f}{kl:10.3f}{learned(fitted):>16}{seconds:>9}"
        print(row, flush=True)
        draws[name] = x
    picture(many, draws, options.output)


def candidates() -> dict[str, Flow]:
    """The three flows: splines on a normal base, on one with a tail of its own for the second coordinate, and with learned tails."""
    splines = flows.nsf(
        affine=False, linear=False, base=Product((Normal(), StudentT(5.0, trainable=True)), (1, 1)), **SIZE
    )
    adaptive = splines(2)
    # The splines are the identity far out, and the last layer must not carry the heavy coordinate into the light one.
    end = LULinear(2, light=1)
    return {
        "normal base": flows.nsf(**SIZE)(2),
        "adaptive base": replace(adaptive, bijection=Chain((*adaptive.bijection.bijections[:-1], end))),
        "tail transform": flows.ttf(**SIZE)(2),
    }


def draw_truth(n: int, seed: int) -> np.ndarray:
    """Draws of the truth."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal(n)
    return np.stack([u, rng.standard_t(2, n) + u**2], axis=1)


def log_truth(x: np.ndarray) -> np.ndarray:
    """Its log density; that of a Student-t of two degrees of freedom is (2 + v^2)^(-3/2)."""
    v = x[:, 1] - x[:, 0] ** 2
    return -0.5 * x[:, 0] ** 2 - 0.5 * math.log(2 * math.pi) - 1.5 * np.log(2 + v**2)


def hill(x: np.ndarray, share: float = 1e-3) -> float:
    """The index a of tails Pr(|x| > t) ~ t^-a, from the largest draws. Hill 1975."""
    largest = np.sort(np.abs(x))[-int(share * len(x)) - 1 :]
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
        axes.set(xlabel=f"t, for $x_{i + 1}$", xlim=(0.3, (30, 3e4)[i]), ylim=(1e-6, 1.2))
    panels[0].set(ylabel="Pr(|x| > t)", title="a normal coordinate")
    panels[1].set(title="a Student-t coordinate, df 2")
    panels[1].legend(frameon=False)
    save(figure, folder / "heavy_tails.png")


if __name__ == "__main__":
    main()
