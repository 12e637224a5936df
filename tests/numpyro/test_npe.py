"""Posteriors from simulations alone, against exact ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from flowppl import flows
from flowppl.errors import DimensionError, FlowFileError, NonFiniteError, SiteError, UnsupportedModelError
from flowppl.numpyro import load_npe, npe
from flowppl.numpyro.simulator import _Simulator
from flowppl.simulations import simulated
from tests import conjugate

SMALL = dict(flow=flows.affine(hidden=(32,)), embedding=0, num_simulations=200, max_steps=1, progress_bar=False)


def line(y=None):
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 2.0))
    slope = numpyro.sample("slope", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("data", 5):
        numpyro.sample("y", dist.Normal(intercept + jnp.log(slope) * conjugate.T, conjugate.NOISE), obs=y)


@pytest.fixture(scope="module")
def amortized():
    options = dict(flow=flows.affine(hidden=(32,)), embedding=0, num_simulations=20_000)
    return npe(line, observed="y", max_steps=2000, learning_rate=5e-3, progress_bar=False, **options)


def test_posterior_is_the_exact_one(amortized) -> None:
    conjugate.check_posterior(amortized)


def test_log_prob_is_the_exact_one(amortized) -> None:
    conjugate.check_log_prob(amortized)


def test_calibration_passes_and_sees_overconfidence(amortized) -> None:
    conjugate.check_calibration(amortized)


@pytest.mark.slow  # compiles for seconds
def test_constraints_networks_summaries_and_what_is_averaged_over() -> None:
    def model(y=None, share=None):
        p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
        scale = numpyro.sample("scale", dist.HalfNormal(jnp.ones((2, 2))).to_event(2))
        shift = numpyro.sample("shift", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(1.0 * shift, scale).to_event(2), obs=y)
        numpyro.sample("share", dist.Normal(p, 0.1).to_event(1), obs=share)
        numpyro.deterministic("sum", shift + scale.sum((-1, -2)))

    observed = ["y", "share", "sum"]
    with pytest.raises(UnsupportedModelError, match=r"'shift' is discrete.*`latents`"):
        npe(model, observed=observed, **SMALL)

    def summary(data):
        return jnp.concatenate([data["y"].sum(-1), data["share"], data["sum"][:, None]], -1)

    options = {**SMALL, "embedding": 4, "hidden": (8,)}
    found = npe(model, observed=observed, latents=["p", "scale"], summary=summary, **options)
    assert found.scales[1].mean.shape == (6,)
    posterior = found.condition({"share": np.ones((6, 3)), "sum": np.ones(6), "y": np.ones((6, 2, 2))})
    draws = posterior.sample(7)
    assert draws["p"].shape == (7, 6, 3) and draws["scale"].shape == (7, 6, 2, 2) and len(draws) == 2
    np.testing.assert_allclose(draws["p"].sum(-1), 1, rtol=1e-5)
    log_q = posterior.log_prob(draws)
    assert log_q.shape == (7, 6) and np.isfinite(log_q).all()


def test_failed_simulations_are_an_error_where_they_are_many() -> None:
    def model(limit, y=None):
        z = numpyro.sample("z", dist.Uniform(0.0, 1.0))
        numpyro.sample("y", dist.Normal(jnp.where(z < limit, jnp.nan, z), 1.0), obs=y)

    simulator = _Simulator(model, (0.2,), {}, "y", None, None)  # the whole of it runs in the tests of the Pyro front
    u, features, dropped = simulated(simulator, 200, (0,))
    assert 10 < dropped < 80 and len(u) == len(features) == 200 - dropped  # 40, six standard deviations of which are 34
    with pytest.raises(NonFiniteError, match="of 200 simulations are not finite"):
        npe(model, 0.9, observed="y", **SMALL)


def test_errors_name_the_site(amortized) -> None:
    with pytest.raises(SiteError, match="no site 'x'; it has intercept, slope, y"):
        npe(line, observed="x", **SMALL)
    with pytest.raises(SiteError, match="'y' has a value already"):
        npe(line, jnp.zeros(5), observed="y", **SMALL)
    with pytest.raises(UnsupportedModelError, match="'y' has a value or is a factor"):
        npe(line, jnp.zeros(5), observed="slope", **SMALL)
    with pytest.raises(SiteError, match="latents: 'y' is not among"):
        npe(line, observed="y", latents=["y"], **SMALL)
    with pytest.raises(UnsupportedModelError, match="nothing to infer"):
        npe(line, observed=["y", "slope", "intercept"], **SMALL)
    with pytest.raises(DimensionError, match=r"data\['y'\]: expected shape \(\*batch, 5\), got \(4,\)"):
        amortized.condition(np.zeros(4))
    with pytest.raises(DimensionError, match="expected the sites y, got x"):
        amortized.condition({"x": np.zeros(5)})
    with pytest.raises(NonFiniteError, match="data: expected finite numbers"):
        amortized.condition(np.full(5, np.nan))
    with pytest.raises(DimensionError, match=r"values\['slope'\]: expected"):
        amortized.condition(np.zeros(5)).log_prob({"intercept": np.zeros(3)})
    with pytest.raises(DimensionError, match=r"summary: expected an array of shape \(200, num_features\)"):
        npe(line, observed="y", summary=lambda data: data["y"].sum(), **SMALL)


def test_supports_that_move_are_refused() -> None:
    def model(y=None):
        top = numpyro.sample("top", dist.HalfNormal(1.0))
        numpyro.sample("below", dist.Uniform(0.0, top))
        numpyro.sample("y", dist.Normal(top, 1.0), obs=y)

    with pytest.raises(UnsupportedModelError, match="'below' depends on other latents"):
        npe(model, observed="y", **SMALL)


def test_a_file_comes_back_here_and_in_the_other_front(amortized, tmp_path) -> None:
    path, y = tmp_path / "line.flow", conjugate.simulate(4, seed=5)[1]
    amortized.save(path)
    again = load_npe(path, line, observed="y")
    draws, same = (jax.tree.map(np.array, found.condition(y).sample(7)) for found in (amortized, again))
    for name in draws:
        np.testing.assert_array_equal(draws[name], same[name])
    assert (again.held_out, again.num_dropped) == (amortized.held_out, amortized.num_dropped)

    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("flowppl.pyro")

    def in_pyro(y=None):
        import pyro.distributions as dist
        from pyro import plate, sample

        intercept = sample("intercept", dist.Normal(0.0, 2.0))
        slope = sample("slope", dist.LogNormal(0.0, 1.0))
        with plate("data", 5):
            mean = intercept + torch.log(slope) * torch.as_tensor(conjugate.T)
            sample("y", dist.Normal(mean, conjugate.NOISE), obs=y)

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = theirs.load_npe(path, in_pyro, observed="y")
        log_q = found.condition(y).log_prob(draws)
        found.save(path)
    finally:
        torch.set_default_dtype(dtype)
    np.testing.assert_allclose(log_q, amortized.condition(y).log_prob(draws), rtol=1e-10)
    back = load_npe(path, line, observed="y").condition(y).sample(7)
    for name in draws:
        np.testing.assert_array_equal(draws[name], back[name])


def test_files_that_do_not_fit(amortized, tmp_path) -> None:
    def other(y=None):
        numpyro.sample("level", dist.Normal(0.0, 2.0))
        numpyro.sample("slope", dist.LogNormal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(jnp.zeros(5), 1.0).to_event(1), obs=y)

    path = tmp_path / "line.flow"
    amortized.save(path)
    with pytest.raises(FlowFileError, match=r"latents are \[\['intercept', \[\]\], .* those of the model \[\['level'"):
        load_npe(path, other, observed="y")
    with pytest.raises(FlowFileError, match="sees 5 features, the model has 2 and 1; the summary"):
        load_npe(path, line, observed="y", summary=lambda data: data["y"].sum(-1, keepdims=True))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FlowFileError, match="cannot be read"):
        load_npe(path, line, observed="y")
