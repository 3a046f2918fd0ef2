import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import bits
from jax.sharding import PartitionSpec as P

import mpjax as mp
from mpjax.diagnostics import gradient_monitor, tree_stats

pytestmark = pytest.mark.standard_promotion

PARAMS = {"b": jnp.ones(3), "w": jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)}
INNER = mp.loss_scaled(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), mp.DynamicLossScale(2.0**4))
MONITOR = gradient_monitor(INNER, every=3, dtype="float16", exponents=(-8, 8))
# Of seven steps, the values of w's gradient, the first of b's.
W = [1.0, jnp.inf, 2.0, 3.0, 1.0, jnp.nan, 5.0]
B = [1.0, 1.0, 1.0, 1.0, 1.0, jnp.inf, 1.0]


def grads(w, b):
    return {"b": jnp.ones(3).at[0].set(b), "w": jnp.full((4, 2), w)}


@jax.jit
def monitored(state, w, b):
    return MONITOR.update(grads(w, b), state, PARAMS)


def after(steps, state=None):
    state = MONITOR.init(PARAMS) if state is None else state
    for w, b in zip(W[:steps], B[:steps], strict=True):
        _, state = monitored(state, w, b)
    return state


def test_it_keeps_what_it_says():
    state = after(7)
    assert state.stats.paths == ("b", "w")
    assert int(state.step) == 7
    assert (int(state.stats_step), float(state.stats_scale)) == (6, 4.0)
    assert bits(state.stats) == bits(tree_stats(grads(5.0, 1.0), "float16", exponents=(-8, 8)))
    first, last = state.first_skip, state.last_skip
    assert (int(first.step), float(first.loss_scale), first.non_finite.tolist()) == (1, 16.0, [0, 8])
    assert (int(last.step), float(last.loss_scale), last.non_finite.tolist()) == (5, 8.0, [1, 8])


def test_between_two_measurements_it_keeps_the_last():
    state = after(5)
    assert (int(state.stats_step), float(state.stats.amax[1])) == (3, 3.0)
    fresh = MONITOR.init(PARAMS)
    assert (int(fresh.stats_step), int(fresh.first_skip.step), int(fresh.last_skip.step)) == (-1, -1, -1)
    assert int(after(1).last_skip.step) == -1


def test_the_optimizer_does_what_it_does_without():
    """Updates and inner state, bit for bit, over overflow, measured steps and others."""
    state, plain = MONITOR.init(PARAMS), INNER.init(PARAMS)
    step = jax.jit(lambda s, w, b: INNER.update(grads(w, b), s, PARAMS))
    for w, b in zip(W, B, strict=True):
        updates, state = monitored(state, w, b)
        expected, plain = step(plain, w, b)
        assert bits(updates) == bits(expected)
    assert bits(state.inner_state) == bits(plain)
    assert mp.get_loss_scale(state) is state.inner_state.loss_scale
    assert optax.tree.get(state, "skips_total") == 2


def test_off_it_is_not_there():
    assert gradient_monitor(INNER, None) is INNER


def test_a_step_of_neither_kind_does_not_look():
    """Both are branches: outside of them nothing is computed from the gradients but what the optimizer computes."""
    state = MONITOR.init(PARAMS)
    jaxpr = jax.make_jaxpr(lambda g, s: MONITOR.update(g, s, PARAMS))(PARAMS, state).jaxpr
    plain = jax.make_jaxpr(lambda g, s: INNER.update(g, s, PARAMS))(PARAMS, INNER.init(PARAMS)).jaxpr
    large = lambda jaxpr: sum(any(getattr(v.aval, "shape", ()) for v in e.outvars) for e in jaxpr.eqns)
    conds = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    assert len(conds) == 2
    assert large(jaxpr) == large(plain) + 2


@pytest.mark.slow
def test_one_trace_donation_and_orbax(tmp_path, count_traces):
    """A run restored in its middle is the run that never stopped."""

    @count_traces
    def step(state, w, b):
        return MONITOR.update(grads(w, b), state, PARAMS)[1]

    jitted = jax.jit(step, donate_argnums=0)
    state = MONITOR.init(PARAMS)
    for w, b in zip(W[:3], B[:3], strict=True):
        state = jitted(state, w, b)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    for w, b in zip(W[3:], B[3:], strict=True):
        state = jitted(state, w, b)
    assert bits(state) == bits(after(7))
    assert step.traces == 1


@pytest.mark.slow
def test_under_scan_and_vmap():
    state = MONITOR.init(PARAMS)
    scanned, _ = jax.jit(
        lambda s: jax.lax.scan(
            lambda s, x: (MONITOR.update(grads(*x), s, PARAMS)[1], None), s, (jnp.array(W), jnp.array(B))
        )
    )(state)
    assert bits(scanned) == bits(after(7))
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 2), state)
    _, members = jax.jit(jax.vmap(lambda s, w: MONITOR.update(grads(w, 1.0), s, PARAMS)))(
        stacked, jnp.array([1.0, jnp.inf])
    )
    assert members.first_skip.step.tolist() == [-1, 0]
    assert members.stats.non_finite.tolist() == [[0, 0], [0, 8]]


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_shards(check_vma):
    """Each device has two rows of w, and one overflows: all record it, and count all numbers."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    inner = mp.loss_scaled(optax.sgd(0.1), mp.StaticLossScale(8.0), axis_name="d")
    tx = gradient_monitor(inner, dtype="float16", exponents=(-2, 2), axis_name="d")
    params = {"w": jnp.ones((4, 2))}
    state = tx.init(params)
    specs = jax.tree.map(lambda _: P(), state)
    step = jax.jit(
        jax.shard_map(
            lambda g, s: tx.update(g, s)[1], mesh=mesh, in_specs=(P("d"), specs), out_specs=specs, check_vma=check_vma
        )
    )
    state = step({"w": jnp.ones((4, 2)).at[3].set(jnp.inf)}, state)
    assert int(state.first_skip.step) == 0
    assert state.first_skip.non_finite.tolist() == [2]
    assert (state.stats.size.tolist(), state.stats.non_finite.tolist()) == ([8], [2])


def test_leaves_without_a_gradient_and_a_norm_past_the_range():
    params = {"f": jnp.tanh, "n": jnp.arange(3), "none": None, "w": jnp.ones(2)}
    tx = gradient_monitor(mp.skip_on_overflow(optax.sgd(0.1)), 1, dtype="float16", exponents=(-2, 2))
    _, gradients = mp.value_and_grad(lambda p: 1e30 * p["w"].sum(), mp.NoOpLossScale())(params)
    _, state = tx.update(gradients, tx.init(params), params)
    assert state.stats.paths == ("w",)
    assert (int(state.last_skip.step), float(state.last_skip.loss_scale)) == (0, 1.0)
    assert state.last_skip.non_finite.tolist() == [0]


def test_a_tree_without_gradients():
    tx = gradient_monitor(INNER, 1)
    _, state = tx.update({"frozen": None}, tx.init({"frozen": None}), {"frozen": None})
    assert mp.diagnostics.summary(state).measured.numbers == 0


@pytest.mark.slow
def test_in_nnx_optimizer():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    tx = gradient_monitor(mp.loss_scaled(optax.sgd(1e-2), mp.DynamicLossScale()), dtype="float16", exponents=(-2, 2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    gradients = nnx.grad(lambda m: m(jnp.full((2, 3), jnp.inf)).sum())(model)
    nnx.jit(lambda o, m, g: o.update(m, g))(optimizer, model, gradients)
    found = mp.diagnostics.summary(optimizer.opt_state)
    assert found.first_skip.leaves == (("kernel", 3),)
    assert found.measured.numbers == 4
    assert found.loss_scale == 2.0**15


def test_schedules_and_counts_do_not_advance_on_a_skipped_step():
    """Those inside count the steps that were taken; the monitor's own, like any counter outside, counts all."""
    seen = []
    schedule = lambda count: seen.append(count) or -0.5 * (count + 1.0)
    inner = optax.chain(optax.scale_by_schedule(schedule), optax.trace(0.0))
    tx = gradient_monitor(mp.loss_scaled(inner, mp.StaticLossScale(8.0)), dtype="float16", exponents=(-2, 2))
    state, rates = tx.init(PARAMS), []
    step = jax.jit(lambda s, w: tx.update(grads(w, 8.0), s, PARAMS))
    for w in (8.0, jnp.inf, jnp.nan, 8.0, jnp.inf, 8.0):
        updates, state = step(state, w)
        rates.append(float(updates["w"][0, 0]))
    assert rates == [-0.5, 0.0, 0.0, -1.0, 0.0, -1.5]
    assert optax.tree.get(state, "count") == 3
    assert int(state.step) - int(optax.tree.get(state, "skips_total")) == 3


class TestErrors:
    @pytest.mark.parametrize(
        "inner", [optax.sgd(0.1), optax.chain(mp.skip_on_overflow(optax.sgd(0.1)), mp.skip_on_overflow(optax.sgd(0.1)))]
    )
    def test_what_is_inside(self, inner):
        with pytest.raises(ValueError, match=r"skips steps in (0|2) places") as error:
            gradient_monitor(inner).init(PARAMS)
        assert "gradient_monitor(mp.loss_scaled(" in str(error.value)

    def test_inside_of_loss_scaled(self):
        with pytest.raises(ValueError, match="skips steps in 0 places"):
            mp.loss_scaled(gradient_monitor(optax.sgd(0.1)), mp.DynamicLossScale()).init(PARAMS)

    def test_every(self):
        with pytest.raises(ValueError, match="every is 0"):
            gradient_monitor(INNER, 0)
        for every in (True, 2.0, "100"):
            with pytest.raises(TypeError, match="every is"):
                gradient_monitor(INNER, every)

    def test_what_is_passed(self):
        with pytest.raises(TypeError, match="the optimizer state is a LossScaledState"):
            MONITOR.update(PARAMS, INNER.init(PARAMS), PARAMS)
        with pytest.raises(ValueError, match=r"differ from the parameters that tx\.init saw: b"):
            MONITOR.update({"w": PARAMS["w"]}, MONITOR.init(PARAMS), PARAMS)
        with pytest.raises(TypeError, match="inner is 3"):
            gradient_monitor(3)


def test_a_vmapped_state_has_no_summary():
    stacked = jax.tree.map(lambda x: np.stack([x] * 2), MONITOR.init(PARAMS))
    with pytest.raises(ValueError, match="that of 2 members"):
        mp.diagnostics.summary(stacked)
