"""Samplers with exact weights along paths of densities: stochastic flows, annealed importance sampling, sequential Monte Carlo."""

from flowppl.stochastic.annealing import Annealed, Bridge, Schedule, anneal, geometric, tune
from flowppl.stochastic.bootstrap import History, bootstrap
from flowppl.stochastic.diffusion import Diffusion
from flowppl.stochastic.gradients import by_energy, by_layer, by_samples
from flowppl.stochastic.moves import Moves
from flowppl.stochastic.path import Path, Run, snf
from flowppl.stochastic.training import train_path

__all__ = [
    "Annealed",
    "Bridge",
    "Diffusion",
    "History",
    "Moves",
    "Path",
    "Run",
    "Schedule",
    "anneal",
    "bootstrap",
    "by_energy",
    "by_layer",
    "by_samples",
    "geometric",
    "snf",
    "train_path",
    "tune",
]
