"""Who reads one front's page can write the other front's script: same names, same signatures but for what the PPLs dictate."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# NumPyro keeps parameters outside of guides and names a guide's sites by a prefix; a Pyro guide holds its parameters and its name.
_OF_THE_PPL = {"params", "prefix", "rng_key", "validate_args", "max_plate_nesting"}

# Each framework has its own library of flows to bring along.
_LIBRARIES = {"flowjax": "zuko"}


def _fronts():
    pytest.importorskip("numpyro")
    pytest.importorskip("pyro")
    import flowppl.numpyro
    import flowppl.pyro

    return flowppl.numpyro, flowppl.pyro


def _parameters(function) -> dict[str, object]:
    found = inspect.signature(function).parameters.values()
    return {p.name: p.kind for p in found if p.name not in _OF_THE_PPL | {"self"} and p.kind is not p.VAR_KEYWORD}


def test_public_names_agree() -> None:
    numpyro_front, pyro_front = _fronts()
    paired = {f"from_{ours}": f"from_{theirs}" for ours, theirs in _LIBRARIES.items()}
    assert [paired.get(name, name) for name in numpyro_front.__all__] == pyro_front.__all__


def test_files_agree() -> None:
    """Only torch's transforms need a memory of the last call: NumPyro hands on what was drawn beside a value."""
    ours, theirs = ({path.name for path in Path(front.__file__).parent.glob("*.py")} for front in _fronts())
    paired = {f"{ours}.py": f"{theirs}.py" for ours, theirs in _LIBRARIES.items()}
    assert {paired.get(name, name) for name in ours} | {"memo.py"} == theirs


@pytest.mark.parametrize(
    "name",
    [
        "AmortizedFlow",
        "AutoFlow",
        "AutoSNF",
        "FlowDistribution",
        "FlowTransform",
        "LogDensity",
        "Objective",
        "PathELBO",
        "SNFDistribution",
        "anneal",
        "fit",
        "flow_module",
        "load_flow",
        "load_npe",
        "marginal",
        "npe",
        "save_flow",
        "to_arviz",
    ],
)
def test_signatures_agree(name: str) -> None:
    ours, theirs = (_parameters(getattr(front, name)) for front in _fronts())
    assert set(ours) - {"params"} == set(theirs) - {"params"}


@pytest.mark.parametrize("name", ["precondition", "log_prob", "save", "load", "quantiles", "median"])
def test_guide_methods_agree(name: str) -> None:
    ours, theirs = (set(_parameters(getattr(front.AutoFlow, name))) for front in _fronts())
    assert ours - {"args"} == theirs - {"args"}


@pytest.mark.parametrize("name", ["get_posterior", "precondition", "sample_posterior", "train_path", "weighted"])
def test_stochastic_guide_methods_agree(name: str) -> None:
    ours, theirs = (set(_parameters(getattr(front.AutoSNF, name))) for front in _fronts())
    assert ours - {"rng"} == theirs - {"rng"}


def test_stochastic_distribution_methods_agree() -> None:
    ours, theirs = (_parameters(front.SNFDistribution.sample_weighted) for front in _fronts())
    assert ours == theirs


@pytest.mark.parametrize("name", ["log_prob", "predict", "to_arviz", "save", "load"])
def test_posterior_methods_agree(name: str) -> None:
    ours, theirs = (_parameters(getattr(front.Posterior, name)) for front in _fronts())
    assert ours == theirs


def test_amortized_methods_agree() -> None:
    ours, theirs = (_parameters(front.AmortizedFlow.sample_posterior) for front in _fronts())
    assert {**ours, "rng": None}.keys() == theirs.keys()
    for name in ("save", "load"):
        ours, theirs = (_parameters(getattr(front.AmortizedFlow, name)) for front in _fronts())
        assert ours == theirs


@pytest.mark.parametrize(
    "name", ["log_prob", "given", "minibatch", "num_nan", "value_and_score", "split", "unpack", "constrain"]
)
def test_density_methods_agree(name: str) -> None:
    ours, theirs = (set(_parameters(getattr(front.LogDensity, name))) for front in _fronts())
    assert ours == theirs


@pytest.mark.parametrize(("front", "needs", "extra"), [("numpyro", "jax", "numpyro"), ("pyro", "torch", "pyro")])
def test_a_missing_ppl_is_named(front: str, needs: str, extra: str) -> None:
    code = f"""
    import sys
    sys.modules[{needs!r}] = None  # as if it were not installed
    from flowppl.errors import MissingExtraError
    try:
        import flowppl.{front}
    except MissingExtraError as error:
        assert "pip install 'flowppl[{extra}]'" in str(error), error
    else:
        raise SystemExit("imported")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


@pytest.mark.parametrize(("front", "others"), [("numpyro", {"torch", "equinox", "flowjax"}), ("pyro", {"jax", "zuko"})])
def test_a_front_imports_neither_the_other_framework_nor_a_library_of_flows(front: str, others: set[str]) -> None:
    pytest.importorskip(front)
    code = f"import sys, flowppl.{front}; assert not {others!r} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
