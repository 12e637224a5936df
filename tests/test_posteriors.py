"""The textbook posteriors of the benchmarks are the same in both PPLs: density, sites and size, on made-up data."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from benchmarks import posteriors

COUNT, STEP = np.arange(6.0), np.linspace(0.5, 2.0, 6)
DATA = {
    "engel": (STEP, COUNT),
    "cars": (STEP, COUNT, STEP**2, COUNT),
    "huron": (STEP, COUNT),
    "longley": (np.outer(STEP, COUNT), COUNT),
    "horseshoe": (np.outer(COUNT, np.linspace(-1.0, 1.0, 10)), COUNT),
    "sunspots": (COUNT,),
    "volatility": (np.linspace(-2.0, 2.0, 80),),
    "coal": (4.0 * np.arange(28), np.arange(28.0)),
    "nile": (np.linspace(900.0, 1200.0, 100),),
    "lynx_hare": (np.stack([STEP, STEP[::-1]], -1),),
    "mpg": (COUNT, STEP, COUNT),
    "party": (np.outer(STEP, np.ones(4)), COUNT),
    "heart": (STEP, COUNT, STEP**2, COUNT),
    "seeds": (np.ones(21), np.full(21, 3.0), np.arange(21.0) % 2, np.arange(21.0) % 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", posteriors.POSTERIORS)
def test_ppls_agree(name: str) -> None:
    jax = pytest.importorskip("jax")
    torch = pytest.importorskip("torch")
    pytest.importorskip("pyro")
    from numpyro.infer.util import potential_energy

    from flowppl.pyro import LogDensity

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no density goes row by row
        density = LogDensity(posteriors.pyro_model(name), tuple(map(torch.as_tensor, DATA[name])))
    assert density.dim == posteriors.POSTERIORS[name].dim
    u = 0.3 * torch.randn(3, density.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model, arrays = posteriors.numpyro_model(name), tuple(map(jax.numpy.asarray, DATA[name]))
    potential = jax.jit(jax.vmap(lambda sites: potential_energy(model, arrays, {}, sites)))
    expected = -potential({site: x.numpy() for site, x in density.unpack(u).items()})
    np.testing.assert_allclose(density.log_prob(u).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in posteriors.POSTERIORS if posteriors.has_reference(name)])
def test_references_are_complete(name: str) -> None:
    found = posteriors.reference(name)
    sizes = [np.size(moments["free_mean"]) for moments in found["sites"].values()]
    assert sum(sizes) == found["dim"] == posteriors.POSTERIORS[name].dim
    assert all(np.all(np.isfinite(x)) for moments in found["sites"].values() for x in moments.values())
    assert found["usable"] == (not found["trouble"])
