"""A regression with unknown noise, in closed form: the posterior has tails, so that annealing has something to do.

tau ~ Gamma(3, 2),  beta_j ~ Normal(0, 2 / sqrt(tau)),  y_i ~ Normal(x_i beta, 1 / sqrt(tau))
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import multivariate_t

ROWS, BATCH, SHAPE, RATE, WIDTH = 12, 4, 3.0, 2.0, 2.0
OPTIONS = {"num_samples": 2000, "num_steps": 4, "step_ess": 0.9, "progress_bar": False}
_RNG = np.random.default_rng(0)
X = np.stack([np.ones(ROWS), _RNG.standard_normal(ROWS)], 1)
Y = X @ np.array([1.0, -0.5]) + 0.7 * _RNG.standard_normal(ROWS)

_PRECISION = X.T @ X + np.eye(2) / WIDTH**2
BETA = np.linalg.solve(_PRECISION, X.T @ Y)
_A, _B = SHAPE + ROWS / 2, RATE + 0.5 * (Y @ Y - BETA @ _PRECISION @ BETA)
MEAN = {"beta": BETA, "tau": _A / _B}
SD = {
    "beta": np.sqrt(_B / (_A - 1) * np.diagonal(np.linalg.inv(_PRECISION))),
    "tau": np.sqrt(_A) / _B,
}
_SCALE = RATE / SHAPE * (np.eye(ROWS) + WIDTH**2 * X @ X.T)
LOG_EVIDENCE = multivariate_t(np.zeros(ROWS), _SCALE, df=2 * SHAPE).logpdf(Y)


def check_evidence(posterior: Any) -> None:
    """Within four standard errors of its own, which twenty islands give, and near."""
    value, error = posterior.log_evidence
    assert abs(value - LOG_EVIDENCE) < 4 * error and error < 0.02
    assert abs(value - LOG_EVIDENCE) < 0.02


def check_moments(posterior: Any) -> None:
    """2000 draws err by 0.022 sds and 1.6 % of sd, 3 % where tails are those of a gamma."""
    mean, sd = posterior.mean(), posterior.sd()
    for site, exact in MEAN.items():
        np.testing.assert_allclose((mean[site] - exact) / SD[site], 0.0, atol=0.1)
        np.testing.assert_allclose(sd[site] / SD[site], 1.0, atol=0.1)


def check_schedule(posterior: Any) -> None:
    """From the base to the posterior by temperatures that increase, with what was seen at each."""
    found = posterior.annealing
    betas = found.schedule.betas
    assert betas[-1] == 1 and np.all(np.diff(np.concatenate([[0.0], betas])) > 0)
    assert len(betas) == len(found.schedule.step_sizes) == len(found.ess) == len(found.acceptance)
    assert found.log_z.shape == (20,) and found.draws[0].shape == (2000, 3)
    assert np.all((found.ess > 0.5) & (found.ess <= 1)) and np.all((found.acceptance > 0.5) & (found.acceptance <= 1))


def check_uses(posterior: Any, new: Any) -> None:
    """What can be asked of it: predictions at new covariates `(2, 2)` against the exact means, draws of equal weight, a picture."""
    predicted = posterior.predict(new, num_samples=1500)["y"]
    assert predicted.shape == (1500, 2)
    np.testing.assert_allclose(predicted.mean(0), np.asarray(new) @ BETA, atol=0.2)
    draws = posterior.resample(1000, seed=1)
    assert draws["beta"].shape == (1000, 2) and draws["tau"].shape == (1000,)
    np.testing.assert_allclose(draws["tau"].mean(), MEAN["tau"], atol=0.2 * SD["tau"])
    assert "AnnealedPosterior" in repr(posterior)


def check_arviz(posterior: Any) -> None:
    """Draws with their log-weights and log likelihoods."""
    data = posterior.to_arviz(num_samples=400, log_likelihood=True)
    assert data.posterior["beta"].shape == (1, 400, 2)
    assert set(data.sample_stats.data_vars) == {"lp", "log_weight"}
    assert data.log_likelihood["y"].shape == (1, 400, ROWS)
