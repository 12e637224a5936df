"""AutoFlow: a guide over all continuous latents of a model, with any flow."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import init_to_median
from torch import Tensor

from flowppl import flows
from flowppl.errors import DimensionError, FlowFileError, UnsupportedModelError
from flowppl.flows import Flow, Recipe, files
from flowppl.flows.affine_end import as_boxed, centred, has_angles, place, with_affine_end
from flowppl.flows.flow import part_of
from flowppl.flows.registry import over_latents
from flowppl.laplace import NormalApproximation
from flowppl.objectives import check_gradient
from flowppl.pyro.bases import FlowBase
from flowppl.pyro.distributions import FlowDistribution, FlowTransform
from flowppl.pyro.flat_guide import FlatGuide
from flowppl.pyro.modules import FlowParameters, template

_QUANTILE_DRAWS = 10_000


class AutoFlow(FlatGuide):
    """A guide whose posterior over the flat unconstrained latents is a flow.

    The flow ends with a trainable affine layer, which starts at `init_loc_fn`'s point with scale `init_scale`;
    `precondition` puts a normal approximation there, which ill-conditioned posteriors need. Sites with a `VonMises` or
    `SineBivariateVonMises` distribution get coordinates on the circle. It works wherever Pyro's own continuous guides
    do: `SVI` with any loss, `Predictive`, `NeuTraReparam`, `AutoGuideList`. Discrete sites that `config_enumerate` marks
    are left to TraceEnum_ELBO.

    Args:
        model: The model.
        flow: A registered name, a recipe such as `flows.nsf(layers=4)`, or a `Flow` of the latents' dimension.
        gradient: "reparam", or "path" for path gradients where the loss can use them, see `FlowDistribution`; "auto" is
            "reparam" in Pyro's own losses. `Objective` has a choice of its own.
        init_loc_fn: How each site starts.
        init_scale: Scale of the start, in unconstrained space.

    Attributes:
        preconditioned: The normal that `precondition` found (`loc`, `scale_tril`, `elbo`, `num_evals`), or None.

    Raises:
        UnknownFlowError: no recipe has this name.
        ValueError: `gradient` is unknown or `init_scale` not positive.
        UnsupportedModelError: at the first call, or at `setup`: the model has a latent that a flow cannot cover.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from flowppl.pyro import AutoFlow
        >>> def model():
        ...     scale = pyro.sample("scale", dist.HalfNormal(3.0))
        ...     pyro.sample("x", dist.Normal(0.0, scale))
        >>> guide = AutoFlow(model, flow="realnvp", gradient="path")
        >>> svi = SVI(
        ...     model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(num_particles=16, vectorize_particles=True)
        ... )
        >>> losses = [svi.step() for _ in range(10)]
        >>> guide.sample_posterior(sample_shape=(100,))["scale"].shape
        torch.Size([100])
    """

    def __init__(
        self,
        model: Callable,
        flow: str | Recipe | Flow = "nsf",
        *,
        gradient: str = "reparam",
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive, got {init_scale}")
        flows.get(flow)  # an unknown name is an error here, not at the first step
        super().__init__(model, init_loc_fn)
        self._choice, self._gradient, self._init_scale = flow, check_gradient(gradient), init_scale
        self.preconditioned: NormalApproximation | None = None

    def _setup_flow(self) -> None:
        loc = self._layout.start
        self._flow = with_affine_end(over_latents(self._choice, self._layout.sizes, self._angles, boxed=False))
        scale_tril = self._init_scale * torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
        self.flow_parameters = FlowParameters(place(self._flow, self._flow.init(None, loc), loc, scale_tril))

    def _variables(self) -> dict[str, Any]:
        return self._variables_in("flow_parameters")

    def get_base_dist(self) -> FlowBase:
        """The flow's base density over the flat latents."""
        variables = self._variables()
        return FlowBase(self._flow, variables)

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """The flow's bijection with its present parameters, for `NeuTraReparam`.

        Raises:
            UnsupportedModelError: the first latent is in a plate. Pyro's `NeuTraReparam` would count the log-determinant once
                for each of its elements, and the chain would have another stationary distribution.
        """
        variables = self._variables()
        name, site = next(self.prototype_trace.iter_stochastic_nodes())
        if site["fn"].batch_shape.numel() > 1:
            raise UnsupportedModelError(
                f"site {name!r} is the model's first latent and in a plate, where Pyro's NeuTraReparam counts the flow's "
                "log-determinant once for each element: sample a latent outside of plates first, or turn the plate into "
                "an event with .to_event(); for the transform alone, use guide.get_posterior().transforms[0]"
            )
        return FlowTransform(self._flow.bijection, part_of(variables, "bijection"))

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The flow with its present parameters, over the flat unconstrained latents."""
        variables = self._variables()
        return FlowDistribution(self._flow, variables, gradient=self._gradient)

    def precondition(self, rng: torch.Generator | None, *args: Any, **kwargs: Any) -> AutoFlow:
        """Puts a normal approximation into the affine layer at the data end, in place; it stays in `guide.preconditioned`.

        Multi-path Pathfinder, polished by Newton and ELBO steps; the model is evaluated in float64 where it allows it.

        Args:
            rng: A `torch.Generator` for what the model draws besides its latents (None: torch's global one).
            args: The model's arguments.
            kwargs: Its keyword arguments.

        Returns:
            The guide.

        Raises:
            NonFiniteError: the model's log density or gradient is finite neither at the start nor at random ones.
        """
        self.preconditioned = self._normal(rng, args, kwargs)
        loc, scale_tril = (torch.as_tensor(a).to(self._layout.start) for a in self.preconditioned[:2])
        self._assign(place(self._flow, self._variables(), loc, scale_tril))
        return self

    @torch.no_grad()
    def sample_posterior(
        self, rng: torch.Generator | None = None, sample_shape: Sequence[int] = ()
    ) -> dict[str, Tensor]:
        """Draws of every site `(*sample_shape, *shape)`.

        Args:
            rng: A `torch.Generator` (None: torch's global one).
            sample_shape: Shape of the draws.
        """
        return self._constrain(self._draw(rng, tuple(sample_shape)))

    def _draw(self, rng: torch.Generator | None, shape: tuple[int, ...]) -> Tensor:
        variables = self._variables()
        return self._flow.sample(rng, variables, shape).x

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each unconstrained coordinate, from draws, constrained: values by site."""
        return self.quantiles(0.5, *args, **kwargs)

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each unconstrained coordinate, from draws, constrained: `(num_quantiles, *shape)` by site.

        Those of angles are counted from the mean direction.

        Args:
            quantiles: Levels between 0 and 1; a single one adds no axis.
            args: The model's arguments, for a guide that is not set up yet.
            kwargs: Its keyword arguments.
        """
        draws = self.setup(*args, **kwargs)._draw(torch.Generator().manual_seed(0), (_QUANTILE_DRAWS,))
        draws, back = centred(self._flow, draws)
        levels = np.quantile(draws.cpu().numpy(), np.asarray(quantiles, np.float64), axis=0)
        return self._constrain(back(torch.as_tensor(levels).to(draws)))

    def log_prob(self, values: dict[str, Tensor]) -> Tensor:
        """Log density of the guide at constrained values, with the Jacobian of the constraints.

        Args:
            values: Tensors `(*batch, *shape)` of every latent site.

        Returns:
            `(*batch,)`.

        Raises:
            DimensionError: a site is missing or has another shape.
        """
        variables = self._variables()
        u, log_det = self._layout.unconstrain(self.prototype_trace.nodes, values)
        return self._flow.log_prob(variables, u) - log_det

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the trained flow and the sites it covers; the file loads in both fronts."""
        variables = self._variables()
        files.write(path, self._flow, variables, {"sites": self._site_sizes})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Callable, *args: Any, **kwargs: Any) -> AutoFlow:
        """Loads a guide for a model, which is needed again because supports may depend on data.

        Args:
            path: The file.
            model: The model.
            args: The model's arguments.
            kwargs: Its keyword arguments.

        Returns:
            The guide, ready to sample.

        Raises:
            FlowFileError: the file is not whole, or does not fit the model's sites.
        """
        flow, arrays, extra = files.read(path)
        files.restore(arrays, lambda: template(flow), torch.empty(0))  # a hostile description ends here
        guide = cls(model, as_boxed(flow, False))
        try:
            guide.setup(*args, **kwargs)
        except DimensionError as error:
            raise FlowFileError(f"{path} does not fit the model: {error}") from error
        if extra.get("sites") != guide._site_sizes:
            raise FlowFileError(
                f"{path} does not fit the model: it covers the sites {extra.get('sites')}, the model has "
                f"{guide._site_sizes}"
            )
        if any(guide._angles) and not has_angles(flow):
            raise FlowFileError(
                f"{path} does not fit the model: it has angles that NumPyro puts into a box and Pyro on a circle, and this flow "
                "knows none; save one that does, such as flows.nsf()"
            )
        variables = guide._variables()
        guide._assign(files.restore(arrays, variables, guide._layout.start))
        return guide
