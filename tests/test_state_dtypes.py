"""Moments stored in few bits: which leaves, what is computed with them, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from helpers import bits
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_blockwise import reference

import mpjax as mp
from mpjax.transforms import BlockScaled, state_dtypes

pytestmark = pytest.mark.standard_promotion

PARAMS = {"dense": {"w": jnp.ones((2, 40)), "bias": jnp.ones(40)}, "scale": jnp.ones(())}
SMALL = {"w": jnp.ones((2, 40)), "scale": jnp.ones(())}
BOTH = {"mu": "bfloat16", "nu": "bfloat16"}
DTYPES = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
PAIRS = [{"mu": "float8_e4m3fn", "nu": "bfloat16"}, {"mu": "float16", "nu": "float8_e5m2"}]


def grads_like(params, seed=0, dtype=None):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(k, x.shape, dtype or x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def stored_in(state):
    """The dtype of each leaf of the inner state by its path, of one with scales in brackets."""
    leaves = jax.tree_util.tree_leaves_with_path(state.inner_state)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): str(x.dtype) for path, x in leaves}
    assert set(state.scales) <= set(found)
    return {path: f"[{dtype}]" if path in state.scales else dtype for path, dtype in found.items()}


def narrow(state):
    return {path for path, dtype in stored_in(state).items() if dtype not in ("float32", "int32", "bool", "uint32")}


def widened(state):
    """The inner state with all moments in float32."""

    def one(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return BlockScaled(x, state.scales[name]).decode() if name in state.scales else x.astype(jnp.float32)

    return jax.tree_util.tree_map_with_path(one, state.inner_state)


class TestWhichLeaves:
    @pytest.mark.parametrize(
        ("inner", "dtypes", "expected"),
        [
            (optax.adamw(1e-3), {"mu": "bf16"}, ["0/mu/dense/bias", "0/mu/dense/w"]),
            (optax.adamw(1e-3), {r"0/nu/.*": "bf16"}, ["0/nu/dense/bias", "0/nu/dense/w"]),
            (
                optax.adamw(1e-3),
                {"mu|nu": "bf16", ".*/w": "bf16"},
                [f"0/{m}/dense/{p}" for m in ("mu", "nu") for p in ("bias", "w")],
            ),
            (optax.adamw(1e-3), {"W": "bf16"}, ["0/mu/dense/w", "0/nu/dense/w"]),
            (optax.sgd(0.1, momentum=0.9), {"trace": "bf16"}, ["0/trace/dense/bias", "0/trace/dense/w"]),
            (optax.lion(1e-3), {"mu": "bf16"}, ["0/mu/dense/bias", "0/mu/dense/w"]),
            (
                optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
                {".*": "bf16"},
                [f"inner_state/0/{m}/dense/{p}" for m in ("mu", "nu") for p in ("bias", "w")],
            ),
            (
                optax.masked(optax.adam(1e-3), {"dense": {"w": True, "bias": False}, "scale": True}),
                {"mu": "bf16"},
                ["inner_state/0/mu/dense/w"],
            ),
            (
                optax.multi_transform({"a": optax.adam(1e-3), "b": optax.sgd(0.1)}, {"dense": "a", "scale": "b"}),
                {"nu": "bf16"},
                ["inner_states/a/inner_state/0/nu/dense/bias", "inner_states/a/inner_state/0/nu/dense/w"],
            ),
            # Coefficients of its polynomial: an array of shape (3,), and no moment.
            (optax.contrib.muon(1e-3), {"muon": "bf16"}, ["inner_states/muon/inner_state/0/mu/dense/w"]),
            (
                optax.MultiSteps(optax.adam(1e-3), 2),
                {"acc_grads": "bf16"},
                ["acc_grads/dense/bias", "acc_grads/dense/w"],
            ),
        ],
    )
    def test_by_pattern(self, inner, dtypes, expected):
        tx = state_dtypes(inner, dtypes)
        state = jax.eval_shape(tx.init, PARAMS)
        assert narrow(state) == set(expected)
        # An update finds the same leaves, in the gradients' tree.
        _, after = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
        assert stored_in(after) == stored_in(state)

    def test_factored_moments(self):
        params = {"w": jnp.ones((2, 40))}
        state = jax.eval_shape(state_dtypes(optax.sm3(0.1), {"mu": "bf16"}).init, params)
        assert narrow(state) == {"0/mu/w/0", "0/mu/w/1"}
        tx = state_dtypes(optax.adafactor(1e-3, min_dim_size_to_factor=2), {"v_.*": "bf16"})
        assert {"0/v_row/dense/w", "0/v_col/dense/w"} <= narrow(jax.eval_shape(tx.init, PARAMS))

    def test_each_dtype_has_its_form(self):
        for dtype in DTYPES:
            found = stored_in(jax.eval_shape(state_dtypes(optax.adam(1e-3), {"mu|nu": dtype}).init, PARAMS))
            assert found == {
                "0/count": "int32",
                "0/mu/scale": "float32",
                "0/nu/scale": "float32",
                **{
                    f"0/{m}/dense/{p}": dtype if dtype == "bfloat16" else f"[{dtype}]"
                    for m in ("mu", "nu")
                    for p in ("w", "bias")
                },
            }

    def test_bytes(self):
        """Two moments in 8 bits: 2.01 bytes beside each weight, in place of 8."""
        params = {"w": jnp.ones((4, 1024))}
        sizes = {}
        for dtype in ("float32", *DTYPES):
            state = state_dtypes(optax.scale_by_adam(), {"mu|nu": dtype}).init(params)
            moments = state.inner_state.mu, state.inner_state.nu, state.scales
            sizes[dtype] = sum(x.nbytes for x in jax.tree.leaves(moments)) / 4096
        assert sizes == {
            "float32": 8,
            "bfloat16": 4,
            "float16": 4 + 8 / 1024,
            "float8_e4m3fn": 2 + 8 / 1024,
            "float8_e5m2": 2 + 8 / 1024,
        }
        tx = state_dtypes(optax.scale_by_adam(), {"mu": "e4m3"}, block_size=256)
        assert jax.eval_shape(tx.init, params).scales["mu/w"].shape == (4, 4)

    def test_what_blocks_would_not_make_smaller_stays(self):
        params = {"column": jnp.ones((50, 1)), "w": jnp.ones((50, 8))}
        found = stored_in(jax.eval_shape(state_dtypes(optax.adam(1e-3), {"mu": "float8_e4m3fn"}).init, params))
        assert found["0/mu/column"] == "float32"
        assert found["0/mu/w"] == "[float8_e4m3fn]"

    @pytest.mark.parametrize(
        "params", [jnp.ones(8), [jnp.ones(8), jnp.ones((2, 8))], {"mu": jnp.ones(8), "b1": jnp.ones(8)}]
    )
    def test_other_trees_of_parameters(self, params):
        """Names of parameters are parts of paths too, and a hyperparameter of such a name stays."""
        tx = state_dtypes(optax.inject_hyperparams(optax.adam)(1e-3, b1=jnp.full(8, 0.9)), {".*": "bf16"})
        found = stored_in(jax.eval_shape(tx.init, params))
        assert all((dtype == "bfloat16") == ("/mu" in path or "/nu" in path) for path, dtype in found.items())
        assert found["hyperparams/b1"] == "float32"

    def test_parameters_and_masters_of_other_transforms_stay(self):
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
        for wrap, field in (
            (mp.transforms.master_weights, "masters"),
            (mp.transforms.kahan, "compensation"),
            (lambda inner: mp.transforms.params_ema(inner, 0.9), "average"),
        ):
            state = jax.eval_shape(state_dtypes(wrap(optax.adam(1e-3)), {".*": "float8_e4m3fn"}).init, params)
            assert {path for path, dtype in stored_in(state).items() if dtype.startswith("[")} == {
                f"inner_state/0/{m}/dense/{p}" for m in ("mu", "nu") for p in ("w", "bias")
            }
            assert any(path.startswith(field) for path in stored_in(state))

    def test_integers_keys_and_scalars_stay(self):
        state = {"n": jnp.arange(3), "k": jax.random.key(0), "x": jnp.float32(1), "w": jnp.ones(3)}
        inner = optax.GradientTransformation(lambda params: state, lambda u, s, p=None: (u, s))
        params = {name: jnp.ones(3) for name in state}
        tx = state_dtypes(inner, {".*": "bf16"})
        before = tx.init(params)
        assert stored_in(before) == {"n": "int32", "k": "key<fry>", "x": "float32", "w": "bfloat16"}
        _, after = tx.update(params, before)
        assert stored_in(after) == stored_in(before)


class TestComputedInFloat32:
    @pytest.mark.parametrize("inner", [optax.adamw(1e-2), optax.sgd(0.1, momentum=0.9), optax.lion(1e-3)])
    def test_float32_is_plain_optax(self, inner):
        tx = state_dtypes(inner, {"mu|nu|trace": "float32"})
        state, plain = tx.init(SMALL), inner.init(SMALL)
        step, plain_step = jax.jit(tx.update), jax.jit(inner.update)
        for seed in range(3):
            updates, state = step(grads_like(SMALL, seed), state, SMALL)
            expected, plain = plain_step(grads_like(SMALL, seed), plain, SMALL)
            assert bits(updates) == bits(expected)
            assert bits(state.inner_state) == bits(plain)

    @pytest.mark.parametrize(
        ("dtype", "block_size"),
        [("bfloat16", None), ("float16", None), ("float8_e4m3fn", None), ("float8_e4m3fn", 64), ("float8_e5m2", 64)],
    )
    def test_adam_with_stored_moments_by_hand(self, dtype, block_size):
        """Scenario 34, in NumPy and float64: widen, one step of Adam, round to nearest, twice."""
        w = jnp.ones((3, 300))
        tx = state_dtypes(optax.adam(0.1, eps=1e-8), {"mu|nu": dtype}, rounding="nearest", block_size=block_size)
        state, step = tx.init(w), jax.jit(tx.update)
        store = lambda x: x.astype(dtype).astype(np.float64) if dtype == "bfloat16" else reference(x, dtype, block_size)
        mu = nu = np.zeros(w.shape)
        for t in (1, 2):
            grad = np.asarray(jax.random.normal(jax.random.key(t), w.shape)) * np.float32(1e-3)
            updates, state = step(grad, state)
            new_mu, new_nu = 0.9 * mu + 0.1 * grad, 0.999 * nu + 0.001 * np.square(grad, dtype=np.float64)
            # optax's bias correction is float32, which has 0.999 to 3e-8, and 1 - 0.999 to 3e-5.
            first, second = (float(1 - np.float32(b) ** np.float32(t)) for b in (0.9, 0.999))
            by_hand = -0.1 * (new_mu / first) / (np.sqrt(new_nu / second) + 1e-8)
            np.testing.assert_allclose(updates, by_hand, rtol=1e-5, atol=1e-7)
            mu, nu = store(new_mu.astype(np.float32)), store(new_nu.astype(np.float32))
            kept = widened(state)[0]
            # A value half-way between two is rounded either way.
            for got, expected in ((kept.mu, mu), (kept.nu, nu)):
                wrong = ~np.isclose(got, expected, rtol=1e-5, atol=0)
                assert wrong.sum() <= 2
            mu, nu = np.asarray(kept.mu, np.float64), np.asarray(kept.nu, np.float64)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_small_gradient_in_half_precision(self, dtype):
        """O6: a float16 second moment of 1e-4 is 0, and the step -inf."""
        params = {"w": jnp.ones(8, jnp.float16)}
        tx = state_dtypes(optax.adam(1e-3), {"mu|nu": dtype})
        state, step = tx.init(params), jax.jit(tx.update)
        for _ in range(20):
            updates, state = step({"w": jnp.full(8, 1e-4, jnp.float16)}, state, params)
            shares = updates["w"] / -1e-3
            assert 1 / 3 < shares.min() <= shares.max() < 3
            if not dtype.startswith("float8"):
                np.testing.assert_allclose(shares, 1, rtol=0.02)

    @pytest.mark.parametrize(
        ("dtype", "rounding"), [(dtype, "stochastic") for dtype in DTYPES] + [("float8_e4m3fn", "nearest")]
    )
    def test_no_absurd_update_whatever_the_range(self, dtype, rounding):
        """Gradients of 1e-15 to 1e3 in one block: no step is much longer than one of float32 can be."""
        scales = jnp.logspace(-15, 3, 256)
        tx = state_dtypes(optax.scale_by_adam(), {"mu|nu": dtype}, rounding=rounding)
        step = jax.jit(tx.update)
        state = tx.init(scales)
        for seed in range(60):
            updates, state = step(scales * jax.random.normal(jax.random.key(seed), (256,)), state)
            assert float(jnp.abs(updates).max()) < 20

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_hyperparameters_with_half_precision_parameters(self, dtype):
        """optax#1414 (O13b): b2 = 0.999 becomes 1 in bfloat16, and eps 0 in float16."""
        params = jax.tree.map(lambda x: x.astype(dtype), SMALL)
        tx = state_dtypes(optax.inject_hyperparams(optax.adam)(learning_rate=1e-2), {".*": "bfloat16"})
        state, step = tx.init(params), jax.jit(tx.update)
        for seed in range(2):
            updates, state = step(grads_like(params, seed), state, params)
        assert bool(mp.all_finite((updates, state)))
        found = {name: float(x) for name, x in state.inner_state.hyperparams.items()}
        assert found == pytest.approx({"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0, "learning_rate": 1e-2})

    def test_what_the_inner_transform_sees(self):
        seen = {}

        def update(updates, state, params=None, **extra):
            seen.update(extra, dtypes={x.dtype.name for x in jax.tree.leaves((updates, state, params))})
            return updates, state

        spy = optax.GradientTransformationExtraArgs(lambda p: jax.tree.map(jnp.zeros_like, p), update)
        params = {"w": jnp.ones(8, jnp.bfloat16), "v": jnp.ones(8, jnp.float8_e4m3fn)}
        tx = state_dtypes(spy, {"w": "bfloat16", "v": "float8_e5m2"})
        tx.update({"w": jnp.ones(8, jnp.float16), "v": jnp.ones(8, jnp.float8_e5m2)}, tx.init(params), params, value=3)
        assert seen == {"value": 3, "dtypes": {"float32"}}

    def test_without_params(self):
        tx = state_dtypes(optax.sgd(0.1, momentum=0.9), {"trace": "bfloat16"})
        updates, _ = tx.update(grads_like(SMALL), tx.init(SMALL))
        assert updates["w"].dtype == jnp.float32


def decayed(dtype, rounding, steps):
    """The second moment after one gradient and then none, as a share of float32's."""
    n = 4096
    tx = state_dtypes(optax.scale_by_adam(), {"nu": dtype}, rounding=rounding)
    first = jnp.linspace(5.0, 15.0, n)
    state = tx.update(first, tx.init(first))[1]
    step = lambda s, _: (tx.update(jnp.zeros(n), s)[1], None)
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, length=steps))(state)
    return np.asarray(widened(state).nu) / np.asarray(0.001 * first**2 * 0.999**steps)


class TestRounding:
    @pytest.mark.parametrize(("dtype", "spread"), [("bfloat16", 0.08), ("float16", 0.03), ("float8_e4m3fn", 0.7)])
    def test_a_second_moment_decays(self, dtype, spread):
        """O7, O12: as in float32 on average. After 1000 steps it is 0.37 of what it was."""
        ratio = decayed(dtype, "stochastic", 1000)
        assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / np.sqrt(ratio.size)
        assert 0.3 * spread < ratio.std() < spread

    def test_to_nearest_it_never_does(self):
        """Which is why that is not the default: it loses a thousandth of itself in a step, and bfloat16 has 1/256."""
        ratio = decayed("bfloat16", "nearest", 1000)
        np.testing.assert_allclose(ratio * 0.999**1000, 1, rtol=0.005)

    @pytest.mark.parametrize(
        ("dtype", "error"), [("bfloat16", 0.03), ("float16", 0.01), ("float8_e4m3fn", 0.2), ("float8_e5m2", 0.28)]
    )
    def test_how_far_a_second_moments_root_is_off(self, dtype, error):
        """For normal gradients of scales from 0.01 to 100: 2% in bfloat16, 15% with 8 bits."""
        shape = (8, 256)
        scales = jnp.exp(2 * jax.random.normal(jax.random.key(9), shape))
        tx, plain = state_dtypes(optax.scale_by_adam(b2=0.99), {"nu": dtype}), optax.scale_by_adam(b2=0.99)

        def step(carry, key):
            state, exact = carry
            grads = scales * jax.random.normal(key, shape)
            state, exact = tx.update(grads, state)[1], plain.update(grads, exact)[1]
            return (state, exact), jnp.sqrt(widened(state).nu / exact.nu)

        run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[1][300:])
        ratio = run((tx.init(scales), plain.init(scales)), jax.random.split(jax.random.key(1), 400))
        assert float(jnp.mean(ratio)) == pytest.approx(1, abs=0.03)
        assert error / 6 < float(jnp.std(ratio)) < error

    @pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
    def test_bits_are_those_of_key_step_and_leaf(self, dtype):
        params = {"a": jnp.ones((4, 256)), "b": jnp.ones((4, 256))}
        grads = jax.tree.map(lambda p: jnp.full(p.shape, 1.238), params)

        def moments(key, steps):
            tx = state_dtypes(optax.trace(0.0), {"trace": dtype}, key=key)
            state = tx.init(params)
            for _ in range(steps):
                _, state = tx.update(grads, state)
            return widened(state).trace

        first, again = moments(None, 1), moments(jax.random.key(0), 1)
        assert bits(first) == bits(again)
        ups = lambda tree: np.concatenate([np.asarray(x).ravel() > 1.238 for x in tree.values()])
        a, b = np.split(ups(first), 2)
        others = [ups(moments(jax.random.key(1), 1))[:1024], ups(moments(None, 2))[:1024], b]
        assert 0.02 < a.mean() < 0.98
        for other in others:
            assert abs(np.corrcoef(a, other)[0, 1]) < 4 / np.sqrt(a.size)

    def test_weights_rounded_with_the_same_key_get_other_bits(self):
        params, key = {"w": jnp.ones((8, 256), jnp.bfloat16)}, jax.random.key(5)
        tx = mp.transforms.stochastic_rounding(state_dtypes(optax.trace(0.0), {"trace": "bf16"}, key=key), key)
        # Weights and moments are both half-way between two numbers.
        grads = {"w": jnp.full((8, 256), 2.0**-8 + 2.0**-16)}
        updates, state = tx.update(grads, tx.init(params), params)
        weights = np.asarray(mp.transforms.apply_updates(params, updates)["w"], np.float32).ravel() > 1
        moments = np.asarray(state.inner_state.inner_state.trace["w"], np.float32).ravel() > grads["w"][0, 0]
        assert 0.4 < weights.mean() < 0.6
        assert 0.4 < moments.mean() < 0.6
        assert abs(np.corrcoef(weights, moments)[0, 1]) < 4 / np.sqrt(weights.size)

    def test_other_key_implementations(self):
        tx = state_dtypes(optax.trace(0.9), {"trace": "bf16"}, key=jax.random.key(0, impl="rbg"))
        _, state = tx.update(jnp.ones(8), tx.init(jnp.ones(8)))
        assert state.key.shape == (4,)

    def test_an_initial_value_is_rounded_to_nearest(self):
        tx = state_dtypes(optax.adagrad(0.1, initial_accumulator_value=0.1), {"sum_of_squares": "bfloat16"})
        (stored,) = jax.tree.leaves(tx.init(jnp.ones(8)).inner_state)
        assert stored.tolist() == [float(jnp.bfloat16(0.1))] * 8


class TestStays:
    @pytest.mark.parametrize("grads_dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("params_dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("mu_dtype", [None, "bfloat16"])
    def test_dtypes_never_drift(self, params_dtype, grads_dtype, mu_dtype):
        """O14: Adam's mu becomes float32 with float32 gradients, so that scan raises and jit traces again."""
        params = jax.tree.map(lambda x: x.astype(params_dtype), SMALL)
        tx = state_dtypes(optax.adamw(1e-2, mu_dtype=mu_dtype), {"nu": "float8_e4m3fn", "mu": "bfloat16"})
        grads = jax.tree.map(lambda x: x.astype(grads_dtype), SMALL)
        before = jax.eval_shape(tx.init, params)
        step = lambda s, _: (tx.update(grads, s, params)[1], None)
        after = jax.eval_shape(lambda s: jax.lax.scan(step, s, length=2)[0], before)
        assert stored_in(after) == stored_in(before)
        assert jax.tree.structure(after) == jax.tree.structure(before)

    def test_one_trace(self, count_traces):
        tx = state_dtypes(optax.adamw(1e-2), {"nu": "float8_e4m3fn", "mu": "bfloat16"})
        step = count_traces(lambda s: tx.update(SMALL, s, SMALL)[1])
        jitted, state = jax.jit(step), tx.init(SMALL)
        for _ in range(3):
            state = jitted(state)
        assert step.traces == 1
        assert int(state.step) == int(state.inner_state[0].count) == 3
        assert bits(state.key) == bits(jax.random.key_data(jax.random.key(0)))

    def test_weak_leaves_of_a_state(self, count_traces):
        inner = optax.GradientTransformation(
            lambda p: (jnp.asarray(1.0), jnp.zeros(4)), lambda u, s, p=None: (u, (s[0] * jnp.float32(0.5), s[1] + u))
        )
        tx = state_dtypes(inner, {".*": "bf16"})
        step = count_traces(lambda s: tx.update(jnp.ones(4), s)[1])
        jitted, state = jax.jit(step), tx.init(jnp.ones(4))
        for _ in range(3):
            state = jitted(state)
        assert step.traces == 1
        assert (float(state.inner_state[0]), state.inner_state[1].tolist()) == (0.125, [3.0] * 4)

    def test_jit_and_eager_agree(self):
        params = {"w": jnp.ones((2, 40)), "bias": jnp.ones(40)}
        tx = state_dtypes(optax.trace(0.9), {"w": "float8_e4m3fn", "bias": "bfloat16"})
        state = tx.init(params)
        assert bits(jax.jit(tx.update)(grads_like(params), state)) == bits(tx.update(grads_like(params), state))

    @pytest.mark.parametrize("dtypes", PAIRS, ids=str)
    @pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
    def test_a_skipped_step_changes_no_bit(self, dtypes, bad):
        tx = mp.loss_scaled(state_dtypes(optax.adamw(1e-2), dtypes), mp.DynamicLossScale(2.0**4))
        step = jax.jit(tx.update)
        _, state = step(grads_like(SMALL), tx.init(SMALL), SMALL)
        updates, skipped = step(jax.tree.map(lambda g: g * bad, grads_like(SMALL)), state, SMALL)
        assert bits(skipped.skip_state.inner_state) == bits(state.skip_state.inner_state)
        assert bits(optax.apply_updates(SMALL, updates)) == bits(SMALL)
        assert int(skipped.skip_state.skips_total) == 1

    def test_a_skip_inside_leaves_the_values(self):
        tx = state_dtypes(mp.skip_on_overflow(optax.adam(1e-2)), {"mu|nu": "float8_e4m3fn"})
        step = jax.jit(tx.update)
        _, state = step(grads_like(SMALL), tx.init(SMALL), SMALL)
        _, skipped = step(jax.tree.map(lambda g: g * jnp.nan, SMALL), state, SMALL)
        before, after = (widened(s).inner_state[0] for s in (state, skipped))
        assert bits(before) == bits(after)

    def test_donation(self):
        tx = state_dtypes(optax.adamw(1e-2), {"mu": "float8_e4m3fn", "nu": "bf16"})
        donating, step = jax.jit(tx.update, donate_argnums=1), jax.jit(tx.update)
        # A second one, since the factory's key must not have been given away with the first.
        for state, kept in ((tx.init(SMALL), tx.init(SMALL)), (tx.init(SMALL), tx.init(SMALL))):
            for seed in range(2):
                _, state = donating(grads_like(SMALL, seed), state, SMALL)
                _, kept = step(grads_like(SMALL, seed), kept, SMALL)
            assert bits(state) == bits(kept)

    @pytest.mark.parametrize("dtypes", PAIRS, ids=str)
    def test_checkpoints(self, dtypes, tmp_path):
        tx = mp.loss_scaled(state_dtypes(optax.adamw(1e-2), dtypes), mp.DynamicLossScale())
        step = jax.jit(tx.update)
        _, state = step(grads_like(SMALL), tx.init(SMALL), SMALL)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
        assert bits(restored) == bits(state)
        assert bits(serialization.from_bytes(state, serialization.to_bytes(state))) == bits(state)
        after, again = (step(grads_like(SMALL, 1), s, SMALL) for s in (state, restored))
        assert bits(after) == bits(again)


COMBINED = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(
        rate=1.0
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "masked": lambda tx: optax.masked(tx, {"w": True, "scale": True}),
    "multi_transform": lambda tx: optax.multi_transform({"all": tx}, {"w": "all", "scale": "all"}),
    "params_ema": lambda tx: mp.transforms.params_ema(tx, 0.9),
}


class TestComposes:
    @pytest.mark.parametrize("name", COMBINED)
    def test_inside_each_combinator(self, name):
        make = lambda: state_dtypes(optax.adamw(1e-2), BOTH)
        outer, alone = mp.loss_scaled(COMBINED[name](make()), mp.StaticLossScale(8.0)), make()
        state, expected_state = outer.init(SMALL), alone.init(SMALL)
        step, alone_step = jax.jit(outer.update), jax.jit(alone.update)
        for seed in range(3):
            grads = jax.tree.map(lambda g: g * 0.01, grads_like(SMALL, seed))
            updates, state = step(jax.tree.map(lambda g: g * 8, grads), state, SMALL)
            expected, expected_state = alone_step(grads, expected_state, SMALL)
            for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize(
        ("kept", "order"),
        [(kept, "inside") for kept in ("masters", "remainder", "kahan", "stochastic")] + [("masters", "outside")],
    )
    def test_with_weights_in_half_precision(self, kept, order):
        """Inside, as documented; and outside it is such a transform itself, since loss_scaled has to show it them."""
        wrap = {
            "masters": mp.transforms.master_weights,
            "remainder": lambda tx: mp.transforms.master_weights(tx, form="remainder"),
            "kahan": mp.transforms.kahan,
            "stochastic": lambda tx: mp.transforms.stochastic_rounding(tx, jax.random.key(0)),
        }[kept]
        store = lambda tx: state_dtypes(tx, {"mu": "float8_e4m3fn", "nu": "bfloat16"})
        adamw = optax.adamw(1e-2)
        tx = mp.loss_scaled(wrap(store(adamw)) if order == "inside" else store(wrap(adamw)), mp.NoOpLossScale())
        params = {"w": jnp.ones((4, 256), jnp.bfloat16)}
        exact_tx = optax.adamw(1e-2)
        exact = {"w": jnp.ones((4, 256))}
        state, exact_state = tx.init(params), exact_tx.init(exact)
        step = jax.jit(tx.update)
        for seed in range(20):
            grads = jax.tree.map(lambda p, s=seed: jax.random.normal(jax.random.key(s), p.shape) + 0.5, params)
            updates, state = step(grads, state, params)
            params = mp.transforms.apply_updates(params, updates)
            updates, exact_state = exact_tx.update(grads, exact_state, exact)
            exact = optax.apply_updates(exact, updates)
        assert params["w"].dtype == jnp.bfloat16
        moved = np.abs(np.asarray(exact["w"]) - 1).mean()
        assert np.abs(np.asarray(params["w"], np.float32) - np.asarray(exact["w"])).mean() < 0.1 * moved

    def test_nnx_optimizer(self):
        """It keeps one array for each leaf of the state of the optimizer that it wraps."""
        model = nnx.Linear(3, 8, rngs=nnx.Rngs(0))
        tx = mp.loss_scaled(state_dtypes(optax.adam(1e-2), PAIRS[0]), mp.DynamicLossScale(2.0**6))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x):
            scale = mp.get_loss_scale(optimizer.opt_state)
            grads = nnx.grad(lambda model: scale.scale(jnp.mean((model(x) - 1) ** 2)))(model)
            optimizer.update(model, grads)
            return jnp.mean((model(x) - 1) ** 2)

        x = jnp.ones((4, 3))
        losses = [float(step(model, optimizer, x)) for _ in range(3)]
        assert losses == sorted(losses, reverse=True)
        adam = optimizer.opt_state.skip_state.inner_state.inner_state[0]
        assert (adam.mu["kernel"].dtype, adam.nu["kernel"].dtype) == (jnp.float8_e4m3fn, jnp.bfloat16)
        step(model, optimizer, x * jnp.inf)
        assert int(optimizer.opt_state.skip_state.skips_total[...]) == 1

    def test_parameters_without_a_gradient(self):
        params = {"w": jnp.ones((2, 8)), "n": jnp.array(3), "f": jnp.tanh, "none": None}
        tx = mp.loss_scaled(state_dtypes(optax.adamw(0.1), BOTH), mp.NoOpLossScale())
        _, grads = mp.value_and_grad(lambda p: (p["w"] * p["n"]).sum(), mp.NoOpLossScale())(params)
        updates, state = tx.update(grads, tx.init(params), params)
        assert updates["none"] is None
        assert state.skip_state.inner_state.inner_state[0].mu["w"].dtype == jnp.bfloat16

    def test_memory_table(self):
        params = {"w": jnp.ones((4, 1024))}
        tx = state_dtypes(optax.adamw(1e-3), {"mu": "float8_e4m3fn", "nu": "bfloat16"})
        rows = {(row.kind, row.name): row for row in mp.diagnostics.memory_table(params, tx).rows}
        assert {name: rows["moments", name].bytes for name in ("mu", "nu", "scales")} == {
            "mu": 4096,
            "nu": 2 * 4096,
            "scales": 4 * 4,
        }


class TestSharded:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"w": P("d", None), "v": P(None, "d")}
    params = {"w": jnp.ones((16, 32)), "v": jnp.ones((4, 512))}
    dtypes = {"mu": "float8_e4m3fn", "nu": "bfloat16"}

    @pytest.mark.slow
    def test_jit(self):
        """Moments keep their parameters' shardings, and their values are those of one device."""
        tx = state_dtypes(optax.adamw(1e-2), self.dtypes, block_size=64)
        place = lambda tree: jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(self.mesh, s)), tree, self.specs)
        params, jitted = place(self.params), jax.jit(tx.update)
        state, alone = tx.init(params), tx.init(self.params)
        for seed in range(2):
            grads = grads_like(self.params, seed)
            _, state = jitted(place(grads), state, params)
            _, alone = jitted(grads, alone, self.params)
        assert bits(jax.device_get(state)) == bits(alone)
        adam = state.inner_state[0]
        for name, spec in self.specs.items():
            for x in (adam.mu[name], state.scales[f"0/mu/{name}"], adam.nu[name]):
                assert x.sharding.is_equivalent_to(NamedSharding(self.mesh, spec), x.ndim)

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_shard_map(self, check_vma):
        """Shards draw their own bits, replicas the same: the parameters' in_specs say which are which."""
        of_params = {"w": P("d", None), "b": P()}
        tx = state_dtypes(optax.trace(0.0), {"trace": "bfloat16"}, axis_name=of_params)
        params = {"w": jnp.ones((16, 512)), "b": jnp.ones(64)}
        grads = jax.tree.map(lambda p: jnp.full(p.shape, 1.0 + 2.0**-9 + 2.0**-10), params)
        state = tx.init(params)
        specs = mp.transforms.StateDtypesState(state.inner_state._replace(trace=of_params), {}, P(), P())
        run = jax.shard_map(
            lambda g, s: tx.update(g, s)[1],
            mesh=self.mesh,
            in_specs=(of_params, specs),
            out_specs=specs,
            check_vma=check_vma,
        )
        trace = jax.jit(run)(grads, state).inner_state.trace
        ups = [np.asarray(x) > 1.0 for x in trace["w"].reshape(8, -1)]
        assert all(0.3 < up.mean() < 0.45 for up in ups)  # 3/8 of the way to the next
        for i in range(8):
            for j in range(i):
                assert abs(np.corrcoef(ups[i], ups[j])[0, 1]) < 4.5 / np.sqrt(ups[i].size)
        replicas = [np.asarray(shard.data) for shard in trace["b"].addressable_shards]
        assert len(replicas) == 8
        assert all((replica == replicas[0]).all() for replica in replicas)

    def test_blocks_under_shard_map(self):
        tx = state_dtypes(optax.adam(1e-2), {"mu|nu": "float8_e4m3fn"}, block_size=64, axis_name="d")
        x = jnp.ones((4, 512))
        state = tx.init(x)
        specs = jax.tree.map(lambda leaf: P(None, "d") if leaf.ndim == 2 else P(), state)
        run = jax.shard_map(tx.update, mesh=self.mesh, in_specs=(P(None, "d"), specs), out_specs=(P(None, "d"), specs))
        grads = jax.random.normal(jax.random.key(0), x.shape)
        updates, after = jax.jit(run)(grads, state)
        exact, exact_state = optax.adam(1e-2).update(grads, optax.adam(1e-2).init(x))
        np.testing.assert_allclose(updates, exact, rtol=1e-5)
        np.testing.assert_allclose(widened(after)[0].mu, exact_state[0].mu, rtol=0.15, atol=1e-4)


def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)


def final_loss(tx, seed, steps):
    """Of a network with one hidden layer, trained on the digits."""
    x, y = digits()
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "w": jax.random.normal(keys[0], (64, 128)) * 0.18,
        "b": jnp.zeros(128),
        "head": jax.random.normal(keys[1], (128, 10)) * 0.12,
    }
    loss_fn = lambda p, x, y: optax.softmax_cross_entropy_with_integer_labels(
        jax.nn.relu(x @ p["w"] + p["b"]) @ p["head"], y
    ).mean()

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params, x[batch], y[batch]), state, params)
        return (optax.apply_updates(params, updates), state), None

    batches = jax.random.randint(keys[2], (steps, 64), 0, len(x))
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))((params, tx.init(params)))
    return float(loss_fn(params, x, y))


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtypes", [BOTH, {"mu|nu": "float8_e4m3fn"}, {"mu": "float8_e4m3fn", "nu": "bfloat16"}], ids=str
)
def test_training_ends_where_float32_does(dtypes):
    """Three seeds: the mean is within the seeds' spread of float32's."""
    exact = [final_loss(optax.adamw(1e-3), seed, 600) for seed in range(3)]
    stored = [final_loss(state_dtypes(optax.adamw(1e-3), dtypes), seed, 600) for seed in range(3)]
    assert np.mean(stored) < np.mean(exact) + 2 * np.std(exact, ddof=1)
    assert np.mean(exact) < 0.1


class TestBadInput:
    @pytest.mark.parametrize("dtypes", [None, "bfloat16", {}, ["mu"]])
    def test_no_mapping(self, dtypes):
        with pytest.raises(TypeError, match=r"dtypes is .*\n.*a mapping from patterns to dtypes"):
            state_dtypes(optax.adam(1e-3), dtypes)

    def test_no_pattern(self):
        with pytest.raises(TypeError, match="a regular expression as a string"):
            state_dtypes(optax.adam(1e-3), {3: "bfloat16"})
        with pytest.raises(ValueError, match=r"'\(mu' is not a regular expression"):
            state_dtypes(optax.adam(1e-3), {"(mu": "bfloat16"})

    def test_no_dtype(self):
        with pytest.raises(ValueError, match="unknown dtype of 'mu' 'bf61'"):
            state_dtypes(optax.adam(1e-3), {"mu": "bf61"})
        with pytest.raises(TypeError, match="dtype of 'mu' 'int8' is not a floating dtype"):
            state_dtypes(optax.adam(1e-3), {"mu": "int8"})

    def test_a_pattern_that_matches_no_moment(self):
        tx = state_dtypes(optax.adam(1e-3), {"mu": "bf16", "v": "bf16", "count": "bf16"})
        with pytest.raises(ValueError, match="patterns that match no moment: 'count', 'v'") as error:
            tx.init(PARAMS)
        for text in ("0/mu/dense/bias", "0/nu/dense/w", "what has shape (), hyperparameters and masters stay"):
            assert text in str(error.value)
        assert "scale" not in str(error.value)

    def test_a_hyperparameter(self):
        tx = state_dtypes(optax.inject_hyperparams(optax.adam)(learning_rate=1e-3), {"b2|hyperparams": "bf16"})
        with pytest.raises(ValueError, match="match no moment"):
            tx.init(PARAMS)

    def test_nothing_to_match(self):
        for params in ({}, {"w": jnp.ones(())}):
            assert not narrow(state_dtypes(optax.adam(1e-3), BOTH).init(params))

    def test_patterns_that_disagree(self):
        tx = state_dtypes(optax.adam(1e-3), {"mu": "bf16", "dense": "float32"})
        with pytest.raises(ValueError, match="2 patterns match '0/mu/dense/bias' and disagree") as error:
            tx.init(PARAMS)
        assert "'mu': bfloat16" in str(error.value)
        assert "'dense': float32" in str(error.value)

    def test_rounding(self):
        with pytest.raises(ValueError, match=r"rounding is 'up'\.\n.*\"stochastic\", or"):
            state_dtypes(optax.adam(1e-3), BOTH, rounding="up")

    @pytest.mark.parametrize("key", [0, jnp.zeros(2, jnp.uint32), jax.random.split(jax.random.key(0), 2)])
    def test_key(self, key):
        with pytest.raises(TypeError, match="one typed PRNG key"):
            state_dtypes(optax.adam(1e-3), BOTH, key=key)

    @pytest.mark.parametrize("size", [0, -4, 3, 2.0, "256"])
    def test_block_size(self, size):
        with pytest.raises(ValueError, match=r"block_size is .*\n.*a power of two"):
            state_dtypes(optax.adam(1e-3), BOTH, block_size=size)

    def test_inner(self):
        with pytest.raises(TypeError, match="an optax gradient transformation"):
            state_dtypes(optax.adam, BOTH)

    def test_another_transforms_state(self):
        with pytest.raises(TypeError, match="the StateDtypesState that"):
            state_dtypes(optax.adam(1e-3), BOTH).update(PARAMS, optax.adam(1e-3).init(PARAMS), PARAMS)
