"""One-step Markov kernels on log densities, for many walkers at once: pairs of `init` and `step`, without any adaptation.

Each module has `step(rng, target, walkers, ...) -> (walkers, Info)`; `target.init(target, x)` makes walkers.
"""

from flowppl.kernels import hmc, independence, langevin, mala, metropolis
from flowppl.kernels.target import Info, Known, Target, Walkers, init, target

__all__ = [
    "Info",
    "Known",
    "Target",
    "Walkers",
    "hmc",
    "independence",
    "init",
    "langevin",
    "mala",
    "metropolis",
    "target",
]
