"""Samplers with exact weights along paths of densities: stochastic flows, annealed importance sampling, sequential Monte Carlo."""

from flowppl.stochastic.annealing import Annealed, Bridge, Schedule, anneal, geometric, tune
from flowppl.stochastic.bootstrap import bootstrap
from flowppl.stochastic.path import Moves, Path, Run, snf

__all__ = ["Annealed", "Bridge", "Moves", "Path", "Run", "Schedule", "anneal", "bootstrap", "geometric", "snf", "tune"]
