"""The transforms that keep weights in half precision, in one table: training, skips, jit, scan, shards, checkpoints."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import bits
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax as mp

pytestmark = pytest.mark.standard_promotion

T = mp.transforms
KEY = jax.random.key(7)
TRANSFORMS = {
    "masters": T.master_weights,
    "remainder": functools.partial(T.master_weights, form="remainder"),
    "kahan": T.kahan,
    "stochastic": functools.partial(T.stochastic_rounding, key=KEY),
}
each = pytest.mark.parametrize("name", TRANSFORMS)
PARAMS = {
    "w": jnp.linspace(-1, 1, 64).reshape(16, 4).astype(jnp.bfloat16),
    "b": [jnp.ones(8, jnp.bfloat16), jnp.linspace(1, 2, 8)],
    "none": None,
}
# What one gradient is in each of the steps: a plain number, or one that has to be skipped.
SEQUENCE = [1.0, -2.0, 0.5, jnp.inf, 0.25, -1.0, jnp.nan, 3.0]


# With state, and with a use for the parameters that it is shown. Its numbers are powers of two, so that a product fused
# into a sum, which the compiler may do under one transform and not under another, is the same.
INNER = optax.chain(optax.add_decayed_weights(2.0**-7), optax.sgd(2.0**-10, momentum=0.5))


def scaled(name):
    return mp.loss_scaled(TRANSFORMS[name](INNER), mp.DynamicLossScale(2.0**4, period=3))


def grads_of(params, state, value):
    """Scaled gradients in the parameters' dtypes, of both signs; where the value is not finite, one number is it."""
    scale, value = mp.get_loss_scale(state).loss_scale, jnp.float32(value)
    finite = jnp.isfinite(value)

    def one(p):
        index = jnp.arange(p.size).reshape(p.shape)
        usual = ((index * 37 + 5) % 64 - 32).astype(jnp.float32) / 16 * jnp.where(finite, value, 1)
        return (jnp.where(finite | (index != 3), usual, value) * scale).astype(p.dtype)

    return jax.tree.map(one, params)


def step_of(tx):
    def step(carry, value):
        params, state = carry
        updates, state = tx.update(grads_of(params, state, value), state, params)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def jitted(name):
    """One compilation for all tests of a transform."""
    return jax.jit(step_of(scaled(name)))


def loop(step, carry, values=SEQUENCE):
    for value in values:
        carry = step(carry, jnp.float32(value))
    return carry


def start(name):
    # A copy, since some tests donate it.
    return jax.tree.map(jnp.copy, PARAMS), scaled(name).init(PARAMS)


@functools.cache
def reference(name):
    params, state = loop(jitted(name), start(name))
    assert int(state.skip_state.skips_total) == 2
    assert bits(params["w"]) != bits(PARAMS["w"])
    return params, state


class TestStagnation:
    """Scenario 32: w = 1 and a step of 1e-4 a thousand times. The next bfloat16 is 1 + 2**-7, the last 1 - 2**-8."""

    def run(self, tx, size=1, step=1e-4, dtype="bfloat16"):
        params, gradient = jnp.ones(size, dtype), jnp.full(size, -step)

        def body(carry, _):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (T.apply_updates(params, updates), state), None

        (params, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, length=1000))((params, tx.init(params)))
        return np.asarray(params, np.float64)

    @pytest.mark.parametrize("step", [1e-4, -1e-3])
    def test_nearest_stays(self, step):
        """O8: 1000 steps of -1e-3 from 1 in bfloat16 are still 1."""
        assert self.run(optax.sgd(1.0), step=step) == 1.0

    @pytest.mark.parametrize("name", ["masters", "remainder", "kahan"])
    @pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: mp.loss_scaled(tx, mp.NoOpLossScale())])
    def test_ends_within_one_ulp(self, name, wrap):
        assert abs(self.run(wrap(TRANSFORMS[name](optax.sgd(1.0))))[0] - 1.1) <= 2.0**-7
        assert abs(self.run(wrap(TRANSFORMS[name](optax.sgd(1.0))), step=-1e-3)[0]) < 1e-3

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
    def test_stochastic_rounding_is_right_on_average(self, dtype):
        weights = self.run(TRANSFORMS["stochastic"](optax.sgd(1.0)), size=4096, dtype=dtype)
        assert weights.std() > 0.009
        assert abs(weights.mean() - 1.1) < 3 * weights.std() / 64


class TestTracksAdamW:
    """Scenario 31: bfloat16 weights and steps of 1e-5, beside float32 AdamW."""

    SHAPE = (128, 128)

    def run(self, tx, dtype, steps):
        params = jax.random.normal(jax.random.key(1), self.SHAPE).astype(jnp.bfloat16).astype(dtype)

        def body(carry, seed):
            params, state = carry
            grads = 1 + 0.5 * jax.random.normal(jax.random.fold_in(KEY, seed), self.SHAPE)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(steps))[0])
        params, state = run((params, tx.init(params)))
        return np.asarray(params, np.float64), state

    @functools.cached_property
    def full(self):
        return self.run(optax.adamw(1e-5), "float32", 5)[0]

    def test_nearest_stands_still_at_once(self):
        before = self.run(optax.adamw(1e-5), "float32", 0)[0]
        moved = self.run(optax.adamw(1e-5), "float32", 1)[0] != before
        nearest = self.run(mp.loss_scaled(optax.adamw(1e-5), mp.NoOpLossScale()), "bfloat16", 1)[0] != before
        assert moved.mean() > 0.99
        assert nearest.mean() < 0.01

    def test_masters_are_float32_adamw(self):
        params, state = self.run(T.master_weights(optax.adamw(1e-5)), "bfloat16", 5)
        np.testing.assert_allclose(state.masters, self.full, rtol=1e-6)
        np.testing.assert_array_equal(params, np.asarray(state.masters.astype(jnp.bfloat16), np.float64))

    def test_remainders_are_the_same_masters(self):
        params, state = self.run(T.master_weights(optax.adamw(1e-5), form="remainder"), "bfloat16", 5)
        whole = self.run(T.master_weights(optax.adamw(1e-5)), "bfloat16", 5)[1].masters
        np.testing.assert_array_equal(state.masters, np.asarray(whole).view(np.int32).astype(np.int16))
        np.testing.assert_allclose(params, self.full, rtol=2.0**-8)

    def test_kahan_with_its_compensation(self):
        params, state = self.run(T.kahan(optax.adamw(1e-5)), "bfloat16", 5)
        np.testing.assert_allclose(params + np.asarray(state.compensation, np.float64), self.full, rtol=2.0**-14)

    def test_stochastic_rounding_on_average(self):
        params, _ = self.run(T.stochastic_rounding(optax.adamw(1e-5), KEY), "bfloat16", 5)
        error = params - self.full
        assert abs(error.mean()) < 3 * error.std() / np.sqrt(error.size)
        # The mean of all weights is known well enough to see a step of 1e-5.
        assert 3 * error.std() / np.sqrt(error.size) < 1e-5 * 5


@each
class TestInALoop:
    def test_eager(self, name):
        tx = mp.loss_scaled(TRANSFORMS[name](optax.sgd(0.1)), mp.NoOpLossScale())
        params, state = PARAMS, tx.init(PARAMS)
        updates, new = tx.update(grads_of(params, state, 1.0), state, params)
        dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
        assert {x.name for x in dtypes(updates)} == {"float32"}
        assert dtypes(new) == dtypes(state)
        compiled = jax.jit(tx.update)(grads_of(params, state, 1.0), state, params)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2.0**-7)
        jax.tree.map(close, optax.apply_updates(params, updates), optax.apply_updates(params, compiled[0]))

    def test_scan(self, name):
        body = lambda carry, value: (step_of(scaled(name))(carry, value), None)
        carry, _ = jax.jit(lambda c: jax.lax.scan(body, c, jnp.array(SEQUENCE)))(start(name))
        assert bits(carry) == bits(reference(name))

    def test_donation_in_one_trace(self, name, count_traces):
        step = count_traces(step_of(scaled(name)))
        carry = loop(jax.jit(step, donate_argnums=0), start(name))
        assert bits(carry) == bits(reference(name))
        assert step.traces == 1
        # None of the factory's own arrays, such as a key, went with it.
        assert bits(start(name)) == bits(start(name))

    @pytest.mark.parametrize("value", [jnp.inf, -jnp.inf, jnp.nan])
    def test_a_skipped_step_changes_no_bit(self, name, value):
        before = loop(jitted(name), start(name), SEQUENCE[:2])
        after = loop(jitted(name), before, [value])
        assert int(after[1].skip_state.skips_total) == 1
        assert bits(after[0]) == bits(before[0])
        assert bits(after[1].skip_state.inner_state) == bits(before[1].skip_state.inner_state)
        # What follows is what would have followed without it, random bits included.
        after = after[0], after[1]._replace(loss_scale=before[1].loss_scale)
        ends = [loop(jitted(name), carry, [0.5]) for carry in (before, after)]
        assert bits(ends[0][0]) == bits(ends[1][0]) != bits(before[0])
        assert bits(ends[0][1].skip_state.inner_state) == bits(ends[1][1].skip_state.inner_state)

    def test_checkpoints(self, name, tmp_path):
        """Orbax and flax: a run that was stored half-way ends where the other does."""
        half = loop(jitted(name), start(name), SEQUENCE[:4])
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "run", half)
            checkpointer.wait_until_finished()
            by_orbax = checkpointer.restore(tmp_path / "run", start(name))
        by_flax = flax.serialization.from_bytes(start(name), flax.serialization.to_bytes(half))
        for restored in (by_orbax, by_flax):
            assert bits(restored) == bits(half)
            assert bits(loop(jitted(name), restored, SEQUENCE[4:])) == bits(reference(name))

    def test_members_of_a_vmap(self, name):
        many = jax.tree.map(lambda x: jnp.stack([x] * 3), start(name))
        params, state = jax.jit(jax.vmap(step_of(scaled(name))))(many, jnp.array([1.0, jnp.inf, 1.0]))
        alone = loop(jitted(name), start(name), [1.0])
        for member in (0, 2):
            assert bits(jax.tree.map(lambda x, i=member: x[i], (params, state))) == bits(alone)
        assert bits(jax.tree.map(lambda x: x[1], params)) == bits(PARAMS)
        assert state.skip_state.skips_total.tolist() == [0, 1, 0]


@each
class TestLeaves:
    def test_float32_parameters_are_updated_by_the_inner_transform_alone(self, name):
        params = {"w": jnp.ones(3, jnp.bfloat16), "f": jnp.linspace(1, 2, 5)}
        tx, plain = TRANSFORMS[name](INNER), INNER
        grads = {"w": jnp.ones(3, jnp.bfloat16), "f": jnp.linspace(-1, 1, 5)}
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
        expected, _ = jax.jit(plain.update)({"f": grads["f"]}, plain.init({"f": params["f"]}), {"f": params["f"]})
        assert bits(updates["f"]) == bits(expected["f"])
        # Nothing is kept for them beside what the inner transform keeps.
        kept = jax.tree.leaves(state._replace(inner_state=None))
        assert not any(x.shape == (5,) for x in kept)

    def test_the_inner_transform_sees_float32(self, name):
        seen = {}

        def init(params):
            seen["init"] = params
            return jax.tree.map(jnp.zeros_like, params)

        def update(updates, state, params=None, **extra):
            seen.update(grads=updates, params=params, **extra)
            return updates, state

        spy = optax.GradientTransformationExtraArgs(init, update)
        for tx in (TRANSFORMS[name](spy), mp.skip_on_overflow(TRANSFORMS[name](spy))):
            seen.clear()
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=3.0)
            for tree in (seen["init"], seen["grads"], seen["params"]):
                assert {x.dtype.name for x in jax.tree.leaves(tree)} == {"float32"}
            assert seen["value"] == 3.0

    def test_leaves_without_a_gradient(self, name):
        params = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.array(3), "flag": jnp.array(True), "none": None}
        tx = scaled(name)
        _, grads = mp.value_and_grad(lambda p: (p["w"].astype(jnp.float32) * p["n"]).sum(), tx.init(params).loss_scale)(
            params
        )
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        new = optax.apply_updates(params, updates)
        assert (int(new["n"]), bool(new["flag"]), new["none"]) == (3, True, None)

    def test_under_strict_promotion(self, name):
        with jax.numpy_dtype_promotion("strict"):
            params = {"w": jnp.ones(3, jnp.bfloat16)}
            tx = mp.loss_scaled(TRANSFORMS[name](optax.sgd(0.5, momentum=0.9)), mp.NoOpLossScale())
            updates, _ = tx.update({"w": jnp.ones(3, jnp.bfloat16)}, tx.init(params), params)
            assert T.apply_updates(params, updates)["w"].tolist() == [0.5] * 3

    def test_a_scalar_and_an_empty_leaf(self, name):
        params = {"s": jnp.bfloat16(1.0), "e": jnp.zeros((0, 3), jnp.bfloat16)}
        tx = mp.loss_scaled(TRANSFORMS[name](optax.sgd(0.5)), mp.StaticLossScale(16.0))
        updates, _ = jax.jit(tx.update)(jax.tree.map(lambda p: p * 16, params), tx.init(params), params)
        new = optax.apply_updates(params, updates)
        assert float(new["s"]) == 0.5
        assert new["e"].shape == (0, 3)

    def test_non_finite_weights_and_steps_are_not_hidden(self, name):
        """Without the wrapper: what float32 would make inf or NaN is inf or NaN, and the neighbours are fine."""
        params = jnp.array([1, jnp.inf, -jnp.inf, jnp.nan, 1, 1], jnp.bfloat16)
        grads = jnp.array([0, 0, 0, 0, jnp.inf, jnp.nan], jnp.float32)
        tx = TRANSFORMS[name](optax.sgd(1.0))
        state = tx.init(params)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_array_equal(
                params.astype(jnp.float32), [1, jnp.inf, -jnp.inf, jnp.nan, -jnp.inf, jnp.nan]
            )

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_no_finite_weight_becomes_inf(self, name, dtype):
        if (name, dtype) == ("remainder", "float16"):
            return
        largest = float(jnp.finfo(dtype).max)
        params = jnp.array([largest, -largest, largest * 0.999], dtype)
        tx = TRANSFORMS[name](optax.sgd(1.0))
        state = tx.init(params)
        step = np.float32(2.0**118 if dtype == "bfloat16" else 100.0)
        for _ in range(3):
            updates, state = jax.jit(tx.update)(jnp.array([-step, step, -step]), state, params)
            params = optax.apply_updates(params, updates)
            assert bool(mp.all_finite((params, state)))
        assert params[:2].astype(jnp.float32).tolist() == [largest, -largest]
        # And it comes back down.
        updates, state = jax.jit(tx.update)(jnp.array([64 * step, 0, 0]), state, params)
        assert 0 < float(optax.apply_updates(params, updates)[0]) < largest


@each
class TestInOthersLoops:
    def test_multisteps_inside(self, name):
        tx = mp.loss_scaled(TRANSFORMS[name](optax.MultiSteps(optax.sgd(1.0), 2)), mp.NoOpLossScale())
        params, state = jnp.ones(2, jnp.bfloat16), tx.init(jnp.ones(2, jnp.bfloat16))
        seen = []
        for value in (0.25, 0.75, jnp.nan, 1.0):
            updates, state = jax.jit(tx.update)(jnp.full(2, value, jnp.bfloat16), state, params)
            params = optax.apply_updates(params, updates)
            seen.append(float(params[0]))
        assert seen == [1.0, 0.5, 0.5, 0.5]

    def test_flax_train_state(self, name):
        params = {"w": jnp.ones(4, jnp.bfloat16)}
        state = TrainState.create(
            apply_fn=None, params=params, tx=mp.loss_scaled(TRANSFORMS[name](optax.sgd(1.0)), mp.NoOpLossScale())
        )
        for _ in range(3):
            state = jax.jit(lambda s: s.apply_gradients(grads={"w": jnp.full(4, 2.0**-3, jnp.bfloat16)}))(state)
        np.testing.assert_allclose(state.params["w"].astype(jnp.float32), 1 - 3 * 2.0**-3, atol=2.0**-8)

    def test_nnx_optimizer(self, name):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
        optimizer = nnx.Optimizer(model, scaled(name), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x):
            scale = mp.get_loss_scale(optimizer.opt_state)
            grads = nnx.grad(lambda m: scale.scale(jnp.mean(m(x).astype(jnp.float32) ** 2)))(model)
            optimizer.update(model, grads)

        before = bits(nnx.state(model))
        step(model, optimizer, jnp.ones((4, 3), jnp.bfloat16))
        after = bits(nnx.state(model))
        step(model, optimizer, jnp.full((4, 3), jnp.inf, jnp.bfloat16))
        assert before != after == bits(nnx.state(model))
        assert model.kernel[...].dtype == jnp.bfloat16


def mesh():
    return jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


SPECS = {"w": P("d"), "b": [P(), P()], "none": None}


@each
class TestEightDevices:
    def test_sharded_jit(self, name):
        """The same bits as on one device, the random ones included."""
        params = jax.device_put(PARAMS, jax.tree.map(lambda spec: NamedSharding(mesh(), spec), SPECS))
        carry = loop(jitted(name), (params, jax.jit(scaled(name).init)(params)))
        assert carry[0]["w"].sharding.spec == P("d")
        assert bits(carry) == bits(reference(name))

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_shard_map(self, name, check_vma):
        """Weights sharded, biases replicated; an overflow on one device skips on all."""
        options = {"axis_name": SPECS} if name == "stochastic" else {}
        tx = mp.loss_scaled(TRANSFORMS[name](INNER, **options), mp.DynamicLossScale(2.0**4), axis_name="d")

        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        carry = start(name)
        # Of the state, what has the shape of w is sharded as w is.
        specs = SPECS, jax.tree.map(lambda x: P("d") if x.shape == (16, 4) else P(), carry[1])
        sharded = jax.jit(
            jax.shard_map(step, mesh=mesh(), in_specs=(specs, SPECS), out_specs=specs, check_vma=check_vma)
        )
        for value in SEQUENCE:
            carry = sharded(carry, grads_of(*carry, value))
        assert int(carry[1].skip_state.skips_total) == 2
        for leaf in jax.tree.leaves(carry):
            if leaf.sharding.is_fully_replicated:
                copies = [np.asarray(s.data).tobytes() for s in leaf.addressable_shards]
                assert copies == copies[:1] * 8
        weights, same = carry[0]["w"].astype(jnp.float32), name != "stochastic"
        np.testing.assert_allclose(weights, reference(name)[0]["w"].astype(jnp.float32), atol=1e-6 if same else 0.02)


@each
class TestErrors:
    call = {
        "masters": "master_weights",
        "remainder": "master_weights",
        "kahan": "kahan",
        "stochastic": "stochastic_rounding",
    }

    @pytest.mark.parametrize("inside", ["loss_scaled", "float32"])
    def test_no_parameter_in_half_precision(self, name, inside):
        """In float32, or hidden by a chain: the type is lost, and loss_scaled shows it float32."""
        tx = TRANSFORMS[name](INNER)
        params = {"w": jnp.ones(2, jnp.float32), "v": jnp.ones(2)}
        if inside == "loss_scaled":
            tx = mp.loss_scaled(optax.chain(optax.clip_by_global_norm(1.0), tx), mp.NoOpLossScale())
            params = {"w": jnp.ones(2, jnp.bfloat16), "v": jnp.ones(2)}
        with pytest.raises(
            ValueError, match=f"{self.call[name]} sees no parameter in half precision: 2 in float32"
        ) as e:
            tx.init(params)
        assert "directly inside mp.loss_scaled" in str(e.value)
        assert f"mp.loss_scaled(mp.transforms.{self.call[name]}(optax.chain(...)), loss_scale)" in str(e.value)

    def test_no_float_at_all_is_nothing_to_do(self, name):
        tx = TRANSFORMS[name](optax.identity())
        assert tx.init({"n": jnp.array(1), "none": None}) is not None

    def test_update_without_parameters(self, name):
        tx = TRANSFORMS[name](INNER)
        for wrapped in (tx, mp.loss_scaled(tx, mp.NoOpLossScale())):
            with pytest.raises(ValueError, match=f"{self.call[name]} was updated without the parameters") as e:
                wrapped.update(PARAMS, wrapped.init(PARAMS))
            assert "tx.update(grads, opt_state, params)" in str(e.value)

    def test_other_dtypes_on_update(self, name):
        tx = TRANSFORMS[name](INNER)
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), PARAMS)
        with pytest.raises(ValueError, match=r"w: float32|no parameter in half precision: 3 in float32"):
            tx.update(PARAMS, tx.init(PARAMS), wide)

    def test_inner_is_no_transform(self, name):
        with pytest.raises(TypeError, match="an optax gradient transformation"):
            TRANSFORMS[name](0.1)

    def test_the_state_of_another_transform(self, name):
        tx = TRANSFORMS[name](INNER)
        with pytest.raises(TypeError, match=r"the optimizer state is a tuple.*\n.*State that tx.init"):
            tx.update(PARAMS, INNER.init(PARAMS), PARAMS)
