"""Small flows, and arrays moved off the identity at which flows start."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("numpyro")

from flowppl import flows  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Nearly all of the time goes into compiling small programs once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def small():
    """A recipe that compiles fast."""
    return flows.realnvp(layers=2, hidden=(8,))


@pytest.fixture(scope="session")
def scramble():
    """Adds noise to every floating leaf of a tree."""

    def by(variables, scale=0.3, seed=7):
        rng = np.random.default_rng(seed)

        def move(a):
            noise = scale * rng.standard_normal(a.shape)
            return jax.numpy.asarray(np.asarray(a) + noise, a.dtype) if a.dtype.kind == "f" else a

        return jax.tree.map(move, variables)

    return by
