"""AutoFlow: a guide over all continuous latents of a model, with any flow."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer.initialization import init_to_median

from flowppl import flows
from flowppl.errors import DimensionError, FlowFileError
from flowppl.flows import Flow, Recipe, files
from flowppl.flows.affine_end import as_boxed, centred, place, with_affine_end
from flowppl.flows.registry import over_latents
from flowppl.laplace import NormalApproximation
from flowppl.numpyro.bases import FlowBase
from flowppl.numpyro.distributions import FlowDistribution
from flowppl.numpyro.files import restore
from flowppl.numpyro.flat_guide import FlatGuide
from flowppl.numpyro.modules import as_params, register
from flowppl.numpyro.sites import is_angle
from flowppl.objectives import check_gradient

Array = Any
_QUANTILE_DRAWS = 10_000


class AutoFlow(FlatGuide):
    """A guide whose posterior over the flat unconstrained latents is a flow.

    The flow ends with a trainable affine layer, which starts at `init_loc_fn`'s point with scale `init_scale`;
    `precondition` puts a normal approximation there, which ill-conditioned posteriors need. Sites whose support is
    `constraints.circular`, such as those of `VonMises`, get coordinates on the circle. It works wherever
    NumPyro's own continuous guides do: `SVI` with any loss, `Predictive`, `NeuTraReparam`, `AutoGuideList`.

    Args:
        model: The model.
        flow: A registered name, a recipe such as `flows.nsf(layers=4)`, or a `Flow` of the latents' dimension.
        gradient: "reparam", or "path" for path gradients (not with `RenyiELBO`, see `FlowDistribution`).
        prefix: Prefix of the guide's own sites; give two guides of one program different ones.
        init_loc_fn: How each site starts.
        init_scale: Scale of the start.

    Attributes:
        preconditioned: The normal that `precondition` found (`loc`, `scale_tril`, `elbo`, `num_evals`), or None.

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
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive, got {init_scale}")
        flows.get(flow)  # an unknown name is an error here, not at the first step
        self._choice, self._gradient, self._init_scale = flow, check_gradient(gradient), init_scale
        self.preconditioned: NormalApproximation | None = None
        super().__init__(model, prefix, init_loc_fn)

    def _setup_flow(self) -> None:
        angles = [is_angle(self.prototype_trace[name]["fn"]) for name in self._layout.names]
        self._flow = with_affine_end(over_latents(self._choice, self._layout.sizes, angles, boxed=True))

    @property
    def _flow_name(self) -> str:
        return f"{self.prefix}_flow"

    def _variables(self, key: Array) -> dict[str, Any]:
        found = self.preconditioned
        start = (self._init_latent, self._init_scale * np.eye(self.latent_dim)) if found is None else found[:2]
        loc, scale_tril = (jnp.asarray(a, self._init_latent.dtype) for a in start)
        return place(self._flow, self._flow.init(key, like=loc), loc, scale_tril)

    def _get_posterior(self) -> FlowDistribution:
        variables = register(self._flow_name, self._flow, self._variables)
        return FlowDistribution(self._flow, variables, gradient=self._gradient)

    def get_base_dist(self) -> FlowBase:
        """The flow's base density over the flat latents, untrained: NeuTra, which asks for it, masks its density."""
        return FlowBase(self._flow, self._flow.init(jax.random.key(0), like=self._init_latent))

    def get_posterior(self, params: dict[str, Any]) -> FlowDistribution:
        """The flow with trained parameters, over the flat unconstrained latents."""
        self._require_prototype()
        return handlers.substitute(self._get_posterior, params)()

    def precondition(self, rng: Array, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Finds a normal approximation and returns parameters that start there; it stays in `guide.preconditioned`.

        Multi-path Pathfinder, polished by Newton and ELBO steps; the model is evaluated in float64 where it allows it.

        Args:
            rng: A key.
            args: The model's arguments.
            kwargs: Its keyword arguments.

        Returns:
            Parameters for `svi.run(..., init_params=...)` or `svi.init(..., init_params=...)`.

        Raises:
            NonFiniteError: the model's log density or gradient is finite neither at the start nor at random ones.
        """
        self.preconditioned = self._normal(rng, args, kwargs)
        return as_params(self._flow_name, self._variables(rng))

    def median(self, params: dict[str, Any]) -> dict[str, Array]:
        """The median of each unconstrained coordinate, from draws, constrained: values by site."""
        return jax.tree.map(lambda a: a[0], self.quantiles(params, [0.5]))

    def quantiles(self, params: dict[str, Any], quantiles: Any) -> dict[str, Array]:
        """Quantiles of each unconstrained coordinate, from draws, constrained: `(num_quantiles, *shape)` by site.

        Those of angles are counted from the mean direction.
        """
        draws = self.get_posterior(params).sample(jax.random.key(0), (_QUANTILE_DRAWS,))
        draws, back = centred(self._flow, draws)
        found = jnp.quantile(draws, jnp.asarray(quantiles, draws.dtype), axis=0)
        return self._unpack_and_constrain(back(found), params)

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
        u, log_det = self._layout.unconstrain(self.prototype_trace, values)
        return self.get_posterior(params).log_prob(u) - log_det

    def save(self, path: str | os.PathLike[str], params: dict[str, Any]) -> None:
        """Saves the trained flow and the sites it covers; the file loads in both fronts."""
        self._require_prototype()
        files.write(path, self._flow, self.get_posterior(params).variables, {"sites": self._site_sizes})

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
        restore(flow, arrays)  # a hostile description ends here
        flow = as_boxed(flow, True)
        guide = cls(model, flow=flow, prefix=prefix)
        try:
            guide._setup(jax.random.key(0), args, kwargs)
        except DimensionError as error:
            raise FlowFileError(f"{path} does not fit the model: {error}") from error
        if extra.get("sites") != guide._site_sizes or guide._flow != flow:
            raise FlowFileError(
                f"{path} does not fit the model: it covers the sites {extra.get('sites')}, the model has "
                f"{guide._site_sizes}"
            )
        return guide, as_params(guide._flow_name, restore(flow, arrays, guide._init_latent))
