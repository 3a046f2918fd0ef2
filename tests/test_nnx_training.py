"""NNX training: scaled gradients of modules, the optimizers, and modules that a skipped step leaves as they were."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import bits
from jax.sharding import PartitionSpec as P

import mpjax as mp

pytestmark = pytest.mark.standard_promotion

X = jax.random.normal(jax.random.key(0), (8, 6))
BAD = X.at[3, 2].set(jnp.inf)


class Net(nnx.Module):
    """Batch statistics, dropout, and layers scanned over and computed again on the way back."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.blocks = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))(rngs.split(3))
        self.last = nnx.Linear(8, 1, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        x = self.dropout(self.norm(self.first(x)))

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def through(x, block):
            return x + jnp.tanh(block(x))

        return self.last(through(x, self.blocks))


def loss_fn(model, x):
    return jnp.mean((model(x)[:, 0] - jnp.where(jnp.isfinite(x), x, 0).sum(1)) ** 2)


def make(policy="mixed_float16", optimizer=nnx.Optimizer, tx=None, **scale):
    model = Net(nnx.Rngs(0))
    tx = mp.loss_scaled(tx or optax.adam(1e-2), mp.DynamicLossScale(2.0**12, **{"period": 3, **scale}))
    return model, optimizer(model, tx, wrt=nnx.Param), mp.nnx.autocast(loss_fn, policy)


def state_of(model, *kinds):
    return nnx.as_pure(nnx.state(model, *kinds))


def train_step(loss, model, optimizer, x, **options):
    scale = mp.get_loss_scale(optimizer.opt_state)
    value, grads = mp.nnx.value_and_grad(loss, scale, **options)(model, x)
    optimizer.update(model, grads)
    return value


@pytest.mark.slow
def test_values_are_those_of_nnx():
    """The true loss, and gradients that are those of NNX times the scale, exactly."""
    model = Net(nnx.Rngs(0))
    expected_loss, expected = nnx.value_and_grad(loss_fn)(nnx.clone(model), X)
    loss, grads = mp.nnx.value_and_grad(loss_fn, mp.StaticLossScale(1024.0))(model, X)
    assert loss == expected_loss
    assert bits(nnx.as_pure(grads)) == bits(jax.tree.map(lambda g: 1024 * g, nnx.as_pure(expected)))
    assert type(grads) is type(expected)
    assert bits(mp.nnx.grad(loss_fn, mp.StaticLossScale(1024.0))(Net(nnx.Rngs(0)), X)) == bits(grads)
    assert model.calls[...] == 1
    assert jnp.abs(model.norm.mean[...]).max() > 0


@pytest.mark.parametrize("jit", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_skipped_step_leaves_nothing_in_the_module(jit):
    """flax's F14 and N10: there statistics are lost or NaN for good, and parameters NaN."""
    model, optimizer, loss = make()
    step = functools.partial(train_step, loss)
    step = nnx.jit(step) if jit else step
    step(model, optimizer, X)
    before = bits(state_of(model, nnx.Not(nnx.RngState))), bits(optimizer.opt_state.skip_state.inner_state)
    counts = int(model.dropout.rngs.count[...])
    assert not jnp.isfinite(step(model, optimizer, BAD))
    assert before == (bits(state_of(model, nnx.Not(nnx.RngState))), bits(optimizer.opt_state.skip_state.inner_state))
    assert int(model.dropout.rngs.count[...]) == counts + 1
    assert optimizer.opt_state.skip_state.skips_total[...] == 1
    assert step(model, optimizer, X) < 10
    assert model.calls[...] == 2


def test_the_history_of_a_run(count_traces):
    model, optimizer, loss = make()
    counted = count_traces(functools.partial(train_step, loss))
    step = nnx.jit(counted)
    history = []
    for kind in "...X..XX...":
        step(model, optimizer, BAD if kind == "X" else X)
        history.append(int(np.log2(optimizer.opt_state.loss_scale.loss_scale[...])))
    assert history == [12, 12, 13, 12, 12, 12, 11, 10, 10, 10, 11]
    assert counted.traces == 1
    assert model.calls[...] == 8
    assert optimizer.step[...] == 11  # as in Flax: the calls
    assert optimizer.opt_state.skip_state.inner_state[0].count[...] == 8
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state_of(model, nnx.Param, nnx.BatchStat)))


def test_it_trains():
    model, optimizer, loss = make(tx=optax.adam(3e-2))
    step = nnx.jit(functools.partial(train_step, loss))
    losses = [float(step(model, optimizer, BAD if i % 10 == 5 else X)) for i in range(60)]
    losses = [x for x in losses if np.isfinite(x)]
    assert len(losses) == 54
    assert np.mean(losses[-5:]) < 0.3 * losses[0]


def test_statistics_are_kept_when_asked():
    model, optimizer, loss = make()
    nnx.jit(functools.partial(train_step, loss, keep_statistics=True))(model, optimizer, BAD)
    assert model.calls[...] == 1
    assert not jnp.isfinite(model.norm.mean[...]).all()
    assert jnp.isfinite(model.first.kernel[...]).all()


def test_gradients_past_the_norms_range_count_as_an_overflow():
    """As in skip_on_overflow, by the same expression: finite gradients whose squares overflow."""
    model = Net(nnx.Rngs(0))

    def large(model, x):
        return 1e20 * loss_fn(model, x)

    grads = mp.nnx.grad(large, mp.NoOpLossScale())(model, X)
    assert mp.all_finite(nnx.as_pure(grads))
    assert model.calls[...] == 0


def test_model_and_optimizer():
    model = Net(nnx.Rngs(0))
    optimizer = nnx.ModelAndOptimizer(model, mp.loss_scaled(optax.adam(1e-2), mp.DynamicLossScale(2.0**12)))

    @nnx.jit
    def step(optimizer, x):
        loss, grads = mp.nnx.value_and_grad(loss_fn, mp.get_loss_scale(optimizer.opt_state))(optimizer.model, x)
        optimizer.update(grads)
        return loss

    first = step(optimizer, X)
    before = bits(state_of(model, nnx.Not(nnx.RngState)))
    step(optimizer, BAD)
    assert bits(state_of(model, nnx.Not(nnx.RngState))) == before
    assert optimizer.opt_state.loss_scale.loss_scale[...] == 2.0**11
    assert step(optimizer, X) < first


@pytest.mark.slow
def test_half_precision_parameters():
    """bfloat16 parameters with exact masters; flax's N9: moments in bfloat16, small steps lost."""
    model, optimizer, loss = make("mixed_bfloat16")
    mp.get_policy("params=bfloat16,compute=bfloat16,output=float32").apply_to(model)
    tx = mp.transforms.master_weights(optax.sgd(1e-3), form="remainder")
    optimizer = nnx.Optimizer(model, mp.loss_scaled(tx, mp.DynamicLossScale(2.0**12)), wrt=nnx.Param)
    step = nnx.jit(functools.partial(train_step, loss))
    kernel = np.asarray(model.first.kernel[...], np.float32)
    for i in range(20):
        step(model, optimizer, BAD if i == 7 else X)
    assert model.first.kernel[...].dtype == jnp.bfloat16
    assert (np.asarray(model.first.kernel[...], np.float32) != kernel).mean() > 0.6
    assert optimizer.opt_state.skip_state.skips_total[...] == 1


@pytest.mark.slow
def test_other_variables_and_several_arguments():
    """nnx.DiffState, several argnums, aux, keywords."""
    model, other = Net(nnx.Rngs(0)), nnx.Linear(6, 6, rngs=nnx.Rngs(1))

    def fn(model, other, x, *, weight):
        loss = loss_fn(model, other(x)) * weight
        return loss, {"weight": weight}

    scale = mp.StaticLossScale(4.0)
    argnums = (nnx.DiffState(0, nnx.PathContains("last")), 1)
    (loss, aux), grads = mp.nnx.value_and_grad(fn, scale, argnums=argnums, has_aux=True)(model, other, X, weight=2.0)
    assert aux["weight"] == 2.0
    assert [set(g) for g in grads] == [{"last"}, {"kernel", "bias"}]
    expected = nnx.grad(lambda *args: fn(*args, weight=2.0)[0], argnums=argnums)(Net(nnx.Rngs(0)), other, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 4 * b, rtol=1e-6), grads, expected)
    grads, aux = mp.nnx.grad(fn, scale, has_aux=True)(model, other, X, weight=2.0)
    assert aux["weight"] == 2.0
    assert np.isfinite(loss)


def test_under_shard_map():
    """An overflow in one device's rows takes the statistics of all back."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    graph, state = nnx.split(nnx.BatchNorm(6, rngs=nnx.Rngs(0)))

    def fn(state, x):
        model = nnx.merge(graph, state)
        options = {"axis_name": "d"}
        mp.nnx.grad(lambda model: jnp.mean((model(x) * x) ** 2), mp.StaticLossScale(8.0), **options)(model)
        return model.mean[...][None]

    mapped = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"), check_vma=False))
    assert (np.abs(mapped(state, X)) > 0).all()
    assert (np.asarray(mapped(state, BAD)) == 0).all()


def test_the_flag_is_computed_once():
    """The test for finite gradients is the optimizer's own: no more reads of the gradients in the compiled step."""

    def reads(keep_statistics):
        model, optimizer, loss = make("float32")
        fn = functools.partial(train_step, loss, keep_statistics=keep_statistics)
        graph, state = nnx.split((model, optimizer))

        def step(state, x):
            model, optimizer = nnx.merge(graph, state)
            value = fn(model, optimizer, x)
            return nnx.state((model, optimizer)), value

        text = jax.jit(step).lower(state, X).compile().as_text()
        return text.count(" reduce(")

    # Another test would read every gradient again, in a reduction each.
    assert reads(keep_statistics=False) == reads(keep_statistics=True)


def test_a_variable_in_the_place_of_another():
    """The call puts a new variable where the old one was: it gets the old value back all the same."""
    model = nnx.Linear(6, 1, rngs=nnx.Rngs(0))
    model.stat = nnx.BatchStat(jnp.zeros(6))

    def fn(model, x):
        model.stat = nnx.BatchStat(x.mean(0))
        return jnp.mean(model(x) ** 2)

    mp.nnx.grad(fn, mp.StaticLossScale(8.0))(model, BAD)
    assert model.stat[...].tolist() == [0.0] * 6
    mp.nnx.grad(fn, mp.StaticLossScale(8.0))(model, X)
    assert bits(model.stat[...]) == bits(X.mean(0))


def test_errors():
    model = Net(nnx.Rngs(0))
    scale = mp.DynamicLossScale()
    with pytest.raises(TypeError, match=r"argnums=0, hold no floats(.|\n)*nnx.DiffState\(0, nnx.LoRAParam\)"):
        mp.nnx.grad(lambda m: m(X).mean(), scale)(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"the loss has shape \(8,\)"):
        mp.nnx.grad(lambda m: m(X)[:, 0], scale)(model)
    with pytest.raises(TypeError, match=r"has_aux=True, but the function returned"):
        mp.nnx.grad(loss_fn, scale, has_aux=True)(model, X)

    def grows(model):
        model.calls.set_value(jnp.zeros(2))
        return model(X).mean()

    with pytest.raises(TypeError, match=r"calls: int32\(\) before, float32\(2,\) after(.|\n)*keep_statistics=True"):
        mp.nnx.grad(grows, scale)(model)
    mp.nnx.grad(grows, scale, keep_statistics=True)(Net(nnx.Rngs(0)))
