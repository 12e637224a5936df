"""Flows: densities from a base and a bijection, by name or by hand."""

from flowppl.flows.bases import Base, Normal, StudentT
from flowppl.flows.flow import Flow, Sample
from flowppl.flows.recipes import Recipe, affine, get, names, nsf, planar, realnvp, register

__all__ = [
    "Base",
    "Flow",
    "Normal",
    "Recipe",
    "Sample",
    "StudentT",
    "affine",
    "get",
    "names",
    "nsf",
    "planar",
    "realnvp",
    "register",
]
