"""The NumPyro front: flow guides, distributions, transforms and densities of models."""

from flowppl.errors import MissingExtraError

try:
    import jax as _jax  # noqa: F401
    import numpyro as _numpyro  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtraError("numpyro", "numpyro") from error

from flowppl.numpyro.amortized import AmortizedFlow
from flowppl.numpyro.annealing import AnnealedPosterior, anneal
from flowppl.numpyro.auxiliary import marginal
from flowppl.numpyro.density import LogDensity
from flowppl.numpyro.distributions import FlowDistribution, FlowTransform
from flowppl.numpyro.export import to_arviz
from flowppl.numpyro.files import load_flow, save_flow
from flowppl.numpyro.flowjax import from_flowjax
from flowppl.numpyro.guides import AutoFlow
from flowppl.numpyro.modules import flow_module
from flowppl.numpyro.objective import Objective, PathELBO
from flowppl.numpyro.posterior import Posterior, fit
from flowppl.numpyro.simulator import load_npe, npe
from flowppl.numpyro.stochastic import AutoSNF, SNFDistribution

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
    "from_flowjax",
    "load_flow",
    "load_npe",
    "marginal",
    "npe",
    "save_flow",
    "to_arviz",
]
