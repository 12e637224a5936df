"""A density of two angles, fitted by splines on the circle and by splines on the line.

The density is a ridge that winds once around the torus and two spots, one of them on the seam. On the line the angle is
2 pi sigmoid(u) - pi, and the seam is at infinity: what lies across it is in two pieces. Both flows have about as many
parameters, and the same training, by path gradients of the ELBO. The picture is torus.png: docs/images/torus.png when run
from the root with `--output docs/images`.

    python examples/torus.py --framework jax
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from fitting import Fitted, arguments, pyplot, save, start

from flowppl import flows
from flowppl.backend import backend_of

SPOTS = ((math.pi, 0.5), (1.2, -1.6))
NAMES = {"circle": "nsf(circular=(0, 1))", "line": "nsf() of the unboxed angles"}


def log_density(angles: Any) -> Any:
    """Unnormalised: the ridge psi = phi + 2.6, and two spots."""
    backend = backend_of(angles)
    phi, psi = angles[..., 0], angles[..., 1]
    cos = backend.xp.cos
    ridge = 6 * (cos(psi - phi - 2.6) - 1)
    spots = [8 * (cos(phi - a) + cos(psi - b) - 2) for a, b in SPOTS]
    return backend.logsumexp(backend.xp.stack([ridge, *(1.0 + s for s in spots)], axis=-1), axis=-1)


def unboxed(u: Any) -> tuple[Any, Any]:
    """The angles 2 pi sigmoid(u) - pi, and the logarithms of their slopes."""
    backend = backend_of(u)
    log_slope = math.log(2 * math.pi) - backend.softplus(u) - backend.softplus(-u)
    return math.pi * backend.xp.tanh(u / 2), backend.xp.sum(log_slope, axis=-1)


def log_density_on_the_line(u: Any) -> Any:
    """That of u."""
    angles, log_slope = unboxed(u)
    return log_density(angles) + log_slope


def main() -> None:
    """Trains, compares with quadrature, prints and draws."""
    options = arguments(__doc__, steps=2000, draws=100_000).parse_args()
    backend, rng = start(options.framework)
    grid, log_z = quadrature()
    targets = {"circle": log_density, "line": log_density_on_the_line}
    recipes = {
        "circle": flows.nsf(
            circular=(0, 1), layers=4, hidden=(32, 32)
        ),  # a layer moves both halves, one after the other
        "line": flows.nsf(layers=8, hidden=(32, 32)),
    }
    pictures = {"the density": np.exp(log_density(grid) - log_z)}
    print(f"{'':30}{'ELBO - log Z':>13}{'ESS':>8}{'parameters':>12}{'seconds':>9}")
    for name, target in targets.items():
        key, rng = backend.split(rng, 2)
        fitted = Fitted(backend, key, recipes[name](2)).maximise_elbo(target, options.steps)
        x, log_q = fitted.draws(options.draws)
        log_w = target(x) - log_q
        w = np.exp(log_w - log_w.max())
        elbo, ess = log_w.mean() - log_z, w.sum() ** 2 / (w**2).sum() / len(w)
        seconds = f"{fitted.seconds:.0f}"
        print(f"{NAMES[name]:30}{elbo:13.4f}{ess:8.1%}{fitted.num_params:12d}{seconds:>9}", flush=True)
        pictures[NAMES[name]] = np.exp(density(fitted, name, grid))
    picture(pictures, options.output)


def quadrature(n: int = 256) -> tuple[np.ndarray, float]:
    """Midpoints of a grid over the torus, and log Z: the sum is exact, to rounding, for so smooth a periodic function."""
    side = -math.pi + 2 * math.pi * (np.arange(n) + 0.5) / n
    grid = np.stack(np.meshgrid(side, side), axis=-1)
    values = log_density(grid)
    return grid, float(np.log(np.exp(values).mean()) + 2 * math.log(2 * math.pi))


def density(fitted: Fitted, name: str, grid: np.ndarray) -> np.ndarray:
    """The log density of a flow at the angles of the grid."""
    points = grid.reshape(-1, 2)
    if name == "circle":
        return fitted.log_prob(points).reshape(grid.shape[:-1])
    u = 2 * np.arctanh(points / math.pi)
    return (fitted.log_prob(u) - unboxed(u)[1]).reshape(grid.shape[:-1])


def picture(densities: dict[str, np.ndarray], folder: Path) -> None:
    """The densities side by side, with a part of the neighbouring sheets around them."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(densities), figsize=(9, 3.2), sharey=True, dpi=100)
    top = densities["the density"].max()
    for axes, (name, values) in zip(panels, densities.items(), strict=True):
        sheets = np.tile(values, (3, 3))
        extent = (-3 * math.pi, 3 * math.pi) * 2
        axes.imshow(sheets, origin="lower", extent=extent, cmap="magma", vmin=0, vmax=top, interpolation="bilinear")
        for edge in (-math.pi, math.pi):
            axes.axvline(edge, color="white", lw=0.6, ls=":")
            axes.axhline(edge, color="white", lw=0.6, ls=":")
        axes.set(title=name, xlim=(-4.7, 4.7), ylim=(-4.7, 4.7), xlabel="$\\phi$")
        axes.set_xticks([-math.pi, 0, math.pi], ["$-\\pi$", "0", "$\\pi$"])
        axes.set_yticks([-math.pi, 0, math.pi], ["$-\\pi$", "0", "$\\pi$"])
    panels[0].set_ylabel("$\\psi$")
    save(figure, folder / "torus.png")


if __name__ == "__main__":
    main()
