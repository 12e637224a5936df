"""AutoFlow over angles and real numbers together: a posterior across the seam at pi, against quadrature."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from flowppl import flows
from flowppl.errors import UnsupportedModelError
from flowppl.pyro import AutoFlow

pytestmark = pytest.mark.usefixtures("float64")


def model():
    a = pyro.sample("a", dist.VonMises(3.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(torch.cos(a) + b, 0.5), obs=torch.tensor(-1.0))


def test_evidence_and_moments_across_the_seam():
    pyro.set_rng_seed(0)
    guide = AutoFlow(model, flows.nsf(layers=2, hidden=(16,)), gradient="path")
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(num_particles=64, vectorize_particles=True))
    for _ in range(300):
        svi.step()
    elbo = -np.mean([svi.evaluate_loss() for _ in range(20)])
    a, b = np.meshgrid(np.linspace(-np.pi, np.pi, 401)[:-1], np.linspace(-6, 6, 401), indexing="ij")
    log_joint = 2 * np.cos(a - 3) - np.log(2 * np.pi * np.i0(2.0)) - b * b / 2 - 2 * (np.cos(a) + b + 1) ** 2
    joint = np.exp(log_joint - np.log(2 * np.pi) - np.log(0.5))
    evidence = joint.sum() * (2 * np.pi / 400) * (12 / 400)
    assert elbo == pytest.approx(np.log(evidence), abs=0.03)
    draws = guide.sample_posterior(sample_shape=(4000,))
    assert draws["a"].abs().max() <= math.pi and draws["a"].min() < -3 and draws["a"].max() > 3
    exact = (joint * np.exp(1j * a)).sum() / joint.sum()
    found = torch.exp(1j * draws["a"]).mean()
    assert abs(complex(found) - exact) < 0.05
    # The median is counted from the mean direction, which is next to the seam: without that it would be near zero.
    median = guide.median()
    assert median["b"].shape == () and abs(torch.exp(1j * median["a"]) - exact / abs(exact)) < 0.1


def test_a_flow_without_angles_says_so():
    with pytest.raises(UnsupportedModelError, match="flow 'planar' has no circular coordinates"):
        AutoFlow(model, "planar").setup()
