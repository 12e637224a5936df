"""What all guides share: how one meets its model, and a life beyond one trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpyro
from numpyro import handlers
from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import mutable

from flowppl.errors import NonFiniteError
from flowppl.numpyro.objective import new_control
from flowppl.numpyro.particles import CONTROL
from flowppl.numpyro.sites import hide_enumerated, look, refuse_moving_supports

Array = Any


class ModelGuide(AutoGuide):
    """A guide that checks its model, and that no jax transformation leaves a tracer in.

    A guide outlives the transformation it is first called in. What it keeps is computed at compile time; where the model's
    arguments are traced that cannot be, so the prototype serves this trace only, and the next call makes another.

    Args:
        model: The model; sites that it marks for enumeration are none of the guide's.
        prefix: Prefix of the guide's own sites.
        init_loc_fn: How each site starts.
    """

    model: Callable
    prototype_trace: Any
    _gradient: str
    _init_locs: dict[str, Array]

    def __init__(self, model: Callable, prefix: str, init_loc_fn: Callable) -> None:
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)
        self._traced = False
        self._unseen = dict(vars(self))

    def __getstate__(self) -> dict[str, Any]:
        # Tracers cannot be pickled: a guide that has not met its model yet.
        return {**self._unseen, "_unseen": self._unseen} if self._traced else super().__getstate__()

    def _meet(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Meets the model, unless that has been done for good."""
        if self.prototype_trace is None or self._traced:
            self._setup_prototype(*args, **kwargs)
        if self._gradient == "auto":
            mutable(CONTROL, new_control())

    def _setup(self, rng: Array, args: tuple, kwargs: dict[str, Any]) -> None:
        """Meets the model outside of any handler that seeds."""
        handlers.seed(self._meet, rng)(args, kwargs)

    def _lay_out(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Finds out where each site lives, from the prototype and the starting values."""
        raise NotImplementedError

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
                # NumPyro advises against what these guides are made for.
                warnings.filterwarnings("ignore", "Continuous inference poorly handles circular", UserWarning)
                super()._setup_prototype(*args, **kwargs)
                self._lay_out(args, kwargs)
            self._traced = any(isinstance(a, jax.core.Tracer) for a in self._init_locs.values())
            if not self._traced:
                refuse_moving_supports(self.prototype_trace, elsewhere)
            self._setup_flow()
        except Exception as error:
            self.prototype_trace = None  # the next call starts anew
            if "Cannot find valid initial parameters" in str(error):
                raise NonFiniteError(
                    "the model's log density or its gradient is not finite at the start: choose another init_loc_fn "
                    "(init_to_value, init_to_uniform) or check the model for parameters outside their support"
                ) from error
            raise
        finally:
            self.model = model

    def _require_prototype(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError(
                "the guide has not seen its model yet: call svi.init, svi.run or guide.precondition first"
            )
