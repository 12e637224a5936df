"""What guides over one flat unconstrained vector share: a layout, and draws of all sites at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.distributions.transforms import UnpackTransform
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.initialization import init_to_uniform

from flowppl.errors import NonFiniteError, UnsupportedModelError
from flowppl.laplace import NormalApproximation
from flowppl.numpyro.density import LogDensity
from flowppl.numpyro.model_guide import ModelGuide
from flowppl.numpyro.precise import Precise
from flowppl.numpyro.sites import Layout
from flowppl.pathfinder import pathfinder

Array = Any


class FlatGuide(ModelGuide, AutoContinuous):
    """A guide over all latents at once, as an `AutoContinuous`."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Draws the latents, constrained: values by site."""
        self._meet(args, kwargs)
        return super().__call__(*args, **kwargs)

    def _lay_out(self, args: tuple, kwargs: dict[str, Any]) -> None:
        # NumPyro keeps the sites in the model's order or in that of their names, as the start was found; files and
        # LogDensity have one order.
        self._layout = Layout(self._init_locs)
        self._init_latent = self._layout.pack(self._init_locs)
        self._unpack_latent = UnpackTransform(self._layout.unpack, self._layout.pack)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._setup_prototype(*args, **kwargs)
        except ValueError as error:
            if "local latent variables" not in str(error):
                raise
            raise UnsupportedModelError(
                f"{type(self).__name__} covers all latents at once, but this model has latents inside a subsampled plate: give the "
                "plate its full size (subsample_size=None), or use AmortizedFlow, whose encoder covers local latents"
            ) from error

    def sample_posterior(
        self, rng_key: Array, params: dict[str, Any], *args: Any, sample_shape: tuple[int, ...] = (), **kwargs: Any
    ) -> dict[str, Array]:
        """Draws the latents, constrained, and the model's deterministic sites: `(*sample_shape, *shape)` by site.

        Args:
            rng_key: A key.
            params: The guide's parameters.
            args: The model's arguments; needed where the guide has not met them yet, or only inside `jax.jit`.
            sample_shape: The shape of the draws.
            kwargs: The model's keyword arguments.
        """
        if args or kwargs:
            self._setup(rng_key, args, kwargs)
        self._require_prototype()
        try:
            draw = handlers.substitute(handlers.seed(self._sample_latent, rng_key), params)
            return self._unpack_and_constrain(draw(*args, sample_shape=sample_shape, **kwargs), params)
        except jax.errors.UnexpectedTracerError as error:
            raise RuntimeError(
                "the guide has met its model's arguments only inside jax.jit: pass them to sample_posterior too"
            ) from error

    def _normal(self, rng: Array, args: tuple, kwargs: dict[str, Any]) -> NormalApproximation:
        """A normal approximation of the posterior, by multi-path Pathfinder; see `AutoFlow.precondition`."""
        self._setup_somewhere(rng, args, kwargs)
        density = Precise(LogDensity(self.model, args, kwargs, rng=rng, init_loc_fn=self.init_loc_fn))
        return pathfinder(density, np.asarray(self._init_latent), np.asarray(jax.random.bits(rng, (4,))))

    def _setup_somewhere(self, rng: Array, args: tuple, kwargs: dict[str, Any]) -> None:
        """Meets the model, from a random start where it has no density at the chosen one."""
        try:
            self._setup(rng, args, kwargs)
        except NonFiniteError:
            self.init_loc_fn = init_to_uniform
            self._setup(rng, args, kwargs)

    def _unpack_and_constrain(self, latent_sample: Array, params: dict[str, Any]) -> dict[str, Array]:
        one = super()._unpack_and_constrain
        flat = jnp.reshape(latent_sample, (-1, self.latent_dim))
        values = jax.vmap(lambda u: one(u, params))(flat)  # NumPyro's own maps serially
        return jax.tree.map(lambda a: jnp.reshape(a, latent_sample.shape[:-1] + a.shape[1:]), values)

    @property
    def _site_sizes(self) -> list[list[Any]]:
        return self._layout.description
