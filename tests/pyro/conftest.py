"""Every test of the Pyro front starts from one seed, an empty param store and one thread."""

import pyro
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_slate():
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def scramble():
    """Moves tensors off the identity at which flows start, in place."""

    def by(tensors, scale=0.3, seed=7):
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for t in tensors:
                t.add_(scale * torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype))

    return by
