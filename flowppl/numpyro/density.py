"""From a NumPyro model to a log density of flat unconstrained vectors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.infer.initialization import init_to_median
from numpyro.infer.util import initialize_model

from flowppl.backend import get_backend
from flowppl.errors import UnsupportedModelError
from flowppl.numpyro.sites import Layout

Array = Any


class LogDensity:
    """The unnormalised log density of a model's latents, in unconstrained space, flat and batched.

    Coordinates are the sites in the order of their names. NaN becomes -inf, so that a sampler rejects it.

    Args:
        model: The model; discrete latents marked for enumeration are summed out.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        rng: A key for the start and for whatever the model draws outside its sites; None for a fixed one.
        init_loc_fn: How each site starts.

    Attributes:
        dim: Length of the vectors.
        init: A start `(dim,)`.
        names: The latent sites.
        shapes: Their unconstrained shapes.

    Raises:
        UnsupportedModelError: a plate subsamples.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from flowppl.numpyro import LogDensity
        >>> def model():
        ...     numpyro.sample("scale", dist.HalfNormal(1.0))
        >>> density = LogDensity(model)
        >>> density.log_prob(jnp.zeros((5, 1))).shape
        (5,)
    """

    def __init__(
        self,
        model: Callable,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        *,
        rng: Array | None = None,
        init_loc_fn: Callable = init_to_median,
    ) -> None:
        key = jax.random.key(0) if rng is None else rng
        self._model, self._args, self._kwargs = model, args, kwargs or {}
        self._key, self._init_loc_fn = key, init_loc_fn
        info = self._initialize(model)
        # By name: NumPyro adds the log-Jacobians as observed sites of its own.
        trace = info.model_trace.items()
        for name, site in trace:
            size, subsample_size = site["args"][:2] if site["type"] == "plate" else (None, None)
            if subsample_size not in (None, size):
                raise UnsupportedModelError(
                    f"plate {name!r} subsamples {subsample_size} of {size}: a density needs all of the data, so run the "
                    "model without subsampling"
                )
        self._observed = [name for name, site in trace if site["type"] == "sample" and site["is_observed"]]
        self._potential = info.potential_fn(*args, **self._kwargs)
        self._postprocess = handlers.seed(info.postprocess_fn(*args, **self._kwargs), key)
        self._layout = Layout(info.param_info.z)
        self.names = self._layout.names
        self.shapes = self._layout.shapes
        self.dim = self._layout.dim
        self.init = self._layout.pack(info.param_info.z)

    def log_prob(self, u: Array) -> Array:
        """Log density at u `(batch, dim)`, with the log-Jacobian of the constraints, `(batch,)`."""
        value = self._raw(u)
        return jnp.where(jnp.isnan(value), -jnp.inf, value)

    def num_nan(self, u: Array) -> Array:
        """How many of the points u `(batch, dim)` have a NaN density."""
        return jnp.sum(jnp.isnan(self._raw(u)))

    def value_and_score(self, u: Array) -> tuple[Array, Array]:
        """Log density `(batch,)` and its gradient `(batch, dim)`."""
        return get_backend("jax").value_and_score(self.log_prob, u)

    def split(self, u: Array) -> tuple[Array, Array]:
        """Log prior (with the log-Jacobian) and log likelihood, each `(batch,)`; they add up to `log_prob`.

        The prior is the density of the model without its observed sites; both sum over enumerated latents.
        """
        prior = jax.vmap(lambda u: -self._prior_potential(self._layout.unpack(u)))(u)
        prior = jnp.where(jnp.isnan(prior), -jnp.inf, prior)
        impossible = jnp.isneginf(prior)
        return prior, jnp.where(impossible, 0.0, self.log_prob(u) - jnp.where(impossible, 0.0, prior))

    def unpack(self, u: Array) -> dict[str, Array]:
        """Unconstrained values by site, from u `(*batch, dim)`."""
        return self._layout.unpack(u)

    def constrain(self, u: Array) -> dict[str, Array]:
        """Values by site, deterministic sites included, from u `(*batch, dim)`."""
        values = jax.vmap(lambda u: self._postprocess(self._layout.unpack(u)))(u.reshape(-1, self.dim))
        return jax.tree.map(lambda a: a.reshape(*u.shape[:-1], *a.shape[1:]), values)

    def _raw(self, u: Array) -> Array:
        return jax.vmap(lambda u: -self._potential(self._layout.unpack(u)))(u)

    @cached_property
    def _prior_potential(self) -> Callable:
        with jax.ensure_compile_time_eval():  # `split` may be under jit
            info = self._initialize(handlers.block(self._model, hide=self._observed))
        return info.potential_fn(*self._args, **self._kwargs)

    def _initialize(self, model: Callable) -> Any:
        with handlers.block():
            return initialize_model(
                self._key,
                model,
                init_strategy=self._init_loc_fn,
                dynamic_args=True,
                model_args=self._args,
                model_kwargs=self._kwargs,
                validate_grad=False,
            )
