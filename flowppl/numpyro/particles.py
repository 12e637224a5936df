"""Particles of a guide and a model: what they draw, their log densities, and the guide's with its parameters frozen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from numpyro.distributions import Delta
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.ops.provenance import eval_provenance
from numpyro.util import check_model_guide_match

from flowppl.errors import UnsupportedModelError
from flowppl.numpyro.distributions import flow_of, gradient_of_draws
from flowppl.numpyro.elements import Plates, Sites, common_plates
from flowppl.numpyro.marks import (
    Assigned,
    StillScored,
    Trace,
    innermost,
    is_scored_site,
    is_summed,
    latents,
    sampled,
    unmasked,
)
from flowppl.objectives.enumeration import (
    Assignments,
    Branches,
    branches,
    check_summed,
    depends_on_summed,
)
from flowppl.objectives.marginal import REVERSE
from flowppl.objectives.score import check_scores

Array = Any
CONTROL = "flowppl_control"  # the mutable site of guides that keep a coefficient
_OUTSIDE = ["sample", "prng_key", "control_flow"]  # what differs between particles; they share subsamples of plates


class Drawn(NamedTuple):
    """What a guide drew: values of its reparametrised sites, and log densities by site."""

    values: Sites
    log_q: Sites
    frozen: Sites  # with the parameters frozen, where that is asked for
    scores: Sites  # of scored sites, without the scale of plates
    summed: Sites  # of sites that are summed out, without the scale of plates
    reverse: Sites  # of reverse programs, where the draw might come from, as functions of their parameters alone
    others: Sites  # alike, where it comes from the reverse program


class Particles:
    """One run of a guide and a model, as functions that can be differentiated: `draw`, then `score`, then the others.

    Where the guide has sites that are summed out, a particle is as many branches, beside one another, as there are assignments of
    values to them; what is drawn for other sites comes from the same keys.

    Args:
        rng_key: A key.
        model: The model.
        guide: The guide.
        args: Their arguments.
        kwargs: Their keyword arguments.
        num_particles: K.
    """

    def __init__(
        self, rng_key: Array, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any], num_particles: int
    ) -> None:
        plate_key, guide_key, model_key = jax.random.split(rng_key, 3)
        self._model, self._guide = (seed(f, plate_key, hide_types=_OUTSIDE) for f in (model, guide))
        self._keys = [jax.random.split(key, num_particles) for key in (guide_key, model_key)]
        self._pick_key = jax.random.fold_in(rng_key, 3)  # what a split in three does not have
        self._args, self._kwargs, self._assignments = args, kwargs, Assignments()
        # What is no array in traces is the same for all particles, and outlives the functions that made it.
        self._drawn: Trace = {}
        self._scored: Trace = {}

    def draw(self, params: dict[str, Any], with_path: bool) -> tuple[Drawn, Sites]:
        """Runs the guide.

        Args:
            params: Values of param sites.
            with_path: Whether to score the draws once more with the parameters frozen.

        Returns:
            What can be differentiated, and what scored sites, those that are summed out, and plates drew.

        Raises:
            ValueError: a site is marked for what there is not.
            UnsupportedModelError: a site cannot score a value, cannot be what it is marked for, or is mutable.
        """

        def one(key: Array, number: Any) -> tuple[Drawn, Sites]:
            guide, met = seed(self._guide, key), Assigned(self._assignments, number)
            with gradient_of_draws("path" if with_path else "reparam"), StillScored(), met:
                drawn = self._drawn = self._trace(guide, params)
            met.check(drawn)
            for name, site in drawn.items():
                if site["type"] == "mutable" and name != CONTROL:
                    raise UnsupportedModelError(
                        f"site {name!r} of the guide is mutable, and particles cannot share its state"
                    )
            moving, still = ({n: s for n, s in latents(drawn).items() if is_scored_site(s) == x} for x in (False, True))
            frozen = {}
            if with_path:
                again = self._trace(replay(guide, drawn), lax.stop_gradient(params))
                frozen = {name: _frozen_log_prob(site, drawn[name]) for name, site in sampled(again).items()}
            log_probs = {name: _log_prob(site) for name, site in sampled(drawn).items()}
            scores = {n: _log_prob({**site, "scale": None}) for n, site in still.items() if not is_summed(site)}
            summed = {n: unmasked(site["fn"]).log_prob(site["value"]) for n, site in still.items() if n not in scores}
            plates = {name: site for name, site in drawn.items() if site["type"] == "plate"}
            values, fixed = ({name: site["value"] for name, site in of.items()} for of in (moving, {**plates, **still}))
            reverse, others = {}, {}
            if with_path and any(REVERSE in site["infer"] for site in sampled(drawn).values()):
                still = {
                    name: {**site, "value": lax.stop_gradient(site["value"])} for name, site in latents(drawn).items()
                }
                for name, site in sampled(self._trace(replay(guide, {**drawn, **still}), params)).items():
                    if REVERSE in site["infer"]:
                        of = site["infer"][REVERSE]
                        reverse[name], others[name] = _scaled(site, of.reverse), _scaled(site, of.others)
            return Drawn(values, log_probs, frozen, scores, summed, reverse, others), fixed

        found = jax.vmap(partial(one, number=0))(self._keys[0])
        num = len(self._assignments)
        if num > 1:
            every = jax.vmap(lambda key: jax.vmap(partial(one, key))(jnp.arange(num)))(self._keys[0])
            found = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), every)
            self._keys[1] = self._keys[1][jnp.arange(self._keys[1].shape[0] * num) // num]
        return found

    def score(self, params: dict[str, Any], values: Sites, fixed: Sites) -> Sites:
        """Log densities of the model's sites at what the guide drew.

        Raises:
            UnsupportedModelError: a site is left for enumeration.
        """

        def one(key: Array, values: Sites, fixed: Sites) -> Sites:
            known = {name: {**self._drawn[name], "value": value} for name, value in {**values, **fixed}.items()}
            self._scored = self._trace(replay(seed(self._model, key), known), params)
            return {name: _log_prob(site) for name, site in sampled(self._scored).items()}

        found = jax.vmap(one)(self._keys[1], values, fixed)
        check_model_guide_match(self._scored, self._drawn)
        for name, site in latents(self._scored).items():
            if name not in self._drawn and site["infer"].get("enumerate"):
                raise UnsupportedModelError(
                    f"site {name!r} of the model is marked for enumeration: use TraceEnum_ELBO, or draw it in the guide"
                )
        return found

    def plates(self, linear: bool) -> Plates:
        """The plates whose elements have log-weights of their own, and how to add up log densities.

        Args:
            linear: Whether it does not matter which log-weights are added up.

        Raises:
            UnsupportedModelError: another plate subsamples, and that matters, or sites are summed out in different plates.
        """
        # a score has the less noise the fewer log-weights it answers for
        self._plates = common_plates(self._scored, self._drawn, linear, self.scored_sites())
        return self._plates

    def scored_sites(self) -> list[str]:
        """The guide's sites that get their gradients from their scores."""
        return [name for name, site in latents(self._drawn).items() if is_scored_site(site)]

    def branches(self, log_r: Array, unbiased: bool, linear: bool) -> Branches | None:
        """The branches of particles, from the total log density of sites that are summed out; None if there are no such sites.

        Args:
            log_r: Of the branches, `(K * M, *batch)`.
            unbiased: Whether the program's gradients are those of its value.
            linear: Whether the program is linear.

        Raises:
            UnsupportedModelError: there are scored sites or such sites for which the program has no gradient, or that cannot be
                summed out.
        """
        for name in self._assignments:
            check_summed(name, self._drawn[name]["fn"].batch_shape, self._plates.dims, unbiased, linear)
        check_scores(self.scored_sites(), unbiased)
        if not any(True for _ in self._assignments):
            return None
        return branches(self._pick_key, log_r, self._keys[0].shape[0])

    def beside(self, name: str, value: Array, weight: Array) -> Array:
        """Weights `(K, *batch)` in the axes that the values of a site, `(K, *batch, *event)`, have for them."""
        event_dim = self._drawn[name]["fn"].event_dim
        axes = range(event_dim - value.ndim + 1, 0)
        batch = [value.shape[axis - event_dim] if axis in self._plates.dims else 1 for axis in axes]
        return weight.reshape(len(weight), *batch, *(1,) * event_dim)

    def check_outside(self, params: list[Array], put_back: Callable) -> None:
        """Checks that no site outside of local plates depends on what is summed out inside, by the provenance of its numbers.

        Raises:
            UnsupportedModelError: one does.
        """
        if not self._plates.local:
            return
        names = [name for name, site in latents(self._drawn).items() if is_summed(site)]
        summed = {n: jnp.zeros(jnp.shape(self._drawn[n]["value"]), self._drawn[n]["value"].dtype) for n in names}

        def numbers(params: list[Array], summed: Sites) -> dict[str, Sites]:
            still = {name: {**self._drawn[name], "value": value} for name, value in summed.items()}
            guide, model = (seed(fn, jax.random.key(0)) for fn in (self._guide, self._model))
            drawn = self._trace(replay(guide, still), put_back(params))
            found = {"guide": drawn, "model": self._trace(replay(model, drawn), put_back(params))}
            return {
                front: {name: _numbers(site) for name, site in sampled(trace).items() if name in self._plates.outside}
                for front, trace in found.items()
            }

        for front, of in eval_provenance(numbers, params=params, summed=summed).items():
            for name, found in of.items():
                if "summed" in found:
                    raise depends_on_summed(name, front)

    def check_densities(self, params: list[Array], put_back: Callable, linear: bool) -> None:
        """Checks that parameters move the guide's draws through densities alone, which count once.

        Raises:
            UnsupportedModelError: a `Delta` moves with parameters, or a site has a scale that is not that of plates.
        """
        sites = latents(self._drawn)
        deltas = [name for name, site in sites.items() if isinstance(innermost(site["fn"]), Delta)]
        if deltas:
            known = {n: jnp.zeros(jnp.shape(s["value"]), s["value"].dtype) for n, s in sites.items()}

            def points(params: list[Array], known: Sites) -> dict[str, Array]:
                still = {name: {**sites[name], "value": value} for name, value in known.items()}
                again = self._trace(replay(seed(self._guide, jax.random.key(0)), still), put_back(params))
                fns = {name: innermost(again[name]["fn"]) for name in deltas}
                return {name: fn.log_density if linear else fn.v for name, fn in fns.items()}

            for name, found in eval_provenance(points, params=params, known=known).items():
                if "params" in found:
                    raise UnsupportedModelError(
                        f"site {name!r} of the guide is a Delta that the guide's parameters move, for which there is no path "
                        'gradient of this objective: use gradient="reparam"'
                    )
        if not linear:
            scale = common_plates(self._scored, self._drawn, linear).scale
            for name, site in sites.items():
                own = 1.0 if site["scale"] is None else site["scale"]
                if not isinstance(own, float | int) or abs(own / scale - 1) > 1e-6:
                    raise UnsupportedModelError(
                        f"site {name!r} of the guide has its log density scaled, for which there is no path gradient of this "
                        'objective: use gradient="reparam", or the objective "elbo"'
                    )

    def _trace(self, fn: Callable, params: dict[str, Any]) -> Trace:
        return trace(substitute(fn, data=params)).get_trace(*self._args, **self._kwargs)


def _log_prob(site: dict[str, Any]) -> Array:
    log_prob = site["fn"].log_prob(site["value"], *([site["intermediates"]] if site["intermediates"] else []))
    return _scaled(site, log_prob)


def _scaled(site: dict[str, Any], log_prob: Array) -> Array:
    return log_prob if site["scale"] is None else site["scale"] * log_prob


def _numbers(site: dict[str, Any]) -> Array:
    """A number that everything about a site goes into."""
    of = [site["value"], site["scale"], site["fn"]]
    with contextlib.suppress(NotImplementedError):  # no inverse
        of.append(_log_prob(site))
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(of)]
    return sum((jnp.sum(a) for a in leaves if not jnp.issubdtype(a.dtype, jax.dtypes.extended)), jnp.zeros(()))


def _frozen_log_prob(site: dict[str, Any], drawn: dict[str, Any]) -> Array:
    """The log density of a draw as a function of the draw, from a site whose parameters are frozen."""
    scores = drawn["intermediates"] if flow_of(site["fn"]) is not None else None
    try:
        with gradient_of_draws("path"):
            return _log_prob({**site, "intermediates": scores})
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"site {site['name']!r} of the guide has the distribution {type(site['fn']).__name__}, which cannot score a value "
            '(it has no inverse), as path gradients need: use gradient="reparam", or a flow of flowppl'
        ) from error
