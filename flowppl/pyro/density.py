"""From a Pyro model to a log density of flat unconstrained vectors."""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from opt_einsum import shared_intermediates
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from flowppl.backend import backend_of
from flowppl.errors import DimensionError, UnsupportedModelError
from flowppl.plates import in_plates, needs_all, refuse_local, rows_at_a_time
from flowppl.pyro.plates import apart, chosen
from flowppl.pyro.sites import (
    Layout,
    Unconstrain,
    hide_enumerated,
    is_enumerated,
    is_latent,
    start_from,
    subsampled,
    unconstrained,
)

_BATCH = "_flowppl_batch"
Terms = tuple[Tensor, Tensor, dict[str, Tensor]]  # log prior, log likelihood, values


class LogDensity:
    """The unnormalised log density of a model's latents, in unconstrained space, flat and batched.

    Coordinates are the sites in the order of their names. A support may depend on other latents, and discrete latents
    marked by `config_enumerate` are summed out. NaN becomes -inf, so that a sampler rejects it. A batch goes through
    `torch.func.vmap`, or an outermost plate, or, with a warning, row by row: the first that agrees with the plain call
    on two rows. Where a plate subsamples, the density is that of all of the data, a few points at a time; `minibatch`
    estimates it.

    Args:
        model: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        rng: A `torch.Generator` for the start (None: torch's global one).
        init_loc_fn: How each site starts.

    Attributes:
        dim: Length of the vectors.
        init: A start `(dim,)`.
        names: The latent sites.
        shapes: Their unconstrained shapes.
        plates: Those that subsample: their full size, and how much of it the model asks for, by name.

    Raises:
        UnsupportedModelError: a latent is discrete and not enumerated, or has no bijection from real vectors; or a plate
            subsamples, and has latents in it, is told its elements, or fails without subsampling, or a latent is enumerated.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from flowppl.pyro import LogDensity
        >>> def model():
        ...     pyro.sample("scale", dist.HalfNormal(1.0))
        >>> density = LogDensity(model)
        >>> density.log_prob(torch.zeros(5, 1)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: Callable,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        *,
        rng: torch.Generator | None = None,
        init_loc_fn: Callable = init_to_median,
    ) -> None:
        self._model, self._args, self._kwargs = model, tuple(args), dict(kwargs or {})
        with seeded(rng), torch.no_grad(), poutine.block(), chosen() as plates:
            start = InitMessenger(start_from(init_loc_fn))
            with start, poutine.block(hide_fn=hide_enumerated):
                nodes = poutine.trace(model).get_trace(*self._args, **self._kwargs).nodes
        self._sites = {name: site for name, site in nodes.items() if site["type"] == "sample"}
        latents = {name: s for name, s in self._sites.items() if is_latent(s) and not is_enumerated(s)}
        if not latents:
            raise UnsupportedModelError("the model has no continuous latent sites: there is nothing to infer")
        self.plates = dict(plates)
        refuse_local({name: site for name, site in self._sites.items() if is_latent(site)}, self.plates)
        for where in filter(None, map(subsampled, self._sites.values())):
            raise UnsupportedModelError(
                f"{where} that it is told: a density needs all of the data, so run the model without subsampling, or let the "
                "plate choose"
            )
        self._rows = rows_at_a_time(self._sites.values(), self.plates)
        self._enumerates = any(map(is_enumerated, self._sites.values()))
        self._plates = max(
            (-f.dim for s in self._sites.values() for f in s["cond_indep_stack"] if f.vectorized), default=0
        )
        self._layout = Layout(unconstrained(latents))
        self.names, self.dim, self.init = self._layout.names, self._layout.dim, self._layout.start
        self.shapes = self._layout.shapes
        try:
            with chosen():
                self._terms = self._first_that_agrees()
        except (RuntimeError, ValueError) as error:
            if self.plates:
                raise needs_all(error, self.plates) from error
            raise

    def given(self, *args: Any, **kwargs: Any) -> LogDensity:
        """The log density of the same latents given other arguments of the model."""
        new = copy.copy(self)
        new._args, new._kwargs, new._terms = args, kwargs, getattr(new, self._terms.__name__)
        return new

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density at u `(batch, dim)`, with the log-Jacobian of the constraints, `(batch,)`."""
        return _finite(self._raw(u))

    def minibatch(self, rng: torch.Generator | None, u: Tensor) -> Tensor:
        """Log density at u `(batch, dim)` as one minibatch estimates it, the same for all points and without bias, `(batch,)`.

        Where no plate subsamples, it is `log_prob`.

        Args:
            rng: A `torch.Generator` (None: torch's global one), from which elements of the model's plates are drawn.
            u: The points.
        """
        if not self.plates:
            return self.log_prob(u)
        device = None if rng is None else rng.device
        drawn = {name: torch.randperm(n, generator=rng, device=device)[:k] for name, (n, k) in self.plates.items()}
        with chosen({name: at.to(u.device) for name, at in drawn.items()}):
            return _finite(self._sum(u))

    def num_nan(self, u: Tensor) -> Tensor:
        """How many of the points u `(batch, dim)` have a NaN density."""
        with torch.no_grad():
            return torch.isnan(self._raw(u)).sum()

    def value_and_score(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log density `(batch,)` and its gradient `(batch, dim)`."""
        return self._in_parts(partial(backend_of(u).value_and_score, self.log_prob), u)

    def split(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log prior (with the log-Jacobian) and log likelihood, each `(batch,)`; they add up to `log_prob`."""
        log_prior, log_likelihood = self._in_parts(lambda u: self._terms(self._checked(u))[:2], u)
        return _finite(log_prior), _finite(log_likelihood)

    def unpack(self, u: Tensor) -> dict[str, Tensor]:
        """Unconstrained values by site, from u `(*batch, dim)`."""
        return self._layout.unpack(u)

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Values by site, from u `(*batch, dim)`, with deterministic sites but for those in plates that subsample."""
        any_of_them = {name: torch.arange(k, device=u.device) for name, (_, k) in self.plates.items()}
        with chosen(any_of_them):
            values = self._terms(self._checked(u.reshape(-1, u.shape[-1])))[2]
        return {name: x.reshape(u.shape[:-1] + x.shape[1:]) for name, x in values.items()}

    def _raw(self, u: Tensor) -> Tensor:
        return self._in_parts(lambda u: (self._sum(u),), u)[0]

    def _in_parts(self, function: Callable[[Tensor], tuple[Tensor, ...]], u: Tensor) -> tuple[Tensor, ...]:
        """A function of points: of all at once, or of a few where each needs all of the data of plates that subsample."""
        if not self.plates:
            return function(u)
        with chosen():
            parts = [function(part) for part in u.split(self._rows)]
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def _sum(self, u: Tensor) -> Tensor:
        try:
            log_prior, log_likelihood, _ = self._terms(self._checked(u))
        except torch.linalg.LinAlgError:  # a matrix of one point that has no Cholesky factor spoils the whole batch
            if len(u) == 1:
                return torch.nan * u.sum(-1)
            return torch.cat([self._sum(half) for half in u.chunk(2)])
        return log_prior + log_likelihood

    def _checked(self, u: Tensor) -> Tensor:
        if u.ndim != 2 or u.shape[-1] != self.dim:
            raise DimensionError(f"u: expected shape (batch, {self.dim}), got {tuple(u.shape)}")
        return u

    # Three ways to evaluate a batch

    def _by_vmap(self, u: Tensor) -> Terms:
        return torch.func.vmap(self._row)(u)

    def _by_plate(self, u: Tensor) -> Terms:
        n = len(u)
        if n == 1:  # Pyro's sums over enumerated values lose plates of one
            return self._by_row(u)

        def total(x: Tensor) -> Tensor:
            return x.expand(torch.broadcast_shapes(x.shape, (n, *(1,) * self._plates))).reshape(n, -1).sum(-1)

        def behind_plates(name: str, x: Tensor) -> Tensor:
            site = self._sites[name]
            return x.reshape((n, *(1,) * (self._plates + site["fn"].event_dim - site["value"].dim()), *x.shape[1:]))

        free = {name: behind_plates(name, x) for name, x in self.unpack(u).items()}
        with poutine.block():  # a plate is a site, and this may be inside of a guide
            plate = pyro.plate(_BATCH, n, dim=-self._plates - 1)
        log_prior, log_likelihood, values = self._run(plate(self._model), free, total)
        return log_prior, log_likelihood, {k: x.reshape((n, *self._sites[k]["value"].shape)) for k, x in values.items()}

    def _by_row(self, u: Tensor) -> Terms:
        priors, likelihoods, values = zip(*map(self._row, u), strict=True)
        return (
            torch.stack(priors),
            torch.stack(likelihoods),
            {k: torch.stack([v[k] for v in values]) for k in values[0]},
        )

    def _row(self, u: Tensor) -> Terms:
        return self._run(self._model, self.unpack(u), torch.sum)

    def _run(self, model: Callable, free: dict[str, Tensor], total: Callable[[Tensor], Tensor]) -> Terms:
        # Validation off: its checks branch on values, which vmap cannot, and raise where the density should be -inf.
        with pyro.validation_enabled(False), apart(), poutine.block(), Unconstrain(free) as latents:
            model = poutine.enum(model, first_available_dim=-2 - self._plates) if self._enumerates else model
            trace = poutine.trace(model).get_trace(*self._args, **self._kwargs)
            trace.compute_log_prob()
            sites = {name: site for name, site in trace.nodes.items() if "log_prob" in site}
            prior = {name: site for name, site in sites.items() if is_latent(site)}
            if self._enumerates:
                log_prior = self._sum_out(prior)
                log_likelihood = self._sum_out(sites) - log_prior
            else:
                zero = total(self.init.new_zeros(()))
                log_prior = sum((total(site["log_prob"]) for site in prior.values()), start=zero)
                log_likelihood = sum(
                    (total(s["log_prob"]) for name, s in sites.items() if name not in prior), start=zero
                )
        log_prior = sum(map(total, latents.log_dets), start=log_prior)
        # A deterministic site may have a value for each enumerated one.
        known = {} if self._enumerates else {k: s for k, s in sites.items() if s["infer"].get("_deterministic")}
        shown = {k: s["value"] for k, s in known.items() if not in_plates(s, self.plates)}
        return log_prior, log_likelihood, {**latents.values, **shown}

    def _sum_out(self, sites: dict[str, Any]) -> Tensor:
        """The log of the product of the sites' densities, summed over enumerated values, for each row of a batch."""
        trace = Trace()
        trace.nodes.update(sites)
        trace.pack_tensors()
        symbols = trace.plate_to_symbol
        factors: OrderedDict = OrderedDict()
        for site in sites.values():
            plates = frozenset(symbols[f.name] for f in site["cond_indep_stack"] if f.vectorized)
            factors.setdefault(plates, []).append(site["packed"]["log_prob"])
        rows = frozenset({symbols[_BATCH]} if _BATCH in symbols else ())
        with shared_intermediates() as cache:
            return contract_to_tensor(factors, set(trace.symbol_to_dim) - set(symbols.values()), rows, cache=cache)

    def _first_that_agrees(self) -> Callable[[Tensor], Terms]:
        noise = torch.randn(2, self.dim, generator=torch.Generator().manual_seed(0), device="cpu")
        rows = self.init + 0.1 * noise.to(self.init)
        with torch.no_grad():
            expected = self._by_row(rows)
            for batched in (self._by_vmap, self._by_plate):
                try:
                    if _agree(batched(rows), expected):
                        return batched
                except Exception:  # anything may happen in a model that was not written for batches
                    continue
        warnings.warn(
            "the model cannot be evaluated on a batch, neither under torch.func.vmap nor in an outermost plate, and "
            "runs once for each row, which is slow: avoid .item(), branches on values, and axes counted from the left",
            stacklevel=3,
        )
        return self._by_row


@contextmanager
def seeded(rng: torch.Generator | None) -> Iterator[None]:
    """Makes torch's global generator draw from `rng`: Pyro's initialisations take no generator."""
    if rng is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng, device=rng.device)))
        yield


def _finite(log_prob: Tensor) -> Tensor:
    return torch.where(torch.isnan(log_prob), -math.inf, log_prob)


def _agree(a: Terms, b: Terms) -> bool:
    flat_a, flat_b = ([*terms[:2], *(terms[2][name] for name in sorted(terms[2]))] for terms in (a, b))
    return all(map(_close, flat_a, flat_b))


def _close(a: Tensor, b: Tensor) -> bool:
    if not b.is_floating_point():
        return torch.equal(a, b)
    tolerance = torch.finfo(b.dtype).eps ** 0.5
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
