"""What every test shares: the installed frameworks as backends, in float64, on one thread."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from flowppl.backend import get_backend

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")  # each has a cache of its own: they write at the same time
FRAMEWORKS = [name for name in ("torch", "jax") if importlib.util.find_spec(name)]

if "jax" in FRAMEWORKS:
    import jax

    jax.config.update("jax_enable_x64", True)
    # What one module has compiled serves the others, and the next run.
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "jax" / WORKER))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

if "torch" in FRAMEWORKS:
    import torch

    torch.set_num_threads(1)

    if importlib.util.find_spec("zuko"):
        import zuko  # noqa: F401 (here and first, since it turns off torch's validation for all tests that follow)

        torch.distributions.Distribution.set_default_validate_args(True)


def pytest_collection_modifyitems(items):
    """What needs one framework only, and runs where that one is alone, need not run beside the other."""
    for item in items:
        in_front = item.path.parent.name in ("numpyro", "pyro") and "tests" in item.path.parts
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if in_front or backend in FRAMEWORKS:
            item.add_marker("front")


@pytest.fixture(autouse=True, scope="module")
def _forget_what_was_compiled():
    """Compiled functions are kept for good: gigabytes over all modules."""
    yield
    if "jax" in FRAMEWORKS:
        jax.clear_caches()


@pytest.fixture(scope="session", params=FRAMEWORKS)
def backend(request):
    """Each installed framework's backend in turn; a test that parametrises it indirectly can have numpy's too."""
    if request.param not in (*FRAMEWORKS, "numpy"):
        pytest.skip(f"{request.param} is not installed")
    return get_backend(request.param)


@pytest.fixture(scope="module")
def f64(backend):
    """Numbers -> a float64 array of the framework."""
    like = backend.xp.zeros((), dtype=backend.xp.float64)
    return lambda a: backend.asarray(np.asarray(a, np.float64), like)


@pytest.fixture(scope="module")
def f32(backend):
    """Numbers -> a float32 array of the framework."""
    like = backend.xp.zeros((), dtype=backend.xp.float32)
    return lambda a: backend.asarray(np.asarray(a, np.float32), like)


@pytest.fixture(scope="module")
def make_rng(backend):
    """Seed -> a random number generator of the framework."""
    if backend.name == "torch":
        return lambda seed: torch.Generator().manual_seed(seed)
    return jax.random.key if backend.name == "jax" else np.random.default_rng
