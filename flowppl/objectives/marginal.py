"""Guides with auxiliary latents: the density of what is kept, estimated by a program that runs backwards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from flowppl.backend import Array, backend_of
from flowppl.errors import UnsupportedModelError
from flowppl.weights import log_mean_exp, normalize

REVERSE = "flowppl_reverse"  # in the `infer` of a site: `Densities` of a marginal guide


class Densities(NamedTuple):
    """What a marginal guide adds to its run."""

    excess: Array  # log q^(x), less the log densities of what was drawn, which are in the run already
    reverse: Array  # sum_m w_m log r(u_m | x), where derivatives of the shares w_m are left out
    others: Array  # sum_m (1 - w_m) log r(u_m | x) alike


def densities(log_q: Sequence[Array], log_r: Sequence[Array]) -> Densities:
    """The marginal density of a guide, estimated from draws that a reverse program makes.

    A guide draws u_1 and x ~ q(x, u_1), a reverse program u_2..u_M ~ r(u | x). The estimate of log q(x) is

        log q^(x) = log 1/M sum_m q(x, u_m) / r(u_m | x) = log Q - log R,    Q = 1/M sum_m q(x, u_m) prod_(j != m) r(u_j | x),

    with R = prod_j r(u_j | x), so that l = log p(x) - log q^(x) is the log-weight of the model, extended by R, and Q: a density of
    draws in which any of the u's may be the one that x came from. Draws with u_1 as that one have the same mean of any function
    of l, which is symmetric in the u's. So the rule of path gradients holds for l (see `flowppl.objectives.programs`), with all
    parameters frozen in log Q, while in log R those of the reverse program are like the model's: they have phi_k d log R besides.
    There u_m is the one that x came from with probability w_m ~ q(x, u_m) / r(u_m | x), and else was drawn from r, whose score
    then has mean zero whatever the weight of it, if u_m has no part in that. So it is taken for

        phi_k sum_m w_m d log r(u_m | x)  +  (phi_k - phi_k without k) sum_m (1 - w_m) d log r(u_m | x),

    with derivatives of r in its parameters alone, where the second part vanishes for the ELBO, and where log-weights are alike.

    Where u_1, x or other u's are drawn without derivatives their scores are those of what drew them: the guide's for u_1 and x, the
    reverse program's for u_2..u_M (see `flowppl.objectives.programs.cotangents`).

    M = 1 is Ranganath, Tran & Blei 2016, "Hierarchical variational models"; M > 1 is Sobolev & Vetrov 2019, "Importance weighted
    hierarchical variational inference".

    Args:
        log_q: log q(x, u_m) for each m, arrays that broadcast.
        log_r: log r(u_m | x) alike.
    """
    backend = backend_of(*log_q)
    xp = backend.xp
    ratios = xp.stack(list(xp.broadcast_arrays(*(q - r for q, r in zip(log_q, log_r, strict=True)))))
    excess = log_mean_exp(ratios, axis=0) - log_q[0] - sum(log_r[1:])
    log_r = xp.stack(list(xp.broadcast_arrays(*log_r, ratios[0])))[:-1]
    shares = backend.stop(normalize(ratios, axis=0))
    return Densities(excess, xp.sum(shares * log_r, axis=0), xp.sum((1 - shares) * log_r, axis=0))


def check_kept(keep: Collection[str], sites: Collection[str]) -> None:
    """Checks the names of sites that a guide is asked to keep.

    Raises:
        UnsupportedModelError: it does not draw one of them, or draws no other.
    """
    for name in keep:
        if name not in sites:
            raise UnsupportedModelError(f"keep: the guide draws no site {name!r}; it draws {', '.join(sites)}")
    if set(keep) == set(sites):
        raise UnsupportedModelError(
            f"keep: the guide draws {', '.join(sites)}, all of which are kept, so that there is nothing to reverse: use the guide"
        )


def check_reverse(auxiliary: Collection[str], sites: Collection[str]) -> None:
    """Checks the names of sites that a reverse program draws.

    Raises:
        UnsupportedModelError: they are not the guide's auxiliary ones.
    """
    for name in [*auxiliary, *sites]:
        if name not in sites:
            raise UnsupportedModelError(
                f"site {name!r} of the guide is not kept, and the reverse program does not draw it: keep it, or draw it there"
            )
        if name not in auxiliary:
            raise UnsupportedModelError(
                f"site {name!r} of the reverse program is no auxiliary site of the guide, which draws {', '.join(auxiliary)}"
            )


def without_density(name: str) -> UnsupportedModelError:
    """The error for a site that the marginal density cannot be had of."""
    return UnsupportedModelError(
        f"site {name!r} is a Delta, which has no density: a marginal guide and its reverse program draw from others, and what is "
        "computed from their draws can be a `deterministic`"
    )


def subsampled(name: str) -> UnsupportedModelError:
    """The error for a plate over which log densities cannot be summed."""
    return UnsupportedModelError(
        f"plate {name!r} subsamples and does not enclose every site of the marginal guide and its reverse program, so that their "
        "densities cannot be scaled up: use all of the data, or put all sites inside"
    )
