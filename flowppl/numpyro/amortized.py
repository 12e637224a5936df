"""AmortizedFlow: a guide whose encoder covers the local latents of a plate, subsampled or not, beside global ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.initialization import init_to_median

from flowppl import flows
from flowppl.bijections.base import broadcast, join
from flowppl.errors import DimensionError, FlowFileError, UnsupportedModelError
from flowppl.flows import Flow, Recipe, files
from flowppl.flows.affine_end import place, with_affine_end, with_encoder, without_encoder
from flowppl.flows.registry import over_latents
from flowppl.numpyro.distributions import FlowDistribution
from flowppl.numpyro.files import shapes_of
from flowppl.numpyro.model_guide import ModelGuide
from flowppl.numpyro.modules import as_params, register
from flowppl.numpyro.plates import Part, bijection_of_one, plate_sizes
from flowppl.numpyro.sites import Layout, is_latent
from flowppl.objectives import check_gradient
from flowppl.plates import own_encoder, split_by_plate

Array = Any


class AmortizedFlow(ModelGuide):
    """A guide for a model with a plate of local latents: what it learns of one element's data serves all others.

    An encoder sees the features of one element and the global latents, and a conditional flow over the element's flat
    unconstrained latents sees what the encoder makes of them: q(global) prod_n q(local_n | features_n, global). The plate may
    subsample, differently at every call, and its size may change; so the trained guide serves data that it has not seen.
    `Predictive(model, guide=guide, ...)` works, also with other data.

    Args:
        model: The model. Local latents are those in the plate; they may be several, with events of any shape.
        features: `features(*args, **kwargs)`, with the model's arguments, gives what the encoder sees of each element,
            `(N, F)` for the whole plate, of order one.
        plate: Name of the plate.
        flow: Of the local latents: a registered name, a recipe, or a `Flow` with a context of length `embedding`.
        global_flow: Of the global latents, if there are any; it ends with an affine layer, as in `AutoFlow`.
        encoder: None for a perceptron, or any function that maps the features followed by the unconstrained global latents,
            `(*batch, F + G)`, to a context `(*batch, embedding)`. It is called inside the guide, and registers parameters of
            its own there (`numpyro.module`, `flax_module`); in path mode they get their plain gradients.
        hidden: Widths of the perceptron's hidden layers.
        embedding: Length of the context that it gives the flow.
        gradient: "reparam", or "path" for path gradients (not with `RenyiELBO`, see `FlowDistribution`).
        prefix: Prefix of the guide's own sites.
        init_loc_fn: How each site starts.
        init_scale: Scale of the start, in unconstrained space.

    Raises:
        UnknownFlowError: no recipe has this name.
        ValueError: `gradient` is unknown or `init_scale` not positive.
        UnsupportedModelError: at the first call: no latent is in the plate, a local latent is in a second plate too, a global
            one is in another plate that subsamples, a support depends on other latents or on the element, or a latent is
            discrete.
        DimensionError: at a call: the features are not `(N, F)`, or have another F than at the first.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from flowppl.numpyro import AmortizedFlow
        >>> def model(y, batch_size=None):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("groups", len(y), subsample_size=batch_size):
        ...         batch = numpyro.subsample(y, event_dim=1)
        ...         theta = numpyro.sample("theta", dist.Normal(mu, 1.0))
        ...         numpyro.sample("obs", dist.Normal(theta[:, None], 1.0).to_event(1), obs=batch)
        >>> y = jax.random.normal(jax.random.key(0), (20, 3))
        >>> guide = AmortizedFlow(
        ...     model, lambda y, batch_size=None: y, plate="groups", flow="affine", global_flow="affine"
        ... )
        >>> svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
        >>> result = svi.run(jax.random.key(1), 5, y, batch_size=4, progress_bar=False)
        >>> new = y[:7] + 1.0
        >>> guide.sample_posterior(jax.random.key(2), result.params, new, sample_shape=(100,))["theta"].shape
        (100, 7)
    """

    def __init__(
        self,
        model: Callable,
        features: Callable,
        plate: str,
        flow: str | Recipe | Flow = "nsf",
        global_flow: str | Recipe | Flow = "nsf",
        *,
        encoder: Callable | None = None,
        hidden: tuple[int, ...] = (64, 64),
        embedding: int = 32,
        gradient: str = "reparam",
        prefix: str = "auto",
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive, got {init_scale}")
        flows.get(flow), flows.get(global_flow)  # an unknown name is an error here, not at the first step
        self._choice, self._global_choice = flow, global_flow
        self._features, self._plate, self._encoder = features, plate, encoder
        self._hidden, self._embedding = tuple(hidden), embedding
        self._gradient, self._init_scale = check_gradient(gradient), init_scale
        super().__init__(model, prefix, init_loc_fn)

    # Meeting the model

    def _lay_out(self, args: tuple, kwargs: dict[str, Any]) -> None:
        trace = self.prototype_trace
        latents = {name: site for name, site in trace.items() if is_latent(site)}
        inside, outside = split_by_plate(latents, self._plate, lambda frame: trace[frame.name]["args"][0])
        self._dim = self._prototype_frames[self._plate].dim

        free = {name: self._init_locs[name] for name in inside}
        free = {n: jnp.mean(u, axis=tuple(range(len(inside[n]["fn"].batch_shape)))) for n, u in free.items()}
        layout, bijections = Layout(free), {name: bijection_of_one(site, self._dim) for name, site in inside.items()}
        self._local = Part(inside, layout, layout.pack(free), bijections)
        self._global: Part | None = None
        if outside:
            free = {name: self._init_locs[name] for name in outside}
            layout, bijections = Layout(free), {name: biject_to(site["fn"].support) for name, site in outside.items()}
            self._global = Part(outside, layout, layout.pack(free), bijections)
        self._num_features = self._read(args, kwargs, None).shape[1]

    def _setup_flow(self) -> None:
        inputs, part = self._num_features, self._global
        if part is not None:
            self._global_flow = with_affine_end(
                over_latents(self._global_choice, part.layout.sizes, part.angles, boxed=True)
            )
            inputs += part.layout.dim
        flow = over_latents(
            self._choice, self._local.layout.sizes, self._local.angles, boxed=True, context_dim=self._embedding
        )
        self._local_flow = with_encoder(flow, inputs, self._hidden if self._encoder is None else None)

    def _read(self, args: tuple, kwargs: dict[str, Any], size: int | None) -> Array:
        """The features `(N, F)`."""
        found = jnp.asarray(self._features(*args, **kwargs), self._local.start.dtype)
        if found.ndim != 2 or (size is not None and found.shape != (size, self._num_features)):
            expected = "(N, F)" if size is None else f"({size}, {self._num_features})"
            raise DimensionError(f"features: expected an array of shape {expected}, got {found.shape}")
        return found

    # Drawing

    def _variables(self, name: str, flow: Flow, start: Array) -> dict[str, Any]:
        """The flow's arrays, as param sites."""
        scale_tril = self._init_scale * jnp.eye(len(start), dtype=start.dtype)
        return register(
            f"{self.prefix}_{name}", flow, lambda key: place(flow, flow.init(key, like=start), start, scale_tril)
        )

    def _of_global(self, part: Part) -> FlowDistribution:
        variables = self._variables("global", self._global_flow, part.start)
        return FlowDistribution(self._global_flow, variables, gradient=self._gradient)

    def _of_local(self, features: Array, u: Array | None) -> FlowDistribution:
        """The flow of local latents, batch `(*batch, n, 1, ...)`, from features `(n, F)` and globals `(*batch, 1, ..., G)`."""
        variables = self._variables("local", self._local_flow, self._local.start)
        features = features.reshape(len(features), *(1,) * (-self._dim - 1), -1)
        context = join(*broadcast(features, u, 0 if u is None else u.shape[-1]))
        context = context if self._encoder is None else self._encoder(context)
        return FlowDistribution(self._local_flow, variables, context, gradient=self._gradient)

    def _sample(self, name: str, fn: FlowDistribution, part: Part) -> tuple[Array, dict[str, Array]]:
        """Samples a flow, and the sites that it covers as deterministic maps of it."""
        u = numpyro.sample(f"_{self.prefix}_{name}", fn, infer={"is_auxiliary": True})
        values = {}
        for site, (x, log_det) in part.constrain(u).items():
            values[site] = numpyro.sample(site, dist.Delta(x, -log_det, event_dim=part.sites[site]["fn"].event_dim))
        return u, values

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Draws the latents, constrained: values by site; the local ones of the elements that the model's plate asks for."""
        self._meet(args, kwargs)
        size, subsample_size = plate_sizes(self.model, self._plate, args, kwargs)
        features = self._read(args, kwargs, size)
        u: Array | None = None
        values: dict[str, Array] = {}
        if self._global is not None:
            u, values = self._sample("global", self._of_global(self._global), self._global)
        with numpyro.plate(self._plate, size, subsample_size, dim=self._dim) as indices:
            return {**values, **self._sample("local", self._of_local(features[indices], u), self._local)[1]}

    def sample_posterior(
        self, rng_key: Array, params: dict[str, Any], *args: Any, sample_shape: tuple[int, ...] = (), **kwargs: Any
    ) -> dict[str, Array]:
        """Draws the latents, constrained: `(*sample_shape, *shape)` by site, the local ones of all elements of the plate.

        Args:
            rng_key: A key.
            params: The guide's parameters.
            args: The model's arguments, with data that the guide has seen or not.
            sample_shape: The shape of the draws.
            kwargs: The model's keyword arguments; how much of the plate they ask for does not matter.
        """
        self._setup(rng_key, args, kwargs)
        features = self._read(args, kwargs, plate_sizes(self.model, self._plate, args, kwargs)[0])

        def draw() -> dict[str, Array]:
            key, local_key = jax.random.split(rng_key)
            u, values = None, {}
            if self._global is not None:
                u = self._of_global(self._global).sample(key, sample_shape)
                values = self._global.constrain(u)
                u = u.reshape(*sample_shape, *(1,) * -self._dim, -1)
            local = self._of_local(features, u).sample(local_key, sample_shape if u is None else ())
            return {name: x for name, (x, _) in {**values, **self._local.constrain(local)}.items()}

        return handlers.substitute(handlers.seed(draw, rng_key), params)()

    # Files

    def save(self, path: str | os.PathLike[str], params: dict[str, Any]) -> None:
        """Saves the trained flows with the built-in encoder, and the sites they cover; the file loads in both fronts.

        Args:
            path: Where to; an older file is replaced only when the new one is whole.
            params: The guide's parameters.

        Raises:
            FlowFileError: the encoder is of the user's own.
        """
        self._require_prototype()
        if self._encoder is not None:
            raise own_encoder("params")

        def variables() -> dict[str, Any]:
            found = {"local": self._variables("local", self._local_flow, self._local.start)}
            if self._global is not None:
                found["global"] = self._variables("global", self._global_flow, self._global.start)
            return found

        arrays = handlers.substitute(handlers.seed(variables, 0), params)()
        files.write_parts(path, type(self).__name__, self._flows, arrays, self._description)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Callable,
        features: Callable,
        *args: Any,
        prefix: str = "auto",
        **kwargs: Any,
    ) -> tuple[AmortizedFlow, dict[str, Any]]:
        """Loads a guide for a model, which is needed again with what makes its features, and data that need not be the same.

        Args:
            path: The file.
            model: The model.
            features: See `AmortizedFlow`.
            args: The model's arguments.
            prefix: Prefix of the guide's own sites.
            kwargs: The model's keyword arguments.

        Returns:
            The guide, ready to sample, and its parameters.

        Raises:
            FlowFileError: the file is not whole, or does not fit the model's sites or its features.
        """
        parts, arrays, extra = files.read_parts(path, cls.__name__, {"local": Flow, "global": Flow})
        files.restore(arrays, lambda: shapes_of(parts), jnp.zeros(()))  # a hostile description ends here
        try:
            flow, hidden, embedding = without_encoder(parts["local"])
            guide = cls(
                model,
                features,
                str(extra.get("plate")),
                flow,
                parts.get("global", "affine"),
                hidden=hidden,
                embedding=embedding,
                prefix=prefix,
            )
            guide._setup(jax.random.key(0), args, kwargs)
        except (DimensionError, UnsupportedModelError) as error:
            raise FlowFileError(f"{path} does not fit the model: {error}") from error
        files.require(path, extra, guide._description)
        files.require(path, {"flows": parts}, {"flows": guide._flows})
        found = files.restore(arrays, lambda: shapes_of(parts), guide._local.start)
        params = [as_params(f"{prefix}_{name}", variables) for name, variables in found.items()]
        return guide, {name: value for one in params for name, value in one.items()}

    @property
    def _flows(self) -> dict[str, Flow]:
        return {"local": self._local_flow, **({} if self._global is None else {"global": self._global_flow})}

    @property
    def _description(self) -> dict[str, Any]:
        """What of a model a file has to fit; the unconstrained form of an angle is not the same in both languages."""
        parts = [part for part in (self._local, self._global) if part is not None]
        sites = [part.layout.description for part in parts]
        angles = [
            [k, "boxed"] for part in parts for k, angle in zip(part.layout.names, part.angles, strict=True) if angle
        ]
        found = {"sites": sites[0], "global sites": sites[1] if sites[1:] else [], "angles": angles}
        return {"plate": self._plate, **found, "features": self._num_features}
