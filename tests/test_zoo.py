"""Autocast over a zoo of small models: dtypes, values, transforms and training in float16."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo_linen
import zoo_nnx
import zoo_other
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import trace
from zoo_case import ROWS, jit

import mpjax as mp

pytestmark = pytest.mark.standard_promotion

CASES = [*zoo_linen.CASES, *zoo_nnx.CASES, *zoo_other.CASES]
MATRIX = ("dot_general", "conv_general_dilated", "ragged_dot")


# A fixture of the module, and no mark: pytest then runs all tests of a case before those of the next.
@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case.framework}-{case.name}")
def case(request):
    return request.param


@functools.lru_cache(1)
def built(case):
    return case.make()


def step_of(case, fn):
    """((loss, aux), gradients) of any case; aux is None where there is none."""
    paired = fn if case.has_aux else lambda params, batch: (fn(params, batch), None)
    return jax.value_and_grad(paired, has_aux=True)


def autocast_step(case, policy="mixed_bfloat16"):
    return step_of(case, mp.autocast(built(case)[0], policy))


@functools.lru_cache(2)
def compiled(case, policy):
    return jit(step_of(case, mp.autocast(built(case)[0], policy)))


@functools.lru_cache(2)
def results(case, policy):
    """What the tests compare with; policy float32 is the model as it was written."""
    _, params, batch = built(case)
    return compiled(case, policy)(params, batch)


def relative(got, expected):
    """|got - expected| / |expected| over all floating leaves."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        if jnp.issubdtype(b.dtype, jnp.floating)
    ]
    norm = lambda arrays: np.sqrt(sum(np.sum(a**2) for a in arrays))
    return norm([a - b for a, b in pairs]) / norm([b for _, b in pairs])


def types(tree):
    return jax.tree.map(lambda x: (str(x.dtype), x.shape), tree)


def assert_close(case, got, expected):
    """Loss and gradients, within the bounds of the case; the same types."""
    (loss, _), gradients = got
    (true_loss, _), true_gradients = expected
    assert types((loss, gradients)) == types((true_loss, true_gradients))
    assert relative(loss, true_loss) <= case.loss_bound
    assert relative(gradients, true_gradients) <= case.gradient_bound


def matrix_work(fn, *args):
    """How often each matrix primitive occurs with each set of floating operand dtypes."""
    found = collections.Counter()
    for eqn in trace(fn, *args):
        if eqn.primitive.name.startswith(MATRIX):
            dtypes = {str(v.aval.dtype) for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)}
            found[eqn.primitive.name, tuple(sorted(dtypes))] += 1
    return found


def test_all_matrix_work_is_low_forward_and_backward(case):
    fn, params, batch = built(case)
    written = matrix_work(step_of(case, fn), params, batch)
    assert sum(written.values()) >= 4
    for policy, low in (("mixed_bfloat16", "bfloat16"), ("mixed_float16", "float16")):
        # The same operations, as many, and in the compute dtype.
        expected = {(name, (low,)): count for (name, _), count in written.items()}
        assert matrix_work(autocast_step(case, policy), params, batch) == expected
    inside = mp.autocast(step_of(case, fn), "mixed_bfloat16")
    assert {dtypes for _, dtypes in matrix_work(inside, params, batch)} == {("bfloat16",)}


def test_types_and_values(case):
    got, expected = results(case, "mixed_bfloat16"), results(case, "float32")
    assert types(got) == types(expected)
    assert {str(g.dtype) for g in jax.tree.leaves(got[1])} == {"float32"}
    assert_close(case, got, expected)
    if case.has_aux:
        assert relative(got[0][1], expected[0][1]) <= case.gradient_bound


def test_gradients_are_as_good_as_by_hand(case):
    """By hand: parameters and inputs in bfloat16, and what the frameworks make of that."""
    if case.not_by_hand:
        pytest.skip(case.not_by_hand)
    fn, params, batch = built(case)
    low = mp.get_policy("params=bfloat16,compute=bfloat16,output=bfloat16")
    _, by_hand = jit(step_of(case, fn))(*low.cast_to_compute((params, batch)))
    _, expected = results(case, "float32")
    _, got = results(case, "mixed_bfloat16")
    assert relative(got, expected) <= 2 * relative(by_hand, expected)


def test_under_vmap(case):
    _, params, batch = built(case)
    rolled = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), batch)
    pair = jax.tree.map(lambda *rows: jnp.stack(rows), batch, rolled)
    ensemble = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    step = jax.vmap(autocast_step(case), in_axes=case.vmap_axes)
    both = jit(step)(params if case.vmap_axes[0] is None else ensemble, pair)
    first, second = (jax.tree.map(lambda x, i=i: x[i], both) for i in range(2))
    assert_close(case, first, results(case, "mixed_bfloat16"))
    # A mean over rows does not see their order.
    if not case.rows_meet:
        assert_close(case, second, results(case, "mixed_bfloat16"))
    # An ensemble: the parameters alone have the extra axis.
    work = matrix_work(jax.vmap(autocast_step(case), in_axes=(0, None)), ensemble, batch)
    assert {dtypes for _, dtypes in work} == {("bfloat16",)}


def test_two_rematerialised_training_steps_in_a_scan(case):
    fn, params, batch = built(case)
    step = step_of(case, jax.checkpoint(mp.autocast(fn, "mixed_bfloat16")))
    descend = lambda params, gradients: jax.tree.map(lambda p, g: p - 0.01 * g, params, gradients)

    def train(params, batch):
        def body(params, _):
            (loss, _), gradients = step(params, batch)
            return descend(params, gradients), (loss, gradients)

        return jax.lax.scan(body, params, length=2)

    params_2, (losses, gradients) = jit(train)(params, batch)
    assert types(params_2) == types(params)
    params_1 = descend(params, results(case, "mixed_bfloat16")[1])
    for i, start in enumerate((params, params_1)):
        expected = compiled(case, "mixed_bfloat16")(start, batch)
        assert_close(case, ((losses[i], None), jax.tree.map(lambda g, i=i: g[i], gradients)), expected)


def mesh_of(devices):
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )


def test_a_batch_sharded_over_devices(case):
    _, params, batch = built(case)
    mesh = mesh_of(ROWS)
    got = jit(autocast_step(case))(
        jax.device_put(params, NamedSharding(mesh, P())), jax.device_put(batch, NamedSharding(mesh, P("data")))
    )
    assert_close(case, got, results(case, "mixed_bfloat16"))


def test_data_parallel_in_shard_map(case):
    _, params, batch = built(case)
    devices = 4

    def step(params, batch):
        # Local gradients, whatever check_vma: the parameters are made to vary over the axis first.
        local = jax.lax.pcast(params, "data", to="varying") if case.check_vma else params
        (loss, _), gradients = autocast_step(case)(local, batch)
        return (jax.lax.pmean(loss, "data"), None), jax.lax.pmean(gradients, "data")

    specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": case.check_vma}
    got = jit(jax.shard_map(step, mesh=mesh_of(devices), **specs))(params, batch)
    expected = results(case, "mixed_bfloat16")
    if case.rows_meet:
        parts = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        step = compiled(case, "mixed_bfloat16")
        each = [step(params, jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(devices)]
        expected = jax.tree.map(lambda *xs: sum(xs) / devices, *[((loss, None), grads) for (loss, _), grads in each])
    assert_close(case, got, expected)


def test_training_in_float16(case):
    fn, params, batch = built(case)
    tx = mp.loss_scaled(optax.adam(0.01), mp.DynamicLossScale())
    loss_fn = mp.autocast(fn, "mixed_float16")

    @jit
    def step(params, state):
        value, gradients = mp.value_and_grad(loss_fn, mp.get_loss_scale(state), has_aux=case.has_aux)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value[0] if case.has_aux else value

    state = jit(tx.init)(params)
    losses, skips = [], []
    for _ in range(8):
        params, state, loss = step(params, state)
        losses.append(float(loss))
        skips.append(int(state.skip_state.skips_total))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    # The first steps find the scale: from 2**15 down to 2**11 where gradients are large.
    assert skips[-1] <= 4
    assert bool(mp.all_finite(params))
