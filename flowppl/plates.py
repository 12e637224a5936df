"""Which latents of a model are local to a plate: what both PPLs call by the same names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flowppl.errors import FlowFileError, UnsupportedModelError

Sites = dict[str, Any]
Sizes = Mapping[str, tuple[int, int]]  # the full size of a plate, and how much of it is asked for, by name
_ELEMENTS = 2**17  # of the largest site in one evaluation of all of the data: 128 particles by 1024 data


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


def own_encoder(what: str) -> FlowFileError:
    """The error of saving a guide whose encoder is not built in.

    Args:
        what: What can be saved in place of a file.
    """
    return FlowFileError(
        f"encoder: a file holds the built-in perceptron and no encoder of your own, which is code: save {what} by the means of "
        "your framework, and make the guide anew from the same model, features and encoder"
    )


def differs(site: str) -> UnsupportedModelError:
    """The error of a support that is not the same for all elements of a plate."""
    return UnsupportedModelError(
        f"the support of site {site!r} differs between the elements of its plate: sample a standardised variable instead, "
        "such as Uniform(0, 1), and scale it with a deterministic site"
    )


def in_plates(site: Any, plates: Sizes) -> bool:
    """Whether a site of a trace is in one of the plates."""
    return any(frame.name in plates for frame in site["cond_indep_stack"])


def refuse_local(latents: Sites, plates: Sizes) -> None:
    """Makes sure that minibatches estimate a density over all latents.

    Args:
        latents: Latent sites of a trace, by name.
        plates: Those that subsample.

    Raises:
        UnsupportedModelError: a latent is in one of them, or is summed out.
    """
    for name, site in latents.items() if plates else ():
        if site["fn"].support.is_discrete:
            raise UnsupportedModelError(
                f"site {name!r} is enumerated and plate {next(iter(plates))!r} subsamples: a sum over its values is not what "
                "minibatches of its terms estimate. Sum it out by a mixture distribution, such as MixtureSameFamily, or run the "
                "model on all of the data"
            )
        for frame in site["cond_indep_stack"]:
            if frame.name in plates:
                size, subsample_size = plates[frame.name]
                raise UnsupportedModelError(
                    f"site {name!r} is in plate {frame.name!r}, which subsamples {subsample_size} of {size}: a flow over these "
                    "latents would know one minibatch only. Run the model on all of the data (subsample_size=None), or use "
                    "AmortizedFlow, whose encoder covers local latents"
                )


def refuse_minibatches(plates: Sizes) -> None:
    """Makes sure that a model sees all of its data.

    Raises:
        UnsupportedModelError: a plate subsamples.
    """
    for name, (size, subsample_size) in plates.items():
        raise UnsupportedModelError(
            f"plate {name!r} subsamples {subsample_size} of {size}, and every step of a path asks for the density of all of the "
            "data: run the model on all of it (subsample_size=None), or use AutoFlow or fit"
        )


def needs_all(error: Exception, plates: Sizes) -> UnsupportedModelError:
    """The error of a model that fails where plates that subsample are given their full size."""
    return UnsupportedModelError(
        f"a density needs all of the data, and the model fails where {', '.join(map(repr, plates))} does not subsample: {error}. "
        "Pass all of the data, and pick a minibatch by the plate: `with plate as idx: y[idx]`, or `subsample(y, event_dim=0)`"
    )


def rows_at_a_time(sites: Iterable[Any], plates: Sizes) -> int:
    """How many points may be evaluated at a time with all of the data, from the sites of such a trace."""
    inside = (site for site in sites if in_plates(site, plates))
    return max(1, _ELEMENTS // max((math.prod(site["value"].shape) for site in inside), default=1))
