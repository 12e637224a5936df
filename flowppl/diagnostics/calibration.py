"""Simulation-based calibration: are true values anywhere among draws of their posteriors, equally often?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import chisquare

Array = np.ndarray


class Calibration(NamedTuple):
    """Ranks of true values among draws of their posteriors.

    Attributes:
        ranks: How many draws are below the truth, `(num, dim)`, from 0 to `num_draws`.
        num_draws: Draws of each posterior.
        names: Those of the unconstrained coordinates.
    """

    ranks: Array
    num_draws: int
    names: list[str]

    def p_values(self, bins: int = 20) -> Array:
        """A chi-square test of uniform ranks for each coordinate, `(dim,)`: small where its posteriors are wrong."""
        owners: Array = np.arange(self.num_draws + 1) * bins // (self.num_draws + 1)
        expected = np.bincount(owners, minlength=bins) * len(self.ranks) / (self.num_draws + 1)
        counts = [np.bincount(owners[column], minlength=bins) for column in self.ranks.T]
        return np.array([chisquare(count, expected).pvalue for count in counts])

    def coverage(self, level: float) -> Array:
        """How often the truth is in the central interval of this probability, `(dim,)`."""
        at = (self.ranks + 0.5) / (self.num_draws + 1)
        return (np.abs(at - 0.5) < level / 2).mean(0)
