"""The test of the design: a new flow is one class and one registry line, and then it is a guide, a prior, a NeuTra transform
and has path gradients, in both PPLs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from flowppl import flows
from flowppl.backend import backend_of, backend_of_rng
from flowppl.bijections import Bijection
from flowppl.flows import registry


@dataclass(frozen=True)
class Shear(Bijection):
    """y_1 = exp(s_1) x_1, and y_i = exp(s_i) x_i + t tanh(x_1): on purpose simple."""

    dim: int
    context_dim: int = 0

    def init(self, rng: Any) -> dict[str, Any]:
        zeros = backend_of_rng(rng).xp.zeros((self.dim,))
        return {"params": {"scale": zeros, "shear": zeros[:1]}, "const": {}}

    def forward(self, params, x, context=None):
        xp = backend_of(x).xp
        first, rest = x[..., :1], x[..., 1:]
        scale = xp.exp(params["scale"])
        y = xp.concat([first * scale[:1], rest * scale[1:] + params["shear"] * xp.tanh(first)], axis=-1)
        return y, xp.sum(params["scale"]) + xp.zeros_like(x[..., 0])

    def inverse(self, params, y, context=None):
        xp = backend_of(y).xp
        scale = xp.exp(params["scale"])
        first = y[..., :1] / scale[:1]
        rest = (y[..., 1:] - params["shear"] * xp.tanh(first)) / scale[1:]
        return xp.concat([first, rest], axis=-1), -xp.sum(params["scale"]) + xp.zeros_like(y[..., 0])


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The registry line; taken back after each test, since others run over all that is registered."""
    monkeypatch.setattr(registry, "_RECIPES", dict(registry._RECIPES))
    flows.register("shear")(lambda dim, context_dim: Shear(dim))


OBSERVED = np.array([1.0, 2.0, 1.5])


@pytest.mark.slow
def test_in_numpyro() -> None:
    numpyro = pytest.importorskip("numpyro")
    import jax
    import jax.numpy as jnp
    import numpyro.distributions as dist
    from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
    from numpyro.infer.reparam import NeuTraReparam

    from flowppl.numpyro import AutoFlow, FlowDistribution, flow_module

    def model(y):
        loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        numpyro.sample("y", dist.Normal(loc, scale), obs=y)

    y = jnp.asarray(OBSERVED)
    fitted = {}
    for gradient in ("reparam", "path"):
        guide = AutoFlow(model, "shear", gradient=gradient)
        svi = SVI(model, guide, numpyro.optim.Adam(0.02), Trace_ELBO(num_particles=32))
        result = svi.run(jax.random.key(0), 600, y, progress_bar=False)
        draws = guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(4000,))
        fitted[gradient] = float(draws["loc"].mean()), float(draws["scale"].mean())
    reference = _posterior_means()
    # The draws' standard errors are 0.005 and 0.005; the family is not exact, hence 0.05.
    np.testing.assert_allclose(fitted["reparam"], reference, atol=0.05)
    np.testing.assert_allclose(fitted["path"], reference, atol=0.05)

    neutra = NeuTraReparam(guide, result.params)
    mcmc = MCMC(NUTS(neutra.reparam(model)), num_warmup=200, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(2), y)
    # About 500 effective draws: standard errors 0.015; four of them, with slack.
    assert abs(float(mcmc.get_samples()["loc"].mean()) - reference[0]) < 0.08

    def with_prior():
        z = numpyro.sample("z", flow_module("prior", "shear", dim=2))
        numpyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y[:2])

    svi = SVI(with_prior, AutoFlow(with_prior), numpyro.optim.Adam(0.01), Trace_ELBO(num_particles=8))
    losses = svi.run(jax.random.key(0), 200, progress_bar=False).losses
    assert losses[-20:].mean() < losses[:20].mean()

    flow = flows.get("shear")(2)
    assert FlowDistribution(flow, flow.init(jax.random.key(0))).log_prob(jnp.zeros((3, 2))).shape == (3,)


@pytest.mark.slow
def test_in_pyro() -> None:
    pyro = pytest.importorskip("pyro")
    import pyro.distributions as dist
    import torch
    from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
    from pyro.infer.reparam import NeuTraReparam

    from flowppl.pyro import AutoFlow, FlowDistribution, flow_module

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    y = torch.as_tensor(OBSERVED, dtype=torch.get_default_dtype())

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)

    reference = _posterior_means()
    for gradient in ("reparam", "path"):
        guide = AutoFlow(model, "shear", gradient=gradient)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(num_particles=32, vectorize_particles=True))
        for _ in range(600):
            svi.step(y)
        draws = guide.sample_posterior(torch.Generator().manual_seed(1), (4000,))
        np.testing.assert_allclose([draws["loc"].mean(), draws["scale"].mean()], reference, atol=0.05)

    guide.requires_grad_(False)
    neutra = NeuTraReparam(guide)
    mcmc = MCMC(NUTS(neutra.reparam(model)), num_samples=150, warmup_steps=50, disable_progbar=True)
    mcmc.run(y)
    draws = neutra.transform_sample(next(iter(mcmc.get_samples().values())))
    # About 100 effective draws: standard error 0.035.
    assert abs(float(draws["loc"].mean()) - reference[0]) < 0.15

    def with_prior():
        z = pyro.sample("z", flow_module("prior", "shear", dim=2))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y[:2])

    loss = Trace_ELBO(num_particles=8, vectorize_particles=True)
    svi = SVI(with_prior, AutoFlow(with_prior), pyro.optim.Adam({"lr": 0.01}), loss)
    losses = [svi.step() for _ in range(100)]
    assert np.mean(losses[-20:]) < np.mean(losses[:20])

    flow = flows.get("shear")(2)
    assert FlowDistribution(flow, flow.init(None)).log_prob(torch.zeros(3, 2)).shape == (3,)


def _posterior_means() -> tuple[float, float]:
    """E loc and E scale by quadrature."""
    loc = np.linspace(-3, 5, 801)[:, None]
    log_scale = np.linspace(-3, 3, 801)[None]
    scale = np.exp(log_scale)
    log_p = -0.5 * loc**2 - 0.5 * (log_scale / 0.5) ** 2
    for y in OBSERVED:
        log_p = log_p - log_scale - 0.5 * ((y - loc) / scale) ** 2
    p = np.exp(log_p - log_p.max())
    return float((p * loc).sum() / p.sum()), float((p * scale).sum() / p.sum())
