"""Updates of parameters stored in half precision: where they lead, and what an ordinary optimizer is shown."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from helpers import bits

import mpjax as mp
from mpjax.transforms._stored import update_to

HALF = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}


@pytest.mark.parametrize("name", HALF)
def test_an_update_hits_what_a_float32_step_leads_to(name):
    """From all 65536 values, by steps of their own size and smaller: what cancels is on the grid of the two."""
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else np.float16)
    old = np.arange(2**16, dtype=np.uint16).view(dtype)[:, None]
    factors = np.concatenate([np.linspace(-1.5, 1.5, 61), -1 + 2.0 ** -np.arange(4, 24)]).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        new = (old.astype(np.float32) + old.astype(np.float32) * factors).astype(dtype)
        # A CPU flushes subnormal differences.
        sizes = np.abs(np.stack(np.broadcast_arrays(old, new)).astype(np.float32))
        counts = (np.isfinite(sizes) & (sizes > 2.0**9 * float(jnp.finfo(dtype).tiny))).all(0)
    old = np.broadcast_to(old, new.shape)[counts]
    assert old.size > 1_000_000
    stepped = jax.jit(lambda p, n: mp.transforms.apply_updates(p, update_to(p, n)))(old, new[counts])
    assert bits(stepped) == bits(new[counts])


@pytest.mark.parametrize("name", HALF)
def test_where_nothing_changes_no_bit_does(name):
    values = jnp.array([0.0, -0.0, 1.0, -3.5, jnp.inf, -jnp.inf], HALF[name])
    update = update_to(values, values)
    assert bits(update) == bits(-jnp.zeros(6))
    assert bits(mp.transforms.apply_updates(values, update)) == bits(values)


def test_a_difference_past_float32_is_finite():
    old, new = jnp.bfloat16(-3e38), jnp.bfloat16(3e38)
    assert jnp.isfinite(update_to(old, new))
    assert jnp.isfinite(mp.transforms.apply_updates(old, update_to(old, new)))
    assert update_to(jnp.bfloat16(1), jnp.bfloat16(jnp.inf)) == jnp.inf


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_apply_updates_is_that_of_optax(dtype):
    params = {"w": jnp.linspace(-1.0, 1.0, 7).astype(dtype), "none": None}
    updates = {"w": jnp.linspace(0.0, 1e-2, 7), "none": None}
    with jax.numpy_dtype_promotion("standard"):
        expected = optax.apply_updates(params, updates)
    assert bits(mp.transforms.apply_updates(params, updates)) == bits(expected)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3fnuz])
def test_apply_updates_adds_to_fp8_in_float32(dtype):
    params = jnp.array([1.0, -2.0], dtype)
    stepped = mp.transforms.apply_updates(params, jnp.array([0.3, 0.3]))
    assert bits(stepped) == bits((jnp.array([1.0, -2.0]) + 0.3).astype(dtype))


def test_apply_updates_leaves_what_has_no_gradient():
    params = {"steps": 3, "table": jnp.arange(3), "key": jax.random.key(0), "w": jnp.ones(1)}
    updates = {"steps": 0, "table": jnp.zeros(3, jnp.int32), "key": np.zeros((), jax.dtypes.float0), "w": jnp.ones(1)}
    stepped = mp.transforms.apply_updates(params, updates)
    assert stepped["steps"] == 3
    assert stepped["key"] is params["key"]
    assert bits(stepped["table"]) == bits(params["table"])
    assert float(stepped["w"][0]) == 2.0


def test_apply_updates_keeps_float64(x64):
    stepped = mp.transforms.apply_updates(jnp.ones(1), jnp.full(1, 1e-12))
    assert stepped.dtype == jnp.float64
    assert float(stepped[0]) == 1 + 1e-12


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e4m3fnuz])
def test_an_ordinary_optimizer_sees_float32(dtype):
    seen = []

    def update(updates, state, params):
        seen.append((updates.dtype.name, params.dtype.name))
        return updates, state

    inner = optax.GradientTransformation(lambda p: seen.append(p.dtype.name), update)
    tx = mp.skip_on_overflow(inner)
    tx.update(jnp.ones(2), tx.init(jnp.ones(2, dtype)), jnp.ones(2, dtype))
    assert seen == ["float32", ("float32", "float32")]
