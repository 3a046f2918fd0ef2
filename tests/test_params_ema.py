"""params_ema: an average that is right to the last bits of float32, of the parameters as they are stored."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax as mp
from mpjax.transforms import ParamsEmaState, apply_updates, ema_params, master_weights, params_ema

PARAMS = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.ones((2, 2))}


def float64_average(history, decay, debias=True):
    """The average of what comes after `history[0]`, by its definition: a sum of weights times parameters.

    A schedule is a function from the step to its decay.
    """
    total, weight = 0.0 if debias else np.asarray(history[0], np.float64), 0.0
    for step, value in enumerate(history[1:]):
        d = decay(step) if callable(decay) else decay
        total = d * total + (1 - d) * np.asarray(value, np.float64)
        weight = d * weight + (1 - d)
    return total / weight if debias else total


def follow(tx, history, dtype="float32"):
    """Takes parameters through a history of values: the gradient is the difference to the next, the rate 1."""
    history = jnp.asarray(history)
    params = {"w": history[0].astype(dtype)}

    def step(carry, target):
        params, state = carry
        gradient = {"w": params["w"].astype(jnp.float32) - target}
        updates, state = tx.update(gradient, state, params)
        params = apply_updates(params, updates)
        return (params, state), params["w"]

    (_, state), seen = jax.jit(lambda c: jax.lax.scan(step, c, history[1:]))((params, tx.init(params)))
    return state, np.concatenate([np.asarray(params["w"], np.float64)[None], np.asarray(seen, np.float64)])


def histories(steps):
    random = np.random.default_rng(0)
    walk = 1 + np.cumsum(1e-4 * random.normal(size=(steps + 1, 8)), 0)
    return {
        "constant": np.full((steps + 1, 1), 3.0),
        "a jump, then rest": np.concatenate([np.full((1, 1), 1.0), np.full((steps, 1), 2.0)]),
        "a random walk": walk,
        "noise around values of all sizes": 10.0 ** np.linspace(-20, 20, 8) * (1 + 0.1 * (walk - walk[0]) / 1e-4),
    }


STEPS = 30_000
HISTORIES = {name: np.asarray(h, np.float32) for name, h in histories(STEPS).items()}


class TestAccuracy:
    @pytest.mark.parametrize("name", HISTORIES)
    @pytest.mark.parametrize("decay", [0.9, 0.999, 0.9999])
    @pytest.mark.parametrize("debias", [True, False])
    def test_to_1e_6_of_float64(self, name, decay, debias):
        state, seen = follow(params_ema(optax.sgd(1.0), decay, debias), HISTORIES[name])
        assert state.average["w"].dtype == jnp.float32
        np.testing.assert_allclose(ema_params(state)["w"], float64_average(seen, decay, debias), rtol=1e-6)

    @pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
    def test_early_steps(self, steps):
        """Debiased by 1 - decay**steps, of which float32 has no digits when computed as it is written."""
        history = np.random.default_rng(1).normal(size=(steps + 1, 50)).astype(np.float32)
        state, seen = follow(params_ema(optax.sgd(1.0), 0.9999), history)
        scale = np.abs(seen).max()
        np.testing.assert_allclose(state.average["w"], float64_average(seen, 0.9999), atol=1e-6 * scale)
        if steps == 1:
            np.testing.assert_allclose(state.average["w"], seen[1], rtol=2e-7)

    @pytest.mark.parametrize("debias", [True, False])
    def test_a_schedule(self, debias):
        """A warm-up of the decay, from 0.1 to 0.999."""
        schedule = lambda step: jnp.minimum(0.999, (1 + step.astype(jnp.float32)) / (10 + step.astype(jnp.float32)))
        true = lambda step: float(np.minimum(np.float32(0.999), np.float32(1 + step) / np.float32(10 + step)))
        state, seen = follow(params_ema(optax.sgd(1.0), schedule, debias), HISTORIES["a random walk"][:5000])
        np.testing.assert_allclose(state.average["w"], float64_average(seen, true, debias), rtol=1e-6)

    def test_a_constant_schedule_is_its_constant(self):
        history = HISTORIES["a random walk"][:2000]
        scheduled, _ = follow(params_ema(optax.sgd(1.0), lambda step: 0.99), history)
        fixed, _ = follow(params_ema(optax.sgd(1.0), 0.99), history)
        assert int(scheduled.steps) == int(fixed.steps) == 1999
        np.testing.assert_allclose(scheduled.average["w"], fixed.average["w"], rtol=1e-6)
        np.testing.assert_allclose(scheduled.log_decay, fixed.log_decay, rtol=1e-4)

    def test_a_float32_average_alone_stalls(self):
        """What the remainder is for: a parameter at rest at 2 after a start at 1, 30000 steps at 0.9999."""
        average = jnp.float32(1)
        step = lambda a, _: (jnp.float32(0.9999) * a + jnp.float32(1 - 0.9999) * 2, None)
        plain = jax.lax.scan(step, average, length=STEPS)[0]
        true = 2 - 0.9999**STEPS
        assert abs(float(plain) - true) > 2e-4
        state, _ = follow(params_ema(optax.sgd(1.0), 0.9999, debias=False), HISTORIES["a jump, then rest"])
        np.testing.assert_allclose(state.average["w"], true, rtol=1e-6)

    @pytest.mark.standard_promotion
    def test_optax_stalls_in_bfloat16(self):
        """O9: ema(0.9999) of 3 says 0.318, and incremental_update never leaves 1."""
        ema = optax.ema(0.9999, debias=False)
        three = jnp.full(1, 3.0, jnp.bfloat16)
        state = ema.init(three)
        stalled = jax.lax.scan(lambda s, _: (ema.update(three, s)[1], None), state, length=STEPS)[0].ema
        assert float(stalled[0]) < 0.5
        one = jnp.ones(1, jnp.bfloat16)
        assert optax.incremental_update(one * 2, one, 1e-3) == one
        ones = np.concatenate([np.full((1, 1), 0.0), np.full((STEPS, 1), 3.0)])
        state, _ = follow(params_ema(optax.sgd(1.0), 0.9999, debias=False), ones, "bfloat16")
        np.testing.assert_allclose(state.average["w"], 3 * (1 - 0.9999**STEPS), rtol=1e-6)

    @given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=8), st.floats(0, 0.99), st.booleans())
    @settings(max_examples=30)
    def test_of_any_history(self, history, decay, debias):
        state, seen = follow(params_ema(optax.sgd(1.0), decay, debias), np.asarray(history, np.float32)[:, None])
        true = float64_average(seen, decay, debias)
        np.testing.assert_allclose(state.average["w"], true, rtol=1e-5, atol=1e-6 * np.abs(seen).max())
        assert seen.min() - 1e-5 * 100 <= float(state.average["w"][0]) <= seen.max() + 1e-5 * 100


class TestDecay:
    @pytest.mark.parametrize("decay", [0, 0.0, lambda step: 0.0])
    def test_zero_is_the_newest(self, decay):
        state, seen = follow(params_ema(optax.sgd(1.0), decay), HISTORIES["a random walk"][:20])
        np.testing.assert_allclose(state.average["w"], seen[-1], rtol=1e-7)

    @pytest.mark.parametrize("debias", [True, False])
    def test_a_schedule_that_reaches_one_stops(self, debias):
        tx = params_ema(optax.sgd(1.0), lambda step: jnp.where(step < 3, 0.5, 1.5), debias)
        early, _ = follow(tx, HISTORIES["a random walk"][:4])
        late, _ = follow(tx, HISTORIES["a random walk"][:20])
        np.testing.assert_allclose(late.average["w"], early.average["w"], rtol=1e-6)
        never, seen = follow(params_ema(optax.sgd(1.0), lambda step: 1.0, debias), HISTORIES["a random walk"][:20])
        np.testing.assert_allclose(never.average["w"], seen[-1 if debias else 0], rtol=1e-6)

    def test_the_schedule_sees_the_steps_before(self):
        seen = []
        tx = params_ema(optax.sgd(1.0), lambda step: (seen.append(int(step)), 0.5)[1])
        state = tx.init(PARAMS)
        for _ in range(3):
            _, state = tx.update(PARAMS, state, PARAMS)
        assert seen == [0, 1, 2]

    @pytest.mark.standard_promotion
    def test_injected(self):
        make = optax.inject_hyperparams(lambda decay: params_ema(optax.sgd(1.0), decay))
        tx = mp.loss_scaled(make(decay=0.5), mp.NoOpLossScale())
        state, params = tx.init(PARAMS), PARAMS
        for _ in range(2):
            updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(ema_params(state)["b"], (0.0 * 1 + -1.0 * 2) / 3, rtol=1e-6)


class TestStored:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
    def test_what_is_really_stored_is_averaged(self, dtype):
        """Steps of a third of the spacing: most are lost when they are added, and the average must not have them."""
        step = 0.3 * float(jnp.finfo(dtype).eps)
        history = np.float32(1 + step * np.arange(200)[:, None] * np.array([1.0, -0.3, 0.5]))
        tx = mp.skip_on_overflow(params_ema(optax.sgd(1.0), 0.9))
        state, seen = follow(tx, history, dtype)
        assert len(np.unique(seen[:, 0])) < 100
        average = ema_params(state)["w"]
        assert average.dtype == jnp.float32
        np.testing.assert_allclose(average, float64_average(seen, 0.9), rtol=1e-6)

    def test_float64_and_complex(self, x64):
        for dtype, value in (("float64", 1 / 3), ("complex64", 1j / 3), ("complex128", 1j / 3)):
            tx = params_ema(optax.sgd(1.0), 0.5)
            params = jnp.full(2, value, dtype)
            _, state = tx.update(jnp.zeros(2, dtype), tx.init(params), params)
            assert ema_params(state).dtype == dtype
            np.testing.assert_allclose(ema_params(state), params, rtol=1e-7 if dtype == "complex64" else 1e-15)

    def test_complex_parameters_do_not_stall_either(self):
        tx = params_ema(optax.sgd(1.0), 0.9999, debias=False)
        params = jnp.full(1, 2 + 2j, jnp.complex64)
        state = tx.init(jnp.full(1, 1 + 1j, jnp.complex64))
        step = lambda s, _: (tx.update(jnp.zeros_like(params), s, params)[1], None)
        state = jax.jit(lambda s: jax.lax.scan(step, s, length=STEPS)[0])(state)
        np.testing.assert_allclose(ema_params(state), (2 - 0.9999**STEPS) * (1 + 1j), rtol=1e-6)

    @pytest.mark.parametrize("outside", [True, False])
    def test_around_master_weights_and_inside(self, outside):
        """Outside it averages what the masters round to, inside the masters."""
        if outside:
            tx = mp.skip_on_overflow(params_ema(master_weights(optax.sgd(1.0)), 0.9))
        else:
            tx = mp.skip_on_overflow(master_weights(params_ema(optax.sgd(1.0), 0.9)))
        params = {"w": jnp.ones(1, jnp.bfloat16)}
        state, seen, masters = tx.init(params), [1.0], [1.0]
        step = jax.jit(tx.update)
        for _ in range(200):
            updates, state = step({"w": jnp.full(1, -1e-3)}, state, params)
            params = apply_updates(params, updates)
            seen.append(float(params["w"][0]))
            masters.append(float(optax.tree.get(state, "masters")["w"][0]))
        expected, other = (float64_average(h, 0.9) for h in ((seen, masters) if outside else (masters, seen)))
        assert abs(expected - other) > 1e-5
        np.testing.assert_allclose(ema_params(state)["w"], expected, rtol=1e-6)


class TestSkippedSteps:
    pytestmark = pytest.mark.standard_promotion

    @pytest.mark.parametrize("value", [jnp.inf, -jnp.inf, jnp.nan])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("wrap", ["loss_scaled", "skip_on_overflow"])
    def test_change_no_bit(self, wrap, dtype, value):
        inner = params_ema(optax.sgd(0.1, momentum=0.9), lambda step: 0.9 - 0.1 / (1 + step.astype(jnp.float32)))
        tx = (
            mp.skip_on_overflow(inner) if wrap == "skip_on_overflow" else mp.loss_scaled(inner, mp.StaticLossScale(8.0))
        )
        params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
        step = jax.jit(tx.update)
        _, state = step(params, tx.init(params), params)
        bad = {**params, "b": params["b"].at[1, 0].set(value)}
        updates, skipped = step(bad, state, params)
        assert bits(apply_updates(params, updates)) == bits(params)
        before, after = (s if wrap == "skip_on_overflow" else s.skip_state for s in (state, skipped))
        assert bits(after.inner_state) == bits(before.inner_state)
        assert int(after.skips_total) == 1
        assert int(after.inner_state.steps) == 1

    def test_a_run_with_overflows_ends_where_the_run_without_does(self):
        tx = mp.loss_scaled(params_ema(optax.adam(0.1), 0.9), mp.StaticLossScale(1.0))
        results = []
        for values in ([1.0, jnp.nan, 2.0, jnp.inf, jnp.inf, -1.0], [1.0, 2.0, -1.0]):
            params, state = PARAMS, tx.init(PARAMS)
            step = jax.jit(tx.update)
            for value in values:
                updates, state = step(jax.tree.map(lambda p, v=value: jnp.full(p.shape, v), params), state, params)
                params = optax.apply_updates(params, updates)
            results.append((params, state.skip_state.inner_state))
        assert bits(results[0]) == bits(results[1])


class TestOtherLeaves:
    params = {"w": jnp.ones(2), "n": jnp.arange(3), "key": jax.random.key(0), "none": None, "flag": jnp.array(True)}

    @pytest.mark.parametrize("wrapped", [True, False])
    def test_are_left_alone(self, wrapped):
        params = {**self.params, "f": jnp.tanh}
        inner = params_ema(optax.sgd(0.5), 0.5)
        if not wrapped:
            inner = params_ema(optax.masked(optax.sgd(0.5), jax.tree.map(lambda p: p is params["w"], params)), 0.5)
        tx = mp.skip_on_overflow(inner) if wrapped else inner
        _, grads = mp.value_and_grad(lambda p: jnp.sum(p["f"](p["w"]) * 0 + p["w"]), mp.NoOpLossScale())(params)
        updates, state = tx.update(grads, tx.init(params), params)
        assert updates["w"].tolist() == [-0.5, -0.5]
        average = ema_params(state)
        assert len(jax.tree.leaves(average)) == 1
        like = ema_params(state, params)
        assert like["w"].tolist() == [0.5, 0.5]
        for name in ("n", "key", "flag", "none", "f"):
            assert like[name] is params[name]

    def test_python_numbers(self):
        tx = params_ema(optax.sgd(1.0), 0.5)
        _, state = tx.update([1.0, 2.0], tx.init([3.0, 4.0]), [3.0, 4.0])
        assert [float(x) for x in ema_params(state)] == [2.0, 2.0]
        assert all(x.dtype == jnp.float32 for x in ema_params(state, [3.0, 4.0]))

    def test_empty(self):
        tx = params_ema(optax.sgd(1.0), 0.5)
        _, state = tx.update({}, tx.init({}), {})
        assert ema_params(state) == {}


class TestEmaParams:
    @pytest.mark.standard_promotion
    def test_at_any_depth(self):
        tx = optax.chain(
            optax.identity(),
            optax.named_chain(
                ("x", mp.loss_scaled(optax.MultiSteps(params_ema(optax.adam(0.1), 0.5), 1), mp.DynamicLossScale()))
            ),
        )
        assert bits(ema_params(tx.init(PARAMS))) == bits(PARAMS)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_like_the_parameters(self, dtype):
        params = {"w": jnp.ones(2, dtype), "b": jnp.ones(1)}
        tx = mp.loss_scaled(params_ema(optax.sgd(1.0), 0.5), mp.NoOpLossScale())
        state = tx.init(params)
        dtypes = lambda tree: {name: str(x.dtype) for name, x in tree.items()}
        assert dtypes(ema_params(state)) == {"w": "float32", "b": "float32"}
        assert dtypes(ema_params(state, params)) == {"w": dtype, "b": "float32"}
        assert jax.jit(ema_params)(state, params)["w"].dtype == dtype

    def test_none(self):
        with pytest.raises(ValueError, match="has 0 averages of the parameters\\.") as error:
            ema_params(optax.adam(0.1).init(PARAMS))
        assert "mp.transforms.params_ema(optax.adamw(3e-4), 0.999)" in str(error.value)

    @pytest.mark.parametrize("nested", [True, False])
    def test_two(self, nested):
        inner = params_ema(optax.sgd(0.1), 0.9)
        tx = params_ema(inner, 0.99) if nested else optax.chain(inner, params_ema(optax.identity(), 0.99))
        with pytest.raises(ValueError, match="has 2 averages of the parameters") as error:
            ema_params(tx.init(PARAMS))
        assert ("<root>\n    inner_state\n" if nested else "    0\n    1\n") in str(error.value)

    def test_parameters_of_another_structure(self):
        state = params_ema(optax.sgd(0.1), 0.9).init(PARAMS)
        with pytest.raises(ValueError, match="params and the average have different tree structures") as error:
            ema_params(state, {"w": PARAMS["w"], "c": PARAMS["b"]})
        assert "only in params: c" in str(error.value)

    def test_nnx_optimizer(self):
        """Its state holds the averages in boxes of its own; with the parameters they come in the parameters' boxes."""
        model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
        tx = mp.loss_scaled(params_ema(optax.sgd(0.5), 0.5), mp.NoOpLossScale())
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        kernels = []
        for _ in range(2):
            optimizer.update(model, nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model))
            kernels.append(np.asarray(model.kernel[...]))
        average = ema_params(optimizer.opt_state, nnx.state(model, nnx.Param))
        nnx.update(model, average)
        np.testing.assert_allclose(model.kernel[...], (kernels[0] + 2 * kernels[1]) / 3, rtol=1e-6)

    def test_flax_train_state(self):
        tx = mp.loss_scaled(params_ema(optax.sgd(0.5), 0.5), mp.NoOpLossScale())
        state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
        for _ in range(2):
            state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, PARAMS))
        np.testing.assert_allclose(ema_params(state.opt_state)["b"], (0.5 * 1 + 0.0 * 2) / 3, rtol=1e-6)
        np.testing.assert_allclose(ema_params(state, state.params)["b"], (0.5 * 1 + 0.0 * 2) / 3, rtol=1e-6)


class TestComposition:
    def test_updates_are_those_of_inner(self):
        make = lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
        wrapped, plain = params_ema(make(), 0.9), make()
        updates, state = jax.jit(wrapped.update)(PARAMS, wrapped.init(PARAMS), PARAMS)
        expected, inner_state = jax.jit(plain.update)(PARAMS, plain.init(PARAMS), PARAMS)
        assert bits(updates) == bits(expected)
        assert bits(state.inner_state) == bits(inner_state)

    def test_extra_arguments_are_forwarded(self):
        update = lambda u, s, p=None, *, value: (jax.tree.map(lambda x: x * value, u), s)
        tx = params_ema(optax.GradientTransformationExtraArgs(optax.init_empty_state, update), 0.5)
        updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=jnp.float32(3))
        assert updates["w"].tolist() == [3.0, -6.0, 9.0]
        tx = params_ema(optax.sgd(1.0), 0.5)
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1)

    @pytest.mark.standard_promotion
    def test_inside_multisteps_it_counts_windows(self):
        tx = mp.loss_scaled(optax.MultiSteps(params_ema(optax.sgd(1.0), 0.5), 3), mp.NoOpLossScale())
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(6):
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
            params = optax.apply_updates(params, updates)
        assert int(optax.tree.get(state, "steps")) == 2
        np.testing.assert_allclose(ema_params(state)["b"], (0.0 * 1 + -1.0 * 2) / 3, rtol=1e-6)

    def test_last_in_a_chain_too(self):
        """As the last link, around nothing, it averages params + updates, before they are rounded to be stored."""
        tx = mp.loss_scaled(optax.chain(optax.sgd(1.0), params_ema(optax.identity(), 0.5)), mp.NoOpLossScale())
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(ema_params(state)["b"], (0.0 * 1 + -1.0 * 2) / 3, rtol=1e-6)


class TestUnderTransforms:
    def test_one_trace_and_a_restored_run(self, tmp_path, count_traces):
        """Saved with Orbax in the middle, bit for bit the same end."""
        tx = mp.loss_scaled(params_ema(optax.sgd(0.1, momentum=0.9), 0.9), mp.DynamicLossScale(period=2))

        @count_traces
        def step(params, state):
            updates, state = tx.update(jax.tree.map(lambda p: p * 0.5, params), state, params)
            return apply_updates(params, updates), state

        jitted = jax.jit(step)
        run = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
        run = (run, tx.init(run))
        for i in range(6):
            run = jitted(*run)
            if i == 2:
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save(tmp_path / "run", run)
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "run", jax.tree.map(jnp.zeros_like, run))
        for _ in range(3):
            restored = jitted(*restored)
        assert bits(restored) == bits(run)
        assert step.traces == 1

    def test_a_fresh_state_can_be_donated_beside_the_parameters(self):
        tx = params_ema(optax.sgd(0.1), 0.9)
        params = jax.tree.map(jnp.copy, PARAMS)
        step = jax.jit(
            lambda p, s: (optax.apply_updates(p, tx.update(p, s, p)[0]), tx.update(p, s, p)[1]), donate_argnums=(0, 1)
        )
        params, state = step(*step(params, tx.init(params)))
        assert int(state.steps) == 2

    def test_dtypes_are_fixed(self):
        tx = params_ema(optax.sgd(0.1), 0.9)
        params = jax.tree.map(lambda p: p.astype(jnp.float16), PARAMS)
        state = tx.init(params)
        _, later = tx.update(params, state, params)
        described = lambda s: jax.tree.map(lambda x: (x.dtype, x.shape, x.weak_type), s)
        assert described(state) == described(later)
        assert {str(x.dtype) for x in jax.tree.leaves(state)} == {"float32", "bfloat16", "int32"}

    @pytest.mark.parametrize("kind", ["jit", "shard_map"])
    def test_sharded_parameters_have_sharded_averages(self, kind):
        """No collective is needed, and the result is that of one device."""
        mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
        params = {"w": jnp.linspace(-1.0, 1.0, 16).astype(jnp.bfloat16)}
        tx = params_ema(optax.sgd(0.1), 0.9)
        step = lambda p, s: tx.update(p, s, p)
        expected, state = jax.jit(step)(params, tx.init(params))
        sharded = jax.device_put(params, NamedSharding(mesh, P("d")))
        start = jax.jit(tx.init)(sharded)
        if kind == "shard_map":
            specs = jax.tree.map(lambda x: P("d") if x.ndim else P(), start)
            step = jax.shard_map(step, mesh=mesh, in_specs=(P("d"), specs), out_specs=(P("d"), specs))
        compiled = jax.jit(step).lower(sharded, start).compile()
        assert not re.search(r" (all-[a-z]+|collective-permute|reduce-scatter)(-start)?\(", compiled.as_text())
        updates, after = compiled(sharded, start)
        assert bits((updates, after)) == bits((expected, state))
        assert len(after.average["w"].sharding.device_set) == 8
        assert after.average["w"].addressable_shards[0].data.shape == (2,)

    def test_vmap(self):
        tx = params_ema(optax.sgd(1.0), 0.5)
        params = jnp.arange(6.0).reshape(3, 2)
        _, state = jax.vmap(tx.update)(params, jax.vmap(tx.init)(params), params)
        assert state.average.tolist() == np.zeros((3, 2)).tolist()
        assert state.steps.tolist() == [1, 1, 1]


class TestBadInput:
    @pytest.mark.parametrize("decay", [1, 1.0, -0.1, float("nan"), 2])
    def test_decay(self, decay):
        with pytest.raises(ValueError, match=f"decay is {decay}") as error:
            params_ema(optax.sgd(0.1), decay)
        assert "from 0 up to, not including, 1" in str(error.value)
        assert "params_ema(inner, 0.999)" in str(error.value)

    def test_inner(self):
        with pytest.raises(TypeError, match=r"inner is 0\.999"):
            params_ema(0.999, 0.999)

    def test_without_params(self):
        tx = params_ema(optax.sgd(0.1), 0.9)
        with pytest.raises(ValueError, match="params_ema was updated without the parameters") as error:
            tx.update(PARAMS, tx.init(PARAMS))
        assert "tx.update(grads, opt_state, params)" in str(error.value)

    @pytest.mark.parametrize("wrap", [mp.skip_on_overflow, lambda tx: mp.loss_scaled(tx, mp.DynamicLossScale())])
    def test_around_what_skips(self, wrap):
        tx = params_ema(optax.chain(wrap(optax.sgd(0.1))), 0.9)
        with pytest.raises(ValueError, match="around a transform that skips steps") as error:
            tx.init(PARAMS)
        assert "mp.loss_scaled(mp.transforms.params_ema(inner, 0.999), loss_scale)" in str(error.value)

    def test_another_transforms_state(self):
        with pytest.raises(TypeError, match="the optimizer state is a tuple") as error:
            params_ema(optax.sgd(0.1), 0.9).update(PARAMS, optax.sgd(0.1).init(PARAMS), PARAMS)
        assert ParamsEmaState.__name__ in str(error.value)
