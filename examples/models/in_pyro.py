"""The example models in Pyro; `in_numpyro` has the same two with the same sites."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def eight_schools(effect: Tensor, standard_error: Tensor) -> None:
    """Centred Eight Schools: a funnel between ``tau`` and the eight ``theta``; 10 dimensions.

    Reference: Rubin (1981); priors as in posteriordb, ``eight_schools-eight_schools_centered``.
    """
    mu = pyro.sample("mu", dist.Normal(effect.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(effect.new_tensor(5.0)))
    with pyro.plate("school", len(effect)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, standard_error), obs=effect)


def sparse_logistic(x: Tensor, y: Tensor) -> None:
    """Logistic regression with a normal-gamma prior that pulls most coefficients to zero; 50 dimensions for 24 features.

    The coefficients are ``beta = tau * lam * z``. Half-normal local scales ``lam`` make the prior of ``beta`` given
    ``tau`` a normal-gamma of shape 1/2, with a pole at zero and tails like exp(-|beta| / tau).

    Reference: Griffin and Brown (2010), "Inference with normal-gamma prior distributions in regression problems",
    Bayesian Analysis 5 (1).
    """
    zero, one = x.new_tensor(0.0), x.new_tensor(1.0)
    alpha = pyro.sample("alpha", dist.Normal(zero, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(one))
    with pyro.plate("feature", x.shape[-1]):
        lam = pyro.sample("lam", dist.HalfNormal(one))
        z = pyro.sample("z", dist.Normal(zero, one))
    beta = pyro.deterministic("beta", tau * lam * z)
    with pyro.plate("row", x.shape[0]):
        pyro.sample("y", dist.Bernoulli(logits=alpha + torch.matmul(beta, x.T)), obs=y)


MODELS = {"eight_schools": eight_schools, "sparse_logistic": sparse_logistic}
