"""Test configuration: eight CPU devices, no silent promotion, no leaked tracers."""

import os

# Before jax starts a backend; a user's own flags are kept.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis
import jax
import pytest

# Two programs with collectives in flight at once can wait for each other's threads for ever on a small machine.
jax.config.update("jax_cpu_enable_async_dispatch", False)

hypothesis.settings.register_profile("mpjax", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("mpjax")


@pytest.fixture
def leak_checks():
    """Tracer-leak checks. They turn jit's trace cache off, so only the tests of transforms pay for them."""
    with jax.checking_leaks():
        yield


@pytest.fixture
def x64():
    """float64 switched on for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def quick_compiles():
    """Programs little optimized: nearly all the time of a small run is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """No silent promotion in mpjax's code.

    A module that runs others' code which relies on it (optax's bias correction adds a float to an int) is marked
    `pytestmark = pytest.mark.standard_promotion`.
    """
    standard = request.node.get_closest_marker("standard_promotion")
    with jax.numpy_dtype_promotion("standard" if standard else "strict"):
        yield


@pytest.fixture
def count_traces():
    """Wraps a function so that `wrapped.traces` counts how often jit traced it."""

    def wrap(fn):
        def counted(*args, **kwargs):
            counted.traces += 1
            return fn(*args, **kwargs)

        counted.traces = 0
        return counted

    return wrap
