"""One table of states under every transform, copy and checkpoint: no field, no dtype is ever lost."""

import copy
import functools
import pickle
import subprocess
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import LOSS_SCALES, bits
from jax.sharding import PartitionSpec as P

import mpjax as mp

PARAMS = {"w": jnp.arange(8.0).reshape(8, 1), "b": jnp.ones(1, jnp.bfloat16)}


def optimizer_state(loss_scale):
    return mp.loss_scaled(optax.adam(1e-3), loss_scale).init(PARAMS)


AROUND = {
    "params_ema": functools.partial(mp.transforms.params_ema, decay=0.9),
    "master_weights": mp.transforms.master_weights,
    "remainder": functools.partial(mp.transforms.master_weights, form="remainder"),
    "kahan": mp.transforms.kahan,
    "stochastic_rounding": functools.partial(mp.transforms.stochastic_rounding, key=jax.random.key(0)),
    "state_dtypes": functools.partial(mp.transforms.state_dtypes, dtypes={"mu": "bfloat16", "nu": "bfloat16"}),
}
# What they keep beside float32 and int32, and why is in their docstrings.
KEPT = {
    "params_ema": {"bfloat16"},
    "remainder": {"int16"},
    "kahan": {"bfloat16"},
    "stochastic_rounding": {"uint32"},
    "state_dtypes": {"bfloat16", "uint32"},
}

STATES = {
    **LOSS_SCALES,
    **{f"loss_scaled {name}": optimizer_state(state) for name, state in LOSS_SCALES.items()},
    **{
        name: mp.loss_scaled(around(optax.adam(1e-3)), LOSS_SCALES["dynamic"]).init(PARAMS)
        for name, around in AROUND.items()
    },
    "gradient_monitor": mp.diagnostics.gradient_monitor(
        mp.loss_scaled(optax.adam(1e-3), LOSS_SCALES["dynamic"]), dtype="float16", exponents=(-2, 2)
    ).init(PARAMS),
    "fp8": mp.fp8.DelayedScaling(("main:0/lhs", "main:0/rhs"), 0, jnp.arange(8.0).reshape(2, 4)),
}


def jit(state):
    return jax.jit(lambda s: s)(state)


def scan(state):
    return jax.lax.scan(lambda s, _: (s, None), state, length=3)[0]


def while_loop(state):
    return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1]), (0, state))[1]


def cond(state):
    return jax.lax.cond(True, lambda s: s, lambda s: jax.tree.map(jnp.zeros_like, s), state)


def vmap(state):
    stacked = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), state)
    return jax.tree.map(lambda x: x[1], jax.vmap(lambda s: s, axis_size=2)(stacked))


def remat(state):
    return jax.jit(jax.checkpoint(lambda s: s))(state)


def donation(state):
    # A copy, since the table's own state is needed again; test_a_fresh_state_can_be_donated has the real thing.
    return jax.jit(lambda s: s, donate_argnums=0)(jax.tree.map(jnp.copy, state))


def shard_map(state):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = jax.tree.map(lambda x: P(), state)
    return jax.jit(jax.shard_map(lambda s: s, mesh=mesh, in_specs=(specs,), out_specs=specs))(state)


def partition_specs(state):
    specs = jax.tree.map(lambda x: P(), state)
    assert all(isinstance(s, P) for s in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, P))
    return jax.jit(lambda s: s, in_shardings=(shardings,), out_shardings=shardings)(state)


def flatten(state):
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    return jax.tree.unflatten(structure, [leaf for _, leaf in leaves])


def eval_shape(state):
    avals = jax.eval_shape(lambda s: s, state)
    return jax.tree.unflatten(jax.tree.structure(avals), jax.tree.leaves(state))


def pickled(state):
    return pickle.loads(pickle.dumps(state))


def flax_bytes(state):
    return flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))


def flax_state_dict(state):
    return flax.serialization.from_state_dict(state, flax.serialization.to_state_dict(state))


TRANSFORMS = [
    jit,
    scan,
    while_loop,
    cond,
    vmap,
    remat,
    donation,
    shard_map,
    partition_specs,
    flatten,
    eval_shape,
    pickled,
    copy.deepcopy,
    flax_bytes,
    flax_state_dict,
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", STATES)
def test_every_field_survives(name, transform, leak_checks):
    """Jmp loses its floor in each of these (J1) and cannot be mapped to specs (J6)."""
    state = STATES[name]
    assert bits(transform(state)) == bits(state)


@pytest.mark.parametrize("name", [name for name, state in STATES.items() if jax.tree.leaves(state)])
def test_orbax_keeps_every_field(name, tmp_path):
    """Jmp and jamp raise in Orbax (C1); flax's DynamicScale loses its weak type there and retraces (C6)."""
    state = STATES[name]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    assert bits(restored) == bits(state)


@pytest.mark.parametrize("name", STATES)
def test_all_leaves_are_strong_float32_and_int32(name):
    """DESIGN section 4: nothing weak-typed, nothing that could drift."""
    allowed = {"float32", "int32"} | KEPT.get(name, set())
    for path, leaf in jax.tree_util.tree_leaves_with_path(STATES[name]):
        assert isinstance(leaf, jax.Array), path
        assert str(leaf.dtype) in allowed, path
        assert not leaf.weak_type, path


@pytest.mark.parametrize("loss_scale", LOSS_SCALES)
@pytest.mark.standard_promotion
def test_one_trace_over_growth_overflow_and_a_restore(loss_scale, tmp_path, count_traces):
    """Jmp and flax trace two or three times (F1, C6)."""
    tx = mp.loss_scaled(optax.adamw(1e-2), LOSS_SCALES[loss_scale])
    loss_fn = lambda params, x: jnp.sum((params["w"] * x) ** 2) + params["b"].astype(jnp.float32).sum()

    @count_traces
    def step(params, opt_state, x):
        loss, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(opt_state))(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    jitted = jax.jit(step)
    params, opt_state = PARAMS, tx.init(PARAMS)
    for x in (1.0, 1.0, 1.0, jnp.inf, jnp.nan, 1.0):
        params, opt_state, _ = jitted(params, opt_state, jnp.float32(x))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", (params, opt_state))
        checkpointer.wait_until_finished()
        params, opt_state = checkpointer.restore(tmp_path / "run", (params, opt_state))
    for x in (1.0, jnp.inf, 1.0):
        params, opt_state, _ = jitted(params, opt_state, jnp.float32(x))
    assert step.traces == 1
    assert int(opt_state.skip_state.skips_total) == 3


@pytest.mark.parametrize("name", LOSS_SCALES)
def test_a_fresh_state_can_be_donated(name):
    """No buffer is in it twice, and none is shared with the next init or another transform."""
    tx = mp.loss_scaled(optax.sgd(0.1, momentum=0.9), LOSS_SCALES[name])
    params, grads = {"w": jnp.ones(2)}, {"w": jnp.ones(2)}
    step = jax.jit(lambda s: tx.update(grads, s, params)[1], donate_argnums=0)
    first = step(step(tx.init(params)))
    again = step(step(tx.init(params)))
    assert bits(first) == bits(again)
    assert mp.loss_scaled(optax.sgd(0.1), LOSS_SCALES[name]).init(params).skip_state.skips_total == 0


def test_the_state_is_the_same_type_in_and_out():
    """A step can be scanned: the carry's type does not change, growth and overflow included."""
    tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale(period=2))
    params = {"w": jnp.ones(2)}

    def step(carry, x):
        params, opt_state = carry
        _, grads = mp.value_and_grad(lambda p: jnp.sum(p["w"] * x), mp.get_loss_scale(opt_state))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), opt_state.skip_state.last_step_finite

    xs = jnp.array([1.0, jnp.inf, 1.0, 1.0])
    (_, opt_state), finite = jax.jit(lambda c: jax.lax.scan(step, c, xs))((params, tx.init(params)))
    assert finite.tolist() == [True, False, True, True]
    assert float(mp.get_loss_scale(opt_state).loss_scale) == 2.0**16


def test_members_of_a_vmap_have_their_own_scales(leak_checks):
    """One member's overflow leaves the others bit-identical."""
    scales = jax.vmap(lambda s: mp.DynamicLossScale(s, period=2))(2.0 ** jnp.arange(4, 8, dtype=jnp.float32))
    tx = mp.loss_scaled(optax.sgd(0.1, momentum=0.9), mp.DynamicLossScale())
    params = {"w": jnp.ones((4, 3))}
    states = jax.vmap(tx.init)(params)._replace(loss_scale=scales)

    @jax.jit
    @jax.vmap
    def step(params, opt_state, x):
        _, grads = mp.value_and_grad(lambda p: jnp.sum(p["w"] * x), mp.get_loss_scale(opt_state))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    clean_params, clean = step(params, states, jnp.ones(4))
    new_params, new = step(params, states, jnp.array([1.0, 1.0, jnp.inf, 1.0]))
    assert new.loss_scale.loss_scale.tolist() == [16.0, 32.0, 32.0, 128.0]
    assert new.skip_state.skips_total.tolist() == [0, 0, 1, 0]
    for a, b in zip(jax.tree.leaves((clean_params, clean)), jax.tree.leaves((new_params, new)), strict=True):
        others = np.array([0, 1, 3])
        assert np.asarray(a)[others].tobytes() == np.asarray(b)[others].tobytes()
    assert np.array_equal(new_params["w"][2], params["w"][2])


def test_a_tree_with_other_leaves_can_be_rebuilt():
    """No validation on unflatten: specs, None, ShapeDtypeStruct, strings all go through."""
    state = LOSS_SCALES["dynamic"]
    for value in (None, "x", object(), jax.ShapeDtypeStruct((), jnp.float32), P("a")):
        rebuilt = jax.tree.unflatten(jax.tree.structure(state), [value] * 4)
        assert rebuilt.loss_scale is value
        assert rebuilt.period == state.period


@pytest.mark.parametrize("make", ["NoOpLossScale()", "StaticLossScale(8.0)", "DynamicLossScale(8.0)"])
@pytest.mark.parametrize("flax_first", [True, False])
def test_flax_serialization_in_a_fresh_process(make, flax_first):
    imports = ["import flax.serialization as fs", "import mpjax as mp, optax, jax.numpy as jnp"]
    code = [
        *(imports if flax_first else imports[::-1]),
        f"tx = mp.loss_scaled(optax.sgd(0.1), mp.{make})",
        "state = tx.init(jnp.ones(2))",
        "back = fs.from_bytes(state, fs.to_bytes(state))",
        "print(float(mp.get_loss_scale(back).loss_scale))",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, check=True)
    assert float(done.stdout) == (1.0 if "NoOp" in make else 8.0)


def test_flax_loaded_after_the_state_was_made():
    code = (
        "import mpjax as mp, jax, sys\n"
        "state = mp.DynamicLossScale(2.0**9, min_loss_scale=0.5)\n"
        "assert 'flax' not in sys.modules\n"
        "import flax.serialization as fs\n"
        "state = jax.jit(lambda s: s)(state)\n"
        "back = fs.from_bytes(state, fs.to_bytes(state))\n"
        "print(float(back.loss_scale), back.min_loss_scale)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["512.0", "0.5"]


def test_flax_restores_in_the_states_own_dtypes(x64):
    state = LOSS_SCALES["dynamic"]
    saved = {name: np.asarray(value, np.float64) for name, value in flax.serialization.to_state_dict(state).items()}
    back = flax.serialization.from_state_dict(state, saved)
    assert [x.dtype.name for x in jax.tree.leaves(back)] == ["float32", "int32", "int32", "int32"]


def test_a_flax_state_dict_without_a_field_is_an_error():
    state = LOSS_SCALES["dynamic"]
    saved = flax.serialization.to_state_dict(state)
    del saved["counter"]
    with pytest.raises(ValueError, match="has no counter") as error:
        flax.serialization.from_state_dict(state, saved)
    assert "mp.DynamicLossScale()" in str(error.value)
    with pytest.raises(ValueError, match="has no loss_scale, counter"):
        flax.serialization.from_state_dict(state, {})
