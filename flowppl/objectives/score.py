"""What multiplies the scores of sites that draw without derivatives: a signal less a baseline that the draw has no part in."""

from __future__ import annotations

from collections.abc import Callable

from flowppl.backend import Array, backend_of
from flowppl.errors import UnsupportedModelError


def leave_one_out(credit: Callable[[Array], Array], log_w: Array) -> Array:
    """What each particle's own log-weight adds to its credit, so that the score that it multiplies varies little.

    Credit k less what it would be, had particle k the mean log-weight of the others (zero, if there are none). That does not depend
    on its draw, and times its score has mean zero. Mnih & Rezende 2016, "Variational inference for Monte Carlo objectives".

    Args:
        credit: From log-weights `(K, *batch)` to as many, or to `(*batch,)` for one credit of all particles.
        log_w: Where; what is not finite has no part in means.

    Returns:
        `(K, *batch)`, without derivatives; zero where it would not be finite.
    """
    backend = backend_of(log_w)
    xp, log_w = backend.xp, backend.stop(log_w)
    own = _one_hot(log_w)
    without = xp.where(own > 0, mean_of_others(log_w)[:, None], log_w)

    def of(log_w: Array, row: Array) -> Array:
        found = credit(log_w)
        return xp.sum(xp.where(row > 0, found, 0.0), axis=0)

    signal = xp.sum(xp.where(own > 0, credit(log_w), 0.0), axis=1) - backend.vmap(of)(without, own)
    return backend.stop(xp.where(xp.isfinite(signal), signal, 0.0))


def mean_of_others(log_w: Array) -> Array:
    """The mean of the other particles' finite log-weights, `(K, *batch)`; zero if there are none."""
    xp = backend_of(log_w).xp
    fine = xp.isfinite(log_w)
    others = (1 - _one_hot(log_w)) * xp.astype(fine, log_w.dtype)
    known = xp.sum(others * xp.where(fine, log_w, 0.0), axis=1)
    return known / xp.clip(xp.sum(others, axis=1), 1.0, None)


def _one_hot(log_w: Array) -> Array:
    """Which of the particles is whose own, `(K, K, *batch)`."""
    backend, k = backend_of(log_w), log_w.shape[0]
    eye = backend.asarray(backend.xp.eye(k, dtype=log_w.dtype), log_w)
    return backend.xp.broadcast_to(backend.xp.reshape(eye, (k, k) + (1,) * (log_w.ndim - 1)), (k, *log_w.shape))


def is_scored(name: str, marked: str | None, distribution: str, *, moves: bool, point: bool) -> bool:
    """Whether a site of a guide gets its gradient from its score: one that draws without derivatives, or is marked for it.

    One that is summed out is such a site, all of whose values are looked at.

    Args:
        name: Of the site.
        marked: Its `infer["grad"]`.
        distribution: The name of its distribution.
        moves: Whether its draws have derivatives.
        point: Whether it is a `Delta`.

    Raises:
        ValueError: it is marked neither "score", "enum" nor "reparam".
        UnsupportedModelError: it cannot be what it is marked for.
    """
    if marked not in (None, "score", "enum", "reparam"):
        raise ValueError(f'site {name!r} has infer["grad"] {marked!r}, expected "score", "enum" or "reparam"')
    if marked == "reparam" and not moves:
        raise UnsupportedModelError(
            f"site {name!r} of the guide has the distribution {distribution}, which draws without derivatives, and is marked "
            '"reparam": mark it "score", or not at all'
        )
    if marked == "score" and point:
        raise UnsupportedModelError(
            f'site {name!r} of the guide is a Delta, which has no score: do not mark it "score"'
        )
    return marked in ("score", "enum") or not moves


def check_scores(names: list[str], unbiased: bool) -> None:
    """Checks that a program has gradients for scored sites.

    Raises:
        UnsupportedModelError: there are such sites, and its gradients are not those of its value.
    """
    if names and not unbiased:
        raise UnsupportedModelError(
            f"site {names[0]!r} of the guide gets its gradient from its score, which there is only for objectives whose gradients "
            "are those of their values, such as elbo, iwae or jensen_shannon"
        )
