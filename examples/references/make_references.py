"""Make the reference posteriors beside this file: long NUTS runs in float64, checked before they are written.

    python examples/references/make_references.py [eight_schools] [sparse_logistic]

Eight Schools runs in its non-centred form, where NUTS has no trouble, and is reported in the centred sites; the sparse
regression is non-centred as written. Needs NumPyro and ArviZ; about five minutes on two cores.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import arviz as az
import jax
import numpy as np
import numpyro
from numpyro.handlers import reparam
from numpyro.infer import MCMC, NUTS
from numpyro.infer.reparam import LocScaleReparam

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from models.data import load_data
from models.in_numpyro import MODELS

SITES = {"eight_schools": ("mu", "tau", "theta"), "sparse_logistic": ("alpha", "tau", "lam", "z", "beta")}
REPARAMETRISED = {"eight_schools": {"theta": LocScaleReparam(0)}, "sparse_logistic": {}}
CHAINS, WARMUP, DRAWS, TARGET_ACCEPT = 8, 3_000, 25_000, 0.99
THINNED = 10_000
PROBABILITIES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def sample(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """Runs NUTS; returns draws of shape ``(chain, draw, *site)`` and the settings with the number of divergences."""
    model = reparam(MODELS[name], config=REPARAMETRISED[name])
    mcmc = MCMC(
        NUTS(model, target_accept_prob=TARGET_ACCEPT),
        num_warmup=WARMUP,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(20), *load_data(name), extra_fields=("diverging", "num_steps"))
    extra = mcmc.get_extra_fields()
    metadata = {
        "model": name,
        "sampler": f"NumPyro {numpyro.__version__} NUTS, float64, non-centred",
        "chains": CHAINS,
        "warmup": WARMUP,
        "draws_per_chain": DRAWS,
        "target_accept_prob": TARGET_ACCEPT,
        "mean_leapfrog_steps": round(float(extra["num_steps"].mean()), 1),
        "divergences": int(extra["diverging"].sum()),
    }
    samples = mcmc.get_samples(group_by_chain=True)
    return {site: np.asarray(samples[site]) for site in SITES[name]}, metadata


def check(draws: dict[str, np.ndarray], metadata: dict) -> dict:
    """Adds R-hat (rank-normalised, split) and effective sample sizes of every scalar; refuses a poor run.

    Raises:
        RuntimeError: On any divergence, an R-hat of 1.01 or more, or an effective sample size of 10,000 or less.
    """
    posterior = az.convert_to_dataset(draws)
    flat = {
        "rhat": az.rhat(posterior),
        "ess_bulk": az.ess(posterior, method="bulk"),
        "ess_tail": az.ess(posterior, method="tail"),
    }
    worst = {"rhat": np.max, "ess_bulk": np.min, "ess_tail": np.min}
    for key, values in flat.items():
        metadata[key] = {site: round(float(worst[key](values[site].values)), 5) for site in draws}
    if (
        metadata["divergences"]
        or max(metadata["rhat"].values()) >= 1.01
        or min(metadata["ess_bulk"].values()) <= 10_000
        or min(metadata["ess_tail"].values()) <= 10_000
    ):
        raise RuntimeError(f"not fit to be a reference: {json.dumps(metadata, indent=2)}")
    return metadata


def summarise(draws: dict[str, np.ndarray], metadata: dict) -> dict[str, np.ndarray]:
    """Arrays to store: moments and quantiles of all draws with their Monte Carlo errors, and thinned draws."""
    posterior = az.convert_to_dataset(draws)
    errors = {kind: az.mcse(posterior, method=kind) for kind in ("mean", "sd")}
    quantile_errors = [az.mcse(posterior, method="quantile", prob=p) for p in PROBABILITIES]
    arrays = {"probabilities": np.array(PROBABILITIES), "metadata": np.array(json.dumps(metadata))}
    for site, values in draws.items():
        pooled = values.reshape(-1, *values.shape[2:])
        arrays[f"mean/{site}"] = pooled.mean(0)
        arrays[f"sd/{site}"] = pooled.std(0)
        arrays[f"quantiles/{site}"] = np.quantile(pooled, PROBABILITIES, axis=0)
        arrays[f"mean_mcse/{site}"] = errors["mean"][site].values
        arrays[f"sd_mcse/{site}"] = errors["sd"][site].values
        arrays[f"quantiles_mcse/{site}"] = np.stack([e[site].values for e in quantile_errors])
        if site != "beta":  # beta = tau * lam * z
            arrays[f"draws/{site}"] = pooled[:: len(pooled) // THINNED].astype(np.float32)
    return arrays


def main() -> None:
    """Makes the references named on the command line, or all."""
    numpyro.enable_x64()
    for name in sys.argv[1:] or list(SITES):
        draws, metadata = sample(name)
        metadata = check(draws, metadata)
        print(json.dumps(metadata, indent=2))
        np.savez_compressed(HERE / f"{name}.npz", **summarise(draws, metadata))


if __name__ == "__main__":
    main()
