"""loss_scaled and its parts inside and around optax's own combinators, and in Flax's train state."""

from collections.abc import Callable

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from helpers import bits

import mpjax as mp

pytestmark = pytest.mark.standard_promotion

PARAMS = {"a": jnp.ones(3), "b": {"w": jnp.full(2, 2.0)}}
SCALE = mp.DynamicLossScale(2.0**6, period=2)


def scaled_grads(state, value=1.0):
    scale = float(mp.get_loss_scale(state).loss_scale)
    return jax.tree.map(lambda p: jnp.full(p.shape, value * scale, p.dtype), PARAMS)


def steps(tx, values, params=PARAMS, **extra):
    """Runs tx over gradients of the given values; returns params and state."""
    state = tx.init(params)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, **extra))
    for value in values:
        updates, state = update(scaled_grads(state, value), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def plain_steps(tx, values, params=PARAMS):
    state = tx.init(params)
    for value in values:
        grads = jax.tree.map(lambda p, v=value: jnp.full(p.shape, v, p.dtype), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


INNER = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(0.5)), ("adam", optax.adam(1e-2))),
    "masked": lambda: optax.chain(optax.masked(optax.trace(0.9), {"a": True, "b": {"w": False}}), optax.sgd(0.1)),
    "multi_transform": lambda: optax.multi_transform(
        {"fast": optax.sgd(1.0), "slow": optax.adam(1e-3)}, {"a": "fast", "b": {"w": "slow"}}
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(0.1, 0, 9)),
    "schedule": lambda: optax.adam(optax.cosine_decay_schedule(0.1, 10)),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "ema": lambda: optax.chain(optax.adam(1e-2), optax.ema(0.9)),
    "params_ema": lambda: mp.transforms.params_ema(optax.adam(1e-2), 0.9),
}


@pytest.mark.parametrize("name", INNER)
def test_around_each_combinator_a_clean_run_is_plain_optax(name):
    values = [1.0, -2.0, 0.5, 3.0]
    params, state = steps(mp.loss_scaled(INNER[name](), SCALE), values)
    expected, inner_state = plain_steps(INNER[name](), values)
    assert_close(params, expected)
    assert_close(state.skip_state.inner_state, inner_state)


@pytest.mark.parametrize("name", INNER)
def test_around_each_combinator_an_overflow_leaves_no_trace(name):
    """The run with overflows in it ends, bit for bit, where the run without them does."""
    tx = mp.loss_scaled(INNER[name](), mp.StaticLossScale(64.0))
    with_bad, state = steps(tx, [1.0, jnp.inf, -2.0, jnp.nan, -jnp.inf, 0.5, 3.0])
    without, clean = steps(tx, [1.0, -2.0, 0.5, 3.0])
    assert bits(with_bad) == bits(without)
    assert bits(state.skip_state.inner_state) == bits(clean.skip_state.inner_state)
    assert int(state.skip_state.skips_total) == 3


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "named_chain": lambda tx: optax.named_chain(("scaled", tx)),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(
        rate=1.0
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": {"w": True}}),
    "multi_transform": lambda tx: optax.multi_transform({"all": tx}, {"a": "all", "b": {"w": "all"}}),
    "with_extra_args_support": lambda tx: optax.with_extra_args_support(tx),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_inside_each_combinator(name):
    values = [1.0, -2.0, 0.5, 3.0]
    make = lambda: mp.loss_scaled(optax.adamw(1e-2), SCALE)
    params, state = steps(WRAPPERS[name](make()), values)
    expected, inner = steps(make(), values)
    assert_close(params, expected)
    assert float(mp.get_loss_scale(state).loss_scale) == float(inner.loss_scale.loss_scale) == 2.0**8


@pytest.mark.parametrize("name", [n for n in WRAPPERS if n != "MultiSteps"])
def test_inside_each_combinator_an_overflow_backs_off(name):
    """Inside MultiSteps its own accumulator keeps the NaN (O3); loss_scaled goes around it, as tested above."""
    params, state = steps(WRAPPERS[name](mp.loss_scaled(optax.adamw(1e-2), SCALE)), [jnp.inf])
    assert bits(params) == bits(PARAMS)
    assert float(mp.get_loss_scale(state).loss_scale) == 2.0**5


def test_multisteps_outside_is_poisoned_for_good_but_not_the_parameters():
    """O3: an inf stays in MultiSteps' accumulator. Every window is skipped from then on, which the counts tell."""
    tx = optax.MultiSteps(mp.loss_scaled(optax.adam(1e-2), SCALE), 2)
    clean, _ = steps(tx, [1.0, 1.0])
    params, state = steps(tx, [1.0, 1.0, jnp.inf, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert bits(params) == bits(clean)
    assert int(optax.tree.get(state, "skips_in_a_row")) == 3
    assert float(mp.get_loss_scale(state).loss_scale) == 2.0**3


def test_multisteps_inside_gets_extra_arguments():
    inner = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(patience=1))
    params, _ = steps(mp.loss_scaled(optax.MultiSteps(inner, 1), SCALE), [1.0], value=jnp.float32(2.0))
    assert_close(params["a"], jnp.zeros(3))


def test_lookahead():
    """Its parameters are a pair of trees, its gradients are one."""
    tx = mp.loss_scaled(optax.lookahead(optax.sgd(0.5), 2, 0.5), mp.StaticLossScale(4.0))
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = tx.init(params)
    for value in (1.0, jnp.nan, 1.0):
        grads = jax.tree.map(lambda p, v=value: jnp.full(p.shape, 4.0 * v), PARAMS)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(params.slow["a"], jnp.full(3, 0.5))
    assert_close(params.fast["a"], jnp.full(3, 0.5))
    assert int(state.skip_state.skips_total) == 1


def test_multisteps_inside_drops_the_bad_microbatch_alone():
    tx = mp.loss_scaled(optax.MultiSteps(optax.sgd(1.0), 2), mp.StaticLossScale(64.0))
    params, state = steps(tx, [1.0, jnp.nan, 3.0])
    assert_close(params["a"], jnp.full(3, 1.0 - 2.0))
    assert int(state.skip_state.inner_state.gradient_step) == 1


def test_two_groups_with_their_own_skips():
    """Two optimizers, one poisoned: only that one skips (scenario 7)."""
    group = lambda: mp.skip_on_overflow(optax.sgd(1.0))
    tx = optax.multi_transform({"x": group(), "y": group()}, {"a": "x", "b": {"w": "y"}})
    state = tx.init(PARAMS)
    grads = {"a": jnp.array([1.0, jnp.inf, 1.0]), "b": {"w": jnp.ones(2)}}
    updates, state = tx.update(grads, state, PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    assert bits(params["a"]) == bits(PARAMS["a"])
    assert params["b"]["w"].tolist() == [1.0, 1.0]


def test_extra_arguments_are_forwarded():
    seen = {}

    def update(updates, state, params=None, *, value, **extra):
        seen.update(value=value, params=params, **extra)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    for tx in (mp.skip_on_overflow(spy), mp.loss_scaled(spy, mp.StaticLossScale(64.0)), optax.chain(mp.unscale(), spy)):
        seen.clear()
        scale = mp.StaticLossScale(64.0)
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=3.0, other="x", loss_scale=scale)
        assert seen["value"] == 3.0
        assert seen["other"] == "x"
        assert seen["params"] is not None


def test_a_schedule_driven_by_the_value():
    tx = mp.loss_scaled(optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(patience=1)), SCALE)
    params, _ = steps(tx, [1.0, 1.0], value=jnp.float32(2.0))
    assert bool(mp.all_finite(params))


def test_design_formula_by_hand():
    """loss_scaled is skip_on_overflow around unscale and the inner transform, plus the state."""
    inner = lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    by_hand = mp.skip_on_overflow(optax.chain(mp.unscale(), inner()))
    whole = mp.loss_scaled(inner(), SCALE)
    state, whole_state, scale = by_hand.init(PARAMS), whole.init(PARAMS), SCALE
    params = whole_params = PARAMS
    for value in (1.0, jnp.inf, 2.0, -1.0):
        grads = scaled_grads(whole_state, value)
        updates, state = by_hand.update(grads, state, params, loss_scale=scale)
        params = optax.apply_updates(params, updates)
        scale = scale.adjust(mp.all_finite(grads))
        updates, whole_state = whole.update(grads, whole_state, whole_params)
        whole_params = optax.apply_updates(whole_params, updates)
    assert bits(params) == bits(whole_params)
    assert bits(scale) == bits(whole_state.loss_scale)


def test_inject_hyperparams_with_bfloat16_parameters():
    """optax#1414 (O13b): b2 = 0.999 becomes 1 in bfloat16 and the first step is NaN."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = mp.loss_scaled(optax.inject_hyperparams(optax.adam)(learning_rate=1e-2), mp.NoOpLossScale())
    new, state = steps(tx, [1.0, 1.0], params)
    assert bool(mp.all_finite((new, state)))
    assert float(state.skip_state.inner_state.hyperparams["b2"]) == pytest.approx(0.999)
    assert bits(new) != bits(params)


@pytest.mark.parametrize("style", ["filtered", "whole model"])
def test_equinox_loop(style):
    """Functions and integers in the model are left alone, with parameters filtered or not."""

    class Net(eqx.Module):
        linear: eqx.nn.Linear
        activation: Callable
        depth: jax.Array

        def __call__(self, x):
            return self.activation(self.linear(x)) * self.depth

    model = Net(eqx.nn.Linear(2, 1, key=jax.random.key(0)), jnp.tanh, jnp.array(2))
    tx = mp.loss_scaled(optax.adamw(1e-2), SCALE)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array) if style == "filtered" else model)

    @eqx.filter_jit
    def step(model, state, x):
        loss, grads = mp.value_and_grad(lambda m, x: jnp.mean(jax.vmap(m)(x) ** 2), mp.get_loss_scale(state))(model, x)
        if style == "filtered":
            grads = eqx.filter(grads, eqx.is_inexact_array)
            updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        else:
            updates, state = tx.update(grads, state, model)
        return eqx.apply_updates(model, updates), state, loss

    x = jnp.ones((4, 2))
    first, state, loss = step(model, state, x)
    second, state, later = step(first, state, x)
    assert later < loss
    third, state, _ = step(second, state, x * jnp.nan)
    assert bits(eqx.filter(third, eqx.is_array)) == bits(eqx.filter(second, eqx.is_array))
    assert third.activation is jnp.tanh
    assert int(third.depth) == 2
    assert int(state.skip_state.skips_total) == 1


def test_haiku_loop():
    def forward(x):
        return hk.Linear(1)(jnp.tanh(hk.Linear(4)(x)))

    policy = mp.get_policy("mixed_float16")
    net = hk.without_apply_rng(hk.transform(forward))
    x = jnp.ones((4, 2))
    params = net.init(jax.random.key(0), x)
    tx = mp.loss_scaled(optax.adam(1e-2), SCALE)
    state = tx.init(params)

    @jax.jit
    def step(params, state, x):
        loss_fn = lambda p, x: jnp.mean(policy.cast_to_output(net.apply(*policy.cast_to_compute((p, x)))) ** 2)
        loss, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(state))(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    first, state, loss = step(params, state, x)
    second, state, later = step(first, state, x)
    assert later < loss
    third, state, _ = step(second, state, x * jnp.inf)
    assert bits(third) == bits(second)
    assert int(state.skip_state.skips_total) == 1


def test_nnx_optimizer(count_traces):
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, mp.loss_scaled(optax.adam(1e-2), SCALE), wrt=nnx.Param)

    @count_traces
    def step(model, optimizer, x):
        scale = mp.get_loss_scale(optimizer.opt_state)

        def loss_fn(model):
            loss = jnp.mean(model(x) ** 2)
            return scale.scale(loss), loss

        grads, loss = nnx.grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        return loss

    jitted = nnx.jit(step)
    x = jnp.ones((4, 3))
    assert jitted(model, optimizer, x) > jitted(model, optimizer, x)
    before = bits(nnx.state(model))
    jitted(model, optimizer, x * jnp.inf)
    assert bits(nnx.state(model)) == before
    assert int(optimizer.opt_state.skip_state.skips_total[...]) == 1
    assert float(mp.get_loss_scale(optimizer.opt_state).scale(jnp.float32(1.0))) == 2.0**6
    assert step.traces == 1


def test_flax_train_state():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(x)

    x = jnp.ones((4, 2))
    net = Net()
    state = TrainState.create(
        apply_fn=net.apply, params=net.init(jax.random.key(0), x), tx=mp.loss_scaled(optax.adam(1e-2), SCALE)
    )

    @jax.jit
    def step(state, x):
        loss_fn = lambda params: jnp.mean(state.apply_fn(params, x) ** 2)
        loss, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(state.opt_state))(state.params)
        return state.apply_gradients(grads=grads), loss

    first, loss = step(state, x)
    second, later = step(first, x)
    assert later < loss
    bad, _ = step(second, x * jnp.inf)
    assert bits(bad.params) == bits(second.params)
    assert float(mp.get_loss_scale(bad.opt_state).loss_scale) == 2.0**6
    assert int(bad.step) == 3
