"""Flows fitted to draws from eight separate normals: how much of each lies on bridges between the modes.

A continuous map of one normal density joins what is separate, by bridges that are the fainter the steeper the map. Residual maps
have no preferred coordinates but a bounded slope, splines are steep where they need to be, and a mixture as the base could do
without bridges. The picture is modes.png: docs/images/modes.png when run from the root with `--output docs/images`.

    python examples/modes.py --framework jax
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from fitting import Fitted, arguments, pyplot, save, start

from flowppl import flows
from flowppl.bijections import Inverse
from flowppl.flows import Flow, Mixture

MODES = 2.5 * np.stack([np.cos(np.arange(8) * math.pi / 4), np.sin(np.arange(8) * math.pi / 4)], axis=1)
WIDTH = 0.2  # neighbouring modes are ten standard deviations apart
BRIDGE = 4.0  # a point so many standard deviations from every mode is on a bridge: of the truth, 0.03 %


def main() -> None:
    """Trains, compares with the truth, prints and draws."""
    options = arguments(__doc__, steps=3000, draws=50_000).parse_args()
    backend, rng = start(options.framework)
    data, test = draw_truth(50_000, 0), draw_truth(options.draws, 1)
    side = np.linspace(-3.6, 3.6, 240)
    grid = np.stack(np.meshgrid(side, side), axis=-1)
    pictures = {"the density": log_truth(grid.reshape(-1, 2))}
    print(f"{'':28}{'KL(p, q)':>9}{'+-':>8}{'on bridges':>12}{'parameters':>12}{'seconds':>9}")
    for name, flow in candidates().items():
        key, rng = backend.split(rng, 2)
        fitted = Fitted(backend, key, flow).maximise_likelihood(data, options.steps)
        ratio = log_truth(test) - fitted.log_prob(test)
        kl, error = ratio.mean(), ratio.std() / math.sqrt(len(ratio))
        far = distance(fitted.draws(options.draws)[0]) > BRIDGE * WIDTH
        seconds = f"{fitted.seconds:.0f}"
        print(f"{name:28}{kl:9.4f}{error:8.4f}{far.mean():12.2%}{fitted.num_params:12d}{seconds:>9}", flush=True)
        pictures[name] = fitted.log_prob(grid.reshape(-1, 2))
    picture({k: v.reshape(grid.shape[:-1]) for k, v in pictures.items()}, side, options.output)


def candidates() -> dict[str, Flow]:
    """Flows of about the same number of parameters."""
    residual = flows.residual(layers=8, hidden=(64, 64))(2)
    return {
        "splines": flows.nsf(layers=8, hidden=(56, 56))(2),
        # The other way round: the density in one pass, draws by fixed-point sweeps.
        "residual": replace(residual, bijection=Inverse(residual.bijection)),
        "splines on a mixture": flows.nsf(layers=8, hidden=(56, 56), base=Mixture(8))(2),
    }


def draw_truth(n: int, seed: int) -> np.ndarray:
    """Draws of the truth."""
    rng = np.random.default_rng(seed)
    return MODES[rng.integers(len(MODES), size=n)] + WIDTH * rng.standard_normal((n, 2))


def log_truth(x: np.ndarray) -> np.ndarray:
    """Its log density."""
    each = -0.5 * ((x[:, None] - MODES) ** 2).sum(-1) / WIDTH**2
    return np.logaddexp.reduce(each, axis=1) - math.log(len(MODES) * 2 * math.pi * WIDTH**2)


def distance(x: np.ndarray) -> np.ndarray:
    """From the nearest mode."""
    return np.sqrt(((x[:, None] - MODES) ** 2).sum(-1)).min(axis=1)


def picture(log_densities: dict[str, np.ndarray], side: np.ndarray, folder: Path) -> None:
    """Log densities down to e^-8 of the truth's top, where the bridges show."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(log_densities), figsize=(10, 2.9), sharey=True, dpi=100)
    top = log_densities["the density"].max()
    for axes, (name, values) in zip(panels, log_densities.items(), strict=True):
        extent = (side[0], side[-1]) * 2
        image = axes.imshow(values - top, origin="lower", extent=extent, cmap="magma", vmin=-8, vmax=0)
        axes.set_title(name, fontsize=10)
    figure.colorbar(image, ax=panels, label="log density, from the top", shrink=0.85)
    save(figure, folder / "modes.png")


if __name__ == "__main__":
    main()
