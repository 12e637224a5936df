"""A stochastic normalizing flow between two wells: maps carry the mass over, moves put it right, and weights know what is left.

A flow is smooth, and draws a bridge between two wells where there is none; moves alone stay in the well that they start in. In turn
they do what neither can. Wu, Koehler & Noe 2020, "Stochastic normalizing flows". The script trains a plain flow and one with
Metropolis moves on u(x, y) = -x / 2 - 6 x^2 + x^4 + y^2 / 2, prints what they know of its free energy and saves a picture:
docs/images/double_well.png when run from the root with `--output docs/images`.

    python examples/double_well.py --framework jax
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path as Folder
from typing import Any

import numpy as np

from flowppl import flows, weights
from flowppl.backend import get_backend
from flowppl.stochastic import Moves, Path, snf, train_path
from flowppl.training import Options

BLOCKS = 3
EDGES = np.linspace(-2.4, 2.4, 49)
CENTRES = (EDGES[1:] + EDGES[:-1]) / 2
GRID = np.linspace(-4, 4, 8001)
WELL = np.exp(0.5 * GRID + 6 * GRID**2 - GRID**4)
WELL /= np.trapezoid(WELL, GRID)
RIGHT = WELL[GRID > 0].sum() / WELL.sum()


def log_prob(x: Any) -> Any:
    """Log density of points `(n, 2)`, unnormalised, in units of kT."""
    return 0.5 * x[:, 0] + 6 * x[:, 0] ** 2 - x[:, 0] ** 4 - 0.5 * x[:, 1] ** 2


def main() -> None:
    """Trains both, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--framework", choices=["jax", "torch"], default="jax")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--draws", type=int, default=50_000)
    parser.add_argument("--output", type=Folder, default=Folder())
    options = parser.parse_args()
    backend = get_backend(options.framework)
    like = backend.asarray(backend.xp.zeros((), dtype=backend.xp.float32))
    maps = flows.realnvp(layers=4, hidden=(32, 32))
    moves = Moves("metropolis", repeats=20, step_size=0.25)
    paths = {"flow": snf([maps] * BLOCKS, dim=2), "stochastic flow": snf([maps, moves] * BLOCKS, dim=2)}

    print(
        f"{'':16} {'ESS':>5} {'F(left) - F(right)':>19} {'reweighted':>11}   exact {np.log(RIGHT / (1 - RIGHT)):.3f} kT"
    )
    found = {}
    for name, path in paths.items():
        training = Options(
            num_particles=256, max_steps=options.steps, chunk=max(options.steps // 6, 1), learning_rate=5e-3
        )
        variables, _ = train_path(path, path.init(backend.rng(0, like), like), log_prob, options=training)
        found[name] = (path, variables)
        x, w, log_w = draws(backend, path, variables, options.draws)
        left = [max(1 - p, 1e-9) for p in ((x > 0).mean(), w[x > 0].sum())]  # a flow may know one well alone
        difference = [np.log(1 / p - 1) for p in left]
        print(f"{name:16} {weights.ess(log_w) / len(x):5.0%} {difference[0]:19.3f} {difference[1]:11.3f}")
    picture(backend, found, options.draws, options.output)


def draws(backend: Any, path: Path, variables: Any, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where paths end along x, their weights, which add up to one, and log-weights."""
    like = flows.flow.exemplar(variables)
    run = backend.stop(backend.jit(lambda rng: path.forward(rng, variables, log_prob, n))(backend.rng(1, like)))
    log_w = np.asarray(backend.to_numpy(run.log_w), np.float64)
    return np.asarray(backend.to_numpy(run.x))[:, 0], weights.normalize(log_w), log_w


def picture(backend: Any, found: dict[str, Any], n: int, folder: Folder) -> None:
    """The densities along the path, layer by layer, and both free energies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    way, *energies = figure.subplots(1, 3, width_ratios=[2, 1.3, 1.3])
    path, variables = found["stochastic flow"]
    for k in range(2 * BLOCKS + 1):
        betas = tuple((j + 1) / BLOCKS for j in range(k // 2))
        part = replace(path, layers=path.layers[:k], betas=betas)
        mine = {kind: {**tree, "layers": tree["layers"][:k]} for kind, tree in variables.items()}
        mine["const"]["log_steps"] = mine["const"]["log_steps"][: k // 2]
        x, _, _ = draws(backend, part, mine, n)
        height, _ = np.histogram(x, np.linspace(-3, 3, 121), density=True)
        beta = (k + 1) // 2 / BLOCKS
        between = np.exp(-0.5 * GRID**2 * (1 - beta)) * WELL**beta
        level = -1.1 * k
        way.fill_between(
            np.linspace(-2.975, 2.975, 120), level, level + height, color="C0" if k % 2 else "C1", alpha=0.6
        )
        way.plot(GRID, level + between / np.trapezoid(between, GRID), "k", linewidth=0.8)
        way.text(-3.4, level + 0.3, "base" if k == 0 else "map" if k % 2 else "moves", ha="right")
    way.set(xlim=(-3.2, 3.2), yticks=[], xlabel="x", title="draws after each layer, and the density there (line)")
    exact = -np.log(np.interp(CENTRES, GRID, WELL))
    for axes, (name, (path, variables)) in zip(energies, found.items(), strict=True):
        x, w, _ = draws(backend, path, variables, n)
        axes.plot(CENTRES, exact, "k", label="exact")
        for label, share, style in (("draws", np.full(n, 1 / n), "C3."), ("reweighted", w, "C0.")):
            density = np.histogram(x, EDGES, weights=share)[0] / np.diff(EDGES)
            axes.plot(CENTRES[density > 0], -np.log(density[density > 0]), style, label=label)
        axes.set(title=name, xlabel="x", ylim=(-0.5, 9), ylabel="free energy (kT)")
        axes.legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "double_well.png", dpi=90)


if __name__ == "__main__":
    main()
