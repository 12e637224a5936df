"""What all guides share: how one meets its model, and an identity."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Self

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger

from flowppl.pyro.sites import hide_enumerated, refuse_moving_supports, start_from

_NUMBERS: dict[str, itertools.count] = defaultdict(itertools.count)


class ModelGuide(AutoGuide):
    """A guide that checks its model, and whose parameters no other guide of the program shares.

    Pyro names guides after their class or their place in a list, so two of them meet in the param store. Here each
    instance, copies included, has a name of its own, and keeps it inside other modules. A copy keeps the model; a
    pickle does not hold it.

    Args:
        model: The model; sites that `config_enumerate` marks are none of the guide's.
        init_loc_fn: How each site starts.
        source: What else a pickle does not hold.
    """

    master: Any
    prototype_trace: Any
    _model: Any

    def __init__(self, model: Callable, init_loc_fn: Callable, *source: Any) -> None:
        start = InitMessenger(start_from(init_loc_fn))
        super().__init__(start(poutine.block(model, hide_fn=hide_enumerated)))
        self._claim_name()
        self._source = (model, init_loc_fn, *source)  # in a tuple, lest a module became a part of the guide

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

    def _lay_out(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Finds out where each site lives, from the prototype."""
        raise NotImplementedError

    def _setup_flow(self) -> None:
        """Makes the flow and its parameters, once the layout is known."""
        raise NotImplementedError

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            with torch.no_grad():  # the sites are kept, and a graph could be neither copied nor pickled
                super()._setup_prototype(*args, **kwargs)
                self._lay_out(args, kwargs)
                refuse_moving_supports(self._require_source()[0], args, kwargs, self._sites)
                self._setup_flow()
        except Exception:
            self.prototype_trace = None  # the next call starts anew
            raise

    @property
    def _sites(self) -> dict[str, Any]:
        """The latent sites of the prototype."""
        return dict(self.prototype_trace.iter_stochastic_nodes())

    def _variables_in(self, attribute: str) -> dict[str, Any]:
        """The flow's arrays that an attribute of the guide holds."""
        if self.prototype_trace is None:
            raise RuntimeError(
                "the guide has not seen its model yet: call guide.setup(...) with the model's arguments first"
            )
        holder = getattr(self, attribute)
        if self._pyro_context.active and not pyro.settings.get("module_local_params"):
            # What a user loaded into the param store wins, as for Pyro's own guides.
            pyro.module(self._pyro_get_fullname(attribute), holder, update_module_params=True)
        return holder.variables

    # Identity

    def _claim_name(self) -> None:
        kind = type(self).__name__
        number = next(_NUMBERS[kind])
        self._own_name = self._pyro_name = f"{kind}_{number}" if number else kind

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        super()._pyro_set_supermodule(self._own_name, context)

    def _require_source(self) -> tuple:
        """The user's model and initialisation, and what else came with them."""
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
