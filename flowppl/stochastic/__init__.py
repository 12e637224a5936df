"""Samplers with exact weights along paths of densities: annealing by importance sampling and by sequential Monte Carlo."""

from flowppl.stochastic.annealing import Annealed, Bridge, Schedule, anneal, tune

__all__ = ["Annealed", "Bridge", "Schedule", "anneal", "tune"]
