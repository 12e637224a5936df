"""Perceptrons: how they start."""

import numpy as np
import pytest

from flowppl.backend import get_backend
from flowppl.networks import MLP, MaskedMLP


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("net", [MLP, MaskedMLP])
def test_signals_keep_their_scale(net, activation):
    """At the start what enters an activation has variance one in every layer: it bends, and learning reaches all layers alike."""
    net = net(16, (2, 16), (128,) * 3, activation)
    rng = np.random.default_rng(0)
    params = net.init(rng)["layers"]
    if net.__class__ is MaskedMLP:
        params = net.mask({"layers": params})["layers"]
    h = rng.standard_normal((16, 4000))
    for layer in params[:-1]:
        enters = layer["weight"] @ h
        np.testing.assert_allclose(np.mean(enters**2, axis=1).mean(), 1, atol=0.3)
        h = getattr(get_backend("numpy"), activation)(enters)


def test_the_start_is_a_constant():
    """The last layer's zeros: a map that is the identity at zeros starts as the identity."""
    net = MLP(3, (2, 3))
    rng = np.random.default_rng(0)
    assert not net(net.init(rng), rng.standard_normal((5, 3))).any()
