"""A Gibbs sampler for the horseshoe regression, where NUTS diverges, non-centred or not.

Half-Cauchy scales are mixtures of inverse gammas (Makalic and Schmidt 2016, "A simple sampler for the horseshoe estimator"); the
variance of the noise, with its half-normal prior, takes a Metropolis step from its conditional under a flat one.
"""

from __future__ import annotations

import numpy as np


def horseshoe(
    x: np.ndarray, y: np.ndarray, chains: int, warmup: int, draws: int, thin: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Draws `(chain, draw, ...)` of the sites of the model `horseshoe`, every `thin`-th after the warm-up."""
    rng = np.random.default_rng(seed)
    n, p = x.shape
    z = np.concatenate([np.ones((n, 1)), x], 1)
    gram, moment = z.T @ z, z.T @ y

    def inverse_gamma(shape: float, rate: np.ndarray) -> np.ndarray:
        return rate / rng.gamma(shape, size=rate.shape)

    lam2, tau2, noise2 = np.exp(rng.normal(size=(chains, p))), np.exp(rng.normal(size=chains)), np.ones(chains)
    kept: dict[str, list] = {"alpha": [], "beta": [], "lam": [], "sigma": [], "tau": []}
    for step in range(warmup + draws * thin):
        prior = np.concatenate([np.ones((chains, 1)), 1.0 / (tau2[:, None] * lam2)], 1)
        root = np.linalg.cholesky(gram / noise2[:, None, None] + prior[:, :, None] * np.eye(p + 1))
        white = np.linalg.solve(root, (moment / noise2[:, None])[..., None]) + rng.normal(size=(chains, p + 1, 1))
        coefficients = np.linalg.solve(root.swapaxes(-1, -2), white)[..., 0]
        beta2 = coefficients[:, 1:] ** 2
        lam2 = inverse_gamma(1.0, 1.0 / inverse_gamma(1.0, 1.0 + 1.0 / lam2) + beta2 / (2.0 * tau2[:, None]))
        mixing = inverse_gamma(1.0, 1.0 + 1.0 / tau2)
        tau2 = inverse_gamma((p + 1) / 2, 1.0 / mixing + np.sum(beta2 / lam2, -1) / 2.0)
        squares = np.sum((y - coefficients @ z.T) ** 2, -1)
        proposal = inverse_gamma((n - 1) / 2, squares / 2.0)
        noise2 = np.where(np.log(rng.uniform(size=chains)) < (noise2 - proposal) / 2.0, proposal, noise2)
        if step >= warmup and (step - warmup) % thin == 0:
            found = coefficients[:, 0], coefficients[:, 1:], np.sqrt(lam2), np.sqrt(noise2), np.sqrt(tau2)
            for site, value in zip(kept, found, strict=True):
                kept[site].append(value)
    return {site: np.stack(values, 1) for site, values in kept.items()}
