"""AmortizedFlow: a guide whose encoder covers the local latents of a plate, subsampled or not, beside global ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_median
from torch import Tensor
from torch.distributions import biject_to

from flowppl import flows, tree
from flowppl.bijections.base import broadcast, join
from flowppl.errors import DimensionError, FlowFileError, UnsupportedModelError
from flowppl.flows import Flow, Recipe, files
from flowppl.flows.affine_end import place, with_affine_end, with_encoder, without_encoder
from flowppl.flows.registry import over_latents
from flowppl.objectives import check_gradient
from flowppl.plates import own_encoder, split_by_plate
from flowppl.pyro.distributions import FlowDistribution
from flowppl.pyro.model_guide import ModelGuide
from flowppl.pyro.modules import FlowParameters, template
from flowppl.pyro.plates import Part, bijection_of_one, plate_sizes
from flowppl.pyro.sites import Layout, among_plates, unconstrained


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
            `(*batch, F + G)`, to a context `(*batch, embedding)`. If it is an `nn.Module`, its parameters are the guide's;
            in path mode they get their plain gradients.
        hidden: Widths of the perceptron's hidden layers.
        embedding: Length of the context that it gives the flow.
        gradient: "reparam", or "path" for path gradients where the loss can use them, see `FlowDistribution`; "auto" is
            "reparam" in Pyro's own losses. `Objective` has a choice of its own.
        init_loc_fn: How each site starts.
        init_scale: Scale of the start, in unconstrained space.

    Raises:
        UnknownFlowError: no recipe has this name.
        ValueError: `gradient` is unknown or `init_scale` not positive.
        UnsupportedModelError: at the first call, or at `setup`: no latent is in the plate, a local latent is in a second plate too,
            a global one is in another plate that subsamples, a support depends on other latents or on the element, or a latent
            is discrete.
        DimensionError: at a call: the features are not `(N, F)`, or have another F than at the first.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from flowppl.pyro import AmortizedFlow
        >>> def model(y, batch_size=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("groups", len(y), subsample_size=batch_size):
        ...         batch = pyro.subsample(y, event_dim=1)
        ...         theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        ...         pyro.sample("obs", dist.Normal(theta[..., None], 1.0).to_event(1), obs=batch)
        >>> y = torch.randn(20, 3)
        >>> guide = AmortizedFlow(
        ...     model, lambda y, batch_size=None: y, plate="groups", flow="affine", global_flow="affine"
        ... )
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        >>> losses = [svi.step(y, batch_size=4) for _ in range(5)]
        >>> new = y[:7] + 1.0
        >>> guide.sample_posterior(None, new, sample_shape=(100,))["theta"].shape
        torch.Size([100, 7])
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
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive, got {init_scale}")
        flows.get(flow), flows.get(global_flow)  # an unknown name is an error here, not at the first step
        super().__init__(model, init_loc_fn, features)
        self._choice, self._global_choice = flow, global_flow
        self._plate, self.encoder = plate, encoder
        self._hidden, self._embedding = tuple(hidden), embedding
        self._gradient, self._init_scale = check_gradient(gradient), init_scale

    # Meeting the model

    def _lay_out(self, args: tuple, kwargs: dict[str, Any]) -> None:
        inside, outside = split_by_plate(self._sites, self._plate, lambda frame: frame.full_size or frame.size)
        self._dim = self._prototype_frames[self._plate].dim
        free = {
            name: u.flatten(0, len(inside[name]["fn"].batch_shape) - 1) for name, u in unconstrained(inside).items()
        }
        layout = Layout({name: u.mean(0) for name, u in free.items()})
        self._local = Part(inside, layout, {name: bijection_of_one(site, self._dim) for name, site in inside.items()})
        self._global: Part | None = None
        if outside:
            bijections = {name: biject_to(site["fn"].support) for name, site in outside.items()}
            self._global = Part(outside, Layout(unconstrained(outside)), bijections)
        self._num_features = self._read(args, kwargs, None).shape[1]

    def _setup_flow(self) -> None:
        inputs, part = self._num_features, self._global
        if part is not None:
            flow = over_latents(self._global_choice, part.layout.sizes, part.angles, boxed=False)
            self._global_flow = with_affine_end(flow)
            self.global_parameters = self._started(self._global_flow, part.layout.start)
            inputs += part.layout.dim
        flow = over_latents(
            self._choice, self._local.layout.sizes, self._local.angles, boxed=False, context_dim=self._embedding
        )
        self._local_flow = with_encoder(flow, inputs, self._hidden if self.encoder is None else None)
        self.local_parameters = self._started(self._local_flow, self._local.layout.start)

    def _started(self, flow: Flow, start: Tensor) -> FlowParameters:
        scale_tril = self._init_scale * torch.eye(len(start), dtype=start.dtype, device=start.device)
        return FlowParameters(place(flow, flow.init(None, start), start, scale_tril))

    def _sizes(self, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int | None, Any]:
        """What `plate_sizes` says of the guide's plate."""
        self._require_source()  # a pickle has no model to ask
        self.setup(*args, **kwargs)
        return plate_sizes(self.model, self._plate, args, kwargs)

    def _read(self, args: tuple, kwargs: dict[str, Any], size: int | None) -> Tensor:
        """The features `(N, F)`."""
        found = torch.as_tensor(self._require_source()[2](*args, **kwargs)).to(self._local.layout.start)
        if found.dim() != 2 or (size is not None and tuple(found.shape) != (size, self._num_features)):
            expected = "(N, F)" if size is None else f"({size}, {self._num_features})"
            raise DimensionError(f"features: expected an array of shape {expected}, got {tuple(found.shape)}")
        return found

    # Drawing

    def _of_global(self) -> FlowDistribution:
        return FlowDistribution(self._global_flow, self._variables_in("global_parameters"), gradient=self._gradient)

    def _of_local(self, features: Tensor, u: Tensor | None) -> FlowDistribution:
        """The flow of local latents, batch `(*batch, n, 1, ...)`, from features `(n, F)` and globals `(*batch, 1, ..., G)`."""
        features = features.reshape(len(features), *(1,) * (-self._dim - 1), -1)
        context = join(*broadcast(features, u, 0 if u is None else u.shape[-1]))
        context = context if self.encoder is None else self.encoder(context)
        return FlowDistribution(
            self._local_flow, self._variables_in("local_parameters"), context, gradient=self._gradient
        )

    def _sample_latent(self, name: str, fn: FlowDistribution) -> Tensor:
        return pyro.sample(f"_{self._pyro_name}_{name}", fn, infer={"is_auxiliary": True})

    def _sample_global(self, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples the flow and, as deterministic maps of it, the sites that it covers, in their own plates."""
        u, values = self._sample_latent("global", self._of_global()), {}
        parts, shapes = part.layout.unpack(u), part.layout.shapes
        free = {name: among_plates(parts[name], shapes[name], site, u.shape[:-1]) for name, site in part.sites.items()}
        frames = {f.name: f for site in part.sites.values() for f in site["cond_indep_stack"]}
        plates = {name: pyro.plate(name, f.size, dim=f.dim) for name, f in frames.items()}
        for name, (x, log_det) in part.constrain(free).items():
            with ExitStack() as stack:
                for frame in part.sites[name]["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                values[name] = _delta(part.sites[name], x, log_det)
        return u, values

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws the latents, constrained: values by site; the local ones of the elements that the model's plate asks for."""
        size, subsample_size, subsample = self._sizes(args, kwargs)
        features = self._read(args, kwargs, size)
        u, values = (None, {}) if self._global is None else self._sample_global(self._global)
        with pyro.plate(self._plate, size, subsample_size, subsample, dim=self._dim) as indices:
            free = self._free_local(self._sample_latent("local", self._of_local(features[indices], u)))
            for name, (x, log_det) in self._local.constrain(free).items():
                values[name] = _delta(self._local.sites[name], x, log_det)
        return values

    def _free_local(self, u: Tensor) -> dict[str, Tensor]:
        free, sites = self._local.layout.unpack(u), self._local.sites
        return {name: free[name].to(site["value"].dtype) for name, site in sites.items()}

    @torch.no_grad()
    def sample_posterior(
        self, rng: torch.Generator | None, *args: Any, sample_shape: Sequence[int] = (), **kwargs: Any
    ) -> dict[str, Tensor]:
        """Draws the latents, constrained: `(*sample_shape, *shape)` by site, the local ones of all elements of the plate.

        Args:
            rng: A `torch.Generator` (None: torch's global one).
            args: The model's arguments, with data that the guide has seen or not.
            sample_shape: The shape of the draws.
            kwargs: The model's keyword arguments; how much of the plate they ask for does not matter.
        """
        features = self._read(args, kwargs, self._sizes(args, kwargs)[0])
        shape, u, values = tuple(sample_shape), None, {}
        if self._global is not None:
            u = _draw(rng, self._of_global(), shape)
            free = {k: v.to(self._global.sites[k]["value"].dtype) for k, v in self._global.layout.unpack(u).items()}
            values = self._global.constrain(free)
            u = u.reshape(*shape, *(1,) * -self._dim, -1)
        local = _draw(rng, self._of_local(features, u), shape if u is None else ())
        return {name: x for name, (x, _) in {**values, **self._local.constrain(self._free_local(local))}.items()}

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the trained flows with the built-in encoder, and the sites they cover; the file loads in both fronts.

        Args:
            path: Where to; an older file is replaced only when the new one is whole.

        Raises:
            FlowFileError: the encoder is of the user's own.
        """
        variables = self._arrays()
        if self.encoder is not None:
            raise own_encoder("guide.state_dict()")
        files.write_parts(path, type(self).__name__, self._flows, variables, self._description)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: Callable, features: Callable, *args: Any, **kwargs: Any
    ) -> AmortizedFlow:
        """Loads a guide for a model, which is needed again with what makes its features, and data that need not be the same.

        Args:
            path: The file.
            model: The model.
            features: See `AmortizedFlow`.
            args: The model's arguments.
            kwargs: The model's keyword arguments.

        Returns:
            The guide, ready to sample.

        Raises:
            FlowFileError: the file is not whole, or does not fit the model's sites or its features.
        """
        parts, arrays, extra = files.read_parts(path, cls.__name__, {"local": Flow, "global": Flow})
        shapes = lambda: {name: template(flow) for name, flow in parts.items()}
        files.restore(arrays, shapes, torch.empty(0))  # a hostile description ends here
        try:
            flow, hidden, embedding = without_encoder(parts["local"])
            of_global = parts.get("global", "affine")
            guide = cls(model, features, str(extra.get("plate")), flow, of_global, hidden=hidden, embedding=embedding)
            guide.setup(*args, **kwargs)
        except (DimensionError, UnsupportedModelError) as error:
            raise FlowFileError(f"{path} does not fit the model: {error}") from error
        files.require(path, extra, guide._description)
        files.require(path, {"flows": parts}, {"flows": guide._flows})
        found = files.restore(arrays, shapes, guide._local.layout.start)
        with torch.no_grad():
            for old, new in zip(tree.leaves(guide._arrays()), tree.leaves(found), strict=True):
                old.copy_(new)
        return guide

    @property
    def _flows(self) -> dict[str, Flow]:
        return {"local": self._local_flow, **({} if self._global is None else {"global": self._global_flow})}

    def _arrays(self) -> dict[str, Any]:
        local = self._variables_in("local_parameters")
        return {"local": local, **({} if self._global is None else {"global": self._variables_in("global_parameters")})}

    @property
    def _description(self) -> dict[str, Any]:
        """What of a model a file has to fit; the unconstrained form of an angle is not the same in both languages."""
        parts = [part for part in (self._local, self._global) if part is not None]
        sites = [part.layout.description for part in parts]
        angles = [
            [k, "turns"] for part in parts for k, angle in zip(part.layout.names, part.angles, strict=True) if angle
        ]
        found = {"sites": sites[0], "global sites": sites[1] if sites[1:] else [], "angles": angles}
        return {"plate": self._plate, **found, "features": self._num_features}


def _draw(rng: torch.Generator | None, fn: FlowDistribution, shape: tuple[int, ...]) -> Tensor:
    return fn.flow.sample(rng, fn.variables, shape, fn.context).x


def _delta(site: Any, x: Tensor, log_det: Tensor) -> Tensor:
    return pyro.sample(site["name"], dist.Delta(x, log_density=-log_det, event_dim=site["fn"].event_dim))
