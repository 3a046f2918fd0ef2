"""Defects demonstrated in other libraries, each with the right behaviour here.

The codes are those of the research notes: J jmp and jamp, M mpx, A jaxamp, F flax's DynamicScale, O optax, D
several devices. Those whose natural place is a table elsewhere are tested there (test_under_transforms: J1, J4, J6,
C1, C6; test_policy: J11; test_composition: O3, O13; test_loss_scaled: M1, O2, O5 to O7, O14; test_shard_map: D3, D4).
"""

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest
from helpers import bits

import mpjax as mp

PARAMS = {"w": jnp.array([1.0, 1.0])}


def run(tx, grads, params=PARAMS):
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("scale", [jnp.asarray(2.0**15), 2.0**15, jmp.half_dtype()(2**15), np.float16(2**15)])
@pytest.mark.parametrize("make", [mp.DynamicLossScale, mp.StaticLossScale])
def test_j2_documented_constructors_unscale_in_float32(make, scale):
    """jmp's docstring and README: a weak or half scale unscales a float16 gradient of 2**-14 in float16, to 0."""
    out = make(scale).unscale(jnp.full(3, 2.0**-14, jnp.float16))
    assert out.dtype == jnp.float32
    assert out.tolist() == [2.0**-29] * 3


def test_j3_readme_recipe_adjusts():
    """jmp raises on float32 against float16 (jmp#47)."""
    assert float(mp.DynamicLossScale(jmp.half_dtype()(2**15)).adjust(jnp.array(True)).loss_scale) == 2.0**15


def test_j12_a_float16_loss_recovers_by_itself():
    """A float16 loss starts its backward pass with the scale in float16: 65536 is inf there, 32768 is not."""
    tx = mp.loss_scaled(optax.sgd(1.0), mp.DynamicLossScale(2.0**16))
    state = tx.init(PARAMS)
    skips = []
    for _ in range(3):
        loss, grads = mp.value_and_grad(
            lambda p: (p["w"].astype(jnp.float16) * jnp.float16(0.5)).sum(), mp.get_loss_scale(state)
        )(PARAMS)
        assert loss == 1.0
        updates, state = tx.update(grads, state, PARAMS)
        skips.append(int(state.skip_state.skips_total))
    assert skips == [1, 1, 1]
    assert updates["w"].tolist() == [-0.5, -0.5]


def test_j1_the_floor_holds_under_jit():
    state = mp.DynamicLossScale(2.0**10, min_loss_scale=2.0**10)
    assert float(jax.jit(lambda s: s.adjust(False))(state).loss_scale) == 2.0**10


def test_m2_no_dtype_is_global():
    """mpx's setter does nothing, and a global is baked into jitted functions (M15). A policy is an argument here."""
    cast = jax.jit(lambda x, policy: policy.cast_to_compute(x), static_argnums=1)
    x = jnp.ones(2)
    assert cast(x, mp.get_policy("mixed_float16")).dtype == jnp.float16
    assert cast(x, mp.get_policy("mixed_bfloat16")).dtype == jnp.bfloat16


def test_m3_scales_are_powers_of_two():
    """mpx's documented 65504 halves to 32752 and reports inf for any float16 loss above 1 (M3b, M7)."""
    with pytest.raises(ValueError, match=r"2\.0\*\*16"):
        mp.DynamicLossScale(65504.0)


def test_m14_overflow_is_seen_without_scaling_too():
    _, state = run(mp.loss_scaled(optax.sgd(0.1), mp.NoOpLossScale()), [{"w": jnp.array([jnp.nan, 1.0])}])
    assert not bool(state.skip_state.last_step_finite)


def test_a1_a_burst_of_nans_is_survived():
    """jaxamp: 165 NaN batches take the scale to 0, and then a clean batch gives NaN for ever."""
    bad, good = {"w": jnp.full(2, jnp.nan)}, {"w": jnp.ones(2)}
    params, state = run(mp.loss_scaled(optax.sgd(0.5), mp.DynamicLossScale()), [bad] * 165 + [good])
    assert params["w"].tolist() == [0.5, 0.5]
    assert float(state.loss_scale.loss_scale) == 1.0
    assert int(state.loss_scale.at_floor) == 165 - 16


def test_a2_growth_never_reaches_inf():
    state = mp.DynamicLossScale(2.0**120, period=1)
    state, _ = jax.lax.scan(lambda s, _: (s.adjust(True), None), state, length=50)
    assert float(state.loss_scale) == 2.0**127


def test_a3_metrics_are_no_gradients():
    """jaxamp: a perplexity of inf in aux takes the scale from 32768 to 16 in one step."""
    tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale())
    state = tx.init(PARAMS)
    loss_fn = lambda p: (p["w"].sum(), {"perplexity": jnp.float32(jnp.inf)})
    (_, aux), grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(state), has_aux=True)(PARAMS)
    _, state = tx.update(grads, state, PARAMS)
    assert np.isinf(aux["perplexity"])
    assert float(state.loss_scale.loss_scale) == 2.0**16


def test_f2_the_first_step_of_the_default_does_not_overflow():
    """flax: its docstring's first step overflows and reports NaN, since a weak 65536 meets a float16 loss."""
    tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale())
    state = tx.init(PARAMS)
    half = mp.get_policy("mixed_float16")

    def loss_fn(params):
        out = half.cast_to_compute(params)["w"] * jnp.float16(1e-3)
        return jnp.mean(half.cast_to_output(out))

    loss, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(state))(PARAMS)
    _, state = tx.update(grads, state, PARAMS)
    assert float(loss) == pytest.approx(1e-3, rel=1e-3)
    assert bool(state.skip_state.last_step_finite)


def test_f3_growth_after_exactly_the_period():
    """flax and jaxamp grow every period + 1 steps."""
    state = mp.DynamicLossScale(2.0**4, period=3)
    history = jax.lax.scan(lambda s, _: (s.adjust(True),) * 2, state, length=9)[1].loss_scale
    assert np.log2(history).tolist() == [4, 4, 5, 5, 5, 6, 6, 6, 7]


def test_f4_the_default_floor_keeps_gradients():
    """flax: 60 NaN batches give 5.7e-14, 120,060 clean steps to climb back; at its floor gradients are 0."""
    state = mp.DynamicLossScale()
    state, _ = jax.lax.scan(lambda s, _: (s.adjust(False), None), state, length=60)
    assert float(state.loss_scale) == 1.0
    assert int(state.at_floor) == 60 - 16


def test_f6_complex_gradients_keep_their_imaginary_part():
    assert mp.StaticLossScale(4.0).unscale(jnp.complex64(4 + 8j)) == 1 + 2j


def test_f7_float64_gradients_keep_their_digits(x64):
    x = jnp.asarray(1.0 + 2.0**-40, jnp.float64)
    assert mp.StaticLossScale(4.0).unscale(mp.StaticLossScale(4.0).scale(x)) == x


@pytest.mark.standard_promotion
def test_o1_no_number_of_errors_lets_a_nan_through():
    """optax.apply_if_finite applies the NaN after max_consecutive_errors and poisons Adam for good."""
    bad, good = {"w": jnp.array([jnp.nan, 0.1])}, {"w": jnp.ones(2)}
    params, state = run(mp.loss_scaled(optax.adam(0.1), mp.NoOpLossScale()), [bad] * 12 + [good])
    np.testing.assert_allclose(params["w"], 0.9, rtol=1e-5)
    assert int(state.skip_state.skips_total) == 12


def test_o1c_a_scale_search_of_many_overflows():
    """Nine overflows in search of a scale destroy the parameters under apply_if_finite with max=5."""
    tx = mp.loss_scaled(optax.sgd(1.0), mp.DynamicLossScale(2.0**24))
    params, state = {"w": jnp.float32(0.0)}, tx.init({"w": jnp.float32(0.0)})
    for _ in range(10):
        # A float16 backward pass in which gradients of 1 overflow from a scale of 2**16 on.
        loss_fn = lambda p: p["w"].astype(jnp.float16).astype(jnp.float32)
        _, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(state))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert int(state.skip_state.skips_total) == 9
    assert float(state.loss_scale.loss_scale) == 2.0**15
    assert float(params["w"]) == -1.0


def test_o5f_the_check_comes_before_clipping():
    """Clipping an inf gives [nan, 0]; a check behind it would report the wrong place, or nothing."""
    tx = mp.loss_scaled(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), mp.NoOpLossScale())
    params, state = run(tx, [{"w": jnp.array([jnp.inf, 1.0])}])
    assert bits(params) == bits(PARAMS)
    assert int(state.skip_state.skips_total) == 1


def test_o10_integers_and_keys_are_not_cast():
    tree = {"n": jnp.arange(2), "k": jax.random.key(0)}
    cast = mp.get_policy("float16").cast_to_compute(tree)
    assert cast["n"] is tree["n"]
    assert cast["k"] is tree["k"]


def test_levanter_selects_and_does_not_multiply():
    """Levanter multiplies the update by 0 on a bad step: 0 * NaN is NaN."""
    params, _ = run(mp.skip_on_overflow(optax.sgd(1.0)), [{"w": jnp.array([jnp.nan, 1.0])}])
    assert bits(params) == bits(PARAMS)


def test_maxtext_takes_the_clean_step_after_a_bad_one():
    """MaxText applies a NaN during warm-up, and after one skips the next 128 clean steps."""
    bad, good = {"w": jnp.full(2, jnp.nan)}, {"w": jnp.ones(2)}
    params, state = run(mp.skip_on_overflow(optax.sgd(0.25)), [bad, good, good])
    assert params["w"].tolist() == [0.5, 0.5]
    assert int(state.skips_total) == 1
