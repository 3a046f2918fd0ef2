"""Delayed scaling: what goes into the history, what does not, and that scales come from it."""

import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax as mp

RULES = mp.default_rules().with_fp8(mp.fp8.Recipe(min_reuse=0, emulate=True))
W = jax.random.normal(jax.random.key(0), (16, 16))
X = jax.random.normal(jax.random.key(1), (128, 16))
NAMES = ("main:0/lhs", "main:0/rhs", "main:0/gradient")


def cast(fn):
    return mp.autocast(fn, "mixed_float8", RULES)


def loss_fn(w, x):
    return jnp.mean(jnp.square(x @ w))


GRAD = jax.value_and_grad(cast(loss_fn))


def last(state):
    """The largest magnitudes of the last step, by place."""
    return dict(zip(state.names, np.asarray(state.history[:, 0]).tolist(), strict=True))


def start(fn, *args, steps=4, margin=0):
    return mp.fp8.init(fn, steps=steps, margin=margin)(*args)


def amax(x):
    return float(jnp.max(jnp.abs(x)))


class TestSteps:
    def test_the_first_step_has_scales_of_the_moment(self):
        state = start(GRAD, W, X)
        assert state.names == NAMES
        assert state.history.shape == (3, 4)
        assert not state.history.any()
        result, state = jax.jit(mp.fp8.delayed(GRAD))(state, W, X)
        for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(jax.jit(GRAD)(W, X)), strict=True):
            np.testing.assert_array_equal(x, y)
        assert last(state)["main:0/lhs"] == amax(X)
        assert last(state)["main:0/rhs"] == amax(W)
        assert 0 < last(state)["main:0/gradient"] < 1

    @pytest.mark.parametrize("margin", [0, 2])
    def test_later_steps_have_those_of_the_steps_before(self, margin):
        """What is larger than any of those saturates at the largest number that they leave room for."""
        fn = cast(lambda x, w: x @ w)
        _, state = mp.fp8.delayed(fn)(start(fn, X, W, margin=margin), jnp.full((16, 16), 7.0), jnp.eye(16))
        out, state = mp.fp8.delayed(fn)(state, jnp.full((16, 16), 1000.0), jnp.eye(16))
        assert (np.asarray(out) == 7.0 * 2**margin).all()
        out, state = mp.fp8.delayed(fn)(state, jnp.full((16, 16), 1000.0), jnp.eye(16))
        assert abs(float(out[0, 0]) - 1000.0) <= 1000.0 / 16

    def test_the_history_has_a_length(self):
        fn = cast(lambda x, w: x @ w)
        step, state = jax.jit(mp.fp8.delayed(fn)), start(fn, X, W, steps=3)
        for i in range(1, 6):
            _, state = step(state, jnp.full((16, 16), float(i)), jnp.eye(16))
        np.testing.assert_array_equal(state.history[0], [5.0, 4.0, 3.0])
        np.testing.assert_array_equal(state.history[1], [1.0, 1.0, 1.0])

    def test_one_trace_and_donation(self):
        traces = []

        def fn(w, x):
            traces.append(1)
            return GRAD(w, x)

        state = start(fn, W, X)
        step = jax.jit(mp.fp8.delayed(fn), donate_argnums=0)
        before = len(traces)
        for _ in range(3):
            _, state = step(state, W, X)
        assert len(traces) == before + 1

    def test_abstract_arguments_and_static_ones(self):
        fn = lambda params, x, how: GRAD(params["w"], x) if how == "grad" else None
        shape = jax.ShapeDtypeStruct((16, 16), jnp.float32)
        state = start(fn, {"w": shape, "none": None}, jax.ShapeDtypeStruct((128, 16), jnp.float32), "grad")
        assert state.names == NAMES
        # Arguments are counted with the state.
        jax.jit(mp.fp8.delayed(fn), static_argnums=3).trace(state, {"w": W, "none": None}, X, "grad")


def three_times(w, x):
    for _ in range(3):
        x = x @ w * 2
    return jnp.mean(jnp.square(x))


def scanned(w, x):
    return jnp.mean(jnp.square(jax.lax.scan(lambda x, _: (x @ w * 2, None), x, None, length=3)[0]))


def rematerialised(w, x):
    body = jax.checkpoint(lambda x: x @ w * 2)
    return jnp.mean(jnp.square(jax.lax.scan(lambda x, _: (body(x), None), x, None, length=3)[0]))


def mapped(w, x):
    return jnp.mean(jnp.square(jax.vmap(lambda rows: rows @ w)(x.reshape(8, 16, 16))))


def branched(w, x):
    return jnp.mean(jnp.square(jax.lax.cond(x[0, 0] > -100, lambda: x @ w, lambda: x)))


def on_devices(w, x):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    mean = lambda w, x: jax.lax.pmean(jnp.mean(jnp.square(x @ w)), "batch")
    return jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())(w, x)


class TestReuse:
    """flax adds up, or loses, the histories of a layer used three times, of the rows of a vmap and of devices."""

    @pytest.mark.parametrize("fn", [three_times, scanned, rematerialised], ids=lambda f: f.__name__)
    def test_the_largest_of_all_uses(self, fn):
        grad = jax.value_and_grad(cast(fn))
        (_, state) = jax.jit(mp.fp8.delayed(grad))(start(grad, W, X), W, X)
        found = last(state)
        (lhs,) = (value for name, value in found.items() if name.endswith("lhs"))
        (rhs,) = (value for name, value in found.items() if name.endswith("rhs"))
        third = jax.jit(cast(lambda w, x: x @ w * 2))(W, jax.jit(cast(lambda w, x: x @ w * 2))(W, X))
        assert rhs == amax(W)
        assert lhs == pytest.approx(amax(third), rel=0.03)

    @pytest.mark.parametrize("fn", [mapped, branched, on_devices], ids=lambda f: f.__name__)
    def test_rows_branches_and_devices(self, fn):
        grad = jax.value_and_grad(cast(fn))
        (_, state) = jax.jit(mp.fp8.delayed(grad))(start(grad, W, X), W, X)
        by_role = {name.split("/")[-1]: value for name, value in last(state).items()}
        assert by_role["lhs"] == amax(X)
        assert by_role["rhs"] == amax(W)
        assert by_role["gradient"] > 0

    def test_microbatches(self):
        grad = mp.accumulate(mp.value_and_grad(cast(loss_fn), mp.NoOpLossScale()), 4, batch_argnums=1)
        (_, state) = jax.jit(mp.fp8.delayed(grad))(start(grad, W, X), W, X)
        assert last(state)["main:0/lhs"] == amax(X)

    def test_a_sharded_jit_has_one_scale_for_all_devices(self):
        mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
        x = jax.device_put(X, NamedSharding(mesh, P("batch")))
        step, state = jax.jit(mp.fp8.delayed(GRAD)), start(GRAD, W, X)
        (loss, _), new = step(state, W, x)
        (expected, _), alone = step(state, W, X)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        assert last(new) == pytest.approx(last(alone))

    def test_shard_map_around_it(self):
        mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
        state = start(GRAD, W, X[:16])

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("batch")), out_specs=(P(), P()))
        def step(state, w, x):
            (loss, _), state = mp.fp8.delayed(GRAD, axis_name="batch")(state, w, x)
            return jax.lax.pmean(loss, "batch"), state

        _, state = jax.jit(step)(state, W, X)
        assert last(state)["main:0/lhs"] == amax(X)

    def test_an_ensemble_has_a_history_for_each_member(self):
        ws = jnp.stack([W, 2 * W, 4 * W])
        state = start(GRAD, W, X)
        states = jax.tree.map(lambda x: jnp.stack([x] * 3), state)
        _, states = jax.jit(jax.vmap(mp.fp8.delayed(GRAD), in_axes=(0, 0, None)))(states, ws, X)
        np.testing.assert_allclose(states.history[:, 1, 0], amax(W) * np.array([1, 2, 4]))

    def test_steps_in_a_scan(self):
        def step(state, x):
            (loss, _), state = mp.fp8.delayed(GRAD)(state, W, x)
            return state, loss

        state, _ = jax.lax.scan(step, start(GRAD, W, X), jnp.stack([X, 3 * X]))
        np.testing.assert_allclose(state.history[0, :2], [amax(3 * X), amax(X)])


class TestOverflow:
    @pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
    def test_stays_out_of_the_history_and_is_seen(self, bad):
        step = jax.jit(mp.fp8.delayed(GRAD))
        _, before = step(start(GRAD, W, X), W, X)
        (_, grads), after = step(before, W, X.at[3, 3].set(bad))
        assert not mp.all_finite(grads)
        np.testing.assert_array_equal(after.history[0], before.history[0])
        assert np.isfinite(after.history).all()
        (_, grads), _ = step(after, W, X)
        assert mp.all_finite(grads)

    def test_a_skipped_step_does_not_write(self):
        tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale())

        @jax.jit
        def train(params, opt_state, fp8_state, x):
            grad_fn = mp.value_and_grad(cast(loss_fn), mp.get_loss_scale(opt_state))
            (_, grads), new = mp.fp8.delayed(grad_fn)(fp8_state, params, x)
            finite = mp.all_finite(grads)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, mp.select_tree(finite, new, fp8_state)

        grad_fn = mp.value_and_grad(cast(loss_fn), mp.DynamicLossScale())
        state = (W, tx.init(W), start(grad_fn, W, X))
        for x in (X, X.at[0].set(jnp.inf)):
            before = state
            state = train(*state, x)
        np.testing.assert_array_equal(state[0], before[0])
        np.testing.assert_array_equal(state[2].history, before[2].history)
        assert mp.get_loss_scale(state[1]).loss_scale == mp.get_loss_scale(before[1]).loss_scale / 2

    @pytest.mark.parametrize(
        ("amax", "expected"),
        [(0.0, 1.0), (1e-44, 2.0**-126), (448.0, 1.0), (3.5, 2.0**-7), (float("inf"), 1.0), (float("nan"), 1.0)],
    )
    def test_scales_of_amaxes(self, amax, expected):
        """Scenario 35 of the peers' list; scales are powers of two here, rounded up."""
        assert float(mp.fp8.power_of_two_scale(jnp.float32(amax), "float8_e4m3fn")) == expected

    @pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
    def test_of_one_place_alone(self, bad):
        state = start(GRAD, W, X).updated(jnp.array([1.0, 2.0, 3.0]))
        state = state.updated(jnp.array([4.0, bad, 5.0]))
        np.testing.assert_array_equal(state.history[:, :2], [[4.0, 1.0], [2.0, 0.0], [5.0, 3.0]])


class TestModels:
    """One signature for all of them."""

    def run(self, loss_fn, params):
        grad_fn = jax.value_and_grad(cast(loss_fn))
        state = start(grad_fn, params, X)
        (_, grads), state = jax.jit(mp.fp8.delayed(grad_fn))(state, params, X)
        assert jax.tree.structure(grads) == jax.tree.structure(params), "nothing but parameters has gradients"
        assert all(value > 0 for value in last(state).values())
        return state.names

    def test_linen(self):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                shared = nn.Dense(16, use_bias=False, name="shared")
                for _ in range(2):
                    x = nn.relu(shared(x))
                return nn.Dense(16, use_bias=False, name="out")(x)

        model = Model()
        names = self.run(lambda p, x: jnp.mean(jnp.square(model.apply(p, x))), model.init(jax.random.key(0), X))
        roles = ("lhs", "rhs", "gradient")
        expected = {f"Model/{name}:0/{role}" for name in ("shared", "out") for role in roles}
        assert set(names) == expected

    def test_nnx(self):
        graph, state = nnx.split(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
        self.run(lambda state, x: jnp.mean(jnp.square(nnx.merge(graph, state)(x))), state)

    def test_nnx_layers_have_scales_of_their_own(self):
        """All linear layers of NNX are one line of Flax, in no module; here in two lines of the model."""
        layers = [nnx.Linear(16, 16, rngs=nnx.Rngs(i)) for i in range(2)]
        graph, state = nnx.split(nnx.List(layers))

        def loss(state, x):
            first, second = nnx.merge(graph, state)
            return jnp.mean(jnp.square(second(jnp.tanh(first(x)))))

        names = self.run(loss, state)
        assert sorted(names) == sorted(f"main:{i}/{role}" for i in range(2) for role in ("lhs", "rhs", "gradient"))

    @pytest.mark.standard_promotion
    def test_equinox(self):
        eqx = pytest.importorskip("equinox")
        model = eqx.nn.MLP(16, 16, 16, 1, key=jax.random.key(0))
        params, static = eqx.partition(model, eqx.is_array)
        self.run(lambda p, x: jnp.mean(jnp.square(jax.vmap(eqx.combine(p, static))(x))), params)


@pytest.mark.slow
def test_it_may_be_the_first_that_is_named():
    """It needs parts of diagnostics, which need it in turn."""
    code = "import mpjax as mp; print(mp.fp8.DelayedScaling.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "DelayedScaling\n", done.stderr


def test_the_condition_of_a_loop_has_scales_of_the_moment():
    product = lambda w, x: mp.fp8.dot_general(x, w, (((1,), (0,)), ((), ())))
    fn = lambda w, x: jax.lax.while_loop(lambda i: (i < 3) & (product(w, x)[0, 0] > -1e9), lambda i: i + 1, 0)
    count, state = mp.fp8.delayed(fn)(start(fn, W, X), W, X)
    assert count == 3
    assert not state.history.any()
    assert mp.diagnostics.fp8_report(fn)(W, X).sites == ()


def test_names_survive_an_edit():
    source = "def fn(w, x):\n{}    a = x @ w\n    with scope('upper'):\n        return mean((a @ w) ** 2)\n"
    states = []
    for blank in ("", "\n\n    # a comment\n"):
        names = {"scope": jax.named_scope, "mean": jnp.mean}
        exec(compile(source.format(blank), f"/tmp/edited_{len(blank)}.py", "exec"), names)
        states.append(start(jax.grad(cast(names["fn"])), W, X))
    assert states[0].names == states[1].names
    assert {name.rsplit("/", 1)[0] for name in states[0].names} == {"main:0", "upper:0"}


class TestErrors:
    def test_no_state(self):
        with pytest.raises(TypeError, match="the state is a ArrayImpl") as error:
            mp.fp8.delayed(GRAD)(W, X)
        assert "mp.fp8.delayed(fn)(mp.fp8.init(fn)(*args), *args)" in str(error.value)

    def test_of_another_function(self):
        other = jax.grad(cast(three_times))
        with pytest.raises(ValueError, match="the state is of other places than the function has") as error:
            mp.fp8.delayed(jax.named_call(other, name="block"))(start(GRAD, W, X), W, X)
        assert "block:0/lhs" in str(error.value)
        assert "main:0/lhs" in str(error.value)

    @pytest.mark.parametrize("fn", [loss_fn, mp.autocast(loss_fn, "mixed_bfloat16")])
    def test_nothing_in_8_bits(self, fn):
        with pytest.raises(ValueError, match="the function brings nothing into 8 bits"):
            mp.fp8.init(fn)(W, X)

    def test_scales_for_channels_have_no_history(self):
        rules = RULES.with_fp8(mp.fp8.Recipe(min_reuse=0, emulate=True, scaling="channel"))
        with pytest.raises(ValueError, match="the function brings nothing into 8 bits with one scale"):
            mp.fp8.init(mp.autocast(loss_fn, "mixed_float8", rules))(W, X)

    def test_the_gradient_outside(self):
        fn = cast(lambda w, x, b: loss_fn(w, x) + jnp.sum(b))
        state = start(fn, W, X, W)
        for argument in (1, 3):  # through a product in fp8, and past it
            with pytest.raises(NotImplementedError, match=r"or one of mp.fp8.delayed"):
                jax.grad(lambda *args: mp.fp8.delayed(fn)(*args)[0], argument)(state, W, X, W)

    @pytest.mark.parametrize(
        ("name", "value"), [("steps", 0), ("steps", 1.5), ("steps", True), ("margin", -1), ("margin", "2")]
    )
    def test_bad_options(self, name, value):
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            mp.fp8.init(GRAD, **{name: value})
