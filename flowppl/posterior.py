"""What a fit gives: draws with weights, what they say of the posterior, and how far they can be trusted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flowppl import weights
from flowppl.diagnostics import Verdict, diagnose, inference_data
from flowppl.diagnostics.compare import Evidence, evidence
from flowppl.diagnostics.pictures import picture
from flowppl.errors import FitWarning
from flowppl.fitting import Fit

Array = np.ndarray
Density = Callable[[Array], tuple[Array, Array]]


def coordinates(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of the elements of flat vectors that hold sites of these shapes."""
    return [
        site + (f"[{', '.join(map(str, index))}]" if index else "")
        for site, shape in shapes.items()
        for index in np.ndindex(*shape)
    ]


class WeightedPosterior:
    """Draws of a fitted flow with their importance weights, and the checks on them.

    Means and the like take the smoothed weights where these can be trusted (k-hat below its limit), and the plain draws elsewhere.

    Args:
        fit: The fit.
        samples: Its draws, constrained: `(num_samples, *shape)` by site, deterministic sites included.
        names: Names of the unconstrained coordinates.
        value_and_score: Log density of the posterior and its gradient, for the HMC check, in numpy.

    Attributes:
        samples: See above; draws as they are, one in ten further out along one coordinate so that weights stay bounded.
        unconstrained: The same in the flow's coordinates, `(num_samples, dim)`.
        log_weights: log p - log q of each draw, `(num_samples,)`, with q the mixture that they are from.
        weights: Smoothed weights that sum to one; all alike where weights cannot be trusted.
        history: What each chunk of steps of the training showed.
    """

    def __init__(self, fit: Fit, samples: dict[str, Array], names: Sequence[str], value_and_score: Density) -> None:
        self.unconstrained, self.log_weights = fit.draws
        self.samples, self.history = samples, fit.history
        self._names, self._value_and_score, self._others = list(names), value_and_score, fit.others
        self._usable = np.isfinite(self.unconstrained).all(1) & (self.log_weights < np.inf)
        self._evidence = evidence(np.where(self._usable, self.log_weights, -np.inf))
        self.start_draws = fit.start
        self._verdict: Verdict | None = None

    @property
    def start(self) -> Evidence | None:
        """What the draws of the start say."""
        return None if self.start_draws is None else evidence(self.start_draws[1])

    @property
    def weights(self) -> Array:
        """Smoothed weights that sum to one; all alike where weights cannot be trusted."""
        e = self._evidence
        return e.weight if e.reliable else self._usable / max(self._usable.sum(), 1)

    @property
    def elbo(self) -> tuple[float, float]:
        """The ELBO of the draws and its standard error.

        One draw in ten reaches further than the flow: mostly that costs less than 0.1, and in a funnel, whose neck such a draw may
        miss by far, as much as the error says.
        """
        return self._evidence.elbo, self._evidence.elbo_error

    @property
    def log_evidence(self) -> tuple[float, float]:
        """The log of the posterior's normalising constant, log p(data), and its standard error."""
        return self._evidence.log_evidence, self._evidence.log_evidence_error

    @property
    def khat(self) -> float:
        """The Pareto shape of the weights: below about 0.7 they can be trusted."""
        return self._evidence.khat

    @property
    def ess(self) -> float:
        """Effective number of draws after reweighting."""
        return self._evidence.ess

    def mean(self) -> dict[str, Array]:
        """Posterior means, `shape` by site."""
        counts = self.weights > 0  # others may have no value at all
        return {name: np.tensordot(self.weights[counts], x[counts], 1) for name, x in self.samples.items()}

    def sd(self) -> dict[str, Array]:
        """Posterior standard deviations, `shape` by site."""
        mean, counts = self.mean(), self.weights > 0
        return {
            name: np.sqrt(np.tensordot(self.weights[counts], (x[counts] - mean[name]) ** 2, 1))
            for name, x in self.samples.items()
        }

    def resample(self, num_samples: int | None = None, seed: int = 0) -> dict[str, Array]:
        """Draws of equal weight: `(num_samples, *shape)` by site, by systematic resampling, in random order.

        Args:
            num_samples: How many (None: as many as there are).
            seed: Of the choice.
        """
        at = self._resampled(num_samples, seed)
        return {name: x[at] for name, x in self.samples.items()}

    def _resampled(self, num_samples: int | None, seed: int) -> Array:
        rng = np.random.default_rng(seed)
        with np.errstate(divide="ignore"):
            at = weights.resample_systematic(rng, np.log(self.weights), n=num_samples)
        return rng.permutation(at)

    def to_arviz(self, *, num_samples: int = 4000, log_likelihood: bool = False) -> Any:
        """Resampled draws for ArviZ, in one chain.

        Args:
            num_samples: How many.
            log_likelihood: Whether to add the log likelihood of each observation, for comparisons by `arviz.loo`.

        Returns:
            `InferenceData` (ArviZ 0.x) or a `DataTree` (1.x) with the groups posterior, sample_stats (lp is log p, log_weight is
            log p / q, by which draws were resampled) and log_likelihood.

        Raises:
            MissingExtraError: ArviZ is not installed.
        """
        at = self._resampled(num_samples, 0)
        samples = {name: x[at] for name, x in self.samples.items()}
        groups = {
            "posterior": samples,
            "sample_stats": {
                "lp": self._value_and_score(self.unconstrained[at])[0],
                "log_weight": self.log_weights[at],
            },
            "log_likelihood": self._log_likelihood(samples) if log_likelihood else {},
        }
        return inference_data({group: {k: v[None] for k, v in arrays.items()} for group, arrays in groups.items()})

    def _log_likelihood(self, samples: dict[str, Array]) -> dict[str, Array]:
        """Log likelihood `(n, *shape)` of the observations by site, for draws `(n, *shape)` of the latents."""
        raise NotImplementedError

    def diagnose(self) -> Verdict:
        """Whether the draws can stand for the posterior, and what to do next; `print` it. Computed once.

        See `flowppl.diagnostics.diagnose`. Other runs of the fit, and modes that the search for a start found and the flow misses,
        count as restarts.
        """
        if self._verdict is None:
            self._verdict = diagnose(
                self.unconstrained,
                self.log_weights,
                self._names,
                constrained=self.samples,
                restarts=self._others,
                value_and_score=self._value_and_score,
            )
        return self._verdict

    def warn(self) -> None:
        """Warns whoever called the caller, if the verdict is that the draws are not to be trusted."""
        verdict = self.diagnose()
        if verdict.verdict == "not to be trusted":
            reason = f"the fit is {verdict.verdict}: {verdict.reasons[0]}; next: {verdict.advice}"
            warnings.warn(reason, FitWarning, stacklevel=3)

    def plot(self, sites: Sequence[str] | None = None) -> Any:
        """Histograms of up to sixteen scalars, raw and reweighted, and the course of the training.

        Args:
            sites: Which sites (None: all).

        Returns:
            A matplotlib figure.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        chosen = self.samples if sites is None else {name: self.samples[name] for name in sites}
        return picture(chosen, self.weights, self.history)

    def __repr__(self) -> str:
        e, z = self._evidence, self.log_evidence
        reliable = "" if e.reliable else ", not to be trusted"
        return (
            f"<{type(self).__name__} of {', '.join(self.samples)}: ELBO {e.elbo:.3f} ± {e.elbo_error:.3f}, "
            f"log evidence {z[0]:.3f} ± {z[1]:.3f}, k-hat {e.khat:.2f}{reliable}>"
        )
