"""What guides over one flat unconstrained vector share: a layout, and sites made of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

from flowppl import tree
from flowppl.errors import UnsupportedModelError
from flowppl.laplace import NormalApproximation
from flowppl.pathfinder import one_turn, pathfinder
from flowppl.pyro.model_guide import ModelGuide
from flowppl.pyro.precise import Precise
from flowppl.pyro.sites import Layout, among_plates, is_angle, subsampled, unconstrained


class FlatGuide(ModelGuide, AutoContinuous):
    """A guide over all latents at once, as an `AutoContinuous`."""

    def _lay_out(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self._layout = Layout(unconstrained(self._sites))
        for where in filter(None, map(subsampled, self._sites.values())):
            raise UnsupportedModelError(
                f"{where}: a flow over these latents would know one minibatch only. Run the model on all of the data, "
                "or use AmortizedFlow, whose encoder covers local latents"
            )

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        if self.master is None:
            with poutine.block():  # for NeuTraReparam; a call makes its own
                self._create_plates(*args, **kwargs)

    def _normal(self, rng: torch.Generator | None, args: tuple, kwargs: dict[str, Any]) -> NormalApproximation:
        """A normal approximation of the posterior, by multi-path Pathfinder; see `AutoFlow.precondition`."""
        self.setup(*args, **kwargs)
        model, init_loc_fn = self._require_source()[:2]
        density = Precise(model, args, kwargs, rng=rng, init_loc_fn=init_loc_fn)
        seed = int(torch.randint(2**62, (), generator=rng, device=None if rng is None else rng.device))
        at = self._layout.start.double().cpu().numpy()
        return pathfinder(one_turn(density, np.repeat(self._angles, self._layout.sizes), at), at, seed)

    @property
    def _angles(self) -> list[bool]:
        """Whether each site is one of angles."""
        return [is_angle(self.prototype_trace.nodes[name]["fn"]) for name in self._layout.names]

    @torch.no_grad()
    def _assign(self, variables: dict[str, Any]) -> None:
        """Overwrites the arrays in place: optimizers and the param store hold on to them."""
        for old, new in zip(tree.leaves(self._variables()), tree.leaves(variables), strict=True):
            old.copy_(new)

    def _variables(self) -> dict[str, Any]:
        """The arrays of the guide's flow."""
        raise NotImplementedError

    def _init_loc(self) -> Tensor:
        return self._layout.start

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Sites in the model's order, as TraceMeanField_ELBO expects, with particles in front of the plates."""
        parts = self._layout.unpack(latent)
        for name, site in self._sites.items():
            yield site, among_plates(parts[name], self._layout.shapes[name], site, latent.shape[:-1])

    def _constrain(self, latent: Tensor) -> dict[str, Tensor]:
        """Values `(*batch, *shape)` by site, from `(*batch, dim)`."""
        sites = self.prototype_trace.nodes
        free = self._layout.unpack(latent)
        return {k: biject_to(sites[k]["fn"].support)(u.to(sites[k]["value"].dtype)) for k, u in free.items()}

    @property
    def _site_sizes(self) -> list[list[Any]]:
        return self._layout.description
