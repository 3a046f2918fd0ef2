import functools
import json

import jax
import jax.numpy as jnp
import optax
import pytest

import mpjax as mp
from mpjax.diagnostics import gradient_monitor, scalars, summary

pytestmark = pytest.mark.standard_promotion

NAN, INF = jnp.nan, jnp.inf
WIDE = jnp.where(jnp.arange(16) < 10, 2.0**-31, 1.0)


PARAMS = {"head": jnp.ones(4), "layers": {"w": jnp.ones(16)}}


@functools.cache
def compiled(kind, **options):
    """A transform and its step; dynamic scales of all sizes share one."""
    loss_scale = kind(**options)
    tx = gradient_monitor(mp.loss_scaled(optax.sgd(1e-3), loss_scale), 1, dtype=("float16", "bfloat16"))

    def loss_fn(params, x):
        half = jax.tree.map(lambda p: p.astype(jnp.float16).astype(jnp.float32), params)
        return jnp.sum(half["layers"]["w"] * x) + half["head"].sum()

    @jax.jit
    def step(params, opt_state, x):
        _, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(opt_state))(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return tx, step


def run(loss_scale, data, per_weight=1.0, **options):
    """A loss in float16 with gradients of `per_weight` times the data, one number of them a step; its state."""
    if loss_scale is None:
        tx, step = compiled(mp.NoOpLossScale)
    elif options.pop("static", False):
        tx, step = compiled(mp.StaticLossScale, loss_scale=loss_scale)
    else:
        tx, step = compiled(mp.DynamicLossScale, **options)
    params, state = PARAMS, tx.init(PARAMS)
    scale = state.inner_state.loss_scale
    if isinstance(scale, mp.DynamicLossScale):
        scale = scale._replace(loss_scale=jnp.float32(loss_scale))
        state = state._replace(inner_state=state.inner_state._replace(loss_scale=scale))
    for x in data:
        params, state = step(params, state, jnp.full(16, per_weight, jnp.float32) * jnp.float32(x))
    return state


# Each run, the rules that give advice on it, and a part of what they say: no others do.
RUNS = {
    "clean": (lambda: run(2.0**10, [1.0] * 9), {}),
    "one overflow": (lambda: run(2.0**10, [1.0] * 8 + [INF, 1.0]), {}),
    "clean, no scale": (lambda: run(None, [1.0] * 9), {}),
    "NaN data": (
        lambda: run(2.0**4, [NAN] * 9),
        {"data": "or the forward pass overflows: gradients were not finite from step 0 on, down to scale 2**0. "},
    ),
    "NaN data, no scale": (lambda: run(None, [NAN] * 9), {"data": "from step 0 on. "}),
    "NaN from step 3 on": (
        lambda: run(2.0**4, [1.0] * 3 + [NAN] * 9),
        {"floor": "of step 11: gradients overflowed 5 times at the scale's floor of 2**0"},
    ),
    "some NaN, no scale": (
        lambda: run(None, [1.0, NAN, 1.0]),
        {"no scale to blame": "of step 1: gradients were not finite once"},
    ),
    "static, too high": (
        lambda: run(2.0**14, [1.0, 8.0, 8.0, 1.0], static=True),
        {"lower the static scale": "lower the loss scale, 2**14, or let it adapt"},
    ),
    "starts too high": (
        lambda: run(2.0**24, [1.0] * 20),
        {"lower the initial scale": "the first 9 steps overflowed. mp.DynamicLossScale(2**15)"},
    ),
    "grows too often": (
        lambda: run(2.0**15, [1.0] * 30, period=3),
        {"raise the period": "7 of 30 steps were skipped. mp.DynamicLossScale(period=2000)"},
    ),
    "too wide": (lambda: run(2.0**14, [2.0], WIDE, static=True), {"bfloat16": '"mixed_bfloat16"'}),
    "too wide, and overflowing": (lambda: run(2.0**15, [1.0] * 99 + [2.0, 1.0], WIDE), {"bfloat16": "remove this"}),
    "static, too low": (
        lambda: run(2.0, [2.0**-17], static=True),
        {"raise the scale": "2**13 instead of 2**1, mp.StaticLossScale(2.0**13)"},
    ),
    "starts too low": (lambda: run(2.0**4, [2.0**-20]), {"raise the scale": "2**13 instead of 2**4"}),
}


# Each of these compiles a step of its own.
SLOW = {"grows too often", "static, too low", "static, too high"}


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in RUNS])
def test_advice(name):
    make, expected = RUNS[name]
    found = summary(make())
    assert {advice.rule for advice in found.advice} == set(expected)
    for advice in found.advice:
        assert expected[advice.rule] in advice.text
        assert f"advice: {advice.text}\n        {advice.reason}" in str(found)
    assert json.loads(found.to_json()) == found.to_dict()
    assert found.to_dict()["skips_total"] == found.skips_total


def test_in_words_and_in_numbers():
    state = run(2.0**15, [2.0, 4.0, 8.0, 1.0], WIDE, min_loss_scale=2.0**14)
    found = summary(state)
    assert str(found) == WORDS
    assert found.first_skip.leaves == (("layers/w", 6),)
    assert found.skips_in_a_row == 0
    numbers = scalars(state)
    assert all(type(value) in (int, float) for value in numbers.values())
    assert numbers == {
        "loss_scale": 2.0**14,
        "skips_total": 3,
        "skips_in_a_row": 0,
        "clean_steps": 1,
        "at_floor": 2,
        "steps": 4,
        "gradients/step": 3,
        "gradients/loss_scale": 2.0**14,
        "gradients/non_finite": 0,
        "gradients/zeros": 0,
        "gradients/min_exponent": -17,
        "gradients/max_exponent": 14,
        "gradients/float16/overflow": 0.0,
        "gradients/float16/subnormal": 0.5,
        "gradients/float16/zero": 0.0,
        "gradients/bfloat16/overflow": 0.0,
        "gradients/bfloat16/subnormal": 0.0,
        "gradients/bfloat16/zero": 0.0,
    }


WORDS = """\
loss scale 2**14, dynamic: 1 of 2,000 clean steps until it grows; held at its floor, 2**14, 2 times
steps skipped: 3 of 4
skipped first: step 0, at scale 2**15: layers/w (6 not finite)
skipped last: step 2, at scale 2**14: layers/w (6 not finite)
gradients of step 3, at scale 2**14: 20 numbers, 0 not finite, 0 zeros, the others from 2**-17 to 2**14
  rounded to      overflow subnormal      zero
  float16            0.00%    50.00%     0.00%
  bfloat16           0.00%     0.00%     0.00%
advice: look for NaN or inf in the data and the loss of step 2: gradients overflowed 2 times at the scale's floor of \
2**14. Or lower that: mp.DynamicLossScale(min_loss_scale=1.0)
        what a scale that low does not keep finite is no overflow of scaled gradients; parameters are as before"""


def test_without_a_monitor():
    tx = optax.chain(mp.loss_scaled(optax.adam(1e-3), mp.StaticLossScale(8.0)))
    found = summary(tx.init({"w": jnp.ones(2)}))
    assert str(found) == (
        "loss scale 2**3, static\n"
        "steps skipped: 0\n"
        "which leaves: mp.diagnostics.gradient_monitor(mp.loss_scaled(...)) keeps that"
    )
    assert (found.kind, found.steps, found.measured, found.advice) == ("static", None, None, ())
    state = mp.skip_on_overflow(optax.sgd(0.1)).init({"w": jnp.ones(2)})
    assert str(summary(state)).startswith("no loss scale\nsteps skipped: 0")


def test_leaves_that_are_many_and_a_norm_past_the_range():
    params = {f"w{i}": jnp.ones(2) for i in range(10)}
    tx = gradient_monitor(mp.skip_on_overflow(optax.sgd(0.1)), dtype="float16", exponents=(-1, 1))
    update = jax.jit(lambda s, value: tx.update(jax.tree.map(lambda p: p * value, params), s)[1])
    found = summary(update(update(tx.init(params), 3e38), INF))
    assert "skipped first: step 0, at scale 2**0: no gradient, but their norm was past float32's range" in str(found)
    assert "w7 (2 not finite), 2 more" in str(found)


def test_a_damaged_scale_is_told_as_it_will_be_used():
    tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale())
    state = tx.init({"w": jnp.ones(2)})
    state = state._replace(loss_scale=state.loss_scale._replace(loss_scale=jnp.float32(NAN)))
    assert summary(state).loss_scale == 2.0**16


def test_errors():
    with pytest.raises(ValueError, match="no loss scale, and skips no steps"):
        summary(optax.sgd(0.1).init({"w": jnp.ones(2)}))
    tx = optax.chain(*[mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale())] * 2)
    with pytest.raises(ValueError, match="has 2 times a SkipOnOverflowState"):
        scalars(tx.init({"w": jnp.ones(2)}))


def test_the_leaf_that_would_lose_most():
    params = {"a": jnp.ones(4), "b": jnp.array([2.0**-30, 1.0, 1e5, 1.0])}
    tx = gradient_monitor(mp.skip_on_overflow(optax.sgd(0.1)), dtype="float16", exponents=(-1, 1))
    found = summary(jax.jit(lambda s: tx.update(params, s)[1])(tx.init(params)))
    row = found.measured.format("float16")
    assert (row.overflow, row.subnormal, row.zero, row.worst, row.worst_share) == (0.125, 0.0, 0.125, "b", 0.5)
    assert found.measured.format("bfloat16") is None
    assert str(found).endswith("  float16           12.50%     0.00%    12.50%  most in b (50.00%)")
