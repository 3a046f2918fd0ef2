"""Whole training runs that a loss scaler has to come through, against controls (scenarios 6 to 8 of the research)."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpjax as mp

pytestmark = pytest.mark.standard_promotion

RNG = np.random.default_rng(0)
PARAMS = {
    "w1": jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32),
    "w2": jnp.asarray(RNG.normal(size=(8, 1)), jnp.float32),
}
BATCHES = [jnp.asarray(RNG.normal(size=(4, 8)), jnp.float32) for _ in range(4)]
BAD_BATCH = 2


def model(params, x, dtype):
    params, x = jax.tree.map(lambda a: a.astype(dtype), (params, x))
    return (jnp.tanh(x @ params["w1"]) @ params["w2"]).astype(jnp.float32)


def loss_fn(params, x, dtype="float32"):
    return jnp.mean((model(params, x, dtype) - 1.0) ** 2)


def poison(grads):
    return {**grads, "w2": grads["w2"].at[3, 0].set(jnp.inf)}


true_grad = jax.grad(loss_fn)


def control(make_inner, grad_fn=true_grad, skip=True):
    """Float32 training that leaves the bad batch out by hand."""
    tx = make_inner()
    params, state = PARAMS, tx.init(PARAMS)
    for i, x in enumerate(BATCHES):
        if i == BAD_BATCH and skip:
            continue
        updates, state = tx.update(grad_fn(params, x), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def scaled_run(make_inner, grad_fn, between=lambda params, state: (params, state)):
    tx = mp.loss_scaled(make_inner(), mp.DynamicLossScale(128.0, period=1))
    params, state = PARAMS, tx.init(PARAMS)
    for i, x in enumerate(BATCHES):
        grads = grad_fn(params, x, mp.get_loss_scale(state))
        updates, state = tx.update(poison(grads) if i == BAD_BATCH else grads, state, params)
        params, state = between(optax.apply_updates(params, updates), state)
    return params, state


def plain_scaled(params, x, scale, dtype="float32"):
    return mp.grad(loss_fn, scale)(params, x, dtype)


INNER = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-2),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("inner", INNER)
def test_equivalence_with_a_control_that_skips_the_same_batch(inner, dtype):
    params, state = scaled_run(INNER[inner], lambda p, x, s: plain_scaled(p, x, s, dtype))
    expected, expected_state = control(INNER[inner])
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == "float32" else {"rtol": 0.1, "atol": 2e-2}
    close = lambda a, b: np.testing.assert_allclose(a, b, **tolerance)
    jax.tree.map(close, params, expected)
    if dtype == "float32":
        jax.tree.map(close, state.skip_state.inner_state, expected_state)
    assert float(state.loss_scale.loss_scale) == 128 * 2**3 * 0.5


def test_disabled_scaling_reads_one_and_the_control_does_not_skip():
    """Without loss_scaled nothing is skipped: the poisoned step goes through, as it must in plain optax."""
    scale = mp.NoOpLossScale()
    assert scale.loss_scale == 1.0
    tx = optax.sgd(0.1)
    params, state = PARAMS, tx.init(PARAMS)
    updates, _ = tx.update(poison(plain_scaled(params, BATCHES[0], scale)), state, params)
    assert not bool(mp.all_finite(optax.apply_updates(params, updates)))
    params, _ = control(INNER["sgd"], lambda p, x: plain_scaled(p, x, scale), skip=False)
    expected, _ = control(INNER["sgd"], skip=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, expected)


def test_serialized_and_restored_after_every_step():
    def between(params, state):
        fresh = mp.loss_scaled(INNER["adamw"](), mp.DynamicLossScale(128.0, period=1)).init(PARAMS)
        return flax.serialization.from_bytes((PARAMS, fresh), flax.serialization.to_bytes((params, state)))

    params, state = scaled_run(INNER["adamw"], plain_scaled, between)
    expected, expected_state = scaled_run(INNER["adamw"], plain_scaled)
    for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves((expected, expected_state)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_clipping_scaled_gradients_by_the_scaled_norm():
    """Clipping before unscaling, at max_norm * scale, is clipping after it."""
    scale = mp.StaticLossScale(128.0)
    grads = plain_scaled(PARAMS, BATCHES[0], scale)
    before = optax.clip_by_global_norm(0.1 * 128.0).update(grads, optax.EmptyState())[0]
    after = optax.clip_by_global_norm(0.1).update(scale.unscale(grads), optax.EmptyState())[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scale.unscale(before), after)


def test_gradient_penalty():
    """Double backward: inner gradients are unscaled, the outer loss is scaled."""

    def penalised(params, x, scale):
        inner = scale.unscale(mp.grad(loss_fn, scale)(params, x))
        return loss_fn(params, x) + 1e-3 * optax.tree.norm(inner, squared=True)

    def true_penalised(params, x):
        return loss_fn(params, x) + 1e-3 * optax.tree.norm(jax.grad(loss_fn)(params, x), squared=True)

    params, state = scaled_run(INNER["sgd"], lambda p, x, s: mp.grad(penalised, s)(p, x, s))
    expected, _ = control(INNER["sgd"], jax.grad(true_penalised))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), params, expected)
    assert float(state.loss_scale.loss_scale) == 512.0


def test_accumulation_over_two_microbatches():
    """MultiSteps inside loss_scaled: four micro-steps, one dropped; the window fills with the next ones."""
    make = lambda: optax.MultiSteps(optax.sgd(0.1), 2)
    params, state = scaled_run(make, plain_scaled)
    expected, expected_state = control(make)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), params, expected)
    inner = state.skip_state.inner_state
    assert (int(inner.mini_step), int(inner.gradient_step)) == (1, 1)
    assert (int(expected_state.mini_step), int(expected_state.gradient_step)) == (1, 1)


def test_two_models_two_losses_two_optimizers_one_scale():
    """One optimizer is poisoned and skips, the other steps; the shared scale backs off once: 128 * 2**3 * 0.5."""
    first, second = (mp.skip_on_overflow(optax.chain(mp.unscale(), optax.sgd(0.1))) for _ in range(2))
    scale = mp.DynamicLossScale(128.0, period=1)
    models = [PARAMS, jax.tree.map(lambda x: x * 0.5, PARAMS)]
    states = [first.init(models[0]), second.init(models[1])]
    moved = []
    for i, x in enumerate(BATCHES):
        losses = [lambda p, x=x: loss_fn(p, x), lambda p, x=x: 2.0 * loss_fn(p, x) + 0.1]
        grads = [mp.grad(loss, scale)(model) for loss, model in zip(losses, models, strict=True)]
        if i == BAD_BATCH:
            grads[1] = poison(grads[1])
        before = models
        results = [
            tx.update(g, s, m, loss_scale=scale)
            for tx, g, s, m in zip((first, second), grads, states, models, strict=True)
        ]
        states = [state for _, state in results]
        models = [optax.apply_updates(m, updates) for m, (updates, _) in zip(models, results, strict=True)]
        moved.append([not np.array_equal(a["w2"], b["w2"]) for a, b in zip(before, models, strict=True)])
        scale = scale.adjust(mp.all_finite(grads))
    assert moved == [[True, True], [True, True], [True, False], [True, True]]
    assert float(scale.loss_scale) == 128 * 2**3 * 0.5


def test_duplicate_indices_that_overflow_when_combined():
    """Scenario 8: 64000 twice into one float16 row is inf; each alone is not."""

    def loss(table):
        rows = table[jnp.array([1, 1])]  # the gradient is scattered into one row, in float16
        return (rows.astype(jnp.float32) * 64000.0).sum()

    table = jnp.zeros((3, 1), jnp.float16)
    grads = jax.grad(loss)(table)
    assert np.isinf(np.asarray(grads, np.float32)).tolist() == [[False], [True], [False]]
    tx = mp.loss_scaled(optax.sgd(0.1), mp.NoOpLossScale())
    updates, state = tx.update(grads, tx.init(table), table)
    assert int(state.skip_state.skips_total) == 1
    assert not np.any(np.asarray(updates))


def test_static_scale_never_changes_and_skips():
    """Scenario 16."""
    tx = mp.loss_scaled(optax.sgd(0.1), mp.StaticLossScale(64.0))
    state = tx.init(PARAMS)
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        grads = {**PARAMS, "w1": PARAMS["w1"].at[0, 0].set(bad)}
        _, state = tx.update(grads, state, PARAMS)
    assert mp.get_loss_scale(state).loss_scale == 64.0
    assert int(state.skip_state.skips_total) == 3


def hundred_thousand_steps(seed, rate, period, floor, ceiling):
    """Random overflows at any rate: the scale is always finite, a power of two, and within its bounds."""
    state = mp.DynamicLossScale(
        2.0**10, period=period, min_loss_scale=2.0**floor, max_loss_scale=2.0**ceiling, hysteresis=1 + seed % 3
    )
    finite = jax.random.uniform(jax.random.key(seed), (100_000,)) >= rate

    def step(state, ok):
        state = state.adjust(ok)
        return state, state.loss_scale

    final, scales = jax.jit(lambda state, finite: jax.lax.scan(step, state, finite))(state, finite)
    scales = np.asarray(scales)
    assert scales.min() >= 2.0**floor
    assert scales.max() <= 2.0**ceiling
    assert np.all(np.frexp(scales)[0] == 0.5)
    assert jax.tree.structure(final) == jax.tree.structure(state)


LONG_RUNS = given(
    st.integers(0, 2**31 - 1), st.floats(0.0, 0.6), st.integers(1, 50), st.integers(-8, 0), st.integers(12, 30)
)
test_a_hundred_thousand_steps = settings(max_examples=5)(LONG_RUNS(hundred_thousand_steps))
test_a_hundred_thousand_steps_often = pytest.mark.slow(settings(max_examples=100)(LONG_RUNS(hundred_thousand_steps)))
