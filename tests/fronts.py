"""Models and guides that are written once and run in either language: for tests that need both."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np


class Front(NamedTuple):
    """One of the languages: `ppl.sample` and the like, its distributions, and arrays."""

    name: str
    ppl: Any
    dist: Any
    array: Any
    objectives: Any  # flowppl's front

    def estimates(self, loss: Any, model: Any, guide: Any, num: int, *args: Any) -> tuple[np.ndarray, np.ndarray]:
        """Estimates of a loss `(num,)` and of its gradient in the guide's and the model's parameters, by name, `(num, params)`."""
        run = _jax_estimates if self.name == "numpyro" else _torch_estimates
        return run(loss, partial(model, self), partial(guide, self), num, *args)


def numpyro_front() -> Front:
    import jax.numpy as jnp
    import numpyro

    import flowppl.numpyro

    return Front("numpyro", numpyro, numpyro.distributions, jnp.asarray, flowppl.numpyro)


def pyro_front() -> Front:
    import pyro
    import torch

    import flowppl.pyro

    array = partial(torch.as_tensor, dtype=torch.float64)
    return Front("pyro", pyro, pyro.distributions, array, flowppl.pyro)


def _jax_estimates(loss: Any, model: Any, guide: Any, num: int, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    import jax
    from numpyro import handlers

    params = {}
    for f in (guide, model):
        with handlers.block():
            found = handlers.trace(handlers.seed(f, 0)).get_trace(*args)
        params |= {name: site["value"] for name, site in found.items() if site["type"] == "param"}
    of = jax.value_and_grad(lambda params, key: loss.loss(key, params, model, guide, *args))
    values, grads = jax.jit(jax.vmap(partial(of, params)))(jax.random.split(jax.random.key(1), num))
    return np.asarray(values), np.stack([np.asarray(grads[name]).reshape(num, -1) for name in sorted(grads)], -1)[:, 0]


def _torch_estimates(loss: Any, model: Any, guide: Any, num: int, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    import pyro

    pyro.clear_param_store()
    guide(*args), model(*args)
    params = dict(sorted(pyro.get_param_store().named_parameters()))
    values, grads = [], []
    for seed in range(num):
        pyro.set_rng_seed(seed)
        for p in params.values():
            p.grad = None
        values.append(loss.loss_and_grads(model, guide, *args))
        grads.append([0.0 if p.grad is None else float(p.grad) for p in params.values()])
    return np.asarray(values), np.asarray(grads)
