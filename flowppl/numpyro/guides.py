"""AutoFlow: a guide over all continuous latents of a model, with any flow."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.transforms import UnpackTransform
from numpyro.distributions.util import sum_rightmost
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.initialization import init_to_median

from flowppl import flows
from flowppl.errors import DimensionError, FlowFileError, NonFiniteError, UnsupportedModelError
from flowppl.flows import Flow, Recipe, files
from flowppl.flows.affine_end import place, with_affine_end
from flowppl.laplace import laplace
from flowppl.numpyro.density import LogDensity
from flowppl.numpyro.distributions import GRADIENTS, FlowDistribution, base_distribution
from flowppl.numpyro.files import restore
from flowppl.numpyro.layout import Layout
from flowppl.numpyro.modules import register
from flowppl.numpyro.sites import hide_enumerated, look, refuse_moving_supports

Array = Any
_QUANTILE_DRAWS = 10_000


class AutoFlow(AutoContinuous):
    """A guide whose posterior over the flat unconstrained latents is a flow.

    The flow ends with a trainable affine layer, which starts at `init_loc_fn`'s point with scale `init_scale`;
    `precondition` puts a Laplace approximation there, which ill-conditioned posteriors need. It works wherever
    NumPyro's own continuous guides do: `SVI` with any loss, `Predictive`, `NeuTraReparam`, `AutoGuideList`.

    Args:
        model: The model.
        flow: A registered name, a recipe such as `flows.nsf(layers=4)`, or a `Flow` of the latents' dimension.
        gradient: "reparam", or "path" for path gradients (not with `RenyiELBO`, see `FlowDistribution`).
        prefix: Prefix of the guide's own sites; give two guides of one program different ones.
        init_loc_fn: How each site starts.
        init_scale: Scale of the start.

    Raises:
        UnknownFlowError: no recipe has this name.
        ValueError: `gradient` is unknown or `init_scale` not positive.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from flowppl.numpyro import AutoFlow
        >>> def model():
        ...     scale = numpyro.sample("scale", dist.HalfNormal(3.0))
        ...     numpyro.sample("x", dist.Normal(0.0, scale))
        >>> guide = AutoFlow(model, flow="realnvp", gradient="path")
        >>> svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO(num_particles=16))
        >>> result = svi.run(jax.random.key(0), 10, progress_bar=False)
        >>> draws = guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(100,))
        >>> draws["scale"].shape
        (100,)
    """

    model: Callable
    prototype_trace: Any

    def __init__(
        self,
        model: Callable,
        flow: str | Recipe | Flow = "nsf",
        *,
        gradient: str = "reparam",
        prefix: str = "auto",
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive, got {init_scale}")
        flows.get(flow)  # an unknown name is an error here, not at the first step
        self._choice = flow
        self._gradient = gradient
        self._init_scale = init_scale
        self._traced = False
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)

    def __getstate__(self) -> dict[str, Any]:
        if self._traced:  # tracers cannot be pickled: a guide that has not met its model yet
            options = {"gradient": self._gradient, "prefix": self.prefix, "init_scale": self._init_scale}
            return dict(vars(type(self)(self.model, self._choice, init_loc_fn=self.init_loc_fn, **options)))
        return super().__getstate__()

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Draws the latents, constrained: values by site."""
        if self.prototype_trace is None or self._traced:
            self._setup_prototype(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        key = numpyro.prng_key()
        # A guide outlives the transformation it is first called in: what it keeps must not depend on a traced key.
        key = jax.random.key(0) if isinstance(key, jax.core.Tracer) else key
        with jax.ensure_compile_time_eval():
            elsewhere = look(self.model, jax.random.fold_in(key, 1), args, kwargs)
        model, self.model = self.model, hide_enumerated(self.model, elsewhere)
        try:
            with handlers.seed(rng_seed=key), jax.ensure_compile_time_eval():
                super()._setup_prototype(*args, **kwargs)
                # NumPyro keeps the sites in the model's order or in that of their names, as the start was found; files and
                # LogDensity have one order.
                self._layout = Layout(self._init_locs)
                self._init_latent = self._layout.pack(self._init_locs)
                self._unpack_latent = UnpackTransform(self._layout.unpack, self._layout.pack)
            # Traced arguments leave tracers in the prototype: it serves this trace, and the next call makes another.
            self._traced = isinstance(self._init_latent, jax.core.Tracer)
            if not self._traced:
                refuse_moving_supports(self.prototype_trace, elsewhere)
            self._flow = with_affine_end(flows.get(self._choice)(self.latent_dim))
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
        self._start_at = self._init_latent, self._init_scale * np.eye(self.latent_dim)

    def _variables(self, key: Array) -> dict[str, Any]:
        loc, scale_tril = (jnp.asarray(a, self._init_latent.dtype) for a in self._start_at)
        return place(self._flow, self._flow.init(key, like=loc), loc, scale_tril)

    def _get_posterior(self) -> FlowDistribution:
        variables = register(f"{self.prefix}_flow", self._flow, self._variables)
        return FlowDistribution(self._flow, variables, gradient=self._gradient)

    def get_base_dist(self) -> numpyro.distributions.Distribution:
        """The flow's base density."""
        return base_distribution(self._flow, {"params": self._init_latent})

    def get_posterior(self, params: dict[str, Any]) -> FlowDistribution:
        """The flow with trained parameters, over the flat unconstrained latents."""
        self._require_prototype()
        return handlers.substitute(self._get_posterior, params)()

    def precondition(self, rng: Array, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Finds a Laplace approximation and returns parameters that start there.

        Args:
            rng: A key.
            args: The model's arguments.
            kwargs: Its keyword arguments.

        Returns:
            Parameters for `svi.run(..., init_params=...)` or `svi.init(..., init_params=...)`.

        Raises:
            NonFiniteError: the model's log density or gradient at the start is not finite.
        """
        if self.prototype_trace is None or self._traced:
            handlers.seed(self._setup_prototype, rng)(*args, **kwargs)
        density = LogDensity(self.model, args, kwargs, rng=rng, init_loc_fn=self.init_loc_fn)
        dtype = self._init_latent.dtype
        value_and_score = jax.jit(density.value_and_score)
        hessian = jax.jit(jax.hessian(lambda u: density.log_prob(u[None])[0]))

        def in_float64(function: Callable) -> Callable:
            return lambda u: jax.tree.map(lambda a: np.asarray(a, np.float64), function(jnp.asarray(u, dtype)))

        self._start_at = laplace(in_float64(value_and_score), in_float64(hessian), np.asarray(self._init_latent))
        with handlers.seed(rng_seed=rng), handlers.trace() as trace:
            self._get_posterior()
        return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}

    def median(self, params: dict[str, Any]) -> dict[str, Array]:
        """The median of each unconstrained coordinate, from draws, constrained: values by site."""
        return jax.tree.map(lambda a: a[0], self.quantiles(params, [0.5]))

    def quantiles(self, params: dict[str, Any], quantiles: Any) -> dict[str, Array]:
        """Quantiles of each unconstrained coordinate, from draws, constrained: `(num_quantiles, *shape)` by site."""
        draws = self.get_posterior(params).sample(jax.random.key(0), (_QUANTILE_DRAWS,))
        return self._unpack_and_constrain(jnp.quantile(draws, jnp.asarray(quantiles, draws.dtype), axis=0), params)

    def log_prob(self, params: dict[str, Any], values: dict[str, Array]) -> Array:
        """Log density of the guide at constrained values, with the Jacobian of the constraints.

        Args:
            params: The guide's parameters.
            values: Arrays `(*batch, *shape)` of every latent site.

        Returns:
            `(*batch,)`.

        Raises:
            DimensionError: a site is missing or has another shape.
        """
        self._require_prototype()
        flat, log_det = {}, 0.0
        for name in self._layout.names:
            site = self.prototype_trace[name]
            shape = jnp.shape(site["value"])
            value = jnp.asarray(values[name]) if name in values else None
            if value is None or value.shape[value.ndim - len(shape) :] != shape:
                got = "none" if value is None else f"shape {value.shape}"
                raise DimensionError(
                    f"values[{name!r}]: expected shape (*batch, {', '.join(map(str, shape))}), got {got}"
                )
            transform = biject_to(site["fn"].support)
            flat[name] = transform.inv(value)
            term = transform.log_abs_det_jacobian(flat[name], value)
            log_det = log_det + sum_rightmost(term, term.ndim - (value.ndim - len(shape)))
        return self.get_posterior(params).log_prob(self._layout.pack(flat)) - log_det

    def save(self, path: str | os.PathLike[str], params: dict[str, Any]) -> None:
        """Saves the trained flow and the sites it covers; the file loads in both fronts."""
        self._require_prototype()
        sites = [[name, size] for name, size in zip(self._layout.names, self._layout.sizes, strict=True)]
        files.write(path, self._flow, self.get_posterior(params).variables, {"sites": sites})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: Callable, *args: Any, prefix: str = "auto", **kwargs: Any
    ) -> tuple[AutoFlow, dict[str, Any]]:
        """Loads a guide for a model: supports may depend on data and on other latents, so the model is needed again.

        Args:
            path: The file.
            model: The model.
            args: The model's arguments.
            prefix: Prefix of the guide's own sites.
            kwargs: The model's keyword arguments.

        Returns:
            The guide, ready to sample, and its parameters.

        Raises:
            FlowFileError: the file is not whole, or does not fit the model's sites.
        """
        flow, arrays, extra = files.read(path)
        variables = restore(flow, arrays)
        guide = cls(model, flow=flow, prefix=prefix)
        try:
            handlers.seed(guide._setup_prototype, jax.random.key(0))(*args, **kwargs)
        except DimensionError as error:
            raise FlowFileError(f"{path} does not fit the model: {error}") from error
        sites = [[name, size] for name, size in zip(guide._layout.names, guide._layout.sizes, strict=True)]
        if extra.get("sites") != sites or guide._flow != flow:
            raise FlowFileError(
                f"{path} does not fit the model: it covers the sites {extra.get('sites')}, the model has {sites}"
            )
        with handlers.seed(rng_seed=0), handlers.trace() as trace:
            guide._get_posterior()
        params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
        kinds = {f"{prefix}_flow$params": "params", f"{prefix}_flow$const": "const"}
        like = guide._init_latent
        return guide, {k: jax.tree.map(lambda a: jnp.asarray(a, like.dtype), variables[kinds[k]]) for k in params}

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
        if (self.prototype_trace is None or self._traced) and (args or kwargs):
            handlers.seed(self._setup_prototype, rng_key)(*args, **kwargs)
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

    def _require_prototype(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError(
                "the guide has not seen its model yet: call svi.init, svi.run or guide.precondition first"
            )
