"""Which latents of a model are local to a plate: what both PPLs call by the same names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from flowppl.errors import UnsupportedModelError

Sites = dict[str, Any]


def split_by_plate(latents: Sites, plate: str, full_size: Callable[[Any], int]) -> tuple[Sites, Sites]:
    """The latents inside a plate, and those outside of it.

    Args:
        latents: Latent sites of a trace, by name.
        plate: Name of the plate.
        full_size: The full size of the plate that a frame of a site's `cond_indep_stack` stands for.

    Raises:
        UnsupportedModelError: there are none inside, one is in a second plate too or has a batch of its own, or one outside is in
            another plate that subsamples.
    """
    frames = {name: {f.name: f for f in site["cond_indep_stack"]} for name, site in latents.items()}
    inside = {name: site for name, site in latents.items() if plate in frames[name]}
    if not inside:
        known = sorted({f for of_site in frames.values() for f in of_site})
        raise UnsupportedModelError(
            f"plate: no latent of the model is in a plate {plate!r}; its latents are in {', '.join(known) or 'no plates'}"
        )
    for name, site in inside.items():
        others = sorted(set(frames[name]) - {plate})
        batch = tuple(site["fn"].batch_shape)
        if others or math.prod(batch) != frames[name][plate].size:
            where = f"plate {others[0]!r} too" if others else f"a batch of shape {batch}"
            raise UnsupportedModelError(
                f"site {name!r} is in plate {plate!r} and in {where}: turn what is not {plate!r} into an event with "
                ".expand([...]).to_event(1), so that one element's latents are one vector"
            )
    outside = {name: site for name, site in latents.items() if name not in inside}
    for name in outside:
        for frame in frames[name].values():
            if frame.size != full_size(frame):
                raise UnsupportedModelError(
                    f"site {name!r} is in plate {frame.name!r}, which subsamples {frame.size} of {full_size(frame)}, and "
                    f"only plate {plate!r} is amortized: give {frame.name!r} its full size"
                )
    return inside, outside


def differs(site: str) -> UnsupportedModelError:
    """The error of a support that is not the same for all elements of a plate."""
    return UnsupportedModelError(
        f"the support of site {site!r} differs between the elements of its plate: sample a standardised variable instead, "
        "such as Uniform(0, 1), and scale it with a deterministic site"
    )
