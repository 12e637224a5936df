"""AutoFlow on every constraint that `biject_to` knows, by name."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO

from flowppl import flows
from flowppl.errors import UnsupportedModelError
from flowppl.pyro import AutoFlow, LogDensity

SMALL = flows.realnvp(layers=1, hidden=(4,))


def improper(constraint, event_shape=()):
    return dist.ImproperUniform(constraint, (), event_shape)


SITES = {
    "real": dist.Normal(0.0, 1.0),
    "real_vector": dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
    "independent": dist.StudentT(3.0, torch.zeros(2, 3), 1.0).to_event(2),
    "positive": dist.LogNormal(0.0, 1.0),
    "nonnegative": dist.HalfCauchy(1.0),
    "greater_than": improper(constraints.greater_than(2.0)),
    "greater_than_eq": dist.Pareto(1.0, 2.0),
    "less_than": improper(constraints.less_than(-1.0), (2,)),
    "interval": dist.Uniform(torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 5.0])).to_event(1),
    "half_open_interval": improper(constraints.half_open_interval(0.0, 3.0)),
    "unit_interval": dist.Beta(2.0, 1.0),
    "simplex": dist.Dirichlet(torch.ones(4)),
    "corr_cholesky": dist.LKJCholesky(4, 1.0),
    "corr_matrix": improper(dist.LKJ(3, 1.0).support, (3, 3)),
    "ordered_vector": improper(constraints.ordered_vector, (4,)),
    "positive_ordered_vector": improper(constraints.positive_ordered_vector, (3,)),
    "softplus_positive": improper(constraints.softplus_positive),
    "improper real": improper(constraints.real, (3,)),
    "improper simplex": improper(constraints.simplex, (3,)),
    "improper batch": dist.ImproperUniform(constraints.positive, (2,), ()).to_event(1),
    "masked": dist.Dirichlet(torch.ones(3)).mask(False),
    "circular": dist.VonMises(0.0, 1.0),
    "stack": improper(constraints.stack([constraints.positive, constraints.unit_interval], -1), (2,)),
    "cat": improper(constraints.cat([constraints.positive, constraints.real], -1, [1, 2]), (3,)),
}


@pytest.mark.parametrize("name", SITES)
def test_every_constraint(name, scramble):
    def model():
        with pyro.plate("rows", 2, dim=-2):
            pyro.sample("x", SITES[name])
        pyro.sample("other", dist.Normal(0.0, 1.0))

    flow = flows.nsf(layers=1, hidden=(4,), bins=3) if name == "circular" else SMALL  # which knows no angles
    guide = AutoFlow(model, flow, gradient="path").setup()
    scramble(guide.parameters(), 0.1)
    draws = guide.sample_posterior(sample_shape=(5,))
    assert draws["x"].shape == (5, 2, 1, *SITES[name].event_shape)
    assert SITES[name].support.check(draws["x"]).all()
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2)
    assert math.isfinite(SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step())
    trace = poutine.trace(guide).get_trace()
    values = {k: trace.nodes[k]["value"] for k in ("x", "other")}
    assert torch.allclose(guide.log_prob(values), trace.log_prob_sum(), rtol=1e-3, atol=1e-3)
    density = LogDensity(model)
    u = density.init + torch.randn(3, density.dim)
    assert torch.isfinite(density.log_prob(u)).all() and torch.isfinite(density.value_and_score(u)[1]).all()
    assert SITES[name].support.check(density.constrain(u)["x"]).all()


@pytest.mark.parametrize(
    "fn",
    [
        dist.Wishart(torch.tensor(4.0), torch.eye(2)),
        dist.ProjectedNormal(torch.ones(3)),
        improper(constraints.lower_cholesky, (2, 2)),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_constraints_without_a_bijection(fn):
    with pytest.raises(UnsupportedModelError, match=r"site 'x' .* knows no bijection .* poutine.reparam, or hide it"):
        AutoFlow(lambda: pyro.sample("x", fn)).setup()


def test_a_point_mass_has_no_density():
    with pytest.raises(UnsupportedModelError, match=r"pyro.deterministic\('x', ...\)"):
        AutoFlow(lambda: pyro.sample("x", dist.Delta(torch.tensor(1.0)))).setup()


def test_a_start_on_the_boundary_becomes_an_inner_point():
    guide = AutoFlow(lambda: pyro.sample("x", dist.Beta(1e-4, 1e-4)), SMALL).setup()
    assert torch.isfinite(guide._layout.start).all() and 0 < guide.median()["x"] < 1
