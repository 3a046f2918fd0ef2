"""Linen training: Flax's TrainState as it is, and with collections that a skipped step leaves as they were."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import struct
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.train_state import TrainState
from helpers import bits

import mpjax as mp

pytestmark = pytest.mark.standard_promotion

X = jax.random.normal(jax.random.key(0), (8, 6))
BAD = X.at[3, 2].set(jnp.inf)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.2, deterministic=False)(nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x)))
        calls = self.variable("counts", "calls", lambda: jnp.int32(0))
        if not self.is_initializing():
            calls.value += 1
        return nn.Dense(1)(nn.relu(x))


class State(TrainState):
    batch_stats: Any
    counts: Any
    key: jax.Array
    epoch: int = struct.field(pytree_node=False, default=0)


MODEL = Net()
TX = mp.loss_scaled(optax.adam(1e-2), mp.DynamicLossScale(2.0**12, period=3))


@jax.jit
def make():
    variables = MODEL.init({"params": jax.random.key(1), "dropout": jax.random.key(2)}, X)
    return State.create(apply_fn=MODEL.apply, tx=TX, key=jax.random.key(3), **variables)


@jax.jit
def gradients(state, x):
    """The loss, scaled gradients, and the collections that the call changed."""

    def loss_fn(params, x):
        variables = {"params": params, "batch_stats": state.batch_stats, "counts": state.counts}
        y, updated = state.apply_fn(variables, x, mutable=["batch_stats", "counts"], rngs={"dropout": state.key})
        return jnp.mean((y[:, 0] - jnp.where(jnp.isfinite(x), x, 0).sum(1)) ** 2), updated

    loss_fn = mp.autocast(loss_fn, "mixed_float16")
    (loss, updated), grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(state.opt_state), has_aux=True)(
        state.params, x
    )
    return loss, grads, updated


def train_step(state, x, **options):
    loss, grads, updated = gradients(state, x)
    key = jax.random.fold_in(state.key, state.step)
    return mp.linen.apply_gradients(state, grads=grads, key=key, **updated, **options), loss


def collections(state):
    return {"params": state.params, "batch_stats": state.batch_stats, "counts": state.counts}


def test_a_step_is_that_of_flax():
    state = make()
    _, grads, updated = gradients(state, X)
    expected = state.apply_gradients(grads=grads, **updated, epoch=1)
    assert bits(mp.linen.apply_gradients(state, grads=grads, **updated, epoch=1)) == bits(expected)
    assert expected.counts["calls"] == 1


def test_a_skipped_step_leaves_nothing_in_the_state():
    """flax's DynamicScale leaves the selection to the user, one field at a time."""
    state, _ = train_step(make(), X)
    skipped, loss = train_step(state, BAD)
    assert not jnp.isfinite(loss)
    assert bits(collections(skipped)) == bits(collections(state))
    assert bits(skipped.opt_state.skip_state.inner_state) == bits(state.opt_state.skip_state.inner_state)
    assert skipped.step == state.step + 1  # as in Flax: the calls
    assert (jax.random.key_data(skipped.key) != jax.random.key_data(state.key)).any()
    after, loss = train_step(skipped, X)
    assert jnp.isfinite(loss)
    assert after.counts["calls"] == 2
    assert mp.all_finite(after.batch_stats)


def test_the_history_of_a_run(count_traces):
    """With the state donated; one trace; the optimizer counts the steps that were taken."""
    counted = count_traces(train_step)
    step = jax.jit(counted, donate_argnums=0)
    state, history = make(), []
    # Flax makes it a Python number, which is another type than what the first step returns.
    state = state.replace(step=jnp.int32(0))
    for kind in "...X..XX...":
        before = bits(collections(state))
        state, _ = step(state, BAD if kind == "X" else X)
        assert (bits(collections(state)) == before) == (kind == "X")
        history.append(int(np.log2(mp.get_loss_scale(state.opt_state).loss_scale)))
    assert history == [12, 12, 13, 12, 12, 12, 11, 10, 10, 10, 11]
    assert counted.traces == 1
    assert state.step == 11
    assert state.opt_state.skip_state.inner_state[0].count == 8
    assert state.counts["calls"] == 8
    assert state.opt_state.skip_state.skips_total == 3


def test_statistics_are_kept_when_asked():
    state = make()
    kept, _ = train_step(state, BAD, keep_statistics=True)
    assert kept.counts["calls"] == 1
    assert not mp.all_finite(kept.batch_stats)
    assert bits(kept.params) == bits(state.params)
    for names in ("counts", ("counts",)):
        kept, _ = train_step(state, BAD, keep_statistics=names)
        assert kept.counts["calls"] == 1
        assert bits(kept.batch_stats) == bits(state.batch_stats)


def test_fields_outside_the_tree_go_on():
    state = make()
    grads = jax.tree.map(lambda x: x * jnp.nan, state.params)
    new = mp.linen.apply_gradients(state, grads=grads, epoch=7, counts={"calls": jnp.int32(9)})
    assert new.epoch == 7
    assert new.counts["calls"] == 0


def test_extra_arguments_of_the_optimizer():
    """A microbatch that overflowed and was dropped: the step is taken, with its statistics, and the scale backs off."""
    state = make()
    _, grads, updated = gradients(state, X)
    new = mp.linen.apply_gradients(state, grads=grads, **updated, extra_args={"overflowed": jnp.array(True)})
    assert mp.get_loss_scale(new.opt_state).loss_scale == 2.0**11
    assert new.counts["calls"] == 1
    assert new.tx is state.tx
    plain = state.apply_gradients(grads=grads, **updated)
    assert bits(new.params) == bits(plain.params)


class Averaged(State):
    """A subclass that does more in a step: an average of the batch statistics."""

    def apply_gradients(self, *, grads, batch_stats, **changes):
        average = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, self.batch_stats, batch_stats)
        return super().apply_gradients(grads=grads, batch_stats=average, **changes)


def test_a_subclass_that_does_more():
    state = make()
    state = Averaged(**{name: getattr(state, name) for name in state.__dataclass_fields__})
    _, grads, updated = gradients(state, X)
    new = mp.linen.apply_gradients(state, grads=grads, **updated)
    assert bits(new) == bits(state.apply_gradients(grads=grads, **updated))
    _, grads, updated = gradients(state, BAD)
    assert bits(mp.linen.apply_gradients(state, grads=grads, **updated).batch_stats) == bits(state.batch_stats)


@pytest.mark.parametrize("keep", [False, True, OVERWRITE_WITH_GRADIENT])
def test_fp8_statistics_of_a_skipped_step(keep):
    """TrainState overwrites them with the gradient, which the optimizer does not see; a skipped step keeps the old."""
    params = {"params": {"w": jnp.ones(2)}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones(1)}}
    state = TrainState.create(apply_fn=None, params=params, tx=mp.loss_scaled(optax.sgd(0.5), mp.StaticLossScale(2.0)))

    def step(bad):
        w = jnp.array([2.0, bad])
        grads = {"params": {"w": w}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.full(1, 7.0)}}
        return mp.linen.apply_gradients(state, grads=grads, keep_statistics=keep).params

    taken, skipped = step(2.0), step(jnp.inf)
    assert taken["params"]["w"].tolist() == [0.5, 0.5]
    assert taken[OVERWRITE_WITH_GRADIENT]["scale"] == 7
    assert skipped["params"]["w"].tolist() == [1, 1]
    assert skipped[OVERWRITE_WITH_GRADIENT]["scale"] == (7 if keep else 1)


def test_flax_own_apply_gradients():
    """As it is, for a model without other collections; autocast around Linen's apply."""
    model = nn.Dense(1)
    tx = mp.loss_scaled(optax.adam(0.1), mp.DynamicLossScale(2.0**12))
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), X)["params"], tx=tx)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x):
        loss_fn = mp.autocast(lambda p, x: jnp.mean((state.apply_fn({"params": p}, x)[:, 0] - 1) ** 2), "mixed_float16")
        loss, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(state.opt_state))(state.params, x)
        return state.apply_gradients(grads=grads), loss

    state, first = step(jax.tree.map(jnp.copy, state), X)
    before = bits(state.params)
    state, _ = step(state, BAD)
    assert bits(state.params) == before
    for _ in range(30):
        state, loss = step(state, X)
    assert loss < 0.5 * first
    assert state.opt_state.skip_state.skips_total == 1


def test_errors():
    state = make()
    grads = jax.tree.map(jnp.zeros_like, state.params)
    apply = functools.partial(mp.linen.apply_gradients, state, grads=grads)
    with pytest.raises(TypeError, match=r"State has no field 'batch_stat'(.|\n)*batch_stats"):
        apply(batch_stat={})
    with pytest.raises(TypeError, match=r"State has no field 'stats'"):
        apply(keep_statistics=["stats"])
    with pytest.raises(ValueError, match=r"only in the new batch_stats: more(.|\n)*only in state.batch_stats: Batch"):
        apply(batch_stats={"more": jnp.zeros(1)})
    with pytest.raises(TypeError, match=r"counts/calls: float32\(\) against int32\(\)"):
        apply(counts={"calls": jnp.float32(0)})
    with pytest.raises(TypeError, match=r"state is a dict(.|\n)*TrainState"):
        mp.linen.apply_gradients({}, grads=grads)
    plain = TrainState.create(apply_fn=None, params=grads, tx=optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"0 parts of state.tx skip steps\.\n(.|\n)*mp.loss_scaled"):
        mp.linen.apply_gradients(plain, grads=grads)
    twice = optax.chain(mp.skip_on_overflow(optax.sgd(1.0)), mp.skip_on_overflow(optax.sgd(1.0)))
    twice = TrainState.create(apply_fn=None, params=grads, tx=twice)
    with pytest.raises(ValueError, match=r"2 parts of state.tx skip steps:\n +0\n +1\n"):
        mp.linen.apply_gradients(twice, grads=grads)


class OwnAverage(TrainState):
    average: Any

    def apply_gradients(self, *, grads, **kwargs):
        new = super().apply_gradients(grads=grads, **kwargs)
        return new.replace(average=jax.tree.map(lambda a, p: (a + p) / 2, self.average, new.params))


@pytest.mark.parametrize("bad", [True, False])
def test_fields_that_the_state_itself_changes(bad):
    """An average of the weights, as subclasses keep it: not moved by a skipped step either."""
    tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale())
    state = OwnAverage.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=tx, average={"w": jnp.zeros(1)})
    new = mp.linen.apply_gradients(state, grads={"w": jnp.array([jnp.nan if bad else 0.0])})
    assert new.average["w"].tolist() == [0.0 if bad else 0.5]
