"""What guides over one flat unconstrained vector share: a layout, the checks of a model, and a life beyond one trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro import handlers
from numpyro.distributions.transforms import UnpackTransform
from numpyro.infer.autoguide import AutoContinuous

from flowppl.errors import NonFiniteError, UnsupportedModelError
from flowppl.numpyro.sites import Layout, hide_enumerated, look, refuse_moving_supports

Array = Any


class FlatGuide(AutoContinuous):
    """An `AutoContinuous` guide that checks its model, and that no jax transformation leaves a tracer in.

    A guide outlives the transformation it is first called in. What it keeps is computed at compile time; where the model's
    arguments are traced that cannot be, so the prototype serves this trace only, and the next call makes another.

    Args:
        model: The model; sites that it marks for enumeration are none of the guide's.
        prefix: Prefix of the guide's own sites.
        init_loc_fn: How each site starts.
    """

    model: Callable
    prototype_trace: Any

    def __init__(self, model: Callable, prefix: str, init_loc_fn: Callable) -> None:
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)
        self._traced = False
        self._unseen = dict(vars(self))

    def __getstate__(self) -> dict[str, Any]:
        # Tracers cannot be pickled: a guide that has not met its model yet.
        return {**self._unseen, "_unseen": self._unseen} if self._traced else super().__getstate__()

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Draws the latents, constrained: values by site."""
        if self.prototype_trace is None or self._traced:
            self._setup_prototype(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _setup(self, rng: Array, args: tuple, kwargs: dict[str, Any]) -> None:
        """Meets the model, unless that has been done for good."""
        if self.prototype_trace is None or self._traced:
            handlers.seed(self._setup_prototype, rng)(*args, **kwargs)

    def _setup_flow(self) -> None:
        """Makes the flow, once the layout is known."""
        raise NotImplementedError

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        key = numpyro.prng_key()
        key = jax.random.key(0) if isinstance(key, jax.core.Tracer) else key
        with jax.ensure_compile_time_eval():
            elsewhere = look(self.model, jax.random.fold_in(key, 1), args, kwargs)
        model, self.model = self.model, hide_enumerated(self.model, elsewhere)
        try:
            with handlers.seed(rng_seed=key), jax.ensure_compile_time_eval(), warnings.catch_warnings():
                # NumPyro advises against what this guide is made for.
                warnings.filterwarnings("ignore", "Continuous inference poorly handles circular", UserWarning)
                super()._setup_prototype(*args, **kwargs)
                # NumPyro keeps the sites in the model's order or in that of their names, as the start was found; files and
                # LogDensity have one order.
                self._layout = Layout(self._init_locs)
                self._init_latent = self._layout.pack(self._init_locs)
                self._unpack_latent = UnpackTransform(self._layout.unpack, self._layout.pack)
            self._traced = isinstance(self._init_latent, jax.core.Tracer)
            if not self._traced:
                refuse_moving_supports(self.prototype_trace, elsewhere)
            self._setup_flow()
        except Exception as error:
            self.prototype_trace = None  # the next call starts anew
            if "local latent variables" in str(error):
                raise UnsupportedModelError(
                    "AutoFlow covers all latents at once, but this model has latents inside a subsampled plate: give "
                    "the plate its full size (subsample_size=None), or write a guide with flow_module and a context "
                    "for the local latents"
                ) from error
            if "Cannot find valid initial parameters" in str(error):
                raise NonFiniteError(
                    "the model's log density or its gradient is not finite at the start: choose another init_loc_fn "
                    "(init_to_value, init_to_uniform) or check the model for parameters outside their support"
                ) from error
            raise
        finally:
            self.model = model

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
            return super().sample_posterior(rng_key, params, sample_shape=sample_shape)
        except jax.errors.UnexpectedTracerError as error:
            raise RuntimeError(
                "the guide has met its model's arguments only inside jax.jit: pass them to sample_posterior too"
            ) from error

    def _unpack_and_constrain(self, latent_sample: Array, params: dict[str, Any]) -> dict[str, Array]:
        one = super()._unpack_and_constrain
        flat = jnp.reshape(latent_sample, (-1, self.latent_dim))
        values = jax.vmap(lambda u: one(u, params))(flat)  # NumPyro's own maps serially
        return jax.tree.map(lambda a: jnp.reshape(a, latent_sample.shape[:-1] + a.shape[1:]), values)

    @property
    def _site_sizes(self) -> list[list[Any]]:
        return [[name, size] for name, size in zip(self._layout.names, self._layout.sizes, strict=True)]

    def _require_prototype(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError(
                "the guide has not seen its model yet: call svi.init, svi.run or guide.precondition first"
            )
