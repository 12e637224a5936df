"""The Pyro half of the demo: train four guides on two models, and leave each fit in a folder.

    python examples/comparison/fit_pyro.py FOLDER [--quick]

`fit_numpyro` is the same script in NumPyro.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoIAFNormal, AutoNormal
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.data import load_data
from models.in_pyro import MODELS

from comparison.fits import CHUNK, CLIP_NORM, FINAL_RATE, FLOW, NUM_DRAWS, RATES, Budget, Fit, run_all
from flowppl.pyro import AutoFlow

# AutoIAFNormal is Pyro's better flow guide here: in trials AutoNormalizingFlow with spline_coupling ended with a lower ELBO
# on both models, -35.0 and -534.7 (1500 steps), and its step takes several times as long.
# AutoFlow starts from a normal of scale 0.5 without `precondition`: neither posterior is ill-conditioned, and the Laplace
# approximation of a funnel is not a better start.
GUIDES: dict[str, Callable[[Callable], AutoGuide]] = {
    "AutoNormal": AutoNormal,
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, hidden_dim=[64, 64], num_transforms=3),
    "AutoFlow": lambda model: AutoFlow(model, flow=FLOW, init_scale=0.5),
    "AutoFlow path": lambda model: AutoFlow(model, flow=FLOW, init_scale=0.5, gradient="path"),
}


def fit(name: str, label: str, budget: Budget) -> Fit:
    """Trains one guide on one model, and draws from it."""
    model, args = MODELS[name], [torch.as_tensor(a, dtype=torch.float32) for a in load_data(name)]
    rate = RATES[name][label]
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    start = time.perf_counter()
    guide = GUIDES[label](model)
    if isinstance(guide, AutoFlow):
        guide.setup(*args)
    adam = {
        "optimizer": torch.optim.Adam,
        "optim_args": {"lr": rate},
        "T_max": budget.steps,
        "eta_min": FINAL_RATE * rate,
    }
    optimizer = pyro.optim.CosineAnnealingLR(adam, clip_args={"clip_norm": CLIP_NORM})
    elbo = Trace_ELBO(num_particles=budget.particles, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, optimizer, elbo)
    losses = []
    for _ in range(budget.steps):
        losses.append(svi.step(*args))
        optimizer.step()
    seconds = time.perf_counter() - start

    log_weights, draws = weigh(model, guide, args)
    return Fit("Pyro", name, label, np.asarray(losses), seconds, log_weights, draws)


@torch.no_grad()
def weigh(model: Callable, guide: AutoGuide, args: list[Tensor]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draws of any guide with log p - log q, both by tracing: the model's trace replays the guide's values."""
    log_weights, draws = [], []
    for _ in range(0, NUM_DRAWS, CHUNK):
        chunk, model_trace, _ = vectorized_importance_weights(
            model, guide, *args, num_samples=CHUNK, max_plate_nesting=1, normalized=False
        )
        log_weights.append(chunk.double().numpy())
        latent = {site: model_trace.nodes[site]["value"] for site in model_trace.stochastic_nodes}
        draws.append({site: value.squeeze().numpy() for site, value in latent.items()})
    return np.concatenate(log_weights), {site: np.concatenate([d[site] for d in draws]) for site in draws[0]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_all(fit, MODELS, GUIDES)
