import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import LOSS_SCALES, bits
from hypothesis import given, settings
from hypothesis import strategies as st

import mpjax as mp

PARAMS = {"w": jnp.array([1.0, -2.0, -0.0, 0.0]), "b": jnp.ones((2, 2))}
COMPLEX = {"z": jnp.array([1 - 0.0j, -0.0 + 0.0j, -0.0 - 0.0j], jnp.complex64)}
BAD_VALUES = [jnp.inf, -jnp.inf, jnp.nan]


def grads_like(params, value=0.5):
    return jax.tree.map(lambda p: jnp.full(p.shape, value, p.dtype), params)


def poison(tree, leaf, index, value):
    leaves, structure = jax.tree.flatten(tree)
    leaves[leaf] = (
        leaves[leaf].ravel().at[index].set(jnp.asarray(value, leaves[leaf].dtype)).reshape(leaves[leaf].shape)
    )
    return jax.tree.unflatten(structure, leaves)


class TestUnscale:
    @pytest.mark.parametrize("name", LOSS_SCALES)
    def test_divides_by_the_scale_it_is_given(self, name):
        tx = mp.unscale()
        state = LOSS_SCALES[name]
        out, _ = tx.update({"w": jnp.float32(8.0)}, tx.init(None), loss_scale=state)
        assert out["w"] == 8.0 / float(state.loss_scale)

    def test_in_float32(self):
        tx = mp.unscale()
        tiny = jnp.full(2, 2.0**-14, jnp.float16)
        out, _ = tx.update(tiny, tx.init(tiny), loss_scale=mp.StaticLossScale(2.0**15))
        assert out.dtype == jnp.float32
        assert out.tolist() == [2.0**-29] * 2

    def test_gets_the_scale_through_a_chain(self):
        tx = optax.chain(mp.unscale(), optax.clip_by_global_norm(1.0), optax.sgd(1.0))
        params = {"w": jnp.zeros(2)}
        updates, _ = tx.update({"w": jnp.array([0.0, 2048.0])}, tx.init(params), loss_scale=mp.StaticLossScale(1024.0))
        assert updates["w"].tolist() == [0.0, -1.0]

    def test_without_a_scale(self):
        tx = mp.unscale()
        with pytest.raises(ValueError, match="without the loss scale") as error:
            tx.update({"w": jnp.ones(1)}, tx.init(None))
        assert "loss_scale=loss_scale" in str(error.value)


@pytest.mark.parametrize("value", BAD_VALUES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wrap", ["skip_on_overflow", "loss_scaled"])
def test_a_skipped_step_changes_no_bit(wrap, dtype, value):
    inner = optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda count: -0.1 * (count + 1).astype(jnp.float32)))
    tx = mp.skip_on_overflow(inner) if wrap == "skip_on_overflow" else mp.loss_scaled(inner, mp.StaticLossScale(8.0))
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    step = jax.jit(tx.update)
    _, state = step(grads_like(params), tx.init(params), params)
    updates, skipped = step(poison(grads_like(params), 1, 2, value), state, params)
    with jax.numpy_dtype_promotion("standard"):
        assert bits(optax.apply_updates(params, updates)) == bits(params)
    before, after = (s if wrap == "skip_on_overflow" else s.skip_state for s in (state, skipped))
    assert bits(after.inner_state) == bits(before.inner_state)
    assert (int(after.skips_in_a_row), int(after.skips_total), bool(after.last_step_finite)) == (1, 1, False)
    assert (int(before.skips_in_a_row), int(before.skips_total), bool(before.last_step_finite)) == (0, 0, True)


@pytest.mark.parametrize("value", BAD_VALUES, ids=str)
def test_a_skipped_step_changes_no_bit_of_a_complex_parameter(value):
    tx = mp.loss_scaled(optax.sgd(0.1), mp.StaticLossScale(8.0))
    grads = {"z": jnp.array([1j, 1.0, value], jnp.complex64)}
    updates, state = tx.update(grads, tx.init(COMPLEX), COMPLEX)
    assert int(state.skip_state.skips_total) == 1
    assert bits(optax.apply_updates(COMPLEX, updates)) == bits(COMPLEX)


def test_counts_of_skips():
    tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale(2.0**2))
    state = tx.init(PARAMS)
    seen = []
    for finite in (True, False, False, True, False, False, False):
        grads = grads_like(PARAMS, 1.0 if finite else jnp.nan)
        _, state = tx.update(grads, state, PARAMS)
        seen.append((int(state.skip_state.skips_in_a_row), int(state.skip_state.skips_total)))
    assert seen == [(0, 0), (1, 1), (2, 2), (0, 2), (1, 3), (2, 4), (3, 5)]
    assert int(state.loss_scale.at_floor) == 3
    assert optax.tree.get(state, "skips_total") == 5


def test_unscales_with_the_scale_that_was_used():
    """mpx adjusts first, then unscales: wrong gradients on every growth step (M1)."""
    tx = mp.loss_scaled(optax.sgd(1.0), mp.DynamicLossScale(2.0**3, period=1))
    params, state = {"w": jnp.float32(0.0)}, tx.init({"w": jnp.float32(0.0)})
    for step in range(5):
        assert float(mp.get_loss_scale(state).loss_scale) == 2.0 ** (3 + step)
        loss, grads = mp.value_and_grad(lambda p: 3.0 * p["w"], mp.get_loss_scale(state))(params)
        updates, state = tx.update(grads, state, params)
        assert updates["w"] == -3.0
        assert loss == 0.0


@given(leaf=st.integers(0, 1), index=st.integers(0, 3), value=st.sampled_from(BAD_VALUES))
@settings(max_examples=25)
def test_one_bad_value_anywhere_is_seen(leaf, index, value):
    tx = mp.loss_scaled(optax.sgd(0.1), mp.NoOpLossScale())
    state = tx.init(PARAMS)
    _, state = tx.update(poison(grads_like(PARAMS), leaf, index, value), state, PARAMS)
    assert int(state.skip_state.skips_total) == 1


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=150)
def test_random_trees_stand_still(data):
    """Any structure, any float dtypes, any number of bad values: no bit moves, and every good step is taken."""
    dtypes = st.sampled_from(["float16", "bfloat16", "float32"])
    shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)
    leaf = st.tuples(dtypes, shapes)
    spec = data.draw(
        st.recursive(leaf, lambda c: st.dictionaries(st.sampled_from("abc"), c, min_size=1) | st.lists(c, min_size=1))
    )
    is_leaf = lambda x: isinstance(x, tuple)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    random = lambda: jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s[1]), s[0]), spec, is_leaf=is_leaf)
    params = random()
    tx = mp.loss_scaled(optax.sgd(0.1, momentum=0.9), mp.DynamicLossScale(2.0**5))
    _, state = tx.update(random(), tx.init(params), params)
    grads = random()
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(jax.tree.leaves(params)) - 1))
        grads = poison(grads, index, 0, data.draw(st.sampled_from(BAD_VALUES)))
    updates, after = tx.update(grads, state, params)
    with jax.numpy_dtype_promotion("standard"):
        assert bits(optax.apply_updates(params, updates)) == bits(params)
    assert bits(after.skip_state.inner_state) == bits(state.skip_state.inner_state)
    assert int(after.skip_state.skips_total) == 1


@given(st.lists(st.floats(-(2.0**59), 2.0**59, width=32), min_size=4, max_size=4))
@settings(max_examples=25)
def test_finite_gradients_are_never_skipped(values):
    tx = mp.loss_scaled(optax.sgd(0.1), mp.NoOpLossScale())
    grads = {"w": jnp.array(values, jnp.float32), "b": jnp.zeros((2, 2))}
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert int(state.skip_state.skips_total) == 0


def test_where_finite_ends():
    """The largest float16 is finite; a norm past float32's range would make second moments inf, and is skipped."""
    tx = mp.loss_scaled(optax.adam(0.1), mp.NoOpLossScale())
    with jax.numpy_dtype_promotion("standard"):
        for value, skips in ((65504.0, 0), (1e18, 0), (3e38, 1)):
            _, state = tx.update(grads_like(PARAMS, value), tx.init(PARAMS), PARAMS)
            assert int(state.skip_state.skips_total) == skips
            assert bool(mp.all_finite(state))


@pytest.mark.parametrize("name", LOSS_SCALES)
def test_no_state_or_update_is_ever_non_finite(name):
    """300 overflows in a row, then a clean step: finite parameters, scale at its floor (scenario 12)."""
    tx = mp.loss_scaled(optax.sgd(0.1, momentum=0.9), LOSS_SCALES[name])
    params = {"w": jnp.ones(3)}

    def step(carry, x):
        params, state = carry
        _, grads = mp.value_and_grad(lambda p: jnp.sum(p["w"] * x), mp.get_loss_scale(state))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda c, xs: jax.lax.scan(step, c, xs)[0])
    params, state = run((params, tx.init(params)), jnp.full(300, jnp.nan))
    assert params["w"].tolist() == [1.0] * 3
    assert int(state.skip_state.skips_in_a_row) == 300
    if isinstance(LOSS_SCALES[name], mp.DynamicLossScale):
        assert float(state.loss_scale.loss_scale) == LOSS_SCALES[name].min_loss_scale
    params, state = run((params, state), jnp.ones(1))
    np.testing.assert_allclose(params["w"], 0.9, rtol=1e-6)
    assert int(state.skip_state.skips_in_a_row) == 0
    assert int(state.skip_state.skips_total) == 300


class TestCheckUpdates:
    """Scenario 9: what the inner transform makes of finite gradients is checked only when asked."""

    bad = optax.stateless(lambda u, p: jax.tree.map(lambda x: x / jnp.zeros_like(x), u))

    def test_off(self):
        tx = mp.skip_on_overflow(self.bad)
        updates, state = tx.update(grads_like(PARAMS), tx.init(PARAMS), PARAMS)
        assert not bool(mp.all_finite(updates))
        assert int(state.skips_total) == 0

    def test_gradients_are_checked_even_where_the_updates_are_finite(self):
        zeros = optax.stateless(lambda u, p: jax.tree.map(jnp.zeros_like, u))
        tx = mp.skip_on_overflow(zeros, check_updates=True)
        _, state = tx.update(grads_like(PARAMS, jnp.nan), tx.init(PARAMS), PARAMS)
        assert int(state.skips_total) == 1

    @pytest.mark.parametrize("wrap", ["skip", "scaled"])
    def test_on(self, wrap):
        if wrap == "skip":
            tx = mp.skip_on_overflow(self.bad, check_updates=True)
        else:
            tx = mp.loss_scaled(self.bad, mp.NoOpLossScale(), check_updates=True)
        updates, state = tx.update(grads_like(PARAMS), tx.init(PARAMS), PARAMS)
        assert bits(optax.apply_updates(PARAMS, updates)) == bits(PARAMS)
        assert int(optax.tree.get(state, "skips_total")) == 1


class TestHalfPrecisionParameters:
    """optax raises on the dtypes (O2c-e), drifts (O14) and underflows (O6); here the inner transform sees float32."""

    pytestmark = pytest.mark.standard_promotion

    @pytest.mark.parametrize("params_dtype", ["bfloat16", "float16", "float32"])
    @pytest.mark.parametrize("grads_dtype", ["bfloat16", "float16", "float32"])
    @pytest.mark.parametrize("mu_dtype", [None, "bfloat16", "float32"])
    def test_dtypes_never_drift(self, params_dtype, grads_dtype, mu_dtype):
        tx = mp.loss_scaled(optax.adamw(1e-2, mu_dtype=mu_dtype), mp.DynamicLossScale(2.0**3, period=2))
        params = {"w": jnp.ones(4, params_dtype)}

        def step(carry, value):
            params, state = carry
            updates, state = tx.update({"w": jnp.full(4, value, grads_dtype)}, state, params)
            return (optax.apply_updates(params, updates), state), updates["w"].dtype.name == "float32"

        values = jnp.array([1.0, jnp.inf, 1.0, 1.0])
        (new_params, state), wide = jax.lax.scan(step, (params, tx.init(params)), values)
        assert wide.all()
        assert new_params["w"].dtype == params_dtype
        adam = state.skip_state.inner_state[0]
        assert adam.nu["w"].dtype == jnp.float32
        assert adam.mu["w"].dtype == (mu_dtype or "float32")
        assert int(adam.count) == 3

    def test_float16_adam_is_finite(self):
        """O6: in float16, nu and eps are 0 and the update is -inf."""
        tx = mp.loss_scaled(optax.adam(1e-3), mp.NoOpLossScale())
        params = {"w": jnp.ones(2, jnp.float16)}
        updates, _ = tx.update({"w": jnp.full(2, 1e-4, jnp.float16)}, tx.init(params), params)
        np.testing.assert_allclose(updates["w"], -1e-3, rtol=1e-3)

    def test_second_moment_decays(self):
        """O7: nu of bfloat16 parameters never decays in optax: 0.1001 after 5000 zero gradients."""
        tx = mp.loss_scaled(optax.adam(1e-3), mp.NoOpLossScale())
        params = {"w": jnp.ones(1, jnp.bfloat16)}
        _, state = tx.update({"w": jnp.full(1, 10.0, jnp.bfloat16)}, tx.init(params), params)

        def step(state, _):
            return tx.update({"w": jnp.zeros(1, jnp.bfloat16)}, state, params)[1], None

        state, _ = jax.lax.scan(step, state, length=5000)
        assert float(state.skip_state.inner_state[0].nu["w"][0]) == pytest.approx(0.1 * 0.999**5000, rel=1e-3)

    def test_norms_do_not_overflow(self):
        """O5b: clipping zeroes float16 gradients of 300."""
        tx = mp.loss_scaled(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), mp.NoOpLossScale())
        params = {"w": jnp.zeros(4, jnp.float16)}
        updates, state = tx.update({"w": jnp.full(4, 300.0, jnp.float16)}, tx.init(params), params)
        assert updates["w"].tolist() == [-0.5] * 4
        assert int(state.skip_state.skips_total) == 0


class TestParametersWithoutAGradient:
    """The canonical loop with integers, booleans, functions and None among the parameters."""

    pytestmark = pytest.mark.standard_promotion

    @pytest.mark.parametrize("inner", [optax.adamw(0.1), optax.sgd(0.1, momentum=0.9)], ids=["adamw", "sgd"])
    @pytest.mark.parametrize("bad", [False, True])
    def test_they_stay(self, inner, bad):
        params = {"w": jnp.ones(2), "n": jnp.array(3), "flag": jnp.array(True), "none": None}
        tx = mp.loss_scaled(inner, mp.DynamicLossScale())
        loss_fn = lambda p: jnp.sum(p["w"]) * p["n"] * (jnp.nan if bad else 1.0)

        @jax.jit
        def step(params, state):
            _, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(state))(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        new, state = step(params, tx.init(params))
        assert new["n"] == 3
        assert new["n"].dtype == jnp.int32
        assert bool(new["flag"])
        assert new["none"] is None
        assert np.array_equal(new["w"], params["w"]) == bad
        assert int(state.skip_state.skips_total) == bad

    def test_functions_and_keys(self):
        """No addition can update them: they come back as what value_and_grad made of them."""
        params = {"w": jnp.ones(2), "f": jnp.tanh, "key": jax.random.key(0)}
        tx = mp.loss_scaled(optax.adamw(0.1), mp.NoOpLossScale())
        _, grads = mp.value_and_grad(lambda p: p["f"](p["w"]).sum(), mp.NoOpLossScale())(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert updates["f"] is None
        assert updates["key"].dtype == jax.dtypes.float0
        assert updates["w"].shape == (2,)


def test_fp8_gradients_that_are_finite_are_not_skipped():
    params = {"w": jnp.ones(2, jnp.float8_e4m3fn)}
    tx = mp.skip_on_overflow(optax.identity())
    state = tx.init(params)
    for value, skips in ((100.0, 0), (jnp.nan, 1)):
        _, state = tx.update({"w": jnp.full(2, value, jnp.float8_e4m3fn)}, state, params)
        assert int(state.skips_total) == skips


def test_what_the_inner_transform_sees():
    """Gradients and parameters in float32, extra arguments dropped for a transform that takes none."""
    seen = {}

    def update(updates, state, params=None):
        seen.update(updates=updates["w"].dtype.name, params=params["w"].dtype.name)
        return updates, state

    params = {"w": jnp.ones(2, jnp.bfloat16)}
    tx = mp.loss_scaled(optax.GradientTransformation(optax.init_empty_state, update), mp.NoOpLossScale())
    tx.update({"w": jnp.ones(2, jnp.float16)}, tx.init(params), params, value=1.0)
    assert seen == {"updates": "float32", "params": "float32"}


def test_a_weak_or_drifting_state_is_fixed_at_init(count_traces):
    """A state that starts as a Python number, and one that an update widens: one trace, one dtype."""

    def update(updates, state, params=None):
        weak, half = state
        return updates, (weak * jnp.float32(0.5), half.astype(jnp.float32) + updates["w"].sum())

    inner = optax.GradientTransformation(lambda params: (1.0, jnp.zeros((), jnp.float16)), update)
    tx = mp.skip_on_overflow(inner)
    step = count_traces(lambda g, s: tx.update(g, s)[1])
    jitted, state = jax.jit(step), tx.init({"w": jnp.ones(2)})
    for _ in range(3):
        state = jitted({"w": jnp.ones(2)}, state)
    assert step.traces == 1
    weak, half = state.inner_state
    assert (float(weak), weak.dtype, float(half), half.dtype) == (0.125, jnp.float32, 6.0, jnp.float16)


def test_python_numbers_as_gradients():
    for tx in (mp.loss_scaled(optax.sgd(1.0), mp.NoOpLossScale()), mp.skip_on_overflow(optax.sgd(1.0))):
        updates, _ = tx.update([3.0, 4.0], tx.init([0.0, 0.0]))
        assert [float(u) for u in updates] == [-3.0, -4.0]


def test_a_state_restored_with_python_numbers():
    tx = mp.skip_on_overflow(optax.scale_by_schedule(lambda count: 1.0))
    state = jax.tree.map(lambda x: x.item(), tx.init({"w": jnp.ones(1)}))
    _, state = tx.update({"w": jnp.ones(1)}, state)
    assert int(state.inner_state.count) == 1


@pytest.mark.standard_promotion
def test_random_keys_in_the_state_stand_still():
    tx = mp.loss_scaled(optax.add_noise(1e-2, 0.5, jax.random.key(3)), mp.NoOpLossScale())
    state = tx.init(PARAMS)
    _, taken = tx.update(grads_like(PARAMS), state, PARAMS)
    assert bits(taken.skip_state.inner_state) != bits(state.skip_state.inner_state)
    _, skipped = tx.update(grads_like(PARAMS, jnp.nan), taken, PARAMS)
    assert bits(skipped.skip_state.inner_state) == bits(taken.skip_state.inner_state)


def test_batch_statistics_of_a_skipped_step_can_be_dropped():
    """Scenario 11: the flag is in the state, and select_tree keeps what was there."""
    tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale())
    state = tx.init(PARAMS)
    old, new = {"mean": jnp.ones(2)}, {"mean": jnp.full(2, jnp.nan)}
    _, state = tx.update(grads_like(PARAMS, jnp.nan), state, PARAMS)
    assert bits(mp.select_tree(state.skip_state.last_step_finite, new, old)) == bits(old)


def test_no_branch_no_callback_no_transfer():
    """Scenario 15: the compiled step never leaves the device, and has no conditional (a host sync on GPUs)."""
    tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale())
    hlo = jax.jit(tx.update).lower(grads_like(PARAMS), tx.init(PARAMS), PARAMS).compile().as_text()
    opcodes = set(re.findall(r" = .*? ([a-z][a-z-]*)\(", hlo))
    assert "fusion" in opcodes
    assert not opcodes & {"custom-call", "infeed", "outfeed", "send", "recv", "conditional", "while", "call"}


def test_a_step_takes_nothing_from_the_host():
    """No Python number is sent to the device from one step to the next (on a CPU, reading back is not guarded)."""
    tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale())
    state, grads = tx.init(PARAMS), grads_like(PARAMS, jnp.nan)
    step = jax.jit(tx.update)
    step(grads, state, PARAMS)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            _, state = step(grads, state, PARAMS)
    assert int(state.skip_state.skips_total) == 3


def test_without_params():
    tx = mp.loss_scaled(optax.sgd(0.5), mp.StaticLossScale(4.0))
    updates, _ = tx.update(grads_like(PARAMS, 8.0), tx.init(PARAMS))
    assert updates["w"].tolist() == [-1.0] * 4


def test_empty_tree():
    tx = mp.loss_scaled(optax.sgd(0.5), mp.DynamicLossScale())
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert int(state.skip_state.skips_total) == 0


class TestGetLossScale:
    @pytest.mark.parametrize("name", LOSS_SCALES)
    def test_finds_each_kind(self, name):
        tx = optax.chain(optax.identity(), mp.loss_scaled(optax.sgd(0.1), LOSS_SCALES[name]))
        assert type(mp.get_loss_scale(tx.init(PARAMS))) is type(LOSS_SCALES[name])

    def test_none(self):
        with pytest.raises(ValueError, match="has 0 loss scales") as error:
            mp.get_loss_scale(optax.adam(0.1).init(PARAMS))
        assert "mp.loss_scaled(optax.chain(...)" in str(error.value)

    def test_two(self):
        tx = optax.chain(
            mp.loss_scaled(optax.identity(), mp.DynamicLossScale()), mp.loss_scaled(optax.sgd(1.0), mp.NoOpLossScale())
        )
        with pytest.raises(ValueError, match="has 2 loss scales") as error:
            mp.get_loss_scale(tx.init(PARAMS))
        assert "0/loss_scale: DynamicLossScale" in str(error.value)
        assert "1/loss_scale: NoOpLossScale" in str(error.value)


class TestBadInput:
    def test_gradients_of_another_structure(self):
        tx = mp.loss_scaled(optax.sgd(0.1), mp.NoOpLossScale())
        with pytest.raises(ValueError, match="grads and params have different tree structures") as error:
            jax.jit(tx.update)({"w": PARAMS["w"], "c": PARAMS["b"]}, tx.init(PARAMS), PARAMS)
        assert "only in grads: c" in str(error.value)
        assert "only in params: b" in str(error.value)

    @pytest.mark.parametrize("shape", [(1, 4), (), (5,)])
    def test_gradients_of_another_shape(self, shape):
        """Adam broadcasts (1, 4) against (4,) without a word."""
        tx = mp.loss_scaled(optax.sgd(0.1), mp.NoOpLossScale())
        with pytest.raises(ValueError, match="grads and params differ in shape") as error:
            tx.update({**PARAMS, "w": jnp.ones(shape)}, tx.init(PARAMS), PARAMS)
        assert f"w: {shape} against (4,)" in str(error.value)

    def test_another_transforms_state(self):
        for tx in (mp.loss_scaled(optax.sgd(0.1), mp.NoOpLossScale()), mp.skip_on_overflow(optax.sgd(0.1))):
            with pytest.raises(TypeError, match="the optimizer state is a tuple") as error:
                tx.update(PARAMS, optax.sgd(0.1).init(PARAMS), PARAMS)
            assert "tx.init(params)" in str(error.value)

    def test_a_loss_scale_inside_could_never_back_off(self):
        scaled = optax.chain(mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale()))
        for tx in (mp.skip_on_overflow(scaled), mp.loss_scaled(scaled, mp.NoOpLossScale())):
            with pytest.raises(ValueError, match="holds a loss scale") as error:
                tx.init(PARAMS)
            assert "outermost" in str(error.value)

    @pytest.mark.parametrize("inner", [None, 0.1, optax.adam])
    def test_inner_is_no_transform(self, inner):
        for wrap in (mp.skip_on_overflow, lambda i: mp.loss_scaled(i, mp.NoOpLossScale())):
            with pytest.raises(TypeError, match="an optax gradient transformation"):
                wrap(inner)

    def test_loss_scale_is_none(self):
        with pytest.raises(TypeError, match="a loss scale"):
            mp.loss_scaled(optax.sgd(0.1), 1024.0)
