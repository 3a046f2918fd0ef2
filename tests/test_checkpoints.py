"""Training states through Orbax as users write it: one device, shards, other meshes, the middle of a back-off."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from helpers import bits
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax as mp

pytestmark = pytest.mark.standard_promotion

ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
# Between them all that a state can hold: masters in both forms, an average, a compensation, a key, blocks with scales.
INNER = {
    "masters, average": lambda: mp.transforms.params_ema(mp.transforms.master_weights(ADAMW), 0.9),
    "remainders": lambda: mp.transforms.master_weights(ADAMW, form="remainder"),
    "compensation, blocks": lambda: mp.transforms.kahan(
        mp.transforms.state_dtypes(ADAMW, {"mu": "float8_e4m3fn"}, block_size=8)
    ),
    "key, moments": lambda: mp.transforms.stochastic_rounding(
        mp.transforms.state_dtypes(ADAMW, {"mu": "bfloat16", "nu": "bfloat16"}), jax.random.key(0)
    ),
}
ALL = [name if name == "remainders" else pytest.param(name, marks=pytest.mark.slow) for name in INNER]
# Three overflows back off, and only the end of a clean period forgives them. After the first part, two have been seen
# and a period is under way: the next overflow counts as the third, two clean steps more would have grown the scale.
BEFORE, AFTER = [1.0, 0.5, jnp.inf, jnp.nan, 0.25], [jnp.inf, 1.0, 0.5, jnp.inf, 0.25, 1.0]
LOSS_SCALE = mp.DynamicLossScale(2.0**6, period=3, hysteresis=3, hysteresis_refill="growth")
W = np.random.default_rng(0).normal(size=(32, 16))


class Run:
    """A run as users write it: parameters in bfloat16 with their optimizer, placed on a mesh or on one device."""

    def __init__(self, name, mesh=None, spec=None, count_traces=lambda step: step):
        self.tx, self.mesh, self.spec = mp.loss_scaled(INNER[name](), LOSS_SCALE), mesh, spec
        self.step = count_traces(self._step)
        self.jitted = jax.jit(self.step)

    def _step(self, carry, x):
        params, opt_state = carry
        loss_fn = lambda p: jnp.sum((p["w"].astype(jnp.float32) @ jnp.ones((16, 4)) + p["b"]) ** 2 * x)
        _, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(opt_state))(params)
        updates, opt_state = self.tx.update(grads, opt_state, params)
        params, opt_state = mp.transforms.apply_updates(params, updates), opt_state
        return jax.lax.with_sharding_constraint((params, opt_state), self.shardings((params, opt_state)))

    def shardings(self, tree):
        """Large arrays in shards, all others on each device."""
        if self.mesh is None:
            return jax.tree.map(lambda x: jax.sharding.SingleDeviceSharding(jax.devices()[0]), tree)
        return jax.tree.map(lambda x: NamedSharding(self.mesh, self.spec if x.ndim == 2 else P()), tree)

    def place(self, tree):
        return jax.device_put(tree, self.shardings(tree))

    def start(self):
        params = {"w": jnp.asarray(W, jnp.bfloat16), "b": jnp.linspace(-1, 1, 4)}
        return self.place((params, self.tx.init(params)))

    def target(self):
        """What to restore into: shapes, dtypes and shardings, and no arrays."""
        shapes = jax.eval_shape(self.start)
        place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.tree.map(place, shapes, self.shardings(shapes))

    def go_on(self, carry, sequence):
        for x in sequence:
            carry = self.jitted(carry, jnp.float32(x))
        return carry


def mesh(*shape):
    return jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def same_places(a, b):
    return all(x.sharding == y.sharding for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def is_mid_back_off(carry):
    scale = mp.get_loss_scale(carry[1])
    seen = (
        float(scale.loss_scale),
        int(scale.counter),
        int(scale.hysteresis_left),
        int(carry[1].skip_state.skips_total),
    )
    return seen == (64.0, 1, 1, 2)


def save(path, carry):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, carry)
        checkpointer.wait_until_finished()


@pytest.mark.parametrize("name", ALL)
def test_a_manager_in_the_middle_of_a_back_off(name, tmp_path, count_traces):
    """A run restored there is the run that never stopped, bit for bit, and is not traced again."""
    run = Run(name, count_traces=count_traces)
    carry = run.start()
    with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        for i, x in enumerate(BEFORE):
            carry = run.jitted(carry, jnp.float32(x))
            manager.save(i, args=ocp.args.StandardSave(carry))
    assert is_mid_back_off(carry)
    expected = run.go_on(carry, AFTER)
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == len(BEFORE) - 1
        restored = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(run.target()))
    assert bits(restored) == bits(carry)
    assert not any(x.weak_type for x in jax.tree.leaves(restored))
    ended = run.go_on(restored, AFTER)
    assert bits(ended) == bits(expected)
    assert run.step.traces == 1
    assert float(mp.get_loss_scale(ended[1]).loss_scale) == 16.0
    assert int(ended[1].skip_state.skips_total) == 4


@pytest.mark.parametrize("name", ALL)
def test_shards(name, tmp_path, count_traces):
    """Restored onto its own mesh a run goes on bit for bit; onto others, as if it had been moved there alive."""
    run = Run(name, mesh(8), P("data"), count_traces)
    carry = run.go_on(run.start(), BEFORE)
    assert is_mid_back_off(carry)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(carry)} == {8}
    assert not carry[0]["w"].sharding.is_fully_replicated
    save(tmp_path / "run", carry)

    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "run", run.target())
    assert bits(restored) == bits(carry)
    assert same_places(restored, carry)
    assert bits(run.go_on(restored, AFTER)) == bits(run.go_on(carry, AFTER))
    assert run.step.traces == 1

    others = [Run(name, mesh(2, 4), P("model", "data"), count_traces), Run(name, count_traces=count_traces)]
    for other in others:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "run", other.target())
        moved = other.place(jax.device_get(carry))
        assert bits(restored) == bits(carry)
        assert same_places(restored, moved)
        assert bits(mp.read_loss_scale(restored)) == bits(jax.device_get(mp.get_loss_scale(carry[1])))
        assert bits(other.go_on(restored, AFTER)) == bits(other.go_on(moved, AFTER))
        assert other.step.traces == 1


class TestDamage:
    """No new scale takes the place of a missing one, and a damaged one is an error for those who ask."""

    @functools.cached_property
    def state(self):
        return mp.loss_scaled(optax.sgd(0.1, momentum=0.9), LOSS_SCALE).init({"w": jnp.ones(2)})

    @pytest.fixture
    def path(self, tmp_path):
        save(tmp_path / "whole", self.state)
        with ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.restore(tmp_path / "whole")
        del saved["loss_scale"]["loss_scale"]
        save(tmp_path / "damaged", saved)
        return tmp_path / "damaged"

    @pytest.mark.filterwarnings("ignore:Sharding info not provided")
    def test_orbax_says_so(self, path):
        with ocp.StandardCheckpointer() as checkpointer:
            with pytest.raises(ValueError, match=r"(?s)structures do not match.*loss_scale\.loss_scale.*MISSING"):
                checkpointer.restore(path, self.state)
            with pytest.raises(ValueError, match=r"has no loss_scale/loss_scale; it has at_floor, counter") as error:
                mp.read_loss_scale(checkpointer.restore(path))
        assert "mp.DynamicLossScale(), which starts again" in str(error.value)
        with ocp.PyTreeCheckpointer() as checkpointer, pytest.raises(ValueError, match=r"loss_scale\.loss_scale"):
            checkpointer.restore(path, item=self.state)

    def test_flax_says_so(self):
        saved = serialization.msgpack_restore(serialization.to_bytes(self.state))
        del saved["loss_scale"]["loss_scale"]
        with pytest.raises(ValueError, match="the saved DynamicLossScale has no loss_scale"):
            serialization.from_state_dict(self.state, saved)

    def test_a_partial_restore_leaves_a_shape_that_no_step_takes(self, path):
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, self.state)
        args = ocp.args.PyTreeRestore(
            shapes, partial_restore=True, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes)
        )
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(path, args=args)
        assert isinstance(restored.loss_scale.loss_scale, jax.ShapeDtypeStruct)
        with pytest.raises(TypeError, match="ShapeDtypeStruct"):
            mp.value_and_grad(jnp.sum, mp.get_loss_scale(restored))(jnp.ones(2))

    def test_a_damaged_scale_is_found_or_repaired_as_documented(self, tmp_path):
        save(tmp_path / "nan", self.state._replace(loss_scale=LOSS_SCALE._replace(loss_scale=jnp.float32(jnp.nan))))
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "nan", self.state)
        with pytest.raises(ValueError, match=r"loss_scale/loss_scale is nan.*\n.*\n.*repair=True"):
            mp.read_loss_scale(restored)
        repaired = mp.read_loss_scale(restored, repair=True)
        assert float(repaired.loss_scale) == float(restored.loss_scale.scale(jnp.float32(1.0))) == 2.0**16

    def test_no_scaling_is_not_read_as_a_scale(self, tmp_path):
        """A checkpoint of a bfloat16 run, restored into a float16 one."""
        unscaled = mp.loss_scaled(optax.sgd(0.1, momentum=0.9), mp.NoOpLossScale()).init({"w": jnp.ones(2)})
        save(tmp_path / "unscaled", unscaled)
        with ocp.StandardCheckpointer() as checkpointer:
            with pytest.raises(ValueError, match="structures do not match"):
                checkpointer.restore(tmp_path / "unscaled", self.state)
            with pytest.raises(ValueError, match="has 0 loss scales"):
                mp.read_loss_scale(checkpointer.restore(tmp_path / "unscaled"))
