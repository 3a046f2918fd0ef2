"""Linen's TrainState: parameters, optimizer state and mutable collections of a skipped step stay as they were."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from helpers import bits

import mpjax as mp

pytestmark = pytest.mark.standard_promotion

OWG = "_overwrite_with_gradient"
X = jax.random.normal(jax.random.key(0), (16, 6))
BAD = X.at[3, 2].set(jnp.inf)
MEAN = jnp.zeros(2)


class State(TrainState):
    batch_stats: Any


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(jnp.tanh(nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))))


def make(**scale):
    variables = Net().init(jax.random.key(1), X)
    tx = mp.loss_scaled(optax.adam(1e-2), mp.DynamicLossScale(2.0**12, **{"period": 3, **scale}))
    return State.create(apply_fn=Net().apply, params=variables["params"], tx=tx, batch_stats=variables["batch_stats"])


def train_step(state, x, policy="mixed_float16", microbatches=None, **options):
    def loss_fn(params, x):
        variables = {"params": params, "batch_stats": state.batch_stats}
        out, changed = state.apply_fn(variables, x, mutable=["batch_stats"])
        return jnp.mean((out[:, 0] - jnp.where(jnp.isfinite(x), x, 0).sum(1)) ** 2), changed["batch_stats"]

    grad_fn = mp.value_and_grad(mp.autocast(loss_fn, policy), mp.get_loss_scale(state.opt_state), has_aux=True)
    if microbatches:
        (loss, stats), grads, dropped = mp.accumulate(grad_fn, microbatches, on_overflow="drop")(state.params, x)
        options["overflowed"] = dropped.any()
    else:
        (loss, stats), grads = grad_fn(state.params, x)
    return mp.linen.apply_gradients(state, grads=grads, batch_stats=stats, **options), loss


def test_a_run(count_traces):
    counted = count_traces(train_step)
    step = jax.jit(counted, donate_argnums=0)
    state, history = make(), []
    stats = []
    for kind in "...X..XX...":
        before = bits((state.params, state.batch_stats, state.opt_state.skip_state.inner_state))
        state, loss = step(state, BAD if kind == "X" else X)
        same = bits((state.params, state.batch_stats, state.opt_state.skip_state.inner_state)) == before
        stats.append("X" if same else ".")
        history.append(int(np.log2(state.opt_state.loss_scale.loss_scale)))
    assert "".join(stats) == "...X..XX..."
    assert history == [12, 12, 13, 12, 12, 12, 11, 10, 10, 10, 11]
    # Flax's initial step is a Python number, which its own second step replaces by an array.
    assert counted.traces <= 2
    assert state.step == 11
    assert state.opt_state.skip_state.inner_state[0].count == 8
    assert np.isfinite(loss)


def test_flax_alone_keeps_statistics_of_the_skipped_step():
    """What apply_gradients of the state itself does: parameters are safe, statistics NaN for good."""
    state = make()
    new = state.apply_gradients(grads=jax.tree.map(lambda p: p * jnp.nan, state.params), batch_stats=MEAN * jnp.nan)
    assert bits(new.params) == bits(state.params)
    assert not jnp.isfinite(new.batch_stats).any()


def test_statistics_are_kept_when_asked():
    state, _ = train_step(make(), BAD, keep_statistics=True)
    assert not mp.all_finite(state.batch_stats)
    assert mp.all_finite(state.params)


def test_other_fields_change_when_the_step_is_taken():
    state, _ = train_step(make(), X)
    assert jnp.abs(state.batch_stats["BatchNorm_0"]["mean"]).max() > 0
    assert state.tx is not None
    assert state.step == 1


def test_overflows_that_the_gradients_do_not_show():
    """A dropped microbatch: the step is taken and the scale backs off; the transform in the state is the same."""
    state = make()
    new, _ = train_step(state, BAD, microbatches=4)
    assert bits(new.params) != bits(state.params)
    assert mp.all_finite(new.params)
    assert new.opt_state.loss_scale.loss_scale == 2.0**11
    assert new.tx is state.tx


def owg_state(tx):
    params = {"params": {"w": jnp.ones(2)}, OWG: {"amax": jnp.ones(3)}}
    return TrainState.create(apply_fn=None, params=params, tx=tx)


@pytest.mark.parametrize("bad", [True, False])
def test_statistics_that_flax_overwrites_with_gradients(bad):
    """Flax's fp8 layers pass their statistics as gradients; those of a skipped step are not taken."""
    state = owg_state(mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale()))
    grads = {"params": {"w": jnp.array([1.0, jnp.inf if bad else 1.0])}, OWG: {"amax": jnp.array([2.0, jnp.inf, 3.0])}}
    new = mp.linen.apply_gradients(state, grads=grads)
    assert new.params[OWG]["amax"].tolist() == ([1.0] * 3 if bad else [2.0, float("inf"), 3.0])
    assert (bits(new.params["params"]) == bits(state.params["params"])) is bad


def test_errors():
    state = make()
    grads = jax.tree.map(jnp.ones_like, state.params)
    with pytest.raises(TypeError, match=r"differ in dtype or shape at\n(.|\n)*bfloat16\(2,\) against float32\(2,\)"):
        mp.linen.apply_gradients(state.replace(batch_stats=MEAN), grads=grads, batch_stats=MEAN.astype(jnp.bfloat16))
    plain = TrainState.create(apply_fn=None, params=state.params, tx=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"0 parts of state.tx skip steps.\n  expected: exactly one(.|\n)*loss_scaled"):
        mp.linen.apply_gradients(plain, grads=grads)
    twice = TrainState.create(
        apply_fn=None, params=state.params, tx=optax.chain(*[mp.skip_on_overflow(optax.sgd(0.1))] * 2)
    )
    with pytest.raises(ValueError, match=r"2 parts of state.tx skip steps:\n.*0\n.*1"):
        mp.linen.apply_gradients(twice, grads=grads)
