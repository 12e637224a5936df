"""Objective: a loss for SVI that maximises any function of log-weights, with gradients of little variance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.elbo import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from pyro.util import check_if_enumerated, check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor

from flowppl.objectives.control import REFRESH, Control, no_control
from flowppl.objectives.enumeration import Branches, branches, check_summed, cotangents_of_branches, mean_of_branches
from flowppl.objectives.programs import Cotangents, Program, Value, cotangents, requested
from flowppl.objectives.score import check_scores
from flowppl.pyro import particles
from flowppl.pyro.elements import Plates, check_outside, common_plates
from flowppl.pyro.marks import is_summed, sample_sites, scored_sites, unmasked


class _Particles(NamedTuple):
    """One run of guide and model: log densities `(K, *batch)`, scaled as Pyro scales them; where sites are summed out, `K * M`."""

    log_p: Tensor
    log_q: Tensor
    frozen: Tensor | None  # log q as a function of the latents alone, where it is needed
    scores: Tensor | None  # log q of scored sites, without the scale of plates, where there are any
    log_r: Tensor | None  # log q of sites that are summed out, alike
    reverse: Tensor | None  # log r of reverse programs, where there are any and that is needed
    others: Tensor | None  # alike
    plates: Plates
    ratio: list[Tensor]  # what the gradient of log p in the latents is multiplied by
    branches: Branches | None  # of particles, where sites are summed out

    def log_w(self) -> Tensor:
        """Log-weights, without derivatives."""
        return (self.log_p - self.log_q).detach() / self.plates.scale

    def pull(self, weights: Cotangents, *, plain: bool) -> Tensor:
        """A scalar of no meaning, whose gradient is that of the objective; `ratio` is set for it."""
        if self.frozen is None:
            total = (weights.model * (self.log_p - self.log_q)).sum()
        else:
            if not self.plates.local:  # linear programs, which alone have them, weigh model and latents alike
                self.ratio[:] = [weights.latents / weights.model]
            total = (weights.model * self.log_p).sum() + (weights.frozen * self.frozen).sum()
            total = total + (weights.plain * self.log_q).sum() if plain else total
        scale = self.plates.scale
        for of, weight, log_prob in (
            (scale, weights.score, self.scores),
            (scale, weights.summed, self.log_r),
            (1.0, weights.reverse, self.reverse),
            (1.0, weights.others, self.others),
        ):
            total = total if log_prob is None else total + of * (weight * log_prob).sum()
        return total


class Objective(ELBO):
    """A loss for `SVI`: minus any objective that is a function of the log-weights log p - log q of K particles.

    With path gradients the guide's parameters get, of whatever objective, the doubly reparametrised gradient, see
    `flowppl.objectives.programs.Program`: unbiased, and without variance where the guide is the posterior. The model's parameters
    get the plain one. This holds for guides of any distributions that have derivatives of their draws and can score values, Pyro's
    own autoguides included; flows of flowppl need no inverse. A guide's `gradient` does not matter. Sites that draw without
    derivatives, such as discrete ones, or that are marked `infer={"grad": "score"}`, get their gradients from their scores, with
    leave-one-out baselines; several particles have the less noise. Sites of few values that are marked `infer={"grad": "enum"}` are
    summed out, in plates around all sites or, for the ELBO, in any: see `flowppl.objectives.enumeration`.

    Particles are always vectorised. Log-weights are kept apart for the elements of plates that enclose every sample site of model
    and guide, and summed over others. A guide runs twice in a step, so that beside its sample sites nothing in it may be random.
    Use one `Objective` for one guide: "auto" learns.

    Args:
        program: A name in `flowppl.objectives.programs.PROGRAMS`, a `Program`, or a function from log-weights `(K, *batch)` to
            `(*batch,)`, which is maximised.
        num_particles: K.
        gradient: "path"; "reparam" for the plain gradient; or "auto" for the mixture of least variance, whose coefficient is
            learnt, since path gradients vary more far from the posterior.
        biased: Whether a `Program` may have gradients that are not those of its value.
        max_plate_nesting: See Pyro; found by a run of model and guide if it is infinite.

    Raises:
        ValueError: there is no such program or gradient, the program is biased, or it has no plain gradient; at a step: a site is
            marked neither "score", "enum" nor "reparam".
        UnsupportedModelError: at a step: a site of the guide draws without derivatives and the gradients of the program are not
            those of its value, cannot be what it is marked for or be summed out, is moved by parameters without a density, is
            scaled, or cannot score values; or a plate subsamples that does not enclose all sites, and the program is not linear.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from flowppl.pyro import AutoFlow, Objective
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 0.5), obs=torch.tensor(1.0))
        >>> guide = AutoFlow(model, flow="affine")
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Objective("iwae", 8))
        >>> losses = [svi.step() for _ in range(5)]
        >>> smooth = Objective(lambda log_w: log_w.sigmoid().mean(0), 8, gradient="auto")
        >>> loss = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), smooth).step()
    """

    def __init__(
        self,
        program: str | Program | Value = "elbo",
        num_particles: int = 16,
        *,
        gradient: str = "path",
        biased: bool = False,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        super().__init__(num_particles, max_plate_nesting + (num_particles == 1), vectorize_particles=True)
        self.program, self.gradient = requested(program, gradient, biased), gradient
        self._control: Control | None = None
        self._steps = 0
        self._known: tuple[Any, list[Tensor]] = (None, [])  # a guide, and its parameters of which Pyro does not know
        # A model and a guide in which nothing outside of a plate depends on what is summed out inside.
        self._apart: tuple[Any, Any] = (None, None)

    @property
    def coefficient(self) -> float:
        """How much of the plain gradient is in the mixture: 0 for path gradients, 1 for plain ones."""
        return float(self._coefficient()) + 0.0  # never -0.0

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss, without derivatives."""
        with torch.no_grad():
            return _item(self.differentiable_loss(model, guide, *args, **kwargs))

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """An estimate of the loss, attached to all parameters; the derivatives mean something once, and not their own."""
        run = self._get_trace(model, guide, args, kwargs)
        if not torch.is_grad_enabled():
            return -self._value(run)
        value, weights = self._look(run, self._coefficient())
        surrogate = run.pull(weights, plain=self.gradient == "auto")
        return -(surrogate + (value - surrogate).detach())

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss, and its gradient, added to the `grad` of all parameters."""
        if self.gradient == "auto" and self._steps % REFRESH == 0:
            loss = self._refresh(self._get_trace(model, guide, args, kwargs))
        else:
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
            if loss.requires_grad:
                loss.backward(retain_graph=self.retain_graph)
        self._steps += 1
        return _item(loss)

    def _refresh(self, run: _Particles) -> Tensor:
        """A step that looks at both estimators: the gradient by the coefficient so far, and a new one for the steps to come."""
        (value, path), (_, plain) = (self._look(run, c) for c in (0.0, 1.0))
        leaves = particles.leaves_of(run.log_p, run.log_q)
        if not leaves:
            return -value
        at_path, at_plain = (
            torch.autograd.grad(-run.pull(w, plain=True), leaves, retain_graph=True, materialize_grads=True)
            for w in (path, plain)
        )
        score = [b - a for a, b in zip(at_path, at_plain, strict=True)]
        control = no_control(run.log_q) if self._control is None else self._control
        for leaf, g, s in zip(leaves, at_path, score, strict=True):
            step = g + control.coefficient.to(s.dtype) * s
            leaf.grad = step if leaf.grad is None else leaf.grad + step
        self._control = Control(*(a.detach() for a in control.updated(at_path, score)))
        return -value

    def _coefficient(self) -> Any:
        if self.gradient == "auto":
            return 0.0 if self._control is None else self._control.coefficient
        return float(self.gradient == "reparam")

    def _value(self, run: _Particles) -> Tensor:
        if run.branches is None:
            return self.program.value(run.log_w()).sum() * run.plates.scale
        return mean_of_branches(self.program, run.log_w(), run.branches).sum() * run.plates.scale

    def _look(self, run: _Particles, coefficient: Any) -> tuple[Tensor, Cotangents]:
        """The objective, summed over plates, and the weights of its gradient."""
        if run.branches is None:
            asked = {"scored": run.scores is not None, "reverse": run.reverse is not None}
            weights = cotangents(self.program, run.log_w(), coefficient, **asked)
        else:
            weights = cotangents_of_branches(self.program, run.log_w(), run.branches, coefficient)
        return weights.value.sum() * run.plates.scale, weights

    def _guess_max_plate_nesting(self, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        super()._guess_max_plate_nesting(model, guide, args, kwargs)
        self.max_plate_nesting += self.num_particles == 1  # a plate of one particle is a plate here

    def _vectorized_num_particles(self, fn: Callable, branches: int = 1) -> Callable:
        return pyro.plate("num_particles_vectorized", self.num_particles * branches, dim=-self.max_plate_nesting)(fn)

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> _Particles:
        """Runs the guide, the guide with its parameters frozen where that is needed, and the model."""
        if self.max_plate_nesting == float("inf"):
            self._guess_max_plate_nesting(model, guide, args, kwargs)
        path = self.gradient != "reparam" and torch.is_grad_enabled()
        run_guide, ratio = self._vectorized_num_particles(guide), [torch.ones(())]
        runs = particles.draw(run_guide, args, kwargs, scores=path)
        drawn, nesting = runs[0], self.max_plate_nesting

        def through(site: Any, _: Tensor) -> Tensor:
            event_dim = site["fn"].event_dim
            value = particles.beside([run.nodes[site["name"]]["value"] for run in runs], -nesting - event_dim)
            return particles.Reweighted.apply(value, ratio, event_dim) if path and value.requires_grad else value

        run_model = poutine.replay(self._vectorized_num_particles(model, len(runs)), particles.replayed(drawn, through))
        model_trace = poutine.trace(run_model).get_trace(*args, **kwargs)
        for trace in (model_trace, *runs):
            trace.compute_log_prob(lambda _, site: not site_is_subsample(site))
        if is_validation_enabled():
            check_model_guide_match(model_trace, drawn, nesting - (len(runs) > 1))  # branches are beside particles
            check_if_enumerated(drawn)
            for trace in (model_trace, *runs):
                for site in sample_sites(trace).values():
                    check_site_shape(site, nesting)
        scored, linear = scored_sites(drawn), self.program.linear
        summed = [name for name in scored if is_summed(scored[name])]
        # A score has the less noise the fewer log-weights it answers for.
        plates = common_plates(model_trace, drawn, -nesting, linear, scored)
        for name in summed:
            check_summed(name, scored.pop(name)["fn"].batch_shape[1:], plates.dims, self.program.unbiased, linear)
        if plates.local and self._apart != (model, guide):
            check_outside(self._vectorized_num_particles(model), run_guide, args, kwargs, summed, plates.outside)
            self._apart = model, guide
        check_scores([*scored], self.program.unbiased)

        def total(log_probs: Callable[[Trace], dict[str, Tensor]], of: Callable = plates.total) -> Tensor:
            return particles.beside([of(log_probs(run)) for run in runs], 0)

        def log_probs(trace: Trace) -> dict[str, Tensor]:
            return {name: site["log_prob"] for name, site in sample_sites(trace).items()}

        frozen = scores = log_r = reverse = others = None
        if path:
            if self._known[0] is not guide:
                scale = None if linear else plates.scale
                particles.check_densities(run_guide, args, kwargs, drawn, scale)
                self._known = guide, particles.unregistered(drawn)
            leaves = particles.registered(drawn) + self._known[1]
            frozen = total(lambda run: particles.frozen_log_q(run_guide, args, kwargs, run, leaves))
            if particles.has_reverse(drawn):
                each = [particles.log_reverse(run_guide, args, kwargs, run) for run in runs]
                reverse, others = (particles.beside([plates.total(x[i]) for x in each], 0) for i in (0, 1))
        if scored:
            scores = total(lambda run: {k: particles.unscaled(run.nodes[k]) for k in scored}, plates.whole)
        if summed:
            log_r = total(lambda run: {name: unmasked(run.nodes[name]) for name in summed})
        of = branches(None, log_r, self.num_particles) if summed else None
        log_p, log_q = plates.total(log_probs(model_trace)), total(log_probs)
        return _Particles(log_p, log_q, frozen, scores, log_r, reverse, others, plates, ratio, of)


def PathELBO(num_particles: int = 1, *, max_plate_nesting: float = float("inf")) -> Objective:
    """The ELBO with path gradients for any guide: `Objective("elbo", num_particles)`, named like Pyro's `Trace_ELBO`."""
    return Objective("elbo", num_particles, gradient="path", max_plate_nesting=max_plate_nesting)


def _item(loss: Tensor) -> float:
    value = loss.item()
    warn_if_nan(value, "loss")
    return value
