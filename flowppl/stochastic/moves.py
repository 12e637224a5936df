"""Moves: steps of a Markov kernel as a layer of a path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowppl.backend import Array, backend_of, backend_of_rng
from flowppl.config import Configured
from flowppl.kernels import Info, Target, Walkers, hmc, langevin, mala, metropolis

_STEPS = {
    "metropolis": metropolis.step,
    "mala": mala.step,
    "hmc": hmc.step,
    "langevin": langevin.step,
    "underdamped": langevin.underdamped,
}
UNADJUSTED = ("langevin", "underdamped")  # never refused


@dataclass(frozen=True)
class Moves(Configured):
    """A stochastic layer: steps of a Markov kernel at one density of the bridge.

    Attributes:
        kernel: "metropolis", "mala", "hmc", "langevin" (overdamped) or "underdamped".
        repeats: How many steps.
        step_size: Where the trainable step size starts.
        leapfrog: Steps of the dynamics in one of "hmc" or "underdamped".

    Raises:
        ValueError: there is no such kernel, or a number is not positive.
    """

    kernel: str = "hmc"
    repeats: int = 1
    step_size: float = 0.2
    leapfrog: int = 8

    def __post_init__(self) -> None:
        if self.kernel not in _STEPS:
            raise ValueError(f"kernel must be one of {', '.join(_STEPS)}, got {self.kernel!r}")
        for name in ("repeats", "step_size", "leapfrog"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def init(self, rng: Any) -> dict[str, Any]:
        """The logarithm of the step size over where it starts."""
        return {"params": {"log_step": backend_of_rng(rng).xp.zeros(())}, "const": {}}

    def apply(self, rng: Any, params: Any, target: Target, walkers: Walkers) -> tuple[Walkers, Info]:
        """All steps; ratios and log-choices are added up, the acceptance is the mean.

        Args:
            rng: A jax key, or a `torch.Generator`.
            params: As `init` draws them.
            target: The density of the bridge.
            walkers: With scores, but for "metropolis".
        """
        backend = backend_of(walkers.x)
        xp = backend.xp
        step_size = self.step_size * xp.exp(params["log_step"])
        options = {"num_steps": self.leapfrog} if self.kernel in ("hmc", "underdamped") else {}

        def one(carry: tuple, _: Array) -> tuple[tuple, Array]:
            walkers, total, rng = carry
            key, rng = backend.split(rng, 2)
            walkers, info = _STEPS[self.kernel](key, target, walkers, step_size, **options)
            return (walkers, Info(*(a + b for a, b in zip(total, info, strict=True))), rng), _

        zero = xp.zeros_like(walkers.log_probs[:, 0])
        rows = backend.asarray(xp.zeros(self.repeats), walkers.x)
        (walkers, total, _), _ = backend.scan(one, (walkers, Info(zero, zero, zero), rng), rows)
        return walkers, total._replace(acceptance=total.acceptance / self.repeats)
