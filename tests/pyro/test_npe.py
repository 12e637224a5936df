"""Posteriors from simulations alone, against exact ones."""

from __future__ import annotations

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from flowppl import flows
from flowppl.errors import DimensionError, FlowFileError, NonFiniteError, SiteError, UnsupportedModelError
from flowppl.pyro import load_flow, load_npe, npe
from tests import conjugate

SMALL = dict(flow=flows.affine(hidden=(32,)), embedding=0, num_simulations=200, max_steps=1, progress_bar=False)


T = torch.as_tensor(conjugate.T, dtype=torch.float32)


def line(y=None):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(intercept + torch.log(slope) * T, conjugate.NOISE), obs=y)


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


def test_constraints_networks_summaries_and_what_is_averaged_over() -> None:
    def model(y=None, share=None):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones((2, 2))).to_event(2))
        shift = pyro.sample("shift", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(shift[..., None, None], scale).to_event(2), obs=y)
        pyro.sample("share", dist.Normal(p, 0.1).to_event(1), obs=share)
        pyro.deterministic("sum", shift + scale.sum((-1, -2)))

    observed = ["y", "share", "sum"]
    with pytest.raises(UnsupportedModelError, match=r"'shift' is discrete.*`latents`"):
        npe(model, observed=observed, **SMALL)

    def summary(data):
        return torch.cat([data["y"].sum(-1), data["share"], data["sum"][:, None]], -1)

    options = {**SMALL, "embedding": 4, "hidden": (8,)}
    found = npe(model, observed=observed, latents=["p", "scale"], summary=summary, **options)
    assert found.scales[1].mean.shape == (6,)
    posterior = found.condition({"share": np.ones((6, 3)), "sum": np.ones(6), "y": np.ones((6, 2, 2))})
    draws = posterior.sample(7)
    assert draws["p"].shape == (7, 6, 3) and draws["scale"].shape == (7, 6, 2, 2) and len(draws) == 2
    np.testing.assert_allclose(draws["p"].sum(-1), 1, rtol=1e-5)
    log_q = posterior.log_prob(draws)
    assert log_q.shape == (7, 6) and np.isfinite(log_q).all()


def test_failed_simulations_are_dropped_and_counted() -> None:
    def model(limit, y=None):
        z = pyro.sample("z", dist.Uniform(0.0, 1.0))
        pyro.sample("y", dist.Normal(torch.where(z < limit, torch.nan, z), 1.0), obs=y)

    found = npe(model, 0.2, observed="y", **SMALL)
    assert 10 < found.num_dropped < 80  # 40, six standard deviations of which are 34
    with pytest.raises(NonFiniteError, match="of 200 simulations are not finite"):
        npe(model, 0.9, observed="y", **SMALL)


def test_errors_name_the_site(amortized) -> None:
    with pytest.raises(SiteError, match="no site 'x'; it has intercept, slope, y"):
        npe(line, observed="x", **SMALL)
    with pytest.raises(SiteError, match="'y' has a value already"):
        npe(line, torch.zeros(5), observed="y", **SMALL)
    with pytest.raises(UnsupportedModelError, match="'y' has a value or is a factor"):
        npe(line, torch.zeros(5), observed="slope", **SMALL)
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
        top = pyro.sample("top", dist.HalfNormal(1.0))
        pyro.sample("below", dist.Uniform(0.0, top))
        pyro.sample("y", dist.Normal(top, 1.0), obs=y)

    with pytest.raises(UnsupportedModelError, match="'below' depends on other latents"):
        npe(model, observed="y", **SMALL)


def test_models_that_a_plate_would_change_run_one_by_one() -> None:
    def mixing(y=None):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(), 0.1), obs=y)

    def noisy():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("y", z + 0.1 * torch.randn(()))

    for model in (mixing, noisy):
        with pytest.warns(UserWarning, match="runs once for each simulation"):
            npe(model, observed="y", **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        npe(line, observed="y", **SMALL)


def test_two_runs_agree_and_seeds_matter() -> None:
    state = torch.get_rng_state()
    first, again, other = (
        npe(line, observed="y", seed=seed, **SMALL).condition(np.zeros(5)).sample(5) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first["slope"], again["slope"])
    assert (again["slope"] != other["slope"]).all()
    assert (torch.get_rng_state() == state).all()  # the user's own stream goes on as if nothing had been drawn


def test_a_file_keeps_the_network_and_the_scales(tmp_path) -> None:
    summary = lambda data: torch.stack([data["y"].mean(-1), data["y"].std(-1)], -1)
    what, path = {"observed": "y", "summary": summary}, tmp_path / "line.flow"
    amortized = npe(line, **what, **{**SMALL, "embedding": 4, "hidden": (8,)})
    amortized.save(path)
    again, y = load_npe(path, line, **what), conjugate.simulate(4, seed=5)[1]
    draws = amortized.condition(y).sample(7)
    for a, b in zip(draws.values(), again.condition(y).sample(7).values(), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(again.condition(y).log_prob(draws), amortized.condition(y).log_prob(draws))
    for scale, same in zip(amortized.scales, again.scales, strict=True):
        np.testing.assert_array_equal(scale, same)
    with pytest.raises(FlowFileError, match="kind 'npe' and not of a flow"):
        load_flow(path)
    with pytest.raises(FlowFileError, match="sees 2 features, the model has 2 and 5; the summary"):
        load_npe(path, line, observed="y")
