"""Running a model and not scoring it: which sites are data and which are inferred, and draws of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from flowppl.errors import DimensionError, NonFiniteError, SiteError, UnsupportedModelError
from flowppl.training import seed_of

Array = np.ndarray
Data = dict[str, Array]
_CHUNK = 1000  # simulations that are run at a time


class Simulator(Protocol):
    """A model that is run and never scored; arrays are numpy's.

    Attributes:
        shapes: Unconstrained shapes of the latents, in the order of their names.
        data_shapes: Shapes of the observed sites, likewise.
        like: An array whose dtype and device the flow takes.
        summary: From data `(n, *shape)` by site to features `(n, num_features)`; None for the data, flat.
    """

    shapes: Mapping[str, tuple[int, ...]]
    data_shapes: Mapping[str, tuple[int, ...]]
    like: Any
    summary: Callable[[Data], Array] | None

    def simulate(self, seed: int, n: int) -> tuple[Array, Data]: ...  # unconstrained latents (n, dim), data (n, *shape)
    def constrain(self, u: Array) -> Data: ...  # (*batch, dim) to (*batch, *shape) by site
    def unconstrain(self, values: Data) -> tuple[Array, Array]: ...  # the way back, and its log-determinant


class Scale(NamedTuple):
    """What makes simulations have mean zero and standard deviation one."""

    mean: Array
    sd: Array

    def standardise(self, x: Array) -> Array:
        """`(*batch, n)` to the same."""
        return (x - self.mean) / self.sd

    @classmethod
    def of(cls, x: Array) -> Scale:
        """That of simulations `(num, n)`."""
        sd = x.std(0)
        return cls(x.mean(0), np.where(sd > 1e-12 * np.abs(x).max(0), sd, 1.0))  # what never changes stays zero


def choose_sites(
    free: Sequence[str], fixed: Sequence[str], computed: Sequence[str], observed: str | Sequence[str], latents: Any
) -> tuple[list[str], list[str]]:
    """Which sites are data and which are inferred, each in the order of names; the others are averaged over.

    Args:
        free: Sites that the model draws.
        fixed: Those that have a value, factors included.
        computed: Deterministic ones.
        observed: Names of the data.
        latents: Names of what is inferred, or None for all that is drawn and not observed.

    Raises:
        SiteError: a name is not a site that can be simulated.
        UnsupportedModelError: a site has a value or is a factor, or there is nothing to infer.
    """
    names = [observed] if isinstance(observed, str) else sorted(observed)
    if not names:
        raise SiteError("observed: expected the name of at least one site, got none")
    for name in names:
        if name in fixed:
            raise SiteError(f"observed: site {name!r} has a value already; leave it open, as obs=None does")
        if name not in free and name not in computed:
            raise SiteError(f"observed: the model has no site {name!r}; it has {', '.join([*free, *computed])}")
    if fixed:
        raise UnsupportedModelError(
            f"site {fixed[0]!r} has a value or is a factor, which counts only where a model is scored, and here it is only run: "
            "leave the site open, as obs=None does, and name it in `observed`"
        )
    chosen = set(free) - set(names) if latents is None else {latents} if isinstance(latents, str) else set(latents)
    for name in sorted(chosen - (set(free) - set(names))):
        raise SiteError(f"latents: {name!r} is not among the sites that the model draws: {', '.join(free)}")
    if not chosen:
        raise UnsupportedModelError("there is nothing to infer: no latent site is left beside the observed ones")
    return names, sorted(chosen)


def not_continuous(name: str) -> UnsupportedModelError:
    """The error for a latent that is not continuous."""
    return UnsupportedModelError(
        f"site {name!r} is discrete, and a flow covers continuous sites: name those in `latents`, and what is drawn beside them "
        "is averaged over"
    )


def features_of(simulator: Simulator, data: Data) -> Array:
    """What a flow sees of data `(n, *shape)`, `(n, num_features)`.

    Raises:
        DimensionError: the summary has another shape.
    """
    n = len(next(iter(data.values())))
    if simulator.summary is None:
        return np.concatenate([np.reshape(data[name], (n, -1)) for name in simulator.data_shapes], axis=-1)
    features = simulator.summary(data)
    if features.ndim != 2 or len(features) != n:
        raise DimensionError(f"summary: expected an array of shape ({n}, num_features), got {features.shape}")
    return features


def simulated(simulator: Simulator, num: int, stream: tuple[int, ...]) -> tuple[Array, Array, int]:
    """Latents `(n, dim)` and features `(n, num_features)` of those simulations that are finite, and the number of others.

    Raises:
        NonFiniteError: more than half are not finite.
    """
    size = min(num, _CHUNK)
    parts = []
    for i in range(-(-num // size)):
        u, data = simulator.simulate(seed_of(*stream, i), size)
        parts.append((u, features_of(simulator, data)))
    u, features = (np.concatenate([np.asarray(part[k], np.float64) for part in parts])[:num] for k in (0, 1))
    fine = np.isfinite(u).all(-1) & np.isfinite(features).all(-1)
    if fine.sum() < num / 2:
        raise NonFiniteError(
            f"{num - fine.sum()} of {num} simulations are not finite: narrow the prior, keep the simulator from overflowing, or "
            "use a summary that is finite"
        )
    return u[fine], features[fine], int(num - fine.sum())
