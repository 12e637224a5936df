"""AutoFlow over angles and real numbers together: a posterior across the seam at pi, against quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI, Trace_ELBO

from flowppl import flows
from flowppl.errors import FlowFileError
from flowppl.flows import files
from flowppl.numpyro import AutoFlow
from flowppl.numpyro.modules import as_params


def model():
    a = numpyro.sample("a", dist.VonMises(3.0, 2.0))
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(jnp.cos(a) + b, 0.5), obs=-1.0)


@pytest.mark.slow
def test_evidence_and_moments_across_the_seam():
    guide = AutoFlow(model, flows.nsf(layers=2, hidden=(16,)), gradient="path")
    svi = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO(num_particles=64))
    result = svi.run(jax.random.key(0), 300, progress_bar=False)
    elbo = -Trace_ELBO(num_particles=2000).loss(jax.random.key(1), result.params, model, guide)
    a, b = np.meshgrid(np.linspace(-np.pi, np.pi, 401)[:-1], np.linspace(-6, 6, 401), indexing="ij")
    log_joint = 2 * np.cos(a - 3) - np.log(2 * np.pi * np.i0(2.0)) - b * b / 2 - 2 * (np.cos(a) + b + 1) ** 2
    joint = np.exp(log_joint - np.log(2 * np.pi) - np.log(0.5))
    evidence = joint.sum() * (2 * np.pi / 400) * (12 / 400)
    assert float(elbo) == pytest.approx(np.log(evidence), abs=0.03)
    draws = guide.sample_posterior(jax.random.key(2), result.params, sample_shape=(4000,))
    assert jnp.abs(draws["a"]).max() <= np.pi + 1e-5 and draws["a"].min() < -3 and draws["a"].max() > 3
    exact = (joint * np.exp(1j * a)).sum() / joint.sum()
    found = complex(jnp.exp(1j * draws["a"]).mean())
    assert abs(found - exact) < 0.05
    # The median is counted from the mean direction, which is next to the seam: without that it would be near zero.
    median = guide.median(result.params)
    assert median["b"].shape == () and abs(jnp.exp(1j * median["a"]) - exact / abs(exact)) < 0.1


def test_a_flow_without_angles_has_them_in_a_box():
    guide = AutoFlow(model, "affine")
    svi = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0)))
    draws = guide.sample_posterior(jax.random.key(1), params, sample_shape=(100,))
    assert jnp.abs(draws["a"]).max() <= np.pi


@pytest.mark.slow
def test_a_file_of_angles_means_the_same_in_the_other_front(scramble, tmp_path):
    """NumPyro's unconstrained angles are in a box, Pyro's on a circle: the density over the angles is one."""
    torch, pyro = pytest.importorskip("torch"), pytest.importorskip("pyro")
    theirs = pytest.importorskip("flowppl.pyro")

    def in_pyro():
        pyro.sample("a", pyro.distributions.VonMises(torch.tensor(3.0, dtype=torch.float64), 2.0))
        pyro.sample("b", pyro.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))

    guide = AutoFlow(model, flows.nsf(layers=1, hidden=(4,), bins=3))
    guide._setup(jax.random.key(0), (), {})
    params = as_params(guide._flow_name, scramble(jax.jit(guide._variables)(jax.random.key(0))))
    guide.save(tmp_path / "q.flow", params)
    values = {"a": np.array([3.1, -3.1, 0.2]), "b": np.array([0.3, -1.0, 2.0])}
    found = theirs.AutoFlow.load(tmp_path / "q.flow", in_pyro)
    ours = jax.jit(guide.log_prob)(params, values)
    np.testing.assert_allclose(
        found.log_prob({k: torch.as_tensor(x) for k, x in values.items()}).detach(), ours, rtol=1e-9
    )
    found.save(tmp_path / "q.flow")
    back, parameters = AutoFlow.load(tmp_path / "q.flow", model)
    np.testing.assert_allclose(jax.jit(back.log_prob)(parameters, values), ours, rtol=1e-12)
    boxed = flows.affine()(2)  # which knows no angles
    variables = boxed.init(torch.Generator().manual_seed(0))
    files.write(tmp_path / "q.flow", boxed, variables, {"sites": [["a", 1], ["b", 1]]})
    with pytest.raises(FlowFileError, match="this flow knows none"):
        theirs.AutoFlow.load(tmp_path / "q.flow", in_pyro)
