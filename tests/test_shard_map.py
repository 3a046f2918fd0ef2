"""Eight devices: an overflow on one makes all skip, and the run equals a single-device run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import bits
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax as mp

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 16).reshape(8, 2), "b": jnp.zeros(2)}
X = jnp.linspace(0.0, 1.0, 64).reshape(8, 8)
BATCHES = [X, X.at[5, 3].set(jnp.inf), X + 1.0, X.at[0, 0].set(jnp.nan), X * 2.0, X - 1.0]


def mesh():
    return jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def loss_fn(params, x):
    return jnp.mean((x @ params["w"] + params["b"]) ** 2)


def optimizer(**options):
    return mp.loss_scaled(optax.sgd(0.1, momentum=0.9), mp.DynamicLossScale(2.0**10, period=2), **options)


def run(step, params, state):
    history = []
    for x in BATCHES:
        params, state = step(params, state, x)
        history.append(float(mp.get_loss_scale(state).loss_scale))
    return params, state, history


@functools.cache
def single_device():
    tx = optimizer()

    @jax.jit
    def step(params, state, x):
        _, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(state))(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return run(step, PARAMS, tx.init(PARAMS))


def check_parity(params, state, history):
    expected, expected_state, expected_history = single_device()
    assert history == expected_history == [1024.0, 512.0, 512.0, 256.0, 256.0, 512.0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, expected)
    assert int(state.skip_state.skips_total) == int(expected_state.skip_state.skips_total) == 2
    for leaf in jax.tree.leaves(params):
        shards = [np.asarray(s.data) for s in leaf.addressable_shards]
        assert np.isfinite(np.concatenate([s.ravel() for s in shards])).all()


@pytest.mark.parametrize("check_vma", [True, False])
def test_data_parallel(check_vma):
    """Parameters replicated, the batch sharded, gradients averaged by the user."""
    tx = optimizer(axis_name="d")

    def step(params, state, x):
        # Local gradients, whatever check_vma: the parameters are made to vary over the axis first.
        local = jax.lax.pcast(params, "d", to="varying") if check_vma else params
        _, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(state))(local, x)
        updates, state = tx.update(jax.lax.pmean(grads, "d"), state, params)
        return optax.apply_updates(params, updates), state

    sharded = jax.shard_map(step, mesh=mesh(), in_specs=(P(), P(), P("d")), out_specs=(P(), P()), check_vma=check_vma)
    result = run(jax.jit(sharded), PARAMS, tx.init(PARAMS))
    check_parity(*result)
    for leaf in jax.tree.leaves(result[:2]):
        copies = [np.asarray(s.data) for s in leaf.addressable_shards]
        assert all(c.tobytes() == copies[0].tobytes() for c in copies)


@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_parameters(check_vma):
    """Each device owns a shard of w: only the agreed flag keeps the other shards from stepping (optax D4)."""
    tx = optimizer(axis_name="d")
    params = {"w": PARAMS["w"]}
    state = tx.init(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    inner = state.skip_state.inner_state
    inner_specs = jax.tree.map(lambda x: P("d") if x.ndim else P(), inner)
    specs = jax.tree.map(lambda x: P(), state)._replace(
        skip_state=jax.tree.map(lambda x: P(), state.skip_state)._replace(inner_state=inner_specs)
    )
    sharded = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh(),
            in_specs=({"w": P("d")}, specs, {"w": P("d")}),
            out_specs=({"w": P("d")}, specs),
            check_vma=check_vma,
        )
    )
    grads = {"w": jnp.ones((8, 2))}
    params1, state1 = sharded(params, state, grads)
    bad = {"w": grads["w"].at[6, 1].set(jnp.inf)}
    params2, state2 = sharded(params1, state1, bad)
    assert bits(params2) == bits(params1)
    assert bits(state2.skip_state.inner_state) == bits(state1.skip_state.inner_state)
    assert float(state2.loss_scale.loss_scale) == 512.0
    alone, alone_state = tx_single_step(params, grads)
    np.testing.assert_allclose(params1["w"], alone["w"], rtol=1e-6)
    assert float(alone_state.loss_scale.loss_scale) == float(state1.loss_scale.loss_scale)


def tx_single_step(params, grads):
    tx = optimizer()
    updates, state = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates), state


def test_without_the_axis_name_vma_refuses():
    """The flag would differ from device to device; JAX's own check says so when the state is declared replicated."""
    tx = optimizer()
    params = {"w": PARAMS["w"]}
    state = tx.init(params)
    specs = jax.tree.map(lambda x: P(), state)
    fn = jax.shard_map(
        lambda g, s: tx.update(g, s)[1], mesh=mesh(), in_specs=({"w": P("d")}, specs), out_specs=specs, check_vma=True
    )
    with pytest.raises(Exception, match=r"out_specs|varying"):
        jax.jit(fn)(params, state)


@pytest.mark.parametrize("spec", [P("d"), P()], ids=["sharded", "replicated"])
def test_under_jit_nothing_is_needed(spec):
    """GSPMD: the same code as on one device, parameters sharded or not."""
    tx = optimizer()
    params = {"w": jax.device_put(PARAMS["w"], NamedSharding(mesh(), spec)), "b": PARAMS["b"]}

    @jax.jit
    def step(params, state, x):
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh(), P("d")))
        _, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(state))(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    check_parity(*run(step, params, tx.init(params)))


@pytest.mark.parametrize("size", [0, None])
def test_a_shard_without_gradients_counts_as_finite(size):
    """Scenario 14: zero-size and None leaves."""
    tx = optimizer()
    grads = {"w": jnp.ones(2), "empty": None if size is None else jnp.zeros((0, 3))}
    _, state = tx.update(grads, tx.init(grads), grads)
    assert int(state.skip_state.skips_total) == 0


def test_pmap():
    tx = optimizer(axis_name="d")
    params = {"w": jnp.ones((8, 2))}
    state = jax.vmap(tx.init)(params)
    step = jax.pmap(lambda g, s, p: tx.update(g, s, p), axis_name="d")
    updates, state = step({"w": jnp.ones((8, 2)).at[3, 0].set(jnp.nan)}, state, params)
    assert np.asarray(updates["w"]).tolist() == [[0.0, 0.0]] * 8
    assert state.skip_state.skips_total.tolist() == [1] * 8
    assert state.loss_scale.loss_scale.tolist() == [512.0] * 8


def test_two_axes():
    tx = optimizer(axis_name=("a", "b"))
    grid = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    state = tx.init({"w": jnp.ones(())})
    fn = jax.shard_map(
        lambda g, s: tx.update({"w": g.sum()}, s)[1].loss_scale.loss_scale,
        mesh=grid,
        in_specs=(P("a", "b"), jax.tree.map(lambda x: P(), state)),
        out_specs=P(),
    )
    assert float(jax.jit(fn)(jnp.ones((4, 2)), state)) == 1024.0
    assert float(jax.jit(fn)(jnp.ones((4, 2)).at[2, 1].set(jnp.inf), state)) == 512.0
