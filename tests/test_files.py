"""Flow files: exact round trips, and refusal of whatever is not one."""

import hashlib
import importlib.util
import json
import os
import pickle

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from flowppl import flows, tree
from flowppl.backend import get_backend
from flowppl.errors import FlowFileError
from flowppl.flows import files

FRONTS = {"jax": "numpyro", "torch": "pyro"}
RECIPES = {
    "affine": flows.affine(),
    "nsf": flows.nsf(layers=2, hidden=(4, 4), bins=3, base=flows.StudentT(4.0)),
    "realnvp": flows.realnvp(layers=2, hidden=(4,)),
    "planar": flows.planar(layers=2),
}


def front_of(backend):
    pytest.importorskip(FRONTS[backend.name])
    return importlib.import_module(f"flowppl.{FRONTS[backend.name]}")


@pytest.fixture
def small_file(backend, make_rng, tmp_path):
    """A whole file, and how the front loads it."""
    front = front_of(backend)
    flow = RECIPES["realnvp"](2)
    path = tmp_path / "q.flow"
    front.save_flow(path, flow, flow.init(make_rng(0)))
    return path, front.load_flow


def header_of(path):
    with safe_open(str(path), framework="numpy") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def signed(path, arrays, text, **header):
    """A file whose checksum is right, whatever it says."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode() + arrays[name].tobytes())
    header = {"format": files.FORMAT, "description": text, "sha256": digest.hexdigest(), **header}
    path.write_bytes(save(arrays, header))
    return path


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("name", RECIPES)
def test_round_trip_is_exact(backend, make_rng, tmp_path, name, context_dim):
    front = front_of(backend)
    flow = RECIPES[name](3, context_dim)
    variables = tree.map(lambda a: backend.asarray(np.asarray(backend.to_numpy(a), np.float32)), flow.init(make_rng(0)))
    front.save_flow(tmp_path / "q.flow", flow, variables)
    again, loaded = front.load_flow(tmp_path / "q.flow")
    assert again == flow and hash(again) == hash(flow)
    assert list(tree.paths(loaded)) == list(tree.paths(variables))
    for a, b in zip(tree.leaves(loaded), tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(backend.to_numpy(a), backend.to_numpy(b))
    assert os.listdir(tmp_path) == ["q.flow"]


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("numpyro", "pyro"))), reason="needs both fronts")
@pytest.mark.parametrize("name", RECIPES)
def test_a_file_of_one_front_loads_in_the_other(tmp_path, name):
    jax, torch = importlib.import_module("jax"), importlib.import_module("torch")
    fronts = {b: importlib.import_module(f"flowppl.{front}") for b, front in FRONTS.items()}
    flow = RECIPES[name](3)
    x = np.random.default_rng(0).standard_normal((5, 3))
    variables = {"jax": flow.init(jax.random.key(0)), "torch": flow.init(torch.Generator().manual_seed(0))}
    for source, target in (("jax", "torch"), ("torch", "jax")):
        fronts[source].save_flow(tmp_path / "q.flow", flow, variables[source])
        again, loaded = fronts[target].load_flow(tmp_path / "q.flow")
        densities = []
        for v, name in ((variables[source], source), (loaded, target)):
            backend = get_backend(name)
            v = tree.map(lambda a, b=backend: b.asarray(np.asarray(b.to_numpy(a), np.float64)), v)
            densities.append(backend.to_numpy(again.log_prob(v, backend.asarray(x))))
        np.testing.assert_allclose(*densities, rtol=1e-5)  # the target may hold float32


def test_an_older_file_survives_an_interrupted_write(small_file, backend, make_rng, monkeypatch):
    path, _ = small_file
    before = path.read_bytes()
    flow = RECIPES["realnvp"](2)

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        files.write(path, flow, flow.init(make_rng(1)), {})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_missing_and_foreign_files(small_file, tmp_path):
    _, load = small_file

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    foreign = {
        "missing": None,
        "empty": b"",
        "text": b"not a flow\n" * 100,
        "pickle": pickle.dumps(Bomb()),
        "numpy": save({"a": np.zeros(3)}),
        "another format": save({"a": np.zeros(3)}, {"format": "pt"}),
        "a huge header": (2**62).to_bytes(8, "little") + b"{}",
    }
    for name, content in foreign.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(FlowFileError):
            load(path)
    with pytest.raises(FlowFileError):
        load(tmp_path)  # a directory
    assert not (tmp_path / "executed").exists()


def test_every_truncation_is_refused(small_file):
    path, load = small_file
    content = path.read_bytes()
    for end in {*range(0, len(content), 37), 7, 8, 9, len(content) - 1}:
        path.write_bytes(content[:end])
        with pytest.raises(FlowFileError):
            load(path)


def test_a_thousand_mutations_are_refused(small_file):
    """Bytes flipped, replaced, cut out and put in: an error, or (in padding) the very same flow; never another one."""
    path, load = small_file
    flow, variables = load(path)
    arrays = [np.asarray(a) for a in tree.leaves(variables)]
    content, rng = path.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(content[:8], "little")
    unharmed = 0
    for i in range(1000):
        data = bytearray(content)
        at = int(rng.integers(header if i % 2 else len(data)))  # half of them in the header
        kind, size = i % 5, int(rng.integers(1, 9))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at : at + size] = rng.bytes(size)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = rng.bytes(size)
        else:
            data = data[:at]
        if data == content:
            continue
        path.write_bytes(data)
        try:
            again, loaded = load(path)
        except FlowFileError:
            continue
        unharmed += 1
        assert again == flow
        for a, b in zip(arrays, tree.leaves(loaded), strict=True):
            np.testing.assert_array_equal(a, np.asarray(b))
    assert unharmed <= 10


def hostile(description):
    """Descriptions that no flow has, made from one that a flow has."""
    text = json.dumps(description)

    def edited(edit):
        copy = json.loads(text)
        edit(copy["flow"])
        return json.dumps(copy)

    def inside(key, value):
        """Sets every field of this name."""

        def edit(node):
            if isinstance(node, dict):
                node.update({key: value} if key in node else {})
                for child in node.values():
                    edit(child)
            elif isinstance(node, list):
                for child in node:
                    edit(child)

        return edited(edit)

    def bijection(value):
        return edited(lambda flow: flow.update(bijection=value))

    deep_stack = {"type": "Rotation", "dim": 2, "shift": 1}
    for _ in range(4):
        deep_stack = {"type": "Stack", "layer": deep_stack, "depth": 1000}
    nested = json.dumps({"type": "Rotation", "dim": 2, "shift": 1})
    for _ in range(150):
        nested = '{"type": "Inverse", "bijection": ' + nested + "}"
    huge_lu = {"type": "LULinear", "dim": 1000}
    yield "not json", "{"
    yield "a number", "3"
    yield "no flow", json.dumps({"extra": {}})
    yield "no extra", json.dumps({"flow": description["flow"]})
    yield "extra of another type", json.dumps({**description, "extra": [1]})
    yield "not a flow", json.dumps({"flow": {"type": "Normal"}, "extra": {}})
    yield "a list", json.dumps({"flow": [1, 2], "extra": {}})
    yield "unknown class", inside("type", "os.system")
    yield "class of another type", inside("type", ["Flow"])
    yield "unknown field", edited(lambda flow: flow.update(command="rm -rf /"))
    yield "missing field", edited(lambda flow: flow.pop("bijection"))
    yield "bijection is a base", bijection({"type": "Normal"})
    yield "bijection is a string", bijection("LULinear")
    yield "bijection is nothing", bijection(None)
    yield "nested lists", '{"extra": {}, "flow": ' + "[" * 100_000 + "]" * 100_000 + "}"
    yield "nested objects", '{"extra": {}, "flow": ' + '{"type":' * 100_000 + "1" + "}" * 100_000 + "}"
    yield "nested inverses", '{"extra": {}, "flow": {"type": "Flow", "bijection": ' + nested + "}}"
    yield "stacks of stacks", bijection(deep_stack)
    yield "a matrix larger than the file", bijection(huge_lu)
    yield "a chain of nothing", bijection({"type": "Chain", "bijections": []})
    yield "a long chain", bijection({"type": "Chain", "bijections": [{"type": "LULinear", "dim": 2}] * 20_000})
    yield "a number of many digits", text.replace('"dim": 2', '"dim": ' + "9" * 10_000)
    for depth in (10**9, -1, 0, 1.5, True, "2", None, [2], 1000):
        yield f"depth {depth!r}", inside("depth", depth)
    for dim in (10**9, -2, 0, 2.5, "2", None, [2], 3):
        yield f"dim {dim!r}", inside("dim", dim)
    for hidden in ([10**9], [1000, 1000, 1000], [-4], [0], ["4"], "4", 4, None, [[4]], [4] * 5000):
        yield f"hidden {str(hidden)[:20]}", inside("hidden", hidden)
    for activation in ("eval", "external", "__class__", 3, None):
        yield f"activation {activation!r}", inside("activation", activation)
    for context_dim in (10**9, -1, 2, "x"):
        yield f"context_dim {context_dim!r}", inside("context_dim", context_dim)


def test_hostile_descriptions_are_refused(small_file, tmp_path):
    """Each has the right checksum: what is refused is what it says."""
    path, load = small_file
    header, arrays = header_of(path)
    assert load(signed(path, arrays, header["description"]))  # the forger can forge
    for name, text in hostile(json.loads(header["description"])):
        with pytest.raises(FlowFileError):
            raise AssertionError(f"{name} gave {load(signed(path, arrays, text))}")


def test_arrays_of_the_wrong_kind_are_refused(small_file):
    path, load = small_file
    header, arrays = header_of(path)
    text, name = header["description"], sorted(arrays)[0]
    for wrong in (arrays[name].astype(np.int64), arrays[name].astype(np.complex64), arrays[name][None]):
        with pytest.raises(FlowFileError, match="does not fit the flow"):
            load(signed(path, {**arrays, name: wrong}, text))
    with pytest.raises(FlowFileError, match="extra_array"):
        load(signed(path, {**arrays, "extra_array": np.zeros(2)}, text))
    with pytest.raises(FlowFileError, match="is nothing in the file"):
        load(signed(path, {k: v for k, v in arrays.items() if k != name}, text))


def test_a_wrong_checksum_or_format_is_refused(small_file):
    path, load = small_file
    header, arrays = header_of(path)
    with pytest.raises(FlowFileError, match="damaged"):
        load(signed(path, arrays, header["description"], sha256="0" * 64))
    with pytest.raises(FlowFileError, match="not a flow file"):
        load(signed(path, arrays, header["description"], format="flowppl-0"))
