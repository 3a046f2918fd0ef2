"""mp.accumulate: the full batch's gradient from pieces of it, and what an overflow in one of them does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import matrix_dtypes, trace

import mpjax as mp

SCALE = mp.StaticLossScale(64.0)
RANDOM = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RANDOM.normal(size=(6, 16)), jnp.float32), "v": jnp.asarray(RANDOM.normal(size=16), "f4")}
X = jnp.asarray(RANDOM.normal(size=(48, 6)), jnp.float32)
Y = jnp.asarray(RANDOM.normal(size=48), jnp.float32)


def loss_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)


def float64_grads(params, x, y):
    """Loss and gradients by hand, in NumPy."""
    w, v, x, y = (np.asarray(a, np.float64) for a in (params["w"], params["v"], x, y))
    h = np.tanh(x @ w)
    e = h @ v - y
    back = 2 * e[:, None] / len(y) * v * (1 - h**2)
    return np.mean(e**2), {"w": x.T @ back, "v": 2 * h.T @ e / len(y)}


def assert_close(got, true, rtol=1e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(true), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("aux", ["mean", "stack"])
def test_pythons_numbers_in_aux(aux):
    def with_numbers(params, x, y):
        return loss_fn(params, x, y), {"rate": 1.5, "rows": 3, "warm": True}

    grad_fn = mp.value_and_grad(with_numbers, SCALE, has_aux=True)
    for run in (lambda f: f, jax.jit):
        (_, found), _ = run(mp.accumulate(grad_fn, 4, aux=aux))(PARAMS, X, Y)
        assert [float(jnp.mean(found[name].astype(jnp.float32))) for name in ("rate", "rows", "warm")] == [1.5, 3, 1]
        assert not any(x.weak_type for x in jax.tree.leaves(found))


class TestMean:
    @pytest.mark.parametrize("n", [1, 2, 3, 16, 48])
    @pytest.mark.parametrize("jit", [False, True])
    def test_is_the_full_batch(self, n, jit):
        fn = mp.accumulate(mp.value_and_grad(loss_fn, SCALE), n)
        loss, grads = (jax.jit(fn) if jit else fn)(PARAMS, X, Y)
        true_loss, true_grads = float64_grads(PARAMS, X, Y)
        assert_close(loss, true_loss)
        assert_close(SCALE.unscale(grads), true_grads, rtol=3e-6)
        assert loss.dtype == grads["w"].dtype == jnp.float32

    def test_of_jaxs_own_gradient_function(self):
        fn = mp.accumulate(jax.value_and_grad(loss_fn, argnums=(0, 2)), 4)
        _, (grads, to_targets) = fn(PARAMS, X, Y)
        assert_close(grads, float64_grads(PARAMS, X, Y)[1], rtol=3e-6)
        assert to_targets.shape == (12,)

    def test_rows_are_dealt_out(self):
        """Row r is in microbatch r % n."""
        fn = jax.value_and_grad(lambda w, x: (w, x), has_aux=True)
        (_, rows), _ = mp.accumulate(fn, 4, aux="stack")(jnp.float32(1), jnp.arange(12))
        assert rows.tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
        assert rows.swapaxes(0, 1).reshape(-1).tolist() == list(range(12))

    def test_masked_losses_as_the_docstring_says(self):
        mask = jnp.asarray(RANDOM.random(48) < 0.3, jnp.float32)
        losses = lambda p, x, y: (jnp.tanh(x @ p["w"]) @ p["v"] - y) ** 2
        whole = jax.grad(lambda p: jnp.sum(losses(p, X, Y) * mask) / mask.sum())(PARAMS)
        part = lambda p, x, y, m, tokens: 4 * jnp.sum(losses(p, x, y) * m) / tokens
        _, grads = mp.accumulate(jax.value_and_grad(part), 4)(PARAMS, X, Y, mask, tokens=mask.sum())
        assert_close(grads, whole, rtol=3e-6)

    @given(
        n=st.integers(1, 5),
        rows=st.integers(1, 4),
        shape=st.lists(st.integers(0, 3), max_size=2).map(tuple),
        dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
        seed=st.integers(0, 2**16),
    )
    @settings(max_examples=30)
    def test_of_any_gradients(self, n, rows, shape, dtype, seed):
        """The gradient of a product is the other factor: NumPy's mean of the rows, in float64."""
        x = np.random.default_rng(seed).normal(size=(n * rows, *shape)).astype(dtype)
        fn = jax.value_and_grad(lambda w, x: jnp.sum(w * x.astype(jnp.float32).mean(0)).astype(jnp.float32))
        _, grads = mp.accumulate(fn, n)(jnp.ones(shape), x)
        np.testing.assert_allclose(grads, x.astype(np.float64).mean(0), rtol=1e-5, atol=1e-6)


class TestDtypes:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "complex64", "complex128"])
    def test_sums_are_wide(self, dtype, x64):
        loss = lambda w, x: jnp.mean(jnp.abs(w * x)).astype(jnp.float32)
        value, grads = mp.accumulate(mp.value_and_grad(loss, SCALE), 2)(jnp.ones(2, dtype), jnp.ones((4, 2), dtype))
        assert str(grads.dtype) == {"bfloat16": "float32", "float16": "float32"}.get(dtype, dtype)
        assert value.dtype == jnp.float32
        assert SCALE.unscale(grads).tolist() == [0.5, 0.5]

    def test_fp8(self):
        fn = lambda w, x: (x.sum(), jnp.full(2, 0.125, jnp.float8_e4m3fn))
        _, grads = mp.accumulate(fn, 4)(jnp.ones(()), jnp.ones(4))
        assert grads.dtype == jnp.float32
        assert grads.tolist() == [0.125, 0.125]

    def test_loss_in_half_precision(self):
        fn = jax.value_and_grad(lambda w, x: (w * x.mean()).astype(jnp.bfloat16))
        loss, _ = mp.accumulate(fn, 2)(jnp.bfloat16(1), jnp.array([1.0, 1.0078125], jnp.bfloat16))
        assert loss.dtype == jnp.float32
        assert loss == 1.00390625

    @pytest.mark.parametrize("jit", [False, True])
    def test_leaves_without_a_gradient(self, jit):
        params = {"w": jnp.ones(2), "n": jnp.arange(3), "key": jax.random.key(0), "none": None, "f": jnp.tanh}
        loss = lambda p, x: jnp.mean(p["f"](p["w"] * x))
        fn = mp.accumulate(mp.value_and_grad(loss, SCALE), 2)
        if jit:
            del params["f"]
            params["w"], loss = jnp.ones(2), lambda p, x: jnp.mean(p["w"] * x)
            fn = jax.jit(mp.accumulate(mp.value_and_grad(loss, SCALE), 2))
        _, grads = fn(params, jnp.ones((4, 2)))
        assert grads["none"] is None
        assert grads.get("f") is None
        assert grads["n"].dtype == grads["key"].dtype == jax.dtypes.float0
        assert grads["n"].shape == (3,)
        assert grads["w"].shape == (2,)
        tx = mp.loss_scaled(optax.sgd(0.1), SCALE)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert updates["w"].shape == (2,)

    @pytest.mark.standard_promotion
    def test_a_bfloat16_sum_stagnates(self):
        """O11: optax.microbatch, which sums in the value's dtype, adds up 1024 ones to 256."""
        ones = jnp.ones((1024, 1), jnp.bfloat16)
        fn = jax.value_and_grad(lambda w, x: jnp.sum(w * x))
        w = jnp.zeros(1, jnp.bfloat16)
        assert float(optax.microbatch(lambda x: fn(w, x)[1], 0, 1)(ones)[0]) == 256
        _, grads = jax.jit(mp.accumulate(fn, 1024))(w, ones)
        assert float(grads[0]) == 1

    def test_random_bfloat16_gradients(self):
        x = jnp.asarray(np.random.default_rng(1).normal(1.0, 0.3, (1000, 8)), jnp.bfloat16)
        _, grads = jax.jit(mp.accumulate(jax.value_and_grad(lambda w, x: jnp.sum(w * x)), 1000))(
            jnp.ones(8, jnp.bfloat16), x
        )
        assert_close(grads, np.asarray(x, np.float64).mean(0))


class TestAux:
    def run(self, aux, values, **options):
        fn = jax.value_and_grad(lambda w, x: (jnp.sum(w * x), jax.tree.map(lambda a: a[0], x_aux(x))), has_aux=True)
        x_aux = lambda x: {name: v[x.astype(jnp.int32)] for name, v in values.items()}
        return mp.accumulate(fn, 4, aux=aux, **options)(jnp.float32(1), jnp.arange(4, dtype=jnp.float32))[0]

    @pytest.mark.parametrize(
        "dtype", ["bfloat16", "float16", "float32", "int32", "uint8", "bool", "float8_e5m2", "complex64"]
    )
    def test_mean_of_each_dtype(self, dtype):
        values = jnp.array([1, 0, 1, 1]).astype(dtype)
        loss, aux = self.run("mean", {"a": values})
        assert str(aux["a"].dtype) == ("complex64" if dtype == "complex64" else "float32")
        assert aux["a"] == 0.75
        assert loss == 1.5

    def test_float64_is_kept(self, x64):
        assert self.run("mean", {"a": jnp.arange(4, dtype=jnp.float64) * 1e300})[1]["a"] == 1.5e300

    def test_stack_keeps_dtypes(self):
        keys = jax.random.split(jax.random.key(0), 4)
        values = {
            "n": jnp.arange(4),
            "half": jnp.arange(4.0).astype(jnp.float16),
            "key": keys,
            "flag": jnp.arange(4) > 1,
        }
        _, aux = self.run("stack", values)
        assert bits(aux) == bits(values)

    def test_a_count_is_the_mean_times_n(self):
        correct = lambda p, x, y: (loss_fn(p, x, y), jnp.sum(jnp.tanh(x @ p["w"]) @ p["v"] > y))
        (_, whole), _ = jax.value_and_grad(correct, has_aux=True)(PARAMS, X, Y)
        (_, mean), _ = mp.accumulate(jax.value_and_grad(correct, has_aux=True), 4)(PARAMS, X, Y)
        assert 4 * float(mean) == int(whole)

    def test_none_and_nothing(self):
        for aux in (None, {}, ()):
            fn = jax.value_and_grad(lambda w, x, a=aux: (jnp.sum(w * x), a), has_aux=True)
            for kind in ("mean", "stack"):
                value, _ = mp.accumulate(fn, 2, aux=kind)(jnp.float32(1), jnp.ones(2))
                assert value == (1.0, aux)

    def test_batch_statistics(self):
        """An average that every microbatch moves from the same start: the mean is one step with all of them."""
        fn = jax.value_and_grad(lambda w, s, x: (jnp.sum(w * x), 0.9 * s + 0.1 * x.mean()), has_aux=True)
        (_, stats), _ = mp.accumulate(fn, 4, batch_argnums=2)(jnp.float32(1), jnp.float32(2), jnp.arange(8.0))
        np.testing.assert_allclose(stats, 0.9 * 2 + 0.1 * 3.5, rtol=1e-6)


class TestWhatIsSplit:
    loss = staticmethod(lambda p, x, key, rate=1.0: jnp.mean(p * x + rate * jax.random.normal(key, x.shape)))

    def test_a_key_is_split(self):
        """Every microbatch has its own noise: that of jax.random.split."""
        key = jax.random.key(7)
        loss, _ = mp.accumulate(jax.value_and_grad(self.loss), 4)(jnp.float32(0), jnp.ones(8), key)
        noise = [jax.random.normal(k, (2,)) for k in jax.random.split(key, 4)]
        np.testing.assert_allclose(loss, jnp.concatenate(noise).mean(), rtol=1e-5)

    def test_a_key_inside_a_batch_and_keys_a_row(self):
        batch = {"x": jnp.ones(8), "rng": jax.random.key(7), "of_rows": jax.random.split(jax.random.key(8), 8)}
        draw = lambda key: jax.random.bits(key, (), jnp.uint32)
        fn = jax.value_and_grad(
            lambda p, b: (jnp.mean(p * b["x"]), (draw(b["rng"]), jax.vmap(draw)(b["of_rows"]))), has_aux=True
        )
        (_, (one, rows)), _ = jax.jit(mp.accumulate(fn, 4, aux="stack"))(jnp.float32(1), batch)
        assert one.tolist() == [draw(k).item() for k in jax.random.split(batch["rng"], 4)]
        assert rows.T.reshape(-1).tolist() == [draw(k).item() for k in batch["of_rows"]]

    def test_what_is_not_named_stays_whole(self):
        key = jax.random.key(7)
        fn = jax.value_and_grad(lambda *args, **kw: (self.loss(*args, **kw), kw.get("rate")), has_aux=True)
        for numbers in (1, (1,), [-2], np.int64(1)):
            (loss, rate), _ = mp.accumulate(fn, 4, batch_argnums=numbers, aux="stack")(
                jnp.float32(0), jnp.ones(8), key, rate=2.0
            )
            np.testing.assert_allclose(loss, 2 * jax.random.normal(key, (2,)).mean(), rtol=1e-6)
            assert rate.tolist() == [2.0] * 4

    def test_parameters_that_come_second(self):
        fn = jax.value_and_grad(lambda x, p: jnp.mean(p * x), argnums=1)
        loss, grads = mp.accumulate(fn, 2, batch_argnums=0)(jnp.arange(4.0), jnp.float32(2))
        assert (float(loss), float(grads)) == (3.0, 1.5)

    def test_numpy_batches_and_integers(self):
        fn = jax.value_and_grad(lambda p, t: jnp.mean(p[t]))
        _, grads = mp.accumulate(fn, 2)(jnp.ones(3), np.array([0, 1, 1, 2]))
        assert grads.tolist() == [0.25, 0.5, 0.25]


def quadratic(w, x):
    return jnp.mean((w * x) ** 2)


class TestOverflow:
    """Rows 1 and 5 of eight are microbatch 1 of four."""

    good = jnp.arange(8.0)
    w = jnp.float32(2)

    def run(self, mode, x, **options):
        fn = mp.value_and_grad(lambda w, x: (quadratic(w, x), x.sum()), SCALE, has_aux=True)
        return jax.jit(mp.accumulate(fn, 4, on_overflow=mode, **options))(self.w, x)

    @pytest.mark.parametrize("value", [jnp.inf, -jnp.inf, jnp.nan])
    @pytest.mark.parametrize("row", [0, 3, 7])
    def test_skip_makes_the_mean_non_finite(self, value, row):
        _, grads = self.run("skip", self.good.at[row].set(value))
        assert not np.isfinite(grads)

    def test_infinities_of_both_signs_do_not_cancel(self):
        fn = lambda w, x: (x.sum(), x.sum())
        _, grads = mp.accumulate(fn, 4)(self.w, jnp.array([jnp.inf, -jnp.inf, jnp.inf, -jnp.inf]))
        assert np.isnan(grads)

    @pytest.mark.parametrize("value", [jnp.inf, -jnp.inf, jnp.nan])
    def test_drop_is_the_mean_of_the_others(self, value):
        (loss, aux), grads, dropped = self.run("drop", self.good.at[5].set(value))
        kept = np.array([0, 2, 3, 4, 6, 7.0])
        assert dropped.tolist() == [False, True, False, False]
        assert dropped.dtype == jnp.bool_
        np.testing.assert_allclose(grads, 64 * np.mean(2 * 2 * kept**2), rtol=1e-6)
        np.testing.assert_allclose(loss, np.mean(4 * kept**2), rtol=1e-6)
        np.testing.assert_allclose(aux, kept.sum() / 3, rtol=1e-6)

    def test_nothing_dropped_is_the_plain_mean(self):
        plain, (value, grads, dropped) = self.run("skip", self.good), self.run("drop", self.good)
        assert bits((value, grads)) == bits(plain)
        assert not dropped.any()

    def test_all_dropped(self):
        """The gradients say that the step has to be skipped; the loss is still that of the batch."""
        fn = mp.value_and_grad(quadratic, mp.StaticLossScale(2.0**127))
        loss, grads, dropped = mp.accumulate(fn, 4, on_overflow="drop")(self.w, self.good + 1)
        assert dropped.all()
        assert np.isnan(grads)
        np.testing.assert_allclose(loss, np.mean(4 * (np.arange(8.0) + 1) ** 2), rtol=1e-6)

    def test_stacked_aux_keeps_what_was_dropped(self):
        (_, aux), _, dropped = self.run("drop", self.good.at[5].set(jnp.inf), aux="stack")
        assert np.isinf(aux).tolist() == dropped.tolist() == [False, True, False, False]

    @pytest.mark.parametrize("mode", ["skip", "drop"])
    def test_nothing_survives_into_the_next_window(self, mode):
        before = self.run(mode, self.good)
        self.run(mode, self.good * jnp.nan)
        assert bits(self.run(mode, self.good)) == bits(before)

    def test_a_sum_that_overflows_is_no_finite_mean(self):
        fn = lambda w, x: (x.sum(), x.sum())
        _, grads, dropped = mp.accumulate(fn, 4, on_overflow="drop")(self.w, jnp.full(4, 3e38))
        assert not dropped.any()
        assert np.isinf(grads)


class TestTheLossScaleLearns:
    params = {"w": jnp.ones(3)}

    def step(self, state, overflowed, gradient=1.0):
        grads = {"w": jnp.full(3, gradient)}
        return self.tx.update(grads, state, self.params, **({} if overflowed is None else {"overflowed": overflowed}))

    tx = mp.loss_scaled(optax.sgd(0.5, momentum=0.9), mp.DynamicLossScale(2.0**4, period=2))

    def test_a_taken_step_backs_the_scale_off(self):
        step = jax.jit(self.step)
        plain, clean = step(self.tx.init(self.params), jnp.array(False))
        updates, state = step(self.tx.init(self.params), jnp.array(True))
        assert bits(updates) == bits(plain)
        assert bits(state.skip_state) == bits(clean.skip_state)
        assert int(state.skip_state.skips_total) == 0
        assert (float(clean.loss_scale.loss_scale), float(state.loss_scale.loss_scale)) == (16.0, 8.0)
        assert (int(clean.loss_scale.counter), int(state.loss_scale.counter)) == (1, 0)

    def test_false_and_nothing_are_the_same(self):
        for gradient in (1.0, jnp.inf):
            results = [self.step(self.tx.init(self.params), flag, gradient) for flag in (None, False, jnp.array(False))]
            assert bits(results[0]) == bits(results[1]) == bits(results[2])

    def test_a_skipped_step_backs_off_once(self):
        _, state = self.step(self.tx.init(self.params), True, jnp.nan)
        assert float(state.loss_scale.loss_scale) == 8.0
        assert int(state.skip_state.skips_total) == 1

    def test_no_growth_while_microbatches_are_dropped(self):
        flags = jnp.array([False, True, False, False, True, True, False, False])
        scan = jax.jit(
            lambda s: jax.lax.scan(
                lambda s, f: (lambda r: (r[1], r[1].loss_scale.loss_scale))(self.step(s, f)), s, flags
            )
        )
        assert scan(self.tx.init(self.params))[1].tolist() == [16.0, 8.0, 8.0, 16.0, 8.0, 4.0, 4.0, 8.0]

    @pytest.mark.parametrize("bad", [jnp.array([True, False]), 1, jnp.array(1)])
    def test_it_is_one_boolean(self, bad):
        with pytest.raises(TypeError, match="overflowed ") as error:
            self.step(self.tx.init(self.params), bad)
        assert "one boolean" in str(error.value)

    def test_it_is_not_forwarded(self):
        tx = mp.loss_scaled(
            optax.GradientTransformationExtraArgs(lambda p: (), lambda u, s, p=None, *, value: (u, s)), SCALE
        )
        tx.update(self.params, tx.init(self.params), self.params, overflowed=True, value=1)

    def test_through_a_chain(self):
        tx = optax.chain(optax.identity(), self.tx)
        _, state = tx.update(self.params, tx.init(self.params), self.params, overflowed=jnp.array(True))
        assert float(mp.get_loss_scale(state).loss_scale) == 8.0

    @pytest.mark.standard_promotion
    def test_a_float16_run_finds_its_scale_without_a_skip(self):
        """One microbatch of four has large gradients: it is dropped until the scale fits, and the others train."""
        policy = mp.get_policy("mixed_float16")
        loss_fn = mp.autocast(lambda p, x: jnp.mean((x @ p["w"]) ** 2), policy)
        tx = mp.loss_scaled(optax.sgd(1e-5), mp.DynamicLossScale(2.0**12))
        x = jnp.ones((8, 3)).at[1::4].set(40.0)

        def step(carry, _):
            params, state = carry
            fn = mp.accumulate(mp.value_and_grad(loss_fn, mp.get_loss_scale(state)), 4, on_overflow="drop")
            _, grads, dropped = fn(params, x)
            updates, state = tx.update(grads, state, params, overflowed=dropped.any())
            return (optax.apply_updates(params, updates), state), dropped

        (params, state), dropped = jax.lax.scan(step, (self.params, tx.init(self.params)), length=12)
        assert dropped[0].tolist() == [False, True, False, False]
        assert not dropped[-1].any()
        assert int(state.skip_state.skips_total) == 0
        assert 1 <= float(state.loss_scale.loss_scale) < 2.0**12
        assert bool((params["w"] < 1).all())


class TestCompiled:
    def test_one_trace_and_one_loop(self, count_traces):
        counted = count_traces(loss_fn)
        jitted = jax.jit(mp.accumulate(mp.value_and_grad(counted, SCALE), 4))
        jitted(PARAMS, X, Y)
        jitted(PARAMS, X + 1, Y)
        assert counted.traces == 1
        equations = trace(mp.accumulate(mp.value_and_grad(loss_fn, SCALE), 4), PARAMS, X, Y)
        assert [e.params["length"] for e in equations if e.primitive.name == "scan"] == [4]

    @pytest.mark.parametrize("mode", ["skip", "drop"])
    def test_memory_does_not_grow_with_n(self, mode):
        """Microbatches of 32 rows: temporaries are those of one of them and one float32 copy of the gradients."""
        params = {"w": jnp.zeros((64, 256), jnp.bfloat16), "v": jnp.zeros(256)}
        fn = mp.value_and_grad(lambda p, x, y: loss_fn({**p, "w": p["w"].astype(jnp.float32)}, x, y), SCALE)

        def temporaries(n):
            accumulated = jax.jit(mp.accumulate(fn, n, on_overflow=mode))
            compiled = accumulated.lower(params, jnp.zeros((32 * n, 64)), jnp.zeros(32 * n)).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        few, many = temporaries(4), temporaries(64)
        # 64 losses and flags are kept to be averaged.
        assert many - few <= 64 * 8
        # Float32 gradients are 66 KB, those of one microbatch 33 KB in bfloat16, its activations 33 KB.
        assert many < 66_000 + 33_000 + 3 * 33_000

    def test_autocast(self):
        """Microbatches compute in bfloat16; what adds them up is float32."""
        fn = mp.value_and_grad(mp.autocast(loss_fn, "mixed_bfloat16"), SCALE)
        assert matrix_dtypes(mp.accumulate(fn, 4), PARAMS, X, Y) == {"bfloat16"}
        _, grads = jax.jit(mp.accumulate(fn, 4))(PARAMS, X, Y)
        assert_close(SCALE.unscale(grads), float64_grads(PARAMS, X, Y)[1], rtol=0.05)

    def test_vmap(self):
        params = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), PARAMS)
        fn = mp.accumulate(mp.value_and_grad(loss_fn, SCALE), 4)
        _, grads = jax.vmap(fn, in_axes=(0, None, None))(params, X, Y)
        assert_close(jax.tree.map(lambda g: g[0], grads), fn(PARAMS, X, Y)[1])
        assert_close(
            SCALE.unscale(jax.tree.map(lambda g: g[1], grads)),
            float64_grads(jax.tree.map(lambda p: p[1], params), X, Y)[1],
            rtol=3e-6,
        )

    def test_name_and_docstring_are_kept(self):
        assert mp.accumulate(mp.value_and_grad(loss_fn, SCALE), 2).__name__ == "loss_fn"


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("d",), axis_types=(kind,))


class TestDevices:
    rows = jnp.asarray(RANDOM.normal(size=(64, 6)), jnp.float32)
    targets = jnp.asarray(RANDOM.normal(size=64), jnp.float32)

    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
    @pytest.mark.parametrize("mode", ["skip", "drop"])
    def test_a_sharded_batch_stays_where_it_is(self, kind, mode):
        """No collective but the sums of losses, gradients and flags."""
        with jax.set_mesh(mesh(kind)):
            x, y = (jax.device_put(a, NamedSharding(mesh(kind), P("d"))) for a in (self.rows, self.targets))
            params = jax.device_put(PARAMS, NamedSharding(mesh(kind), P()))
            fn = mp.accumulate(mp.value_and_grad(loss_fn, SCALE), 4, on_overflow=mode)
            compiled = jax.jit(fn).lower(params, x, y).compile()
            _, grads = compiled(params, x, y)[:2]
        collectives = set(
            re.findall(r" (all-[a-z]+|collective-permute|reduce-scatter)(?:-start)?\(", compiled.as_text())
        )
        assert collectives == {"all-reduce"}
        assert_close(SCALE.unscale(grads), float64_grads(PARAMS, self.rows, self.targets)[1], rtol=3e-6)

    @pytest.mark.parametrize("check_vma", [True, False])
    @pytest.mark.parametrize("mode", ["skip", "drop"])
    def test_shard_map(self, check_vma, mode):
        """Local sums, and one mean over the devices."""

        def local(params, x, y):
            params = jax.lax.pcast(params, "d", to="varying") if check_vma else params
            fn = mp.accumulate(mp.value_and_grad(loss_fn, SCALE), 4, on_overflow=mode, axis_name="d")
            return jax.lax.pmean(fn(params, x, y)[:2], "d")

        fn = jax.shard_map(local, mesh=mesh(), in_specs=(P(), P("d"), P("d")), out_specs=P(), check_vma=check_vma)
        loss, grads = jax.jit(fn)(PARAMS, self.rows, self.targets)
        true_loss, true_grads = float64_grads(PARAMS, self.rows, self.targets)
        assert_close(loss, true_loss)
        assert_close(SCALE.unscale(grads), true_grads, rtol=3e-6)

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_all_devices_drop_the_same(self, check_vma):
        """Row 11 is on the second device, the fourth of its rows: microbatch 3 there, and with axis_name everywhere."""
        tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale(2.0**10), axis_name="d")
        params = {"w": jnp.ones((6, 2))}

        def step(params, state, x):
            local = jax.lax.pcast(params, "d", to="varying") if check_vma else params
            fn = mp.value_and_grad(lambda p, x: jnp.mean((x @ p["w"]) ** 2), mp.get_loss_scale(state))
            _, grads, dropped = mp.accumulate(fn, 4, on_overflow="drop", axis_name="d")(local, x)
            updates, state = tx.update(jax.lax.pmean(grads, "d"), state, params, overflowed=dropped.any())
            return optax.apply_updates(params, updates), state, dropped

        fn = jax.shard_map(step, mesh=mesh(), in_specs=(P(), P(), P("d")), out_specs=P(), check_vma=check_vma)
        bad = self.rows.at[11].set(jnp.inf)
        params, state, dropped = jax.jit(fn)(params, tx.init(params), bad)
        assert dropped.tolist() == [False, False, False, True]
        assert float(state.loss_scale.loss_scale) == 2.0**9
        assert int(state.skip_state.skips_total) == 0
        # On each device every fourth of its eight rows is dropped.
        kept = np.asarray(self.rows, np.float64)[np.arange(64) % 4 != 3]
        np.testing.assert_allclose(params["w"], 1 - 0.1 * kept.T @ (kept @ np.ones((6, 2))) / len(kept), rtol=1e-5)

    def test_flags_of_devices_that_do_not_agree_are_made_to(self):
        """`overflowed` on one device backs the scale off on all."""
        tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale(2.0**10), axis_name="d")
        state = tx.init(PARAMS)
        step = lambda s, flag: tx.update(PARAMS, s, PARAMS, overflowed=flag[0])[1]
        fn = jax.jit(jax.shard_map(step, mesh=mesh(), in_specs=(P(), P("d")), out_specs=P()))
        assert float(fn(state, jnp.arange(8) == 5).loss_scale.loss_scale) == 2.0**9
        assert float(fn(state, jnp.arange(8) > 8).loss_scale.loss_scale) == 2.0**10


class TestWholeSteps:
    @pytest.mark.parametrize("donate", [(), (0, 1)])
    def test_in_a_donated_step(self, donate):
        tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale(2.0**10))

        def step(params, state, x, y):
            _, grads = mp.accumulate(mp.value_and_grad(loss_fn, mp.get_loss_scale(state)), 4)(params, x, y)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(jnp.copy, PARAMS)
        state = tx.init(params)
        step = jax.jit(step, donate_argnums=donate)
        expected = jax.tree.map(lambda p: np.asarray(p, np.float64), PARAMS)
        for i in range(5):
            params, state = step(params, state, X + i, Y)
            grads = float64_grads(expected, X + i, Y)[1]
            expected = jax.tree.map(lambda p, g: p - 0.1 * g, expected, grads)
        assert_close(params, expected, rtol=1e-5)

    @pytest.mark.standard_promotion
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_with_multisteps_over_steps(self, dtype):
        """Four microbatches in each of three calls: SGD with momentum on windows of twelve, against NumPy in float64.

        An inf in one call skips that call alone; in plain optax it stays in the accumulator for good (O3).
        """
        tx = mp.loss_scaled(optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 3), mp.StaticLossScale(2.0**7))
        x = RANDOM.normal(size=(7, 8))
        x[4, 2] = np.inf

        @jax.jit
        def step(params, state, x):
            _, grads = mp.accumulate(mp.value_and_grad(quadratic, mp.get_loss_scale(state)), 4)(params, x)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, grads.dtype.name == "float32"

        params, state = jnp.asarray(1.5, dtype), tx.init(jnp.asarray(1.5, dtype))
        for rows in x:
            params, state, wide = step(params, state, jnp.asarray(rows, jnp.float32))
            assert wide
        w, velocity = 1.5, 0.0
        for window in (x[[0, 1, 2]], x[[3, 5, 6]]):
            velocity = 0.9 * velocity + np.mean(2 * w * window**2)
            w = w - 0.1 * velocity
            w = float(jnp.asarray(w, dtype))
        assert params.dtype == dtype
        # In bfloat16 each microbatch's own gradient has 8 bits.
        rtol = 1e-5 if dtype == "float32" else 2.0**-8
        np.testing.assert_allclose(float(params), w, rtol=rtol)
        np.testing.assert_allclose(state.skip_state.inner_state.inner_opt_state[0].trace, velocity, rtol=rtol)
        assert int(state.skip_state.skips_total) == 1

    @pytest.mark.standard_promotion
    def test_what_plain_multisteps_does(self):
        """O3 and O4, which the test above has right: poisoned for good, and the mean rounded to bfloat16."""
        poisoned = optax.MultiSteps(optax.sgd(0.1), 2)
        state = poisoned.init(jnp.ones(1))
        for g in (jnp.inf, 1.0, 1.0, 1.0):
            updates, state = poisoned.update(jnp.full(1, g), state, jnp.ones(1))
        assert not np.isfinite(updates)

        seen = []
        spy = optax.stateless(lambda u, p: (seen.append(u["w"]), u)[1])
        params = {"w": jnp.ones(1, jnp.bfloat16)}
        grads = [{"w": jnp.full(1, g, jnp.bfloat16)} for g in (1.0, 1.0078125)]
        for tx in (optax.MultiSteps(spy, 2), mp.loss_scaled(optax.MultiSteps(spy, 2), mp.NoOpLossScale())):
            state = tx.init(params)
            with jax.disable_jit():
                for g in grads:
                    _, state = tx.update(g, state, params)
        assert seen[1].dtype == jnp.bfloat16
        assert (float(seen[1][0]), float(seen[3][0])) == (1.0, 1.00390625)
        fn = mp.accumulate(jax.value_and_grad(lambda p, x: jnp.sum(p["w"] * x)), 2)
        assert fn(params, jnp.array([1.0, 1.0078125], jnp.bfloat16))[1]["w"] == 1.00390625


GRAD = mp.value_and_grad(quadratic, SCALE)
W = jnp.float32(1)
BAD = {
    "none": (lambda: mp.accumulate(GRAD, 0), ValueError, "microbatches is 0", "microbatches=4"),
    "negative": (lambda: mp.accumulate(GRAD, -2), ValueError, "microbatches is -2", "microbatches=4"),
    "a float": (lambda: mp.accumulate(GRAD, 2.0), TypeError, "microbatches is 2.0", "microbatches=4"),
    "a bool": (lambda: mp.accumulate(GRAD, True), TypeError, "microbatches is True", "microbatches=4"),
    "aux": (lambda: mp.accumulate(GRAD, 2, aux="sum"), ValueError, "aux is 'sum'", "'mean' or 'stack'"),
    "on_overflow": (
        lambda: mp.accumulate(GRAD, 2, on_overflow="keep"),
        ValueError,
        "on_overflow is 'keep'",
        "'skip' or 'drop'",
    ),
    "does not divide": (
        lambda: mp.accumulate(GRAD, 4)(W, {"a": jnp.ones((10, 2)), "b": jnp.ones(10)}),
        ValueError,
        "microbatches=4 does not divide the 10 rows of\n    1/a: float32(10, 2)\n    1/b: float32(10,)",
        "microbatches=2, or a batch of 8 rows",
    ),
    "more than rows": (lambda: mp.accumulate(GRAD, 8)(W, jnp.ones(3)), ValueError, "the 3 rows", "microbatches=3"),
    "no rows": (lambda: mp.accumulate(GRAD, 4)(W, jnp.ones(0)), ValueError, "the 0 rows", "a batch of 4 rows"),
    "different rows": (
        lambda: mp.accumulate(GRAD, 2)(W, jnp.ones((4, 3)), [jnp.ones(4), jnp.ones(2, jnp.int32)]),
        ValueError,
        "differ in their leading axis:\n    1: float32(4, 3)\n    2/0: float32(4,)\n    2/1: int32(2,)",
        "batch_argnums=1",
    ),
    "no axis": (
        lambda: mp.accumulate(GRAD, 2)(W, {"x": jnp.ones(4), "rate": 0.1, "n": jnp.array(3)}),
        ValueError,
        "no leading axis at\n    1/n: int32()\n    1/rate: float",
        "by keyword",
    ),
    "nothing in it": (lambda: mp.accumulate(GRAD, 2)(W, {}), ValueError, "(no arrays at all)", "batch_argnums=1"),
    "only a key": (
        lambda: mp.accumulate(GRAD, 2)(W, jax.random.key(0)),
        ValueError,
        "(no arrays at all)",
        "first axis",
    ),
    "no batch": (
        lambda: mp.accumulate(GRAD, 2)(W),
        ValueError,
        "called with 1 positional arguments",
        "batch_argnums=1",
    ),
    "argnums too large": (
        lambda: mp.accumulate(GRAD, 2, batch_argnums=2)(W, W),
        ValueError,
        "batch_argnums is 2, but the function was called with 2",
        "all after the first",
    ),
    "argnums no number": (
        lambda: mp.accumulate(GRAD, 2, batch_argnums="x")(W, W),
        ValueError,
        "batch_argnums is 'x'",
        "all after the first",
    ),
    "a loss function": (
        lambda: mp.accumulate(quadratic, 2)(W, jnp.ones(2)),
        TypeError,
        "no loss of shape () and gradients, but a",
        "mp.accumulate(mp.value_and_grad(loss_fn, loss_scale), microbatches=4)",
    ),
    "gradients alone": (
        lambda: mp.accumulate(mp.grad(lambda w, x: jnp.mean(w[0] * w[1] * x), SCALE), 2)((jnp.ones(2), W), jnp.ones(2)),
        TypeError,
        "no loss of shape () and gradients, but a tuple of 2",
        "((loss, aux), grads)",
    ),
    "aux without a mean": (
        lambda: mp.accumulate(lambda w, x: ((x.sum(), {"k": jax.random.key(0), "n": 1}), w), 2)(W, jnp.ones(2)),
        TypeError,
        "aux has no mean at\n    k: key<fry>()",
        'aux="stack"',
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("under_jit", [False, True])
def test_bad_input(name, under_jit):
    call, error, what, write = BAD[name]
    with pytest.raises(error) as caught:
        jax.jit(call)() if under_jit else call()
    for words in (what, "expected:", "write:", write):
        assert words in str(caught.value)
