"""Flows: densities from a base and a bijection, by name or by hand."""

from flowppl.flows.bases import Base, CircularUniform, Normal, Product, StudentT, Uniform
from flowppl.flows.flow import Flow, Sample, part_of
from flowppl.flows.mixture import Mixture
from flowppl.flows.recipes import affine, bnaf, iaf, maf, nsf, planar, radial, realnvp, residual, sylvester, ttf
from flowppl.flows.registry import Recipe, get, names, register

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
    "part_of",
    "planar",
    "radial",
    "realnvp",
    "register",
    "residual",
    "sylvester",
    "ttf",
]
