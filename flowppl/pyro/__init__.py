"""The Pyro front: flows as guides, distributions, transforms and modules of Pyro models."""

from flowppl.errors import MissingExtraError

try:
    import pyro  # noqa: F401
    import torch  # noqa: F401
except ImportError as error:
    raise MissingExtraError("pyro-ppl", "pyro") from error

from flowppl.pyro.amortized import AmortizedFlow
from flowppl.pyro.annealing import AnnealedPosterior, anneal
from flowppl.pyro.auxiliary import marginal
from flowppl.pyro.density import LogDensity
from flowppl.pyro.distributions import FlowDistribution, FlowTransform
from flowppl.pyro.export import to_arviz
from flowppl.pyro.files import load_flow, save_flow
from flowppl.pyro.guides import AutoFlow
from flowppl.pyro.modules import flow_module
from flowppl.pyro.objective import Objective, PathELBO
from flowppl.pyro.posterior import Posterior, fit
from flowppl.pyro.simulator import load_npe, npe
from flowppl.pyro.stochastic import AutoSNF, SNFDistribution
from flowppl.pyro.zuko import from_zuko

__all__ = [
    "AmortizedFlow",
    "AnnealedPosterior",
    "AutoFlow",
    "AutoSNF",
    "FlowDistribution",
    "FlowTransform",
    "LogDensity",
    "Objective",
    "PathELBO",
    "Posterior",
    "SNFDistribution",
    "anneal",
    "fit",
    "flow_module",
    "from_zuko",
    "load_flow",
    "load_npe",
    "marginal",
    "npe",
    "save_flow",
    "to_arviz",
]
