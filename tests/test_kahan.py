"""Compensated summation against float64, and what becomes of a compensation that is not the parameter's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import bits
from hypothesis import given
from hypothesis import strategies as st

import mpjax as mp

pytestmark = pytest.mark.standard_promotion

T = mp.transforms
TX = T.kahan(optax.identity())
UPDATE = jax.jit(TX.update)


def state_with(compensation):
    return T.KahanState(optax.EmptyState(), jnp.asarray(compensation))


def half_spacing(x):
    """Half the distance to the next value of its dtype away from zero."""
    bits_lost = {"bfloat16": 16, "float16": 13}[str(x.dtype)]
    spacing = np.spacing(np.abs(np.asarray(x, np.float32))).astype(np.float64) * 2**bits_lost
    return np.maximum(spacing, float(jnp.finfo(x.dtype).smallest_subnormal)) / 2


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2.0**-16), ("float16", 2.0**-21)])
def test_a_random_walk_against_float64(dtype, bound):
    """Weight and compensation together keep about twice the bits: each step loses half a unit of the last one."""
    rng = np.random.default_rng(0)
    steps = (rng.normal(size=(1000, 256)) * 1e-3).astype(np.float32)
    params = jnp.asarray(rng.uniform(1, 2, 256), dtype)
    exact = np.asarray(params, np.float64) + steps.astype(np.float64).cumsum(0)

    def body(carry, step):
        params, state = carry
        updates, state = TX.update(step, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state.compensation)

    (_, state), (weights, left) = jax.jit(lambda c: jax.lax.scan(body, c, steps))((params, TX.init(params)))
    assert state.compensation.dtype == weights.dtype == dtype
    both = np.asarray(weights, np.float64) + np.asarray(left, np.float64)
    count = np.arange(1, 1001)[:, None]
    assert (np.abs(both - exact) <= 2 * bound * count).all()
    # Rounding errors are of both signs: far less than the worst case is lost.
    assert np.abs(both - exact).max() < 64 * bound
    assert (np.abs(np.asarray(left, np.float64)) <= half_spacing(weights)).all()
    # The weight is the sum rounded: nothing of the error is in it but half a spacing.
    assert (np.abs(np.asarray(weights, np.float64) - exact) <= half_spacing(weights) + 64 * bound).all()


@given(st.floats(-(2.0**60), 2.0**60, width=32), st.floats(-(2.0**60), 2.0**60, width=32), st.floats(-1, 1, width=32))
def test_one_step(weight, step, share):
    """The parameter is the nearest to the sum, and what is left of the sum goes into the compensation."""
    weight = jnp.bfloat16(weight if abs(weight) > 1e-20 else 0.0)
    step = np.float32(step if abs(step) > 1e-20 else 0.0)
    own = jnp.asarray(half_spacing(weight) * share * 0.99, jnp.bfloat16) if weight else jnp.bfloat16(0)
    updates, state = UPDATE(jnp.float32(step), state_with(own), weight)
    new = optax.apply_updates(weight, updates)
    total = np.float32(weight) + (step + np.float32(own))
    assert bits(new) == bits(jnp.asarray(total).astype(jnp.bfloat16)) or float(new) == 0 == total
    left = (np.float32(weight) - np.float32(new)) + (step + np.float32(own))
    assert float(state.compensation) == np.float32(left.astype(jnp.bfloat16))


def test_jit_gives_what_eager_gives():
    """Rounding that XLA might leave out under jit is the whole of it."""
    params = jnp.linspace(0.5, 2, 333).astype(jnp.bfloat16)
    steps = jnp.sin(jnp.arange(333.0)) * 1e-3
    eager, compiled = TX.update(steps, TX.init(params), params), UPDATE(steps, TX.init(params), params)
    assert bits(eager) == bits(compiled)
    assert (np.asarray(compiled[1].compensation) != 0).mean() > 0.9


def test_two_bytes_beside_each_weight():
    params = {"w": jnp.ones((4, 8), jnp.bfloat16), "h": jnp.ones(4, jnp.float16), "f": jnp.ones(8)}
    state = TX.init(params)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == 2 * (4 * 8 + 4)


class TestLoadedParameters:
    """A checkpoint of parameters alone, beside the compensation of others."""

    def test_what_cannot_be_their_own_is_dropped(self):
        loaded = jnp.array([1e-6, 0.0, -(2.0**-20), 1.0], jnp.bfloat16)
        updates, state = UPDATE(-jnp.zeros(4), state_with(jnp.full(4, 2.0**-6, jnp.bfloat16)), loaded)
        assert bits(optax.apply_updates(loaded, updates)) == bits(loaded)
        assert not state.compensation.any()

    @given(st.floats(-1000, 1000, width=32), st.floats(-1000, 1000, width=32))
    def test_all_else_displaces_by_less_than_the_spacing(self, weight, other):
        weight, other = (jnp.bfloat16(x if abs(x) > 1e-20 else 0.0) for x in (weight, other))
        updates, state = UPDATE(jnp.float32(-0.0), state_with(other), weight)
        new = optax.apply_updates(weight, updates)
        both = np.float64(new) + np.float64(state.compensation)
        assert abs(both - np.float64(weight)) <= 2 * half_spacing(weight)

    @given(st.floats(-1000, 1000, width=32), st.floats(-1, 1, width=32))
    def test_its_own_is_never_dropped(self, weight, share):
        """Half a spacing included, to which the rounding of the compensation itself may take it."""
        weight = jnp.bfloat16(weight if abs(weight) > 1e-20 else 1.0)
        own = jnp.asarray(half_spacing(weight) * share, jnp.bfloat16)
        updates, state = UPDATE(jnp.float32(-0.0), state_with(own), weight)
        both = np.float64(optax.apply_updates(weight, updates)) + np.float64(state.compensation)
        assert both == np.float64(weight) + np.float64(own)


def test_what_saturates_is_no_rounding_error():
    """It would come back as a step, and could not be stored."""
    params = jnp.array([65504.0, -65504.0], jnp.float16)
    state = TX.init(params)
    for _ in range(5):
        updates, state = UPDATE(jnp.array([1e6, -1e6]), state, params)
        params = optax.apply_updates(params, updates)
    assert params.tolist() == [65504.0, -65504.0]
    assert not state.compensation.any()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_is_refused(dtype):
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, dtype)}
    with pytest.raises(ValueError, match=f"it cannot store:\n    b: {dtype}\n") as error:
        TX.init(params)
    assert "stochastic_rounding(inner, jax.random.key(0))" in str(error.value)
