"""Products in 8 bits: the numbers that fp8 units would give, forward and backward, under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import bits
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxprs import MATRIX, dtypes, trace

import mpjax as mp
from mpjax import fp8

MATMUL = (((1,), (0,)), ((), ()))
RECIPES = [{}, {"scaling": "channel"}, {"gradients": "e4m3"}, {"weight_gradient": "bfloat16"}]
pytestmark = pytest.mark.usefixtures("quick_compiles")
ids = functools.partial(pytest.mark.parametrize, ids=lambda x: None if callable(x) else str(x))


def slow_but_first(cases):
    """The first case is quick, the others are for CI."""
    return [cases[0], *(pytest.param(case, marks=pytest.mark.slow) for case in cases[1:])]


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


X, W, C = normal(32, 64), normal(64, 48, seed=1), normal(32, 48, seed=2)


def sqnr(got, true):
    """How far the error is below the signal, in dB."""
    got, true = np.asarray(got, np.float64), np.asarray(true, np.float64)
    return 10 * np.log10((true**2).sum() / ((got - true) ** 2).sum())


def product(numbers=MATMUL, **recipe):
    return lambda x, w: fp8.dot_general(x, w, numbers, **recipe)


def gradients(fn, x, w, c):
    """The gradients by both operands where the incoming one is c."""
    return jax.jit(lambda: jax.vjp(fn, x, w)[1](jnp.asarray(c, jax.eval_shape(fn, x, w).dtype)))()


def rounded(x, dtype="float8_e4m3fn", axes=None):
    """What 8 bits hold of an array, by NumPy; one scale for what lies along these axes."""
    x = np.asarray(x, np.float32)
    amax, largest = np.abs(x).max(axes, keepdims=True), fp8.format_of(dtype).max
    scale = np.exp2(np.ceil(np.log2(amax.astype(np.float64) / largest)))
    return (x / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale


class TestNumbers:
    @ids("emulate", [True, False])
    def test_against_numpy(self, emulate):
        """Operands in e4m3, incoming gradients in e5m2, exact products; up to the rounding of float32 sums."""
        fn = product(emulate=emulate)
        x, w, c = rounded(X), rounded(W), rounded(C, "float8_e5m2")
        np.testing.assert_allclose(jax.jit(fn)(X, W), x @ w, rtol=1e-5, atol=1e-5)
        by_x, by_w = gradients(fn, X, W, C)
        np.testing.assert_allclose(by_x, c @ w.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(by_w, x.T @ c, rtol=1e-5, atol=1e-5)

    def test_by_channel_against_numpy(self):
        """Scales of what is summed over in a gradient go with the incoming one before it is rounded."""
        big, wide = X * np.exp2(np.arange(32) - 16)[:, None], W * np.exp2(np.arange(48) - 24)
        big, wide = big.astype(np.float32), wide.astype(np.float32)
        fn = product(scaling="channel")
        x, w = rounded(big, axes=1), rounded(wide, axes=0)
        scale = lambda x, axes: np.exp2(np.ceil(np.log2(np.abs(x).max(axes, keepdims=True) / 448.0)))
        np.testing.assert_allclose(jax.jit(fn)(big, wide), x @ w, rtol=1e-5, atol=1e-4 * np.abs(x @ w).min())
        by_x, by_w = gradients(fn, big, wide, C)
        c = rounded(C * scale(wide, 0), "float8_e5m2", axes=1)
        np.testing.assert_allclose(by_x, c @ (w / scale(wide, 0)).T, rtol=1e-4, atol=1e-6)
        c = rounded(C * scale(big, 1), "float8_e5m2", axes=0)
        np.testing.assert_allclose(by_w, (x / scale(big, 1)).T @ c, rtol=1e-4, atol=1e-6)

    @ids("recipe", slow_but_first(RECIPES))
    def test_signal_to_noise(self, recipe):
        x, w, c = normal(256, 512), normal(512, 384, seed=1), normal(256, 384, seed=2)
        fn = product(**recipe)
        by_x, by_w = gradients(fn, x, w, c)
        assert sqnr(jax.jit(fn)(x, w), x @ w) >= 18
        assert sqnr(by_w, x.T @ c) >= 17
        assert sqnr(by_x, c @ w.T) >= 17
        if recipe == {"weight_gradient": "bfloat16"}:
            assert sqnr(by_w, x.T @ c) > 45

    @ids("size", [2.0**-60, 2.0**40])
    def test_powers_of_two_in_the_operands_change_nothing_else(self, size):
        fn = jax.jit(product())
        assert bits(fn(X * np.float32(size), W)) == bits(fn(X, W) * np.float32(size))
        # Their product is what float32 holds, though the scales are far from 1.
        assert bits(fn(X * np.float32(size), W / np.float32(size))) == bits(fn(X, W))

    def test_zeros(self):
        assert not np.any(jax.jit(product())(np.zeros_like(X), W))
        by_x, by_w = gradients(product(), X, W, np.zeros_like(C))
        assert not np.any(by_x)
        assert not np.any(by_w)

    @ids("numbers", [(((2,), (1,)), ((0,), (0,))), (((1, 3), (2, 0)), ((), ())), (((3,), (3,)), ((2, 0), (1, 0)))])
    @ids("scaling", slow_but_first(["tensor", "channel"]))
    def test_every_order_of_axes(self, numbers, scaling):
        """Against the product of what was rounded before."""
        (left, right), (left_batch, right_batch) = numbers
        x, w = normal(2, 3, 4, 6), normal(4, 2, 3, 5, seed=1)
        sizes = {0: 2, 1: 3, 2: 4, 3: 6}
        shape = [7, 8, 9, 10]
        for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
            shape[j] = sizes[i]
        w = normal(*shape, seed=1)
        axes = (left, right) if scaling == "channel" else (None, None)
        a, b = (rounded(v, axes=summed).astype(np.float32) for v, summed in zip((x, w), axes, strict=True))
        plain = lambda x, w: lax.dot_general(x, w, numbers)
        true = plain(a, b)
        fn = product(numbers, scaling=scaling)
        np.testing.assert_allclose(jax.jit(fn)(x, w), true, rtol=1e-5, atol=1e-5)
        c = normal(*true.shape, seed=2)
        for got, exact in zip(gradients(fn, x, w, c), gradients(plain, x, w, c), strict=True):
            assert got.shape == exact.shape
            assert sqnr(got, exact) > 20

    @ids("dtypes", slow_but_first([
        ("bfloat16", "float32", None, "bfloat16"),
        ("float32", "float32", None, "float32"),
        ("bfloat16", "bfloat16", None, "bfloat16"),
        ("float16", "float32", "float16", "float16"),
        ("float32", "float32", "bfloat16", "bfloat16"),
    ]))  # fmt: skip
    def test_dtypes(self, dtypes):
        left, right, preferred, result = dtypes
        fn = lambda x, w: fp8.dot_general(x, w, MATMUL, None, preferred)
        x, w = jnp.asarray(X, left), jnp.asarray(W, right)
        out, back = jax.vjp(fn, x, w)
        assert out.dtype == result
        assert [g.dtype for g in back(out)] == [left, right]
        assert sqnr(out, X @ W) > 20


class TestNothingIsHidden:
    @ids("recipe", slow_but_first(RECIPES))
    def test_infinities_and_nans_come_through(self, recipe):
        fn = product(**recipe)
        step = jax.jit(lambda x, w, c: (fn(x, w), jax.vjp(fn, x, w)[1](c)))
        for bad in (np.inf, -np.inf, np.nan):
            for position in range(3):
                operands = [X.copy(), W.copy(), C.copy()]
                operands[position][3, 5] = bad
                out, grads = step(*operands)
                assert mp.all_finite(out) == (position == 2)
                assert not mp.all_finite(grads)

    def test_a_loss_scale_sees_them(self):
        """A step on a batch with an infinity is skipped."""
        tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale(2.0**4))
        params = {"w": jnp.asarray(W)}
        state = tx.init(params)
        loss = lambda params, x: (product()(x, params["w"]) ** 2).mean()

        @jax.jit
        def step(params, state, x):
            _, grads = mp.value_and_grad(loss, mp.get_loss_scale(state))(params, x)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        after, state = step(params, state, jnp.asarray(X).at[0, 0].set(jnp.inf))
        assert bits(after) == bits(params)
        assert mp.get_loss_scale(state).loss_scale == 2.0**3
        after, state = step(after, state, X)
        assert not np.array_equal(after["w"], W)


class TestTransformations:
    @ids("axes", slow_but_first([(0, None), (None, 0), (0, 0), (1, None), (None, 2), (2, 1)]))
    @ids("scaling", slow_but_first(["tensor", "channel"]))
    def test_vmap(self, axes, scaling):
        """Results are those of a loop; gradients of a sum over the map have one scale for all of it."""
        fn = product(scaling=scaling)
        xs, ws = normal(3, 32, 64), normal(3, 64, 48, seed=1)
        operands = [v if axis is not None else v[0] for v, axis in zip((xs, ws), axes, strict=True)]
        placed = [v if axis is None else np.moveaxis(v, 0, axis) for v, axis in zip(operands, axes, strict=True)]
        c = normal(3, 32, 48, seed=2)
        mapped = lambda fn: jax.vmap(fn, axes)
        loop = jnp.stack([
            fn(*(v if axis is None else v[i] for v, axis in zip(operands, axes, strict=True))) for i in range(3)
        ])  # fmt: skip
        np.testing.assert_allclose(jax.jit(mapped(fn))(*placed), loop, rtol=1e-6, atol=1e-6)
        plain = lambda x, w: lax.dot_general(x, w, MATMUL)
        for got, true in zip(*(gradients(mapped(f), *placed, c) for f in (fn, plain)), strict=True):
            assert sqnr(got, true) > 20
        # Not one product for each, added up afterwards.
        if axes == (0, None):
            shapes = [e.outvars[0].aval.shape for e in trace(jax.grad(lambda w: (mapped(fn)(xs, w) * c).sum()), W)]
            assert (3, 64, 48) not in shapes
            assert (3, 48, 64) not in shapes

    def test_vmap_of_gradients(self):
        grad = jax.grad(lambda w, x, c: (product()(x, w) * c).sum())
        xs, cs = normal(3, 32, 64), normal(3, 32, 48, seed=2)
        for got, x, c in zip(jax.jit(jax.vmap(grad, (None, 0, 0)))(W, xs, cs), xs, cs, strict=True):
            np.testing.assert_allclose(got, grad(W, x, c), rtol=1e-5, atol=1e-5)

    def test_a_layer_used_three_times(self):
        """In a loop, rematerialised, or written out: the gradients of the uses add up."""
        w = normal(64, 64, seed=1) / 8
        layer = lambda x, w: jnp.tanh(product()(x, w))
        unrolled = lambda w: layer(layer(layer(X, w), w), w).sum()
        again = lambda w: lax.scan(lambda x, _: (jax.checkpoint(layer)(x, w), None), X, length=3)[0].sum()
        plain = lambda w: functools.reduce(lambda x, _: jnp.tanh(x @ w), range(3), X).sum()
        a, b, true = (jax.jit(jax.grad(fn))(w) for fn in (unrolled, again, plain))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
        assert sqnr(a, true) > 17

    @ids("axis_types", [(AxisType.Auto,), (AxisType.Explicit,)])
    def test_sharded_jit(self, axis_types):
        mesh = jax.make_mesh((8,), ("data",), axis_types=axis_types)
        with jax.set_mesh(mesh):
            x, w, c = (jax.device_put(v, P("data")) for v in (X, W, C))
            w = jax.device_put(W, P(None, "data"))
            step = lambda x, w, c: jax.value_and_grad(lambda x, w: (product()(x, w) * c).sum(), (0, 1))(x, w)
            if axis_types == (AxisType.Explicit,):
                w = jax.device_put(W, P())
            got = jax.jit(step)(x, w, c)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(step)(X, W, C)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)

    @ids("check_vma", [True, False])
    def test_shard_map(self, check_vma):
        """Each device has scales of its own; the gradient of a replicated weight is the sum."""
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        parts = P("data"), P(), P("data")

        @jax.jit
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=parts, out_specs=(P("data"), P()), check_vma=check_vma)
        def step(x, w, c):
            by_x, by_w = jax.grad(lambda x, w: (product()(x, w) * c).sum(), (0, 1))(x, w)
            return by_x, by_w if check_vma else lax.psum(by_w, "data")

        by_x, by_w = step(X, W, C)
        assert sqnr(by_x, C @ W.T) > 20
        assert sqnr(by_w, X.T @ C) > 20

    def test_forward_derivatives(self):
        out, change = jax.jit(lambda x, w: jax.jvp(product(), (x, w), (x, w)))(X, W)
        assert bits(out) == bits(jax.jit(product())(X, W))
        assert sqnr(change, 2 * X @ W) > 25

    @ids("derivative", [jax.hessian, lambda f: jax.grad(lambda w: jax.grad(f)(w).sum())])
    def test_second_derivatives_are_refused(self, derivative):
        fn = lambda w: (product()(X, w) ** 2).sum()
        with pytest.raises(NotImplementedError, match=r'second derivative(.|\n)*mp.autocast\(fn, "mixed_bfloat16"'):
            derivative(fn)(W)


class TestPrograms:
    @ids(("recipe", "operands"), [
        ({}, [("float8_e4m3fn",) * 2, ("float8_e5m2", "float8_e4m3fn"), ("float8_e4m3fn", "float8_e5m2")]),
        ({"gradients": "e4m3"}, [("float8_e4m3fn",) * 2] * 3),
        ({"dtype": "float8_e4m3fnuz"}, [
            ("float8_e4m3fnuz",) * 2, ("float8_e5m2fnuz", "float8_e4m3fnuz"), ("float8_e5m2fnuz", "float8_e4m3fnuz")
        ]),
        ({"weight_gradient": "bfloat16"}, [
            ("float8_e4m3fn",) * 2, ("float8_e5m2", "float8_e4m3fn"), ("bfloat16",) * 2
        ]),
    ])  # fmt: skip
    def test_what_the_units_are_given(self, recipe, operands):
        fn = product(emulate=False, **recipe)
        loss = lambda x, w: fn(x, w).astype(jnp.float32).sum()
        found = [e for e in trace(jax.grad(loss, (0, 1)), X.astype(jnp.bfloat16), W) if e.primitive.name in MATRIX]
        assert sorted(tuple(sorted(dtypes(e.invars))) for e in found) == sorted(tuple(sorted(o)) for o in operands)
        # Weight gradients are the accumulator, everything else is rounded once.
        assert sorted(dtypes(e.outvars)[0] for e in found) == ["bfloat16", "bfloat16", "float32"]

    def test_what_is_kept_for_the_backward_pass_has_8_bits(self):
        _, back = jax.vjp(product(), jnp.asarray(X, jnp.bfloat16), jnp.asarray(W))
        kept = [x for x in jax.tree.leaves(back) if np.size(x) > 1]
        assert [x.dtype.itemsize for x in kept] == [1, 1]

    def test_a_checkpoint_that_keeps_it_loses_nothing(self):
        """JAX puts `lax.reduce_precision` on what it keeps, which makes NaNs of float8_e4m3fn from 256 up."""
        layer = lambda x, w: jnp.tanh(product()(x, w))
        keeping = jax.checkpoint(layer, policy=jax.checkpoint_policies.everything_saveable)
        for got, true in zip(gradients(keeping, X, W, C), gradients(layer, X, W, C), strict=True):
            np.testing.assert_allclose(got, true, rtol=1e-5, atol=1e-5)

    def test_what_checkpoint_policies_keep_of_a_dot_has_16_bits(self):
        layer = jax.checkpoint(product(emulate=False), policy=jax.checkpoint_policies.dots_saveable)
        loss = lambda x, w: jnp.tanh(layer(layer(x, w), w)).astype(jnp.float32).sum()
        x, w = jnp.ones((32, 64), jnp.bfloat16), jnp.ones((64, 64))
        out = jax.vjp(loss, x, w)[1]
        assert {str(v.dtype) for v in jax.tree.leaves(out) if v.shape == (32, 64)} <= {"bfloat16", "uint8"}


@ids(("call", "error", "message"), [
    (lambda: product(dtype="e5m2")(X, W), ValueError, "the compute dtype is float8_e5m2, a format for gradients"),
    (lambda: product(dtype="bfloat16")(X, W), ValueError, "expected: an 8-bit dtype"),
    (lambda: fp8.dot_general(X, W, MATMUL, out_sharding=P("data")), ValueError, "expected: None: the sharding of"),
    (lambda: product()(np.ones((16, 16), np.int32), X), TypeError, "an operand is in int32.\n  expected: float32, bf"),
    (lambda: product()(X, W.astype(np.complex64)), TypeError, "an operand is in complex64"),
    (lambda: product()(X, jnp.asarray(W, "float8_e4m3fn")), TypeError, "an operand is in float8_e4m3fn"),
    (lambda: product(scaling="row")(X, W), ValueError, "scaling is 'row'.\n  expected: 'tensor' or 'channel'"),
    (lambda: product(gradients="e3m4")(X, W), ValueError, "gradients is 'e3m4'.\n  expected: 'e5m2' or 'e4m3'"),
])  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
