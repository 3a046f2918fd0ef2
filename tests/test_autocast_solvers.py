"""Autocast and functions with batching or solving rules of their own, loops to convergence, and kernels."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits, close, total
from jax.experimental import pallas as pl
from jaxprs import dtypes, dtypes_of, matrix_dtypes, trace
from zoo_case import jit

import mpjax as mp

K = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(K[0], (4, 4))
W = jax.random.normal(K[1], (4, 4)) * 0.5


def cast(fn, policy="mixed_bfloat16"):
    return mp.autocast(fn, policy)


class TestCustomVmap:
    @staticmethod
    def function():
        seen = []

        @jax.custom_batching.custom_vmap
        def fn(x, w, n):
            return jnp.tanh(x @ w), n

        @fn.def_vmap
        def _(size, batched, x, w, n):
            seen.append((size, tuple(batched), str(x.dtype)))
            y = jnp.sinh(x @ w) if batched[0] and not batched[1] else jnp.tanh(x @ w)
            return (y, n), (True, batched[2])

        return fn, seen

    @pytest.mark.parametrize("order", ["vmap of autocast", "autocast of vmap"])
    def test_the_rule_is_used_and_low(self, order):
        fn, seen = self.function()
        one = lambda x: fn(x @ W, W, jnp.int32(1))[0] @ W
        batched = jax.vmap(cast(one)) if order == "vmap of autocast" else cast(jax.vmap(one))
        xs = jnp.stack([X, 0.5 * X])
        assert matrix_dtypes(batched, xs) == {"bfloat16"}
        assert dtypes_of("sinh", batched, xs) == {"float32"}
        assert dtypes_of("tanh", batched, xs) == set()
        close(batched(xs), jax.vmap(one)(xs))
        assert {s[:2] for s in seen} == {(2, (True, False, False))}
        assert {s[2] for s in seen} == {"float32"}

    def test_without_vmap_the_function_itself(self):
        fn, seen = self.function()
        one = cast(lambda x: fn(x @ W, W, jnp.int32(1))[0] @ W)
        assert matrix_dtypes(one, X) == {"bfloat16"}
        assert dtypes_of("tanh", one, X) == {"bfloat16"}
        assert seen == []


# Solvers: float32 inside, as written, and no warning (pytest makes each an error) -----------------

A = X @ X.T + 4 * jnp.eye(4)


def conjugate_gradient(x, w):
    return jax.scipy.sparse.linalg.cg(lambda v: A @ v, x @ w)[0]


def linear_solve(x, w):
    solve = lambda matvec, b: jnp.linalg.solve(A, b)
    return jax.lax.custom_linear_solve(lambda v: A @ v, x @ w, solve, symmetric=True)


def root(x, w):
    b = x @ w
    tangent = lambda g, y: y / g(jnp.ones_like(y))
    newton = lambda f, v: jax.lax.fori_loop(0, 30, lambda _, v: v - f(v) / (3 * v * v + 1), v)
    return jax.lax.custom_root(lambda v: v**3 + v - b, jnp.zeros_like(x), newton, tangent)


@pytest.mark.parametrize("fn", [conjugate_gradient, linear_solve, root], ids=lambda f: f.__name__)
class TestSolvers:
    def test_values_and_gradients(self, fn):
        """Only the right-hand side is rounded: its solution is as close as it is itself."""
        grad = lambda f: jit(jax.grad(total(f), argnums=(0, 1)))
        close(cast(fn)(X, W), fn(X, W), rel=0.02)
        close(grad(cast(fn))(X, W), grad(fn)(X, W), rel=0.02)
        close(jit(cast(jax.grad(total(fn), argnums=(0, 1))))(X, W), grad(fn)(X, W), rel=0.02)

    def test_the_solve_is_float32(self, fn):
        rounded = (X.astype(jnp.bfloat16) @ W.astype(jnp.bfloat16)).astype(jnp.float32)
        exact = fn(rounded, jnp.eye(4))
        np.testing.assert_allclose(cast(fn)(X, W), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_loop_to_convergence_converges(policy):
    """In 16 bits the residual never gets below the tolerance: without the limit this would not end."""

    def square_root(x, w):
        b = jnp.abs(x @ w) + 1

        def step(state):
            n, v, _ = state
            new = 0.5 * (v + b / v)
            return n + 1, new, jnp.abs(new * new - b).max()

        going = lambda state: (state[0] < 50) & (state[2] > 1e-4)
        return jax.lax.while_loop(going, step, (jnp.int32(0), b, jnp.float32(1.0)))[:2]

    (steps, found), (true_steps, true) = cast(square_root, policy)(X, W), square_root(X, W)
    assert abs(int(steps) - int(true_steps)) <= 1
    close(found, true, rel=0.01)


class TestCalls:
    def test_closed_call(self):
        inner = jax.make_jaxpr(lambda x, w: jnp.tanh(x @ w))(X, W)
        primitive = jax.extend.core.primitives.closed_call_p
        params = primitive.get_bind_params({"call_jaxpr": inner})
        fn = lambda x, w: primitive.bind(x @ w, w, **params)[0] @ w
        assert matrix_dtypes(cast(fn), X, W) == {"bfloat16"}
        assert dtypes_of("tanh", cast(fn), X, W) == {"bfloat16"}
        close(cast(fn)(X, W), jnp.tanh(X @ W @ W) @ W)

    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
    def test_kernels_are_left_with_a_warning(self, policy):
        def kernel(x_ref, w_ref, o_ref):
            o_ref[...] = x_ref[...] @ w_ref[...]

        def fn(x, w):
            shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
            return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x @ w, w)

        with pytest.warns(UserWarning, match="autocast leaves pallas_call") as caught:
            found = trace(cast(fn, policy), X, W)
        (message,) = [str(w.message) for w in caught]
        assert f" at {__file__}:" in message
        assert message.endswith(" as written: its dot_general stays float32")
        (call,) = [e for e in found if e.primitive.name == "pallas_call"]
        assert dtypes(call.invars) == ("float32", "float32")

    def test_kernels_without_matrix_work_are_left_silently(self):
        def kernel(x_ref, o_ref):
            o_ref[...] = x_ref[...] + 1

        shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
        fn = lambda x, w: pl.pallas_call(kernel, out_shape=shape, interpret=True)(x @ w) @ w
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert matrix_dtypes(cast(fn), X, W) == {"bfloat16"}

    def test_a_kernel_in_a_region_is_left_silently(self):
        product = jax.lax.composite(lambda x, w: x @ w, name="my.product")
        fn = lambda x, w: mp.keep_precision(product)(x, w)
        assert bits(cast(fn)(X, W)) == bits(fn(X, W))
