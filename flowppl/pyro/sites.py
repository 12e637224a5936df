"""Which sites of a model a flow can cover, where they start, and how a flat vector becomes their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, Independent, SineBivariateVonMises, SineSkewed, VonMises
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.infer.autoguide import init_to_median
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from flowppl.errors import DimensionError, UnsupportedModelError


def is_latent(site: Any) -> bool:
    """Whether a site is a random variable that the data leave open."""
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)


def is_enumerated(site: Any) -> bool:
    """Whether a site is a discrete latent that `config_enumerate` marked."""
    return is_latent(site) and site["infer"].get("enumerate") == "parallel" and site["fn"].has_enumerate_support


def hide_enumerated(site: Any) -> bool:
    """A `hide_fn` for `poutine.block`: enumerated sites are none of a flow's business.

    Raises:
        UnsupportedModelError: the site is discrete and not enumerated, or a point mass, or has no bijection from real
            vectors.
    """
    if not is_latent(site) or is_enumerated(site):
        return is_enumerated(site)
    name, fn = site["name"], site["fn"]
    if isinstance(fn, Delta):
        raise UnsupportedModelError(
            f"site {name!r} is a Delta, which has no density: use pyro.deterministic({name!r}, ...)"
        )
    try:
        if not fn.support.is_discrete:
            biject_to(fn.support)
            return False
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"site {name!r} ({type(fn).__name__}): torch.distributions.biject_to knows no bijection of real vectors "
            f"onto its support; reparametrise it with poutine.reparam, or hide it with "
            f"poutine.block(model, hide=[{name!r}])"
        ) from error
    raise UnsupportedModelError(
        f"site {name!r} is discrete, and a flow covers continuous sites: enumerate it with config_enumerate(model) and "
        f"TraceEnum_ELBO, or hide it with poutine.block(model, hide=[{name!r}]) and give it a guide of its own"
    )


def subsampled(site: Any) -> str | None:
    """A description of the subsampling plate that a site is in, or None."""
    for f in site["cond_indep_stack"]:
        if f.full_size is not None and f.full_size != f.size:
            return f"site {site['name']!r} is in plate {f.name!r}, which subsamples {f.size} of {f.full_size}"
    return None


def start_from(init_loc_fn: Callable = init_to_median) -> Callable:
    """An initialisation for `InitMessenger`, also of sites that cannot be sampled, such as `ImproperUniform`."""

    def init(site: Any) -> Tensor:
        try:
            return init_loc_fn(site)
        except NotImplementedError:
            bijection = biject_to(site["fn"].support)
            return bijection(torch.zeros(bijection.inverse_shape(site["fn"].shape())))

    return init


def unconstrained(sites: dict[str, Any]) -> dict[str, Tensor]:
    """The unconstrained values of sites of a trace."""
    return {name: biject_to(site["fn"].support).inv(site["value"].detach()) for name, site in sites.items()}


def refuse_moving_supports(model: Callable, args: tuple, kwargs: dict[str, Any], sites: dict[str, Any]) -> None:
    """Compares the supports of latent sites with those of a run of the model at other latents.

    Raises:
        UnsupportedModelError: a support depends on other latents.
    """
    layout = Layout(unconstrained(sites))
    elsewhere = layout.unpack(layout.start + 1.0)
    with pyro.validation_enabled(False), poutine.block(), Unconstrain(elsewhere) as seen:
        model(*args, **kwargs)
    for name, site in sites.items():
        value = biject_to(site["fn"].support)(elsewhere[name].to(site["value"].dtype))
        if not torch.allclose(value, seen.values[name], rtol=1e-3, equal_nan=True):
            raise UnsupportedModelError(
                f"the support of site {name!r} depends on other latents, and Pyro's guides map onto a fixed one: "
                "sample a standardised variable, from Uniform(0, 1) say, and scale it with pyro.deterministic"
            )


def among_plates(u: Tensor, shape: torch.Size, site: Any, batch: torch.Size) -> Tensor:
    """Unconstrained values `(*batch, *shape)` of a site, reshaped so that the batch of particles is in front of its plates."""
    event_dim = site["fn"].event_dim + len(shape) - site["value"].dim()
    return u.reshape(torch.broadcast_shapes(shape, batch + (1,) * event_dim)).to(site["value"].dtype)


def is_angle(fn: Any) -> bool:
    """Whether the values of a distribution are angles, by its kind: torch has no constraint for them."""
    while isinstance(fn, Independent | MaskedDistribution | SineSkewed):
        fn = fn.base_dist
    return isinstance(fn, VonMises | SineBivariateVonMises)


class Layout:
    """Where each site lives in a flat unconstrained vector: sites in the order of their names, each in C order.

    Args:
        free: Unconstrained starting values by site.

    Attributes:
        names: The sites.
        shapes: Their unconstrained shapes.
        sizes: Their numbers of unconstrained elements.
        dim: The sum of the sizes.
        start: The starting values `(dim,)`; zero where one is on the boundary of its support.
    """

    def __init__(self, free: dict[str, Tensor]) -> None:
        self.names = sorted(free)
        self.shapes = {name: free[name].shape for name in self.names}
        self.sizes = [free[name].numel() for name in self.names]
        self.dim = sum(self.sizes)
        start = torch.cat([free[name].reshape(-1) for name in self.names])
        self.start = torch.where(torch.isfinite(start), start, torch.zeros_like(start))

    @property
    def description(self) -> list[list[Any]]:
        """Sites and sizes, as JSON types: what a file has to fit."""
        return [[name, size] for name, size in zip(self.names, self.sizes, strict=True)]

    def unpack(self, u: Tensor) -> dict[str, Tensor]:
        """Unconstrained values `(*batch, *shape)` by site, from `(*batch, dim)`."""
        parts = torch.split(u, self.sizes, dim=-1)
        return {name: p.reshape(u.shape[:-1] + self.shapes[name]) for name, p in zip(self.names, parts, strict=True)}

    def pack(self, free: dict[str, Tensor]) -> Tensor:
        """`(*batch, dim)` from unconstrained values `(*batch, *shape)`."""
        parts = [free[name].reshape((*_batch(free[name], self.shapes[name]), -1)) for name in self.names]
        return torch.cat(parts, dim=-1)

    def unconstrain(self, sites: dict[str, Any], values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The flat vectors `(*batch, dim)` of constrained values `(*batch, *shape)`, and log |d value / d u| `(*batch,)`.

        Raises:
            DimensionError: a site is missing or has another shape.
        """
        free, log_det = {}, 0.0
        for name in self.names:
            shape, value = tuple(sites[name]["value"].shape), values.get(name)
            if value is None or tuple(value.shape[value.dim() - len(shape) :]) != shape:
                got = "none" if value is None else f"shape {tuple(value.shape)}"
                raise DimensionError(
                    f"values[{name!r}]: expected shape (*batch, {', '.join(map(str, shape))}), got {got}"
                )
            bijection = biject_to(sites[name]["fn"].support)
            free[name] = bijection.inv(value)
            term = bijection.log_abs_det_jacobian(free[name], value)
            log_det = log_det + term.reshape((*value.shape[: value.dim() - len(shape)], -1)).sum(-1)
        return self.pack(free), log_det


class Unconstrain(Messenger):
    """Sets latent sites to the images of unconstrained values, under the supports that the run itself gives them.

    Attributes:
        values: The constrained values by site.
        log_dets: The log-determinants of the bijections.
    """

    def __init__(self, free: dict[str, Tensor]) -> None:
        super().__init__()
        self.free = free
        self.values: dict[str, Tensor] = {}
        self.log_dets: list[Tensor] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.free:
            bijection, u = biject_to(msg["fn"].support), self.free[msg["name"]]
            x = bijection(u)
            self.log_dets.append(bijection.log_abs_det_jacobian(u, x))
            self.values[msg["name"]] = msg["value"] = x
            msg["done"] = True


def _batch(x: Tensor, shape: torch.Size) -> torch.Size:
    return x.shape[: x.dim() - len(shape)]
