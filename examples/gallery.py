"""A small picture of each kind of flow: where it takes the lines of a grid, on top of its density.

Each flow is fitted for a few hundred steps, by path gradients of the ELBO, to one bent density with two modes (the flow of
angles to one that winds around the torus). The pictures are those of docs/flows.md when run from the root with

    python examples/gallery.py --output docs/images/gallery
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from fitting import Fitted, arguments, pyplot, save, start

from flowppl import flows
from flowppl.backend import backend_of
from flowppl.flows import Mixture, Recipe

NETWORKS = dict(layers=4, hidden=(32, 32))
RECIPES: dict[str, Recipe] = {
    "affine": flows.affine(),
    "nsf": flows.nsf(**NETWORKS),
    "nsf-circular": flows.nsf(circular=(0, 1), **NETWORKS),
    "realnvp": flows.realnvp(**NETWORKS),
    "maf": flows.maf(**NETWORKS),
    "iaf": flows.iaf(**NETWORKS),
    "iaf-spline": flows.iaf(transformer="spline", **NETWORKS),
    "iaf-deep_sigmoid": flows.iaf(transformer="deep_sigmoid", **NETWORKS),
    "iaf-sum_of_squares": flows.iaf(transformer="sum_of_squares", **NETWORKS),
    "planar": flows.planar(layers=8),
    "radial": flows.radial(layers=8),
    "sylvester": flows.sylvester(layers=8),
    "residual": flows.residual(layers=6, hidden=(32, 32)),
    "bnaf": flows.bnaf(),
    "ttf": flows.ttf(**NETWORKS),
    "mixture": flows.affine(base=Mixture(4)),
}
REST = {name: flows.get(name) for name in flows.names() if name not in RECIPES}  # registered since


def main() -> None:
    """Fits and draws."""
    recipes = RECIPES | REST
    parser = arguments(__doc__, steps=400)
    parser.add_argument("--only", nargs="+", choices=recipes, default=list(recipes), metavar="NAME")
    options = parser.parse_args()
    backend, _ = start(options.framework)
    for name in options.only:
        began = time.process_time()
        circular = "circular" in name
        target = log_ridge if circular else log_crescents
        fitted = Fitted(backend, start(options.framework)[1], recipes[name](2))
        fitted.maximise_elbo(target, options.steps, particles=128, rate=1e-2)
        picture(fitted, circular, options.output / f"{name}.png")
        print(f"{name:20} {time.process_time() - began:5.0f} seconds of CPU time", flush=True)


def log_crescents(x: Any) -> Any:
    """Two crescents on a circle. Rezende and Mohamed 2015, table 1, the first potential."""
    backend = backend_of(x)
    xp = backend.xp
    radius = xp.sqrt(xp.sum(x * x, axis=-1) + 1e-6)
    sides = [-0.5 * ((x[..., 0] - side) / 0.6) ** 2 for side in (-2, 2)]
    return -0.5 * ((radius - 2) / 0.4) ** 2 + backend.logsumexp(xp.stack(sides, axis=-1), axis=-1)


def log_ridge(angles: Any) -> Any:
    """A ridge with two summits that winds once around the torus."""
    cos, phi, psi = backend_of(angles).xp.cos, angles[..., 0], angles[..., 1]
    return 4 * cos(psi - phi - 2) + cos(2 * phi)


def picture(fitted: Fitted, circular: bool, path: Path) -> None:
    """The density of the flow as shading, and the images of lines of the base's coordinates."""
    plt = pyplot()
    reach = math.pi if circular else 3.6
    side = (np.arange(160) + 0.5) / 80 * reach - reach
    density = np.exp(fitted.log_prob(np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)).reshape(160, 160))
    figure = plt.figure(figsize=(2.2, 2.2), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(density, origin="lower", extent=(-reach, reach, -reach, reach), cmap="Blues", vmax=1.1 * density.max())
    lines = fitted.push(grid(math.pi if circular else 3.0))
    if circular:  # a line that leaves at one side comes back at the other
        lines[:, 1:][np.abs(np.diff(lines, axis=1)).max(axis=-1) > math.pi] = np.nan
    axes.plot(lines[..., 0].T, lines[..., 1].T, color="0.15", lw=0.55)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    axes.set_axis_off()
    save(figure, path, colors=32)
    plt.close(figure)


def grid(reach: float, lines: int = 13, points: int = 400) -> np.ndarray:
    """Lines across and along, `(2 lines, points, 2)`."""
    fine, at = (np.linspace(-0.999 * reach, 0.999 * reach, n) for n in (points, lines))
    across = np.stack(np.meshgrid(fine, at), axis=-1)
    return np.concatenate([across, across[..., ::-1]])


if __name__ == "__main__":
    main()
