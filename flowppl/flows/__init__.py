"""Flows: densities from a base and a bijection, by name or by hand."""

from flowppl.flows.bases import Base, CircularUniform, Normal, Product, StudentT, Uniform
from flowppl.flows.flow import Flow, Sample
from flowppl.flows.mixture import Mixture
from flowppl.flows.recipes import (
    Recipe,
    affine,
    bnaf,
    get,
    iaf,
    maf,
    names,
    nsf,
    planar,
    radial,
    realnvp,
    register,
    residual,
    sylvester,
    ttf,
)

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
    "bnaf",
    "get",
    "iaf",
    "maf",
    "names",
    "nsf",
    "planar",
    "radial",
    "realnvp",
    "register",
    "residual",
    "sylvester",
    "ttf",
]
