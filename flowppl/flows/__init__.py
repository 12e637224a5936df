"""Flows: densities from a base and a bijection, by name or by hand."""

from flowppl.flows.bases import Base, CircularUniform, Normal, Product, StudentT, Uniform
from flowppl.flows.flow import Flow, Sample
from flowppl.flows.mixture import Mixture
from flowppl.flows.recipes import Recipe, affine, get, names, nsf, planar, realnvp, register

__all__ = [
    "Base",
    "CircularUniform",
    "Flow",
    "Mixture",
    "Normal",
    "Product",
    "Recipe",
    "Sample",
    "StudentT",
    "Uniform",
    "affine",
    "get",
    "names",
    "nsf",
    "planar",
    "realnvp",
    "register",
]
