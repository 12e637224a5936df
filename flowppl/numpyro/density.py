"""From a NumPyro model to a log density of flat unconstrained vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer.initialization import init_to_median
from numpyro.infer.util import initialize_model, potential_energy

from flowppl.numpyro.plates import FullPlates
from flowppl.numpyro.sites import Layout, is_latent
from flowppl.plates import in_plates, needs_all, refuse_local, rows_at_a_time

Array = Any


class LogDensity:
    """The unnormalised log density of a model's latents, in unconstrained space, flat and batched.

    Coordinates are the sites in the order of their names. NaN becomes -inf, so that a sampler rejects it. Where a plate subsamples,
    the density is that of all of the data, a few points at a time; `minibatch` estimates it.

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
        plates: Those that subsample: their full size, and how much of it the model asks for, by name.

    Raises:
        UnsupportedModelError: a plate subsamples, and has latents in it or fails without subsampling, or a latent is enumerated.

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
        full = FullPlates(model)
        self._model, self._full, self._args, self._kwargs = model, full, args, kwargs or {}
        self._key, self._init_loc_fn = key, init_loc_fn
        try:
            info = self._initialize(full)
        except (TypeError, ValueError) as error:
            if full.found:
                raise needs_all(error, full.found) from error
            raise
        self.plates = dict(full.found)
        # By name: NumPyro adds the log-Jacobians as observed sites of its own.
        trace = info.model_trace.items()
        refuse_local({name: site for name, site in trace if is_latent(site)}, self.plates)
        self._rows = rows_at_a_time((site for _, site in trace if "cond_indep_stack" in site), self.plates)
        self._local = [name for name, site in trace if site["type"] == "deterministic" and in_plates(site, self.plates)]
        self._observed = [name for name, site in trace if site["type"] == "sample" and site["is_observed"]]
        self._potential_given = info.potential_fn
        self._potential = info.potential_fn(*args, **self._kwargs)
        self._postprocess_given = info.postprocess_fn
        self._postprocess = handlers.seed(info.postprocess_fn(*args, **self._kwargs), key)
        self._layout = Layout(info.param_info.z)
        self.names = self._layout.names
        self.shapes = self._layout.shapes
        self.dim = self._layout.dim
        self.init = self._layout.pack(info.param_info.z)

    def given(self, *args: Any, **kwargs: Any) -> LogDensity:
        """The log density of the same latents given other arguments of the model, which may be traced."""
        new = copy.copy(self)
        vars(new).pop("_prior_potential", None)
        new._args, new._kwargs, new._potential = args, kwargs, self._potential_given(*args, **kwargs)
        new._postprocess = handlers.seed(self._postprocess_given(*args, **kwargs), self._key)
        return new

    def log_prob(self, u: Array) -> Array:
        """Log density at u `(batch, dim)`, with the log-Jacobian of the constraints, `(batch,)`."""
        return _finite(self._raw(u))

    def minibatch(self, rng: Array, u: Array) -> Array:
        """Log density at u `(batch, dim)` as one minibatch estimates it, the same for all points and without bias, `(batch,)`.

        Where no plate subsamples, it is `log_prob`.

        Args:
            rng: A key, from which the model's plates draw.
            u: The points.
        """
        if not self.plates:
            return self.log_prob(u)
        model = handlers.seed(self._model, rng)
        with jax.ensure_compile_time_eval():  # traced indices cannot index numpy's arrays
            given = (self._args, self._kwargs)
            args, kwargs = jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, given)

        def one(u: Array) -> Array:
            with handlers.block():
                return -potential_energy(model, args, kwargs, self._layout.unpack(u))

        return _finite(jax.vmap(one)(u))

    def num_nan(self, u: Array) -> Array:
        """How many of the points u `(batch, dim)` have a NaN density."""
        return jnp.sum(jnp.isnan(self._raw(u)))

    def value_and_score(self, u: Array) -> tuple[Array, Array]:
        """Log density `(batch,)` and its gradient `(batch, dim)`."""
        return self._each(jax.value_and_grad(lambda u: _finite(self._one(u))), u)

    def split(self, u: Array) -> tuple[Array, Array]:
        """Log prior (with the log-Jacobian) and log likelihood, each `(batch,)`; they add up to `log_prob`.

        The prior is the density of the model without its observed sites; both sum over enumerated latents.
        """
        prior = _finite(self._each(lambda u: -self._prior_potential(self._layout.unpack(u)), u))
        impossible = jnp.isneginf(prior)
        return prior, jnp.where(impossible, 0.0, self.log_prob(u) - jnp.where(impossible, 0.0, prior))

    def unpack(self, u: Array) -> dict[str, Array]:
        """Unconstrained values by site, from u `(*batch, dim)`."""
        return self._layout.unpack(u)

    def constrain(self, u: Array) -> dict[str, Array]:
        """Values by site, from u `(*batch, dim)`, with deterministic sites but for those in plates that subsample."""
        values = self._each(self._values, u.reshape(-1, self.dim))
        return jax.tree.map(lambda a: a.reshape(*u.shape[:-1], *a.shape[1:]), values)

    def _values(self, u: Array) -> dict[str, Array]:
        values = self._postprocess(self._layout.unpack(u))
        return {name: value for name, value in values.items() if name not in self._local}

    def _one(self, u: Array) -> Array:
        return -self._potential(self._layout.unpack(u))

    def _raw(self, u: Array) -> Array:
        return self._each(self._one, u)

    def _each(self, function: Callable, u: Array) -> Any:
        """A function of every point: of all at once, or of a few where each needs all of the data of plates that subsample."""
        return jax.lax.map(function, u, batch_size=self._rows) if self.plates else jax.vmap(function)(u)

    @cached_property
    def _prior_potential(self) -> Callable:
        with jax.ensure_compile_time_eval():  # `split` may be under jit
            info = self._initialize(handlers.block(self._full, hide=self._observed))
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


def _finite(log_prob: Array) -> Array:
    return jnp.where(jnp.isnan(log_prob), -jnp.inf, log_prob)
