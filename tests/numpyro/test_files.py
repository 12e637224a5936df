"""Saving and loading AutoFlow, here and across the fronts."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

from flowppl import flows
from flowppl.bijections import Rotation
from flowppl.errors import FlowFileError
from flowppl.flows import files
from flowppl.numpyro import AutoFlow

X = jnp.array(0.4)


def model(x):  # the sites are not in the order of their names
    s = numpyro.sample("scale", dist.HalfNormal(2.0))
    p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
    numpyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("x", dist.Normal(p[0], s), obs=x)


def ready(flow, scramble):
    guide = AutoFlow(model, flow)

    @jax.jit
    def init():
        trace = handlers.trace(handlers.seed(guide, 0)).get_trace(X)
        return {k: site["value"] for k, site in trace.items() if site["type"] == "param"}

    return guide, scramble(init(), scale=0.1)


@pytest.fixture(scope="module")
def saved(small, scramble, tmp_path_factory):
    guide, params = ready(small, scramble)
    path = tmp_path_factory.mktemp("files") / "guide.flow"
    guide.save(path, params)
    return guide, params, path


def test_a_guide_comes_back(saved):
    guide, params, path = saved
    again, loaded = AutoFlow.load(path, model, X)
    draw = lambda g, p: jax.jit(lambda: g.sample_posterior(jax.random.key(0), p, sample_shape=(5,)))()
    draws = draw(guide, params)
    jax.tree.map(np.testing.assert_array_equal, draws, draw(again, loaded))
    np.testing.assert_array_equal(jax.jit(guide.log_prob)(params, draws), jax.jit(again.log_prob)(loaded, draws))


def test_constants_come_back(scramble, tmp_path):
    from flowppl.bijections import Chain, LULinear, Permutation

    guide, params = ready(flows.Flow(Chain((LULinear(5), Permutation(5), LULinear(5)))), scramble)
    params["auto_flow$const"] = jax.tree.map(jnp.round, params["auto_flow$const"])
    params["auto_flow$const"]["bijection"][1]["indices"] = jnp.array([4.0, 2.0, 0.0, 1.0, 3.0])
    guide.save(tmp_path / "q.flow", params)
    again, loaded = AutoFlow.load(tmp_path / "q.flow", model, X, prefix="other")
    np.testing.assert_array_equal(loaded["other_flow$const"]["bijection"][1]["indices"], [4, 2, 0, 1, 3])
    draws = guide.sample_posterior(jax.random.key(0), params, sample_shape=(3,))
    np.testing.assert_allclose(guide.log_prob(params, draws), again.log_prob(loaded, draws))


def test_another_model_is_refused(saved, scramble, tmp_path):
    _, _, path = saved

    def renamed(x):
        handlers.scope(model, prefix="inner")(x)

    def smaller(x):
        numpyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    with pytest.raises(FlowFileError, match=r"does not fit the model: it covers the sites .*'scale'"):
        AutoFlow.load(path, renamed, X)
    with pytest.raises(FlowFileError, match="does not fit the model"):
        AutoFlow.load(path, smaller, X)
    flow = flows.Flow(Rotation(2, 1))  # no affine end, which every guide's flow has
    files.write(tmp_path / "q.flow", flow, flow.init(jax.random.key(0)), {"sites": [["a", 2]]})
    with pytest.raises(FlowFileError, match="does not fit the model"):
        AutoFlow.load(tmp_path / "q.flow", smaller, X)


def test_the_other_front_reads_it_and_agrees(saved):
    torch, pyro = pytest.importorskip("torch"), pytest.importorskip("pyro")
    theirs = pytest.importorskip("flowppl.pyro")
    guide, params, path = saved

    def in_pyro(x):
        import pyro.distributions as dist

        s = pyro.sample("scale", dist.HalfNormal(torch.tensor(2.0, dtype=torch.float64)))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3, dtype=torch.float64)))
        pyro.sample("a", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(p[0], s), obs=x)

    draws = guide.sample_posterior(jax.random.key(0), params, sample_shape=(6,))
    x = torch.tensor(0.4, dtype=torch.float64)
    loaded = theirs.AutoFlow.load(path, in_pyro, x)
    values = {name: torch.from_numpy(np.array(value)) for name, value in draws.items()}
    ours = guide.log_prob(params, draws)
    np.testing.assert_allclose(loaded.log_prob(values).detach(), ours, rtol=1e-10)

    back = path.with_name("back.flow")
    loaded.save(back)
    again, parameters = AutoFlow.load(back, model, X)
    np.testing.assert_allclose(again.log_prob(parameters, draws), ours, rtol=1e-10)
