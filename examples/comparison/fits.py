"""What both PPLs share: the settings of every fit, and the file that a fit leaves for the report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowppl import flows


@dataclass(frozen=True)
class Budget:
    """What every guide of a model gets."""

    steps: int
    particles: int


BUDGETS = {"eight_schools": Budget(1500, 32), "sparse_logistic": Budget(2000, 32)}
QUICK = Budget(20, 4)
# For the flows, the better of the learning rates tried: 3e-3 or 5e-3, and 1e-2. The mean field converges at 1e-2.
RATES = {
    "eight_schools": {"AutoNormal": 1e-2, "AutoIAFNormal": 1e-2, "AutoFlow": 1e-2, "AutoFlow path": 1e-2},
    "sparse_logistic": {"AutoNormal": 1e-2, "AutoIAFNormal": 1e-2, "AutoFlow": 5e-3, "AutoFlow path": 5e-3},
}
FLOW = flows.nsf(layers=4)
FINAL_RATE = 0.01  # the learning rate falls along a cosine to this fraction
CLIP_NORM = 10.0
NUM_DRAWS = 10_000
CHUNK = 1_000  # draws at a time, against the likelihood's memory


@dataclass(frozen=True)
class Fit:
    """A trained guide, as the report sees it.

    Attributes:
        ppl: "NumPyro" or "Pyro".
        model: Name of the model.
        guide: Label of the guide.
        losses: The negative ELBO estimate of every step.
        seconds: Wall-clock time of the training, preconditioning and compilation included.
        log_weights: log p(latents, data) - log q(latents) of draws from the guide.
        draws: The same draws, by site.
    """

    ppl: str
    model: str
    guide: str
    losses: np.ndarray
    seconds: float
    log_weights: np.ndarray
    draws: dict[str, np.ndarray]

    def save(self, folder: Path) -> None:
        """Writes the fit to an npz file in a folder."""
        labels = {"ppl": self.ppl, "model": self.model, "guide": self.guide, "seconds": self.seconds}
        arrays = {"losses": self.losses, "log_weights": self.log_weights}
        draws = {f"draws/{site}": value for site, value in self.draws.items()}
        np.savez(folder / f"{self.ppl}-{self.model}-{self.guide.replace(' ', '-')}.npz", **labels, **arrays, **draws)

    @staticmethod
    def load(path: Path) -> Fit:
        """Reads what `save` wrote."""
        with np.load(path) as file:
            return Fit(
                *(str(file[label]) for label in ("ppl", "model", "guide")),
                losses=file["losses"],
                seconds=float(file["seconds"]),
                log_weights=file["log_weights"],
                draws={key.removeprefix("draws/"): file[key] for key in file.files if key.startswith("draws/")},
            )


def run_all(fit: Callable[[str, str, Budget], Fit], models: Iterable[str], guides: Iterable[str]) -> None:
    """Runs `fit(model, guide, budget)` for all pairs, as the command line says, and leaves the fits in a folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for model in list(models)[: 1 if options.quick else None]:
        for guide in guides:
            done = fit(model, guide, QUICK if options.quick else BUDGETS[model])
            done.save(options.folder)
            print(f"{done.ppl:8} {model:16} {guide:14} {done.seconds:5.1f} s", flush=True)
