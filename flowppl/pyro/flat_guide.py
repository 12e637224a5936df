"""What guides over one flat unconstrained vector share: an identity, a layout, and the checks of a model."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Self

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

from flowppl.errors import UnsupportedModelError
from flowppl.pyro.sites import Layout, Unconstrain, hide_enumerated, moving_support, start_from, subsampled

_NUMBERS: dict[str, itertools.count] = defaultdict(itertools.count)


class FlatGuide(AutoContinuous):
    """An `AutoContinuous` guide that checks its model, and whose parameters no other guide of the program shares.

    Pyro names guides after their class or their place in a list, so two of them meet in the param store. Here each
    instance, copies included, has a name of its own, and keeps it inside other modules. A copy keeps the model; a
    pickle does not hold it.

    Args:
        model: The model; sites that `config_enumerate` marks are none of the guide's.
        init_loc_fn: How each site starts.
    """

    master: Any
    prototype_trace: Any
    _model: Any

    def __init__(self, model: Callable, init_loc_fn: Callable) -> None:
        super().__init__(poutine.block(model, hide_fn=hide_enumerated), init_loc_fn=start_from(init_loc_fn))
        self._claim_name()
        self._source = (model, init_loc_fn)  # in a tuple, lest a model that is a module became a part of the guide

    def setup(self, *args: Any, **kwargs: Any) -> Self:
        """Creates the parameters before any step, by running the model: for `parameters()`, `.to()`, `load_state_dict`.

        Args:
            args: The model's arguments.
            kwargs: Its keyword arguments.

        Returns:
            The guide.

        Raises:
            UnsupportedModelError: the model has a latent that the guide cannot cover.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    def _setup_flow(self) -> None:
        """Makes the flow and its parameters, once the layout is known."""
        raise NotImplementedError

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            with torch.no_grad():  # the sites are kept, and a graph could be neither copied nor pickled
                super()._setup_prototype(*args, **kwargs)
                self._layout = Layout(dict(self.prototype_trace.iter_stochastic_nodes()))
                self._check_sites(*args, **kwargs)
                self._setup_flow()
        except Exception:
            self.prototype_trace = None  # the next call starts anew
            raise
        if self.master is None:
            with poutine.block():  # for NeuTraReparam; a call makes its own
                self._create_plates(*args, **kwargs)

    def _check_sites(self, *args: Any, **kwargs: Any) -> None:
        for where in filter(None, (subsampled(site) for _, site in self.prototype_trace.iter_stochastic_nodes())):
            raise UnsupportedModelError(
                f"{where}: a flow over these latents would know one minibatch only. Run the model on all of the data, "
                "or write a guide with flow_module and a context for the local latents"
            )
        elsewhere = self._layout.start + 1.0
        with pyro.validation_enabled(False), poutine.block(), Unconstrain(self._layout.unpack(elsewhere)) as seen:
            self._require_source()[0](*args, **kwargs)
        for name, value in self._constrain(elsewhere).items():
            if not torch.allclose(value, seen.values[name], rtol=1e-3, equal_nan=True):
                raise moving_support(name)

    def _init_loc(self) -> Tensor:
        return self._layout.start

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Sites in the model's order, as TraceMeanField_ELBO expects, with particles in front of the plates."""
        parts = self._layout.unpack(latent)
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            shape = self._layout.shapes[name]
            event_dim = site["fn"].event_dim + len(shape) - site["value"].dim()
            shape = torch.broadcast_shapes(shape, latent.shape[:-1] + (1,) * event_dim)
            yield site, parts[name].reshape(shape).to(site["value"].dtype)

    def _constrain(self, latent: Tensor) -> dict[str, Tensor]:
        """Values `(*batch, *shape)` by site, from `(*batch, dim)`."""
        sites = self.prototype_trace.nodes
        free = self._layout.unpack(latent)
        return {k: biject_to(sites[k]["fn"].support)(u.to(sites[k]["value"].dtype)) for k, u in free.items()}

    @property
    def _site_sizes(self) -> list[list[Any]]:
        return [[name, size] for name, size in zip(self._layout.names, self._layout.sizes, strict=True)]

    # Identity

    def _claim_name(self) -> None:
        kind = type(self).__name__
        number = next(_NUMBERS[kind])
        self._own_name = self._pyro_name = f"{kind}_{number}" if number else kind

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        super()._pyro_set_supermodule(self._own_name, context)

    def _require_source(self) -> tuple[Callable, Callable]:
        """The user's model and initialisation."""
        if self._source is None:
            raise RuntimeError(
                "a pickled guide comes back without its model: use save and load, or a new guide and its state_dict"
            )
        return self._source

    def __getstate__(self) -> dict[str, Any]:
        model, master = self._model, self.master
        try:
            return {**super().__getstate__(), "_source": None}
        finally:
            self._model, self.master = model, master  # Pyro clears them on the live guide

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._claim_name()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._model, new._source = self._model, self._source
        return new
