"""The example models in NumPyro; `in_pyro` has the same two with the same sites."""

from __future__ import annotations

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array


def eight_schools(effect: Array, standard_error: Array) -> None:
    """Centred Eight Schools: a funnel between ``tau`` and the eight ``theta``; 10 dimensions.

    Reference: Rubin (1981); priors as in posteriordb, ``eight_schools-eight_schools_centered``.
    """
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(effect)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("effect", dist.Normal(theta, standard_error), obs=effect)


def sparse_logistic(x: Array, y: Array) -> None:
    """Logistic regression with a normal-gamma prior that pulls most coefficients to zero; 50 dimensions for 24 features.

    The coefficients are ``beta = tau * lam * z``. Half-normal local scales ``lam`` make the prior of ``beta`` given
    ``tau`` a normal-gamma of shape 1/2, with a pole at zero and tails like exp(-|beta| / tau).

    Reference: Griffin and Brown (2010), "Inference with normal-gamma prior distributions in regression problems",
    Bayesian Analysis 5 (1).
    """
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("feature", x.shape[-1]):
        lam = numpyro.sample("lam", dist.HalfNormal(1.0))
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    beta = numpyro.deterministic("beta", tau * lam * z)
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Bernoulli(logits=alpha + jnp.matmul(beta, x.T)), obs=y)


MODELS = {"eight_schools": eight_schools, "sparse_logistic": sparse_logistic}
