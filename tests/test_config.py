"""Descriptions: every flow survives the way through JSON, and nothing but a flow's own description is built."""

import dataclasses
import json

import pytest

from flowppl import flows
from flowppl.bijections import (
    Affine,
    Bijection,
    Chain,
    Coupling,
    Inverse,
    MaskedAutoregressive,
    Permutation,
    RQSpline,
    Stack,
)
from flowppl.config import Configured, build, describe
from flowppl.errors import FlowFileError
from flowppl.flows import Flow, StudentT
from tests.registry import CASES, registered

LINEAR = {"type": "LULinear", "dim": 2}


NAMES = flows.names()  # before an example in a docstring registers its own


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim, context_dim", [(1, 0), (3, 2)])
def test_registered_flows_survive(name, dim, context_dim):
    flow = flows.get(name)(dim, context_dim)
    text = json.dumps(describe(flow))
    again = build(json.loads(text))
    assert again == flow and hash(again) == hash(flow)
    assert json.dumps(describe(again)) == text


@pytest.mark.parametrize("case", CASES)
def test_hand_built_flows_survive(case):
    flow = CASES[case]
    again = build(json.loads(json.dumps(describe(flow))))
    assert again == flow and hash(again) == hash(flow) and repr(again) == repr(flow)
    assert (again.dim, again.context_dim) == (flow.dim, flow.context_dim)


def test_every_option_survives():
    parts = (
        Stack(Chain((Coupling(4, Affine(7.0), 3, (5,), "relu"), Permutation(4))), 2),
        Inverse(MaskedAutoregressive(4, RQSpline(3, 2.5), 3, (6, 7), "gelu")),
    )
    flow = Flow(Chain(parts), StudentT(2.5))
    assert build(json.loads(json.dumps(describe(flow)))) == flow
    assert describe(flow)["bijection"]["bijections"][0]["layer"]["bijections"][0]["hidden"] == [5]


def test_equal_flows_are_equal_whatever_built_them():
    assert registered("nsf", 2) == registered("nsf", 2) != registered("nsf", 3)
    assert len({registered(name, 2) for name in NAMES}) == len(NAMES)


HOSTILE = {
    "no type": {"dim": 2},
    "type that is no string": {"type": ["LULinear"], "dim": 2},
    "empty": {},
    "unknown class": {"type": "Unknown", "dim": 2},
    "name of a builtin": {"type": "eval", "source": "1"},
    "path to a function": {"type": "os.system", "command": "true"},
    "module path of a class": {"type": "flowppl.bijections.linear.LULinear", "dim": 2},
    "dunder": {"type": "__class__"},
    "root of all": {"type": "Configured"},
    "field missing": {"type": "LULinear"},
    "field unknown": {**LINEAR, "extra": 1},
    "method as field": {**LINEAR, "forward": 1},
    "value out of range": {"type": "RQSpline", "bins": 1, "bound": 3.0},
    "negative": {"type": "RQSpline", "bins": 8, "bound": -3.0},
    "not a number": {"type": "RQSpline", "bins": 8, "bound": float("nan")},
    "zero depth": {"type": "Stack", "layer": LINEAR, "depth": 0},
    "string as a number": {"type": "StudentT", "df": "5"},
    "no parts": {"type": "Chain", "bijections": []},
    "parts that are none": {"type": "Chain", "bijections": [1, 2]},
    "part that is none": {"type": "Chain", "bijections": [LINEAR, None]},
    "parts of two dimensions": {"type": "Chain", "bijections": [LINEAR, {**LINEAR, "dim": 3}]},
    "parts as a string": {"type": "Chain", "bijections": "ab"},
    "hostile inside": {
        "type": "Flow",
        "bijection": {"type": "Inverse", "bijection": {"type": "eval"}},
        "base": {"type": "Normal"},
    },
    "unknown activation": {"type": "MLP", "inputs": 1, "outputs": [1], "activation": "__call__"},
}


@pytest.mark.parametrize("description", HOSTILE.values(), ids=HOSTILE)
def test_hostile_descriptions_are_refused(description):
    with pytest.raises(FlowFileError):
        build(description)


ILL_TYPED = {
    "dimension as a string": {"type": "LULinear", "dim": "2"},
    "no dimension": {"type": "LULinear", "dim": None},
    "half a dimension": {"type": "LULinear", "dim": 2.5},
    "truth as a depth": {"type": "Stack", "layer": LINEAR, "depth": True},
    "base as a layer": {"type": "Stack", "layer": {"type": "Normal"}, "depth": 2},
    "base as a transformer": {"type": "Coupling", "dim": 3, "transformer": {"type": "Normal"}},
    "numbers as parts of a flow": {"type": "Flow", "bijection": 3, "base": None},
    "string as widths": {"type": "Planar", "dim": 2, "hidden": "ab"},
    "contract without a map": {"type": "Bijection"},
}


@pytest.mark.parametrize("description", ILL_TYPED.values(), ids=ILL_TYPED)
def test_ill_typed_descriptions_are_refused(description):
    """A flow of nonsense would fail later, with an error that does not speak of the file."""
    with pytest.raises(FlowFileError):
        build(description)


@pytest.mark.parametrize("size", [1025, 2**62, -(2**62), 10**400])
def test_sizes_are_limited_to_what_a_file_brings(size):
    """A small file must not exhaust the memory."""
    for description in ({**LINEAR, "dim": size}, {"type": "Stack", "layer": LINEAR, "depth": size}):
        with pytest.raises(FlowFileError, match=r"describes a size of -?\d+ but brings 1024 numbers"):
            build(description, 1024)
    assert build({**LINEAR, "dim": 1024}, 1024).dim == 1024


def test_errors_say_what_to_do():
    with pytest.raises(FlowFileError, match=r"class 'Mine' that is not registered: define or import it first"):
        build({"type": "Mine"})
    with pytest.raises(FlowFileError, match=r"describes a LULinear that cannot be built: .*'dim'"):
        build({"type": "LULinear"})


def test_only_configurations_are_described():
    for value in (object(), {1: 2}, [1], 1j, Bijection):
        with pytest.raises(TypeError, match="a configuration holds numbers, strings, tuples and configurations"):
            describe(value)


def test_class_names_are_taken_once():
    """Files name classes by their bare names."""
    with pytest.raises(TypeError, match=r"the class name 'LULinear' is taken by flowppl\.bijections"):
        type("LULinear", (Configured,), {})


def test_a_class_of_ones_own_survives():
    @dataclasses.dataclass(frozen=True)
    class OfOnesOwn(Bijection):
        dim: int
        scales: tuple[float, ...] = (0.5, 2.0)

    flow = Flow(Inverse(OfOnesOwn(3, (1.0, 0.1))))
    assert build(json.loads(json.dumps(describe(flow)))) == flow
