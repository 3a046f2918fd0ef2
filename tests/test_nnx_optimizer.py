"""nnx.Optimizer with half-precision parameters; and what a call makes anew in a module, or cannot be given."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import bits

import mpjax as mp

X = jnp.linspace(-1.0, 1.0, 8, dtype=jnp.bfloat16).reshape(2, 4)
BAD = X.at[0, 0].set(jnp.nan)


def half():
    """In bfloat16, parameters and all."""
    return nnx.Linear(4, 2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


def loss_fn(model, x):
    return (model(x).astype(jnp.float32) ** 2).mean()


TX = mp.loss_scaled(
    mp.transforms.master_weights(optax.trace(0.9), form="remainder"), mp.DynamicLossScale(2.0**12, period=2)
)


def gradients(model, opt_state, x):
    return mp.nnx.grad(loss_fn, mp.get_loss_scale(opt_state))(model, x)


def test_half_precision_parameters_step_as_in_a_loop_of_optax():
    """Bit for bit, masters and scale too; the momentum is float32, and a skipped step changes nothing (flax's N9)."""
    model, optimizer = half(), nnx.Optimizer(half(), TX, wrt=nnx.Param)
    graph, params = nnx.split(half())
    params, opt_state = nnx.as_pure(params), TX.init(nnx.as_pure(params))

    @nnx.jit
    def step(model, optimizer, x):
        grads = gradients(model, optimizer.opt_state, x)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, grads)

    @jax.jit
    def by_hand(params, opt_state, x):
        grads = nnx.as_pure(gradients(nnx.merge(graph, params), opt_state, x))
        updates, opt_state = TX.update(grads, opt_state, params)
        return mp.transforms.apply_updates(params, updates), opt_state

    for x in (X, X, BAD, X):
        before = bits(nnx.state(model))
        step(model, optimizer, x)
        params, opt_state = by_hand(params, opt_state, x)
        assert (bits(nnx.state(model)) == before) == (x is BAD)
        assert bits(nnx.as_pure(nnx.state(model))) == bits(params)
        assert bits(nnx.as_pure(optimizer.opt_state))[1] == bits(opt_state)[1]
    assert model.kernel[...].dtype == jnp.bfloat16
    moments = optimizer.opt_state.skip_state.inner_state.inner_state
    assert {x.dtype for x in jax.tree.leaves(nnx.as_pure(moments))} == {jnp.dtype("float32")}


def test_strict_promotion_refuses_what_the_optimizer_adds():
    """Flax's own sum of a bfloat16 parameter and a float32 update: why the other test asks for standard promotion."""
    model = half()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    with pytest.raises(ValueError, match="no available implicit dtype promotion path"):
        optimizer.update(model, gradients(model, optimizer.opt_state, X))


class Sowing(nnx.Module):
    """Makes a variable in its first call, and sows in every one."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones(2))

    def __call__(self, x):
        if not hasattr(self, "last"):
            self.last = nnx.Variable(x)
        self.last[...] = x
        self.sow(nnx.Intermediate, "seen", x)
        return (self.w * x).sum()


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")  # deprecated, not gone
def test_new_variables_and_what_was_sown():
    model, good, bad = Sowing(), jnp.ones(2), jnp.full(2, jnp.nan)
    grad_fn = mp.nnx.grad(lambda model, x: model(x), mp.DynamicLossScale())
    grad_fn(model, bad)  # nothing was there that it could go back to
    assert jnp.isnan(model.last[...]).all()
    grad_fn(model, good)
    grad_fn(model, bad)
    assert bits(model.last[...]) == bits(good)
    assert [bool(jnp.isnan(x).any()) for x in model.seen.get_value()] == [True, False, True]


class Indices(nnx.Module):
    """A parameter of integers, as a quantised weight is one."""

    def __init__(self):
        self.weight = nnx.Param(jnp.ones(2))
        self.indices = nnx.Param(jnp.arange(2))

    def __call__(self):
        return self.weight[self.indices[...]].sum()


def test_integer_parameters_are_left_alone():
    model = Indices()
    tx = mp.loss_scaled(optax.sgd(0.5), mp.StaticLossScale(4.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = mp.nnx.grad(lambda model: model(), mp.get_loss_scale(optimizer.opt_state))(model)
    assert grads["indices"].get_value().dtype == jax.dtypes.float0
    optimizer.update(model, grads)
    assert model.weight[...].tolist() == [0.5, 0.5]
    assert model.indices[...].dtype == jnp.int32
    assert model.indices[...].tolist() == [0, 1]


def test_arguments_that_cannot_be_differentiated():
    model, scale = half(), mp.StaticLossScale(4.0)
    last = mp.nnx.grad(lambda x, model: loss_fn(model, x), scale, argnums=-1)(X, model)
    assert bits(last) == bits(mp.nnx.grad(loss_fn, scale)(model, X))
    for argnums, shown in ((2, "2"), ((0, 5), "(0, 5)"), (nnx.DiffState(3, nnx.Param), "3")):
        with pytest.raises(ValueError, match=re.escape(f"argnums is {shown}, but the function was called with 2")):
            mp.nnx.grad(loss_fn, scale, argnums=argnums)(model, X)
    with pytest.raises(ValueError, match=r"argnums is \(0, 0\)"):
        mp.nnx.grad(loss_fn, scale, argnums=(0, nnx.DiffState(0, nnx.Param)))(model, X)
    with pytest.raises(ValueError, match="without its keyword"):
        mp.nnx.grad(loss_fn, scale)(model=model, x=X)
    with pytest.raises(TypeError, match=r"loss_fn is Linear.__call__ of one module(.|\n)*grad\(Linear.__call__, loss"):
        mp.nnx.grad(model.__call__, scale)
