"""A model whose posterior is known, for estimators that only run it: a line with noise, and its slope's logarithm normal.

intercept ~ Normal(0, 2),  slope ~ LogNormal(0, 1),  y_i ~ Normal(intercept + log(slope) t_i, 0.5)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from flowppl.flows import Normal

T = np.linspace(0.0, 2.0, 5)
NOISE, PRIOR = 0.5, np.array([2.0, 1.0])
DESIGN = np.stack([np.ones_like(T), T], 1)
COV = np.linalg.inv(DESIGN.T @ DESIGN / NOISE**2 + np.diag(PRIOR**-2))
SD = np.sqrt(np.diag(COV))


def simulate(num: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Latents (intercept, log slope) `(num, 2)` and data `(num, 5)`."""
    rng = np.random.default_rng(seed)
    latents = PRIOR * rng.standard_normal((num, 2))
    return latents, latents @ DESIGN.T + NOISE * rng.standard_normal((num, len(T)))


def log_posterior(latents: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Log density of (intercept, slope) where latents are (intercept, log slope), `(num,)`."""
    gap = (latents - _mean(y)) / SD
    inverse = np.linalg.inv(COV / np.outer(SD, SD))
    _, log_det = np.linalg.slogdet(2 * np.pi * COV)
    return -0.5 * np.einsum("ni,ij,nj->n", gap, inverse, gap) - 0.5 * log_det - latents[:, 1]


def check_posterior(amortized: Any) -> None:
    """Means within 0.15 and sds within 12% of the exact ones, correlations within 0.05, at nine data amid the prior.

    20,000 draws give a Monte Carlo error of 0.007 in each: the rest is what the training may leave.
    """
    latents = PRIOR * np.array([(a, b) for a in (-1.0, 0.0, 1.0) for b in (-1.0, 0.0, 1.0)])
    y = latents @ DESIGN.T + NOISE * np.random.default_rng(3).standard_normal((9, len(T)))
    draws = amortized.condition(y.astype(np.float32)).sample(20_000, seed=1)
    assert draws["intercept"].shape == draws["slope"].shape == (20_000, 9)
    z = np.stack([draws["intercept"], np.log(draws["slope"])], -1)
    np.testing.assert_allclose((z.mean(0) - _mean(y)) / SD, 0, atol=0.15)
    np.testing.assert_allclose(z.std(0) / SD, 1, atol=0.12)
    for k in range(9):
        np.testing.assert_allclose(np.corrcoef(z[:, k].T)[0, 1], COV[0, 1] / SD.prod(), atol=0.05)


def check_log_prob(amortized: Any) -> None:
    """KL(p | q) on average over 2000 data is positive (but for four standard errors, 6e-5) and below 0.05 nats; one datum alike."""
    latents, y = simulate(2000, seed=4)
    values = {"intercept": latents[:, 0], "slope": np.exp(latents[:, 1])}
    log_q = amortized.condition(y).log_prob(values)
    gap = log_posterior(latents, y) - log_q
    assert log_q.shape == (2000,)
    assert -4 * gap.std() / np.sqrt(2000) < gap.mean() < 0.05
    one = amortized.condition({"y": y[0]}).log_prob({name: v[:1] for name, v in values.items()})
    np.testing.assert_allclose(one, log_q[:1], rtol=1e-4)


def check_calibration(amortized: Any) -> None:
    """1000 replications: uniform ranks pass at 1e-3 each (false alarms 2e-3), and those of posteriors 0.7 times as wide do not."""
    found = amortized.calibration(1000, seed=2)
    assert found.ranks.shape == (1000, 2) and found.names == ["intercept", "slope"]
    assert found.ranks.min() >= 0 and found.ranks.max() <= found.num_draws
    assert (found.p_values() > 1e-3).all()
    np.testing.assert_allclose(found.coverage(0.9), 0.9, atol=4 * np.sqrt(0.9 * 0.1 / 1000))
    sharp = replace(amortized, flow=replace(amortized.flow, base=_Narrow())).calibration(1000, seed=2)
    assert (sharp.p_values() < 1e-3).all()
    assert (sharp.coverage(0.9) < 0.9 - 4 * np.sqrt(0.9 * 0.1 / 1000)).all()


class _Narrow(Normal):
    def sample(self, rng: Any, params: Any, shape: tuple[int, ...], like: Any = None) -> Any:
        return 0.7 * super().sample(rng, params, shape, like)


def _mean(y: np.ndarray) -> np.ndarray:
    return y @ DESIGN @ COV.T / NOISE**2
