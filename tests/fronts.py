"""Models and guides that are written once and run in either language: for tests that need both."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy.stats import f

from flowppl.backend import backend_of
from flowppl.objectives import programs

try:
    import jax
    import jax.numpy as jnp
    import numpyro
    import pyro
    import torch
    from numpyro import handlers

    import flowppl.numpyro
    import flowppl.pyro
except ImportError:  # in the environment of one front; `needs_both` skips a module there
    pyro = None


def needs_both() -> None:
    """Skips a test module where one of the languages is not installed."""
    if pyro is None:
        pytest.skip("needs NumPyro and Pyro", allow_module_level=True)


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


NUMPYRO = PYRO = None
if pyro is not None:
    NUMPYRO = Front("numpyro", numpyro, numpyro.distributions, jnp.asarray, flowppl.numpyro)
    PYRO = Front("pyro", pyro, pyro.distributions, partial(torch.as_tensor, dtype=torch.float64), flowppl.pyro)
each_front = pytest.mark.parametrize("front", [NUMPYRO, PYRO], ids=["numpyro", "pyro"])


@pytest.fixture
def quick_and_precise() -> Any:
    """Nearly all of the time of small programs goes into compiling them; double precision."""
    before, dtype = jax.config.read("jax_disable_most_optimizations"), torch.get_default_dtype()
    jax.config.update("jax_disable_most_optimizations", True)
    torch.set_default_dtype(torch.float64)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    torch.set_default_dtype(dtype)


def smooth(log_w: Any) -> Any:
    """A user's objective, in which particles have different parts."""
    xp = backend_of(log_w).xp
    return xp.mean(xp.tanh(log_w), axis=0) + 0.3 / (1 + xp.exp(-log_w[0]))


PROGRAMS = {"elbo": programs.elbo(), "iwae": programs.iwae(), "user": programs.get(smooth)}


def with_gradient(value: Any, theta: list[Any]) -> np.ndarray:
    """A number and its derivatives."""
    return torch.stack([value, *torch.autograd.grad(value, theta)]).detach().numpy()


def assert_mean_zero(draws: np.ndarray) -> None:
    """Hotelling's test, with a floor against rounding: one false alarm in a thousand."""
    n, k = draws.shape
    mean, covariance = draws.mean(0), np.cov(draws.T) + 1e-12 * np.eye(k)
    assert n * mean @ np.linalg.solve(covariance, mean) * (n - k) / (k * (n - 1)) < f.isf(1e-3, k, n - k)


def _jax_estimates(loss: Any, model: Any, guide: Any, num: int, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    def start() -> dict[str, Any]:
        params = {}
        for each in (guide, model):
            found = handlers.trace(handlers.seed(each, 0)).get_trace(*args)
            params |= {name: site["value"] for name, site in found.items() if site["type"] == "param"}
        return params

    params = jax.jit(start)()  # compiled, all else that guide and model do is left out
    of = jax.value_and_grad(lambda params, key: loss.loss(key, params, model, guide, *args))
    values, grads = jax.jit(jax.vmap(partial(of, params)))(jax.random.split(jax.random.key(1), num))
    return np.asarray(values), np.stack([np.asarray(grads[name]).reshape(num, -1) for name in sorted(grads)], -1)[:, 0]


def _torch_estimates(loss: Any, model: Any, guide: Any, num: int, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    pyro.clear_param_store()
    guide(*args), model(*args), loss.loss(model, guide, *args)  # some draw at the first time only
    params = dict(sorted(pyro.get_param_store().named_parameters()))
    values, grads = [], []
    for seed in range(num):
        pyro.set_rng_seed(seed)
        for p in params.values():
            p.grad = None
        values.append(loss.loss_and_grads(model, guide, *args))
        grads.append([0.0 if p.grad is None else float(p.grad) for p in params.values()])
    return np.asarray(values), np.asarray(grads)
