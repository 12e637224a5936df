"""Normalizing flows as guides, distributions and transforms in Pyro and NumPyro.

The two fronts, `flowppl.pyro` and `flowppl.numpyro`, hold the same names with the same signatures; import the one whose
language the model is written in. This package itself imports neither torch nor jax.
"""

__version__ = "0.1.0.dev0"
