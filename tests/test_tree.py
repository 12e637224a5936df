from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowppl import tree


class Pair(NamedTuple):
    left: object
    right: object


TREE = {"b": (1, [2, None, {}], ()), "a": {"y": 3, "x": Pair(4, {"w": 5})}}

keys = st.text("abcxyz", min_size=1, max_size=3)
trees = st.recursive(
    st.integers() | st.none(),
    lambda t: (
        st.dictionaries(keys, t, max_size=3) | st.lists(t, max_size=3) | st.lists(t, max_size=3).map(tuple)
        | st.builds(Pair, t, t)
    ),
    max_leaves=8,
)  # fmt: skip


def test_map_keeps_structure_and_sorts_keys():
    doubled = tree.map(lambda x: 2 * x, TREE)
    assert doubled == {"a": {"x": Pair(8, {"w": 10}), "y": 6}, "b": (2, [4, None, {}], ())}
    assert isinstance(doubled["a"]["x"], Pair)
    assert list(doubled) == ["a", "b"] and list(doubled["a"]) == ["x", "y"]


def test_leaves_and_paths_share_an_order():
    assert tree.leaves(TREE) == [4, 5, 3, 1, 2]
    assert tree.paths(TREE) == {"a.x.0": 4, "a.x.1.w": 5, "a.y": 3, "b.0": 1, "b.1.0": 2}
    assert list(tree.paths(TREE).values()) == tree.leaves(TREE)
    assert tree.paths({"layers": [{"weight": 7}]}) == {"layers.0.weight": 7}
    assert tree.paths(7) == {"": 7}


@given(trees)
def test_unflatten_inverts_paths_and_leaves(t):
    assert tree.unflatten(t, tree.paths(t)) == t
    assert tree.unflatten(t, tree.leaves(t)) == t
    shuffled = dict(reversed(tree.paths(t).items()))
    assert tree.unflatten(t, shuffled) == t


@given(trees)
def test_order_is_that_of_jax(t):
    jax = pytest.importorskip("jax")
    assert tree.leaves(t) == jax.tree.leaves(t)
    assert tree.map(str, t) == jax.tree.map(str, t)
    assert list(tree.paths(jax.tree.map(str, t))) == list(tree.paths(t))


def test_map_takes_subtrees_of_the_rest_at_leaves():
    assert tree.map(lambda x, sub: (x, len(sub)), {"a": 1}, {"a": [5, 6]}) == {"a": (1, 2)}


@pytest.mark.parametrize("other", [{"a": 1}, {"a": 1, "c": 2}, (1, 2), None, 3])
def test_map_refuses_another_structure(other):
    with pytest.raises(ValueError, match="differ in structure"):
        tree.map(lambda x, y: x, {"a": 1, "b": 2}, other)


@pytest.mark.parametrize(("first", "other"), [((1, 2), [1, 2]), ([1], [1, 2]), (None, 1), ((), (1,))])
def test_map_refuses_another_node(first, other):
    with pytest.raises(ValueError, match="differ in structure"):
        tree.map(lambda x, y: x, first, other)


def test_unflatten_refuses_missing_and_extra_leaves():
    with pytest.raises(ValueError, match=r"missing \['b'\], not in the template \['c'\]"):
        tree.unflatten({"a": 1, "b": 2}, {"a": 1, "c": 2})
    with pytest.raises(ValueError, match="fewer"):
        tree.unflatten((1, 2), [1])
    with pytest.raises(ValueError, match="more"):
        tree.unflatten((1, 2), [1, 2, 3])


def test_paths_refuse_ambiguous_keys():
    with pytest.raises(ValueError, match="without dots"):
        tree.paths({"a.b": 1, "a": {"b": 2}})


def test_stack_and_index(backend, f64):
    rows = [{"w": (f64([i, 2.0]), None), "b": f64(i)} for i in range(3)]
    stacked = tree.stack(rows)
    assert stacked["w"][0].shape == (3, 2) and stacked["b"].shape == (3,) and stacked["w"][1] is None
    for i, row in enumerate(rows):
        back = tree.index(stacked, i)
        np.testing.assert_array_equal(backend.to_numpy(back["w"][0]), backend.to_numpy(row["w"][0]))
        assert float(back["b"]) == float(row["b"])
    with pytest.raises(ValueError, match="empty"):
        tree.stack([])
