"""Stochastic flows as guides against closed forms, such as the regression of `annealed`; derivatives of decisions by quadrature."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.polynomial.hermite_e import hermegauss

from flowppl import flows
from flowppl.stochastic import Moves, snf
from flowppl.training import Options
from flowppl.weights import ess, log_mean_exp, normalize
from tests.annealed import LOG_EVIDENCE, MEAN, ROWS, SD

LAYERS = ["affine", Moves("langevin", repeats=3, step_size=0.5)]
SCALE, PARTICLES, STEPS, RATE, PATHS = 0.5, 8, 40, 0.05, 2000

# To the wave: a ~ N(0, 1) exp(-a^4 / 4), b ~ N(cos 2a, width^2). Paths start off the guide's own point.
WAVE = [flows.realnvp(layers=2, hidden=(16,)), Moves("metropolis", repeats=3)]
PLACE = {"shift": [0.0, 0.5], "log_scale": [0.3, 0.3]}
WIDTH, OPTIONS = 0.5, Options(num_particles=100, max_steps=150, chunk=50, learning_rate=2e-2)


def check_training(losses: Any) -> None:
    """From a start that is some nats below, in 40 steps."""
    elbos = -np.asarray(losses)
    assert elbos[:5].mean() + 2 < elbos[-10:].mean() < LOG_EVIDENCE + 0.5


def check_layers(before: Any, after: Any, history: list) -> None:
    """Log-weights of 2000 paths. False alarms: 4 standard errors. The best normal has an ELBO 0.48 below the evidence."""
    a = np.linspace(-5, 5, 1001)
    exact = np.log(np.trapezoid(np.exp(-0.5 * a**2 - 0.25 * a**4), a) / np.sqrt(2 * np.pi))
    error = (1 / ess(after) - 1 / PATHS) ** 0.5
    assert abs(log_mean_exp(after) - exact) < 4 * error < 0.05
    assert before.mean() < exact - 5 and after.mean() > exact - 0.1
    assert ess(after) > 0.8 * PATHS and ess(before) < 0.4 * PATHS
    assert len(history) == 3 and history[-1].elbo > history[0].elbo


def check_weights(posterior: Any, elbo: float) -> None:
    """Of 2000 paths; the ELBO is what the loss says of as many others. False alarms: 4 standard errors, each time."""
    value, error = posterior.log_evidence
    assert abs(value - LOG_EVIDENCE) < 4 * error and error < 0.05
    own, own_error = posterior.elbo
    assert abs(elbo - own) < 4 * 2**0.5 * own_error
    assert LOG_EVIDENCE - 2 < elbo < LOG_EVIDENCE + 4 * own_error
    w = normalize(posterior.log_weights)  # as they are: those of a large k-hat are not for use, and still exact
    for site, exact in MEAN.items():
        x = posterior.samples[site]
        mean = np.tensordot(w, x, 1)
        sd, error = np.sqrt(np.tensordot(w, (x - mean) ** 2, 1)), np.sqrt(np.tensordot(w**2, (x - mean) ** 2, 1))
        assert np.all(np.abs(mean - exact) < 4 * error) and np.all(error < 0.08 * SD[site])
        np.testing.assert_allclose(sd / SD[site], 1.0, atol=0.15)


def check_uses(posterior: Any, new: Any) -> None:
    """What weighted draws can be asked; new covariates are `(2, 2)`."""
    assert 0.2 * PATHS < posterior.ess <= PATHS and posterior.khat < 1
    draws = posterior.resample(500, seed=1)
    assert draws["beta"].shape == (500, 2) and draws["tau"].shape == (500,)
    predicted = posterior.predict(new, num_samples=200)["y"]
    assert predicted.shape == (200, 2)


def check_arviz(posterior: Any) -> None:
    """Draws with their log-weights and log likelihoods."""
    data = posterior.to_arviz(num_samples=50, log_likelihood=True)
    assert data.posterior["beta"].shape == (1, 50, 2) and data.log_likelihood["y"].shape == (1, 50, ROWS)
    assert set(data.sample_stats.data_vars) == {"lp", "log_weight"}


# Two random-walk steps on the line, of which the first decides what the second bridge's step sees.
SHIFT, STEP = 0.5, 1.5


def undecided() -> Any:
    """x0 = z + shift, a Metropolis step at beta 1/2 and one at beta 1, which changes no weight."""
    return snf(["affine", *2 * [Moves("metropolis", step_size=STEP)]], 1)


def log_target(x: Any) -> Any:
    """A normal about 2, not normalised: `(n, 1)` to `(n,)`."""
    return -0.5 * ((x - 2.0) ** 2).sum(-1)


def slope_of_elbo(h: float = 1e-4) -> float:
    """d E log_w / d shift, by quadrature over where the path starts and what it proposes, and differences."""
    nodes, weights = hermegauss(120)
    z, noise, w = nodes[:, None], nodes[None], np.outer(weights, weights) / (2 * np.pi)

    def log_base(x: np.ndarray) -> np.ndarray:
        return -0.5 * x**2 - 0.5 * np.log(2 * np.pi)

    def log_p(x: np.ndarray) -> np.ndarray:
        return -0.5 * (x - 2.0) ** 2

    def elbo(shift: float) -> float:
        x = z + shift
        proposed = x + STEP * noise
        middle = lambda x: 0.5 * (log_base(x) + log_p(x))
        last = lambda x: log_p(x) - middle(x)
        accept = np.exp(np.minimum(middle(proposed) - middle(x), 0.0))
        log_w = middle(x) - log_base(z) + accept * last(proposed) + (1 - accept) * last(x)
        return float((w * log_w).sum())

    return (elbo(SHIFT + h) - elbo(SHIFT - h)) / (2 * h)


def check_score(slopes: np.ndarray, biased: np.ndarray) -> None:
    """Estimates of the slope by batches of paths, with the score of decisions and without, which is off by far."""
    exact = slope_of_elbo()
    for found, is_right in ((slopes, True), (biased, False)):
        error = found.std(ddof=1) / len(found) ** 0.5
        assert (abs(found.mean() - exact) < 4 * error) == is_right, (found.mean(), exact, error)
