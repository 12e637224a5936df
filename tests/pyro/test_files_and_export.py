"""Saving, loading and ArviZ."""

import subprocess
import sys
import textwrap

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoNormal

from flowppl import flows, tree
from flowppl.errors import FlowFileError
from flowppl.pyro import AutoFlow, load_flow, save_flow, to_arviz

SMALL = flows.nsf(layers=2, hidden=(8,), bins=4)


def model(n=3):
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", n):
        pyro.sample("a", dist.Normal(0.0, 1.0))


def renamed():
    pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("a", dist.Normal(0.0, 1.0))


def test_flow_round_trip(tmp_path):
    flow = SMALL(3)
    variables = flow.init(None, torch.empty(0, dtype=torch.float64))
    save_flow(tmp_path / "q.flow", flow, variables)
    loaded, arrays = load_flow(tmp_path / "q.flow")
    assert loaded == flow
    for a, b in zip(tree.leaves(variables), tree.leaves(arrays), strict=True):
        assert b.dtype == torch.get_default_dtype() and torch.allclose(a.to(b.dtype), b)
    torch.set_default_dtype(torch.float64)
    assert all(map(torch.equal, tree.leaves(variables), tree.leaves(load_flow(tmp_path / "q.flow")[1])))


def test_guide_round_trip(tmp_path, scramble):
    guide = AutoFlow(model, SMALL).setup()
    scramble(guide.parameters())
    guide.save(tmp_path / "q.flow")
    loaded = AutoFlow.load(tmp_path / "q.flow", model)
    values = guide.sample_posterior(sample_shape=(4,))
    assert torch.equal(loaded.log_prob(values), guide.log_prob(values))
    assert {k: v.shape for k, v in loaded.sample_posterior().items()} == {"a": (3,), "scale": ()}
    assert all(p.requires_grad for p in loaded.parameters())


def test_file_that_does_not_fit_the_model(tmp_path):
    AutoFlow(model, SMALL).setup().save(tmp_path / "q.flow")
    with pytest.raises(
        FlowFileError, match=r"sites \[\['a', 3\], \['scale', 1\]\], the model has \[\['a', 3\], \['sigma', 1\]\]"
    ):
        AutoFlow.load(tmp_path / "q.flow", renamed)
    with pytest.raises(FlowFileError, match=r"does not fit the model: .*expected dim=5"):
        AutoFlow.load(tmp_path / "q.flow", model, n=4)
    with pytest.raises(FlowFileError, match="cannot be read"):
        AutoFlow.load(tmp_path / "nothing.flow", model)


@pytest.mark.parametrize("source", ["AutoFlow", "AutoNormal", "MCMC"])
def test_arviz(source):
    pytest.importorskip("arviz")
    if source == "MCMC":
        fitted = MCMC(NUTS(model), num_samples=8, warmup_steps=4, num_chains=1, disable_progbar=True)
        fitted.run()
        data, shape = to_arviz(fitted), (1, 8)
        assert data.sample_stats["diverging"].shape == shape and data.sample_stats["diverging"].dtype == bool
    else:
        fitted = AutoFlow(model, SMALL) if source == "AutoFlow" else AutoNormal(model)
        state = torch.get_rng_state()
        fitted() if source == "AutoNormal" else fitted.setup()
        torch.set_rng_state(state)
        data, shape = to_arviz(fitted, rng=torch.Generator().manual_seed(1), num_samples=8), (1, 8)
        again = to_arviz(fitted, rng=torch.Generator().manual_seed(1), num_samples=8)
        assert torch.equal(torch.get_rng_state(), state)
        assert np.array_equal(data.posterior["a"].values, again.posterior["a"].values)
    assert set(data.posterior.data_vars) == {"a", "scale"}
    assert data.posterior["scale"].shape == shape and data.posterior["a"].shape == (*shape, 3)


def test_arviz_sets_a_guide_up():
    pytest.importorskip("arviz")
    assert to_arviz(AutoFlow(model, SMALL), 4, num_samples=2).posterior["a"].shape == (1, 2, 4)


def test_arviz_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="source is dict: expected an AutoFlow"):
        to_arviz({})
    with pytest.raises(TypeError, match="leave it out"):
        to_arviz(AutoFlow(model), params={})


def test_missing_pyro_says_what_to_install():
    script = """
        import sys
        sys.modules["pyro"] = None
        try:
            import flowppl.pyro
        except ImportError as error:
            print(type(error).__name__, error)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert (
        out.stdout.strip()
        == "MissingExtraError pyro-ppl is not installed; install it with: pip install 'flowppl[pyro]'"
    )
