"""Make the reference for `examples/amortized.py`: a long NUTS run in float64 over all countries, checked before it is written.

    python examples/references/make_fertility.py

Needs NumPyro and ArviZ; a few minutes on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC, NUTS

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from amortized import load, numpyro_model


def main() -> None:
    """Samples, checks and writes means and sds of all sites."""
    jax.config.update("jax_enable_x64", True)
    _, x, y = load()
    mcmc = MCMC(
        NUTS(numpyro_model()),
        num_warmup=1000,
        num_samples=2500,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), jnp.asarray(x), jnp.asarray(y), extra_fields=("diverging",))
    draws = mcmc.get_samples(group_by_chain=True)
    summary = az.summary(az.convert_to_inference_data({k: np.asarray(v) for k, v in draws.items()}), round_to="none")
    divergences = int(mcmc.get_extra_fields()["diverging"].sum())
    print(
        f"R-hat at most {summary.r_hat.max():.4f}, ESS at least {summary.ess_bulk.min():.0f}, {divergences} divergences"
    )
    if summary.r_hat.max() > 1.01 or summary.ess_bulk.min() < 1000 or divergences:
        raise SystemExit("not good enough: nothing is written")
    moments = {f"{stat}/{k}": getattr(np, stat)(v, axis=(0, 1)) for k, v in draws.items() for stat in ("mean", "std")}
    np.savez_compressed(HERE / "fertility.npz", **moments)


if __name__ == "__main__":
    main()
