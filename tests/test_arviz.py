"""Exports to ArviZ of either generation."""

import numpy as np
import pytest

from flowppl.diagnostics import inference_data
from flowppl.errors import DimensionError, MissingExtraError

arviz = pytest.importorskip("arviz")


def groups_of(data):
    """The groups' names: `groups` is a method in ArviZ 0.x and paths of a tree in 1.x."""
    names = data.groups() if callable(data.groups) else data.groups
    return {name.strip("/") for name in names} - {""}


def test_groups_and_variables():
    rng = np.random.default_rng(0)
    data = inference_data(
        {
            "posterior": {"a": rng.standard_normal((2, 50)), "b": rng.standard_normal((2, 50, 3))},
            "sample_stats": {"lp": rng.standard_normal((2, 50))},
            "log_likelihood": {},
            "observed_data": {"y": np.arange(4.0)},
        }
    )
    assert groups_of(data) == {"posterior", "sample_stats", "observed_data"}
    posterior = data["posterior"]
    assert dict(posterior.sizes) | {"chain": 2, "draw": 50} == dict(posterior.sizes)
    assert posterior["b"].shape == (2, 50, 3)
    assert list(arviz.summary(data, var_names=["a", "b"]).index) == ["a", "b[0]", "b[1]", "b[2]"]


def test_axes_that_are_missing_are_named():
    with pytest.raises(DimensionError, match=r"posterior\['a'\]: expected shape \(chain, draw, ...\), got \(3,\)"):
        inference_data({"posterior": {"a": np.zeros(3)}})


def test_without_arviz(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "arviz", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'flowppl\[arviz\]'"):
        inference_data({"posterior": {"a": np.zeros((1, 3))}})


@pytest.fixture(scope="module")
def numpyro_pieces():
    """A model, a guide with parameters, an observation and a key."""
    pytest.importorskip("numpyro")
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from flowppl import flows
    from flowppl.numpyro import AutoFlow

    def model(y=None):
        s = numpyro.sample("s", dist.HalfNormal(1.0))
        with numpyro.plate("n", 3):
            z = numpyro.sample("z", dist.Normal(0.0, s))
        numpyro.deterministic("total", z.sum())
        numpyro.sample("y", dist.Normal(z.sum(), 1.0), obs=y)

    guide = AutoFlow(model, flows.realnvp(layers=1, hidden=(4,)))
    trace = numpyro.handlers.trace(numpyro.handlers.seed(guide, 0)).get_trace(jnp.array(0.5))
    params = {k: site["value"] for k, site in trace.items() if site["type"] == "param"}
    return model, guide, params, jnp.array(0.5), jax.random.key(0)


def test_numpyro_a_guide(numpyro_pieces):
    from flowppl.numpyro import to_arviz

    _, guide, params, y, key = numpyro_pieces
    data = to_arviz(guide, y, params=params, rng=key, num_samples=20)
    assert groups_of(data) == {"posterior"}
    posterior = data["posterior"]
    assert set(posterior.data_vars) == {"s", "z", "total"}
    assert posterior["z"].shape == (1, 20, 3)
    np.testing.assert_allclose(posterior["z"].sum("z_dim_0"), posterior["total"])
    draws = guide.sample_posterior(key, params, sample_shape=(20,))
    np.testing.assert_array_equal(posterior["s"][0], draws["s"])


def test_numpyro_any_guide_of_numpyro(numpyro_pieces):
    import jax
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal
    from numpyro.optim import Adam

    from flowppl.numpyro import to_arviz

    model, _, _, y, key = numpyro_pieces
    guide = AutoNormal(model)
    svi = SVI(model, guide, Adam(1e-2), Trace_ELBO())
    params = svi.get_params(jax.jit(svi.init)(key, y))
    assert to_arviz(guide, y, params=params, num_samples=5)["posterior"]["z"].shape == (1, 5, 3)


def test_numpyro_parameters_are_asked_for(numpyro_pieces):
    from flowppl.numpyro import to_arviz

    with pytest.raises(TypeError, match=r"pass params=result\.params"):
        to_arviz(numpyro_pieces[1], numpyro_pieces[3])


def test_numpyro_chains(numpyro_pieces):
    from numpyro.infer import MCMC, NUTS

    from flowppl.numpyro import to_arviz

    model, _, _, y, key = numpyro_pieces
    mcmc = MCMC(NUTS(model), num_warmup=10, num_samples=15, num_chains=2, chain_method="vectorized", progress_bar=False)
    mcmc.run(key, y, extra_fields=("potential_energy", "accept_prob", "num_steps", "adapt_state.step_size"))
    data = to_arviz(mcmc)
    assert groups_of(data) == {"posterior", "sample_stats"}
    assert data["posterior"]["z"].shape == (2, 15, 3) and data["posterior"]["total"].shape == (2, 15)
    stats = data["sample_stats"]
    assert set(stats.data_vars) == {"lp", "acceptance_rate", "n_steps", "step_size", "diverging"}
    energy = mcmc.get_extra_fields(group_by_chain=True)["potential_energy"]
    np.testing.assert_allclose(stats["lp"], -np.asarray(energy))
