"""The NumPyro half of the demo: train four guides on two models, and leave each fit in a folder.

    python examples/comparison/fit_numpyro.py FOLDER [--quick]

`fit_pyro` is the same script in Pyro.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
from jax import Array
from numpyro.handlers import seed
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoGuide, AutoIAFNormal, AutoNormal
from numpyro.infer.util import get_importance_trace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.data import load_data
from models.in_numpyro import MODELS

from comparison.fits import CHUNK, CLIP_NORM, FINAL_RATE, FLOW, NUM_DRAWS, RATES, Budget, Fit, run_all
from flowppl.numpyro import AutoFlow

# AutoIAFNormal is NumPyro's better flow guide here: in trials AutoBNAFNormal ended with a lower ELBO on both models, -31.9
# and -516.0 (1500 steps), and on the larger one its step takes ten times as long.
# AutoFlow starts from a normal of scale 0.5 without `precondition`: neither posterior is ill-conditioned, and the Laplace
# approximation of a funnel is not a better start.
GUIDES: dict[str, Callable[[Callable], AutoGuide]] = {
    "AutoNormal": AutoNormal,
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, hidden_dims=[64, 64], skip_connections=False),
    "AutoFlow": lambda model: AutoFlow(model, flow=FLOW, init_scale=0.5),
    "AutoFlow path": lambda model: AutoFlow(model, flow=FLOW, init_scale=0.5, gradient="path"),
}


def fit(name: str, label: str, budget: Budget) -> Fit:
    """Trains one guide on one model, and draws from it."""
    model, args = MODELS[name], [np.asarray(a, np.float32) for a in load_data(name)]
    rate = RATES[name][label]
    train_key, draw_key = jax.random.split(jax.random.key(0))

    start = time.perf_counter()
    guide = GUIDES[label](model)
    schedule = optax.cosine_decay_schedule(rate, budget.steps, FINAL_RATE)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adam(schedule))
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=budget.particles))
    result = svi.run(train_key, budget.steps, *args, progress_bar=False, stable_update=True)
    losses = np.asarray(result.losses)
    seconds = time.perf_counter() - start

    log_weights, draws = weigh(draw_key, model, guide, result.params, args)
    return Fit("NumPyro", name, label, losses, seconds, log_weights, draws)


def weigh(
    key: Array, model: Callable, guide: AutoGuide, params: dict, args: list[np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draws of any guide with log p - log q, both by tracing: the model's trace replays the guide's values."""

    def one(key: Array) -> tuple[Array, dict[str, Array]]:
        seeded = [seed(fn, k) for fn, k in zip((model, guide), jax.random.split(key), strict=True)]
        traces = get_importance_trace(*seeded, args, {}, params)
        log_p, log_q = (sum(s["log_prob"].sum() for s in t.values() if s["type"] == "sample") for t in traces)
        latent = {k: s["value"] for k, s in traces[0].items() if s["type"] == "sample" and not s["is_observed"]}
        return log_p - log_q, latent

    keys = jax.random.split(key, NUM_DRAWS)
    log_weights, draws = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=CHUNK))(keys)
    return np.asarray(log_weights, np.float64), jax.tree.map(np.asarray, draws)


if __name__ == "__main__":
    run_all(fit, MODELS, GUIDES)
