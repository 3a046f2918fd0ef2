"""Autocast and functions with derivative rules of their own.

Each rule gives twice the true derivative: a rule that got lost shows in the gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits, close, total
from jax.custom_derivatives import SymbolicZero
from jaxprs import census, dtypes_of, matrix_dtypes, matrix_dtypes_by_axis, trace
from zoo_case import jit

import mpjax as mp

K = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(K[0], (4, 4))
W = jax.random.normal(K[1], (4, 4)) * 0.5
C = jax.random.normal(K[2], (4, 4)) * 0.5
ROWS = jnp.array([0, 2, 1, 0])


def cast(fn, policy="mixed_bfloat16"):
    return mp.autocast(fn, policy)


def doubled(*tangents):
    return tuple(2 * t for t in tangents)


# custom_jvp -----------------------------------------------------------------------------------


@jax.custom_jvp
def plain_jvp(x, w):
    return jnp.tanh(x @ w)


@plain_jvp.defjvp
def _(primals, tangents):
    x, w = primals
    y = plain_jvp(x, w)
    return y, (1 - y * y) * sum(doubled(tangents[0] @ w, x @ tangents[1]))


@jax.custom_jvp
def nested_jvp(x, w):
    return plain_jvp(x, w) @ w


@nested_jvp.defjvp
def _(primals, tangents):
    y, change = jax.jvp(lambda x, w: plain_jvp(x, w) @ w, primals, tangents)
    return y, 2 * change


@jax.custom_jvp
def with_integers(x, rows, w):
    return x[rows] @ w


@with_integers.defjvp
def _(primals, tangents):
    x, rows, w = primals
    dx, drows, dw = tangents
    assert drows.dtype == jax.dtypes.float0
    return with_integers(x, rows, w), 2 * (dx[rows] @ w + x[rows] @ dw)


@jax.custom_jvp
def jvp_symbolic_zeros(x, w, shift):
    return jnp.tanh(x @ w) + shift


def symbolic_rule(primals, tangents):
    x, w, _ = primals
    dx, dw, dshift = tangents
    assert isinstance(dshift, SymbolicZero)
    assert dshift.aval.dtype == jnp.float32
    y = jnp.tanh(x @ w)
    parts = [2 * p for p in (() if isinstance(dx, SymbolicZero) else (dx @ w,))]
    parts += [2 * p for p in (() if isinstance(dw, SymbolicZero) else (x @ dw,))]
    return jvp_symbolic_zeros(*primals), (1 - y * y) * sum(parts)


jvp_symbolic_zeros.defjvp(symbolic_rule, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 2))
def jvp_nondiff(fn, x, factor, w):
    return fn(x @ w) * factor


@jvp_nondiff.defjvp
def _(fn, factor, primals, tangents):
    y, change = jax.jvp(lambda x, w: fn(x @ w) * factor, primals, tangents)
    return y, 2 * change


@jax.custom_jvp
def jvp_tree(tree):
    return {"y": tree["x"] @ tree["w"], "n": tree["n"] + 1}


@jvp_tree.defjvp
def _(primals, tangents):
    (tree,), (change,) = primals, tangents
    y = 2 * (change["x"] @ tree["w"] + tree["x"] @ change["w"])
    return jvp_tree(tree), {"y": y, "n": change["n"]}


def jvp_closure(x, w):
    table = np.asarray(C)

    @jax.custom_jvp
    def fn(x):
        return jnp.tanh(x @ table)

    fn.defjvp(lambda primals, tangents: (fn(*primals), 2 * (1 - fn(*primals) ** 2) * (tangents[0] @ table)))
    return fn(x) @ w


# custom_vjp -----------------------------------------------------------------------------------


@jax.custom_vjp
def plain_vjp(x, w):
    return jnp.tanh(x @ w)


def plain_fwd(x, w):
    y = jnp.tanh(x @ w)
    return y, (x, w, y)


def plain_bwd(kept, g):
    x, w, y = kept
    g = g * (1 - y * y)
    return doubled(g @ w.T, x.T @ g)


plain_vjp.defvjp(plain_fwd, plain_bwd)


@jax.custom_vjp
def optimized(x, w):
    return jnp.tanh(x @ w)


optimized.defvjp(plain_fwd, plain_bwd, optimize_remat=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def vjp_nondiff(fn, x, factor, w):
    return fn(x @ w) * factor


vjp_nondiff.defvjp(
    lambda fn, x, factor, w: (fn(x @ w) * factor, (x, w)),
    lambda fn, factor, kept, g: doubled(*jax.vjp(lambda x, w: fn(x @ w) * factor, *kept)[1](g)),
)


@jax.custom_vjp
def vjp_symbolic_zeros(x, w):
    return x @ w, x + 1


def symbolic_fwd(x, w):
    assert isinstance(x.perturbed, bool)
    return (x.value @ w.value, x.value + 1), (x.value, w.value)


def symbolic_bwd(kept, cotangents):
    g, zero = cotangents
    assert isinstance(zero, SymbolicZero)
    assert zero.dtype == jnp.float32
    return doubled(g @ kept[1].T, kept[0].T @ g)


vjp_symbolic_zeros.defvjp(symbolic_fwd, symbolic_bwd, symbolic_zeros=True)


@jax.custom_vjp
def vjp_mixed(tree, rows, nothing, w):
    return {"y": tree["x"][rows] @ w, "rows": rows, "nothing": nothing}


def mixed_fwd(tree, rows, nothing, w):
    return vjp_mixed(tree, rows, nothing, w), {"x": tree["x"], "rows": rows, "nothing": nothing, "w": w}


def mixed_bwd(kept, g):
    x = 2 * jnp.zeros_like(kept["x"]).at[kept["rows"]].add(g["y"] @ kept["w"].T)
    return {"x": x}, None, kept["nothing"], 2 * kept["x"][kept["rows"]].T @ g["y"]


vjp_mixed.defvjp(mixed_fwd, mixed_bwd)


def vjp_closure(x, w):
    table = C

    @jax.custom_vjp
    def fn(x):
        return jnp.tanh(x @ table)

    fn.defvjp(lambda x: (fn(x), x), lambda x, g: doubled(g * (1 - fn(x) ** 2) @ table.T))
    return fn(x) @ w


CASES = {
    "custom_jvp": plain_jvp,
    "custom_jvp, nested": nested_jvp,
    "custom_jvp, integers": lambda x, w: with_integers(x, ROWS, w),
    "custom_jvp, symbolic zeros": lambda x, w: jvp_symbolic_zeros(x, w, C),
    "custom_jvp, nondiff_argnums": lambda x, w: jvp_nondiff(jnp.tanh, x, 3.0, w),
    "custom_jvp, trees": lambda x, w: jvp_tree({"x": x, "w": w, "n": ROWS})["y"],
    "custom_jvp, closure": jvp_closure,
    "custom_vjp": plain_vjp,
    "custom_vjp, optimize_remat": optimized,
    "custom_vjp, nondiff_argnums": lambda x, w: vjp_nondiff(jnp.tanh, x, 3.0, w),
    "custom_vjp, symbolic zeros": lambda x, w: vjp_symbolic_zeros(x, w)[0],
    "custom_vjp, mixed arguments": lambda x, w: vjp_mixed({"x": x}, ROWS, None, w)["y"],
    "custom_vjp, closure": vjp_closure,
    "both": lambda x, w: plain_vjp(plain_jvp(x, w), w),
}
AROUND = {
    "alone": lambda fn: fn,
    # What comes in is an activation, and so is what reads the result.
    "between": lambda fn: lambda x, w: fn(x @ w, w) @ w,
    "jit": lambda fn: lambda x, w: jax.jit(fn)(x @ w, w),
    "scan": lambda fn: lambda x, w: jax.lax.scan(lambda c, _: (0.5 * fn(c, w), None), x, length=3)[0],
    "remat": lambda fn: jax.checkpoint(lambda x, w: fn(x @ w, w) @ w),
    "scan of remat": lambda fn: AROUND["scan"](jax.checkpoint(fn)),
    "vmap": lambda fn: lambda x, w: jax.vmap(fn, in_axes=(0, None))(jnp.stack([x, 2 * x]), w).sum(0),
    "cond": lambda fn: lambda x, w: jax.lax.cond(x[0, 0] > -9, fn, lambda x, w: x, x @ w, w),
}


EVERYWHERE = ("custom_jvp", "custom_vjp", "custom_vjp, optimize_remat", "both")
PLACES = [(case, around) for case in CASES for around in AROUND if case in EVERYWHERE or around in ("alone", "between")]


@pytest.mark.parametrize(("case", "around"), PLACES, ids=" / ".join)
def test_every_case(case, around):
    """Matrix work low forward and backward in both orders; the rule's derivatives, not the function's own."""
    fn = AROUND[around](CASES[case])
    assert matrix_dtypes(cast(fn), X, W) == {"bfloat16"}
    grad = lambda f: jax.grad(total(f), argnums=(0, 1))
    true = jit(grad(fn))(X, W)
    for taken in (grad(cast(fn)), cast(grad(fn))):
        assert matrix_dtypes(taken, X, W) == {"bfloat16"}
        close(jit(taken)(X, W), true, rel=0.06)


@pytest.mark.parametrize("case", CASES)
def test_values_eager_and_in_float16(case):
    fn = CASES[case]
    for policy in ("mixed_bfloat16", "mixed_float16"):
        assert matrix_dtypes(cast(fn, policy), X, W) == {str(mp.get_policy(policy).compute_dtype)}
        close(cast(fn, policy)(X, W), fn(X, W), rel=0.02)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("custom_jvp")])
def test_forward_mode(case):
    fn = CASES[case]
    if "zeros" in case:  # its rule asserts which tangents are zero
        fn = lambda x, w: jvp_symbolic_zeros(x, w, C)
    push = lambda f: lambda x, w: jax.jvp(f, (x, w), (w, x))
    assert matrix_dtypes(push(cast(fn)), X, W) == matrix_dtypes(cast(push(fn)), X, W) == {"bfloat16"}
    close(push(cast(fn))(X, W), push(fn)(X, W))
    close(cast(push(fn))(X, W), push(fn)(X, W))
    close(jax.jacfwd(cast(fn))(X, W), jax.jacfwd(fn)(X, W))


@pytest.mark.parametrize(
    "fn", [jax.nn.silu, jax.nn.gelu, jax.nn.softplus, jax.nn.logsumexp], ids=["silu", "gelu", "softplus", "logsumexp"]
)
def test_second_derivatives(fn):
    loss = lambda x: fn(x @ W).sum()
    row = X[0]
    for taken in (jax.hessian(cast(loss)), cast(jax.hessian(loss))):
        assert matrix_dtypes(taken, row) == {"bfloat16"}
        close(taken(row), jax.hessian(loss)(row), rel=0.05)


def test_the_order_of_autocast_and_grad_changes_no_dtype():
    fn = total(lambda x, w: plain_vjp(plain_jvp(x @ w, w), w) @ w)
    outside, inside = jax.grad(cast(fn), argnums=1), cast(jax.grad(fn, argnums=1))
    dots = [sum(1 for e in trace(f, X, W) if e.primitive.name == "dot_general") for f in (outside, inside)]
    assert dots[0] == dots[1]
    assert matrix_dtypes(outside, X, W) == matrix_dtypes(inside, X, W) == {"bfloat16"}
    close(outside(X, W), inside(X, W), rel=0.02)


class TestForwardAndBackwardRules:
    def test_they_see_the_original_dtypes(self):
        """Code that checks or casts to `x.dtype` does what it does without autocast."""
        seen = []

        @jax.custom_vjp
        def fn(x, w):
            return x @ w

        def fwd(x, w):
            seen.append(("fwd", str(x.dtype), str(w.dtype)))
            return fn(x, w), (x, w)

        def bwd(kept, g):
            seen.append(("bwd", str(g.dtype), *(str(k.dtype) for k in kept)))
            return g @ kept[1].T, kept[0].T @ g

        fn.defvjp(fwd, bwd)
        jax.grad(total(cast(lambda x, w: fn(x @ w, w) @ w)))(X, W)
        assert set(seen) == {("fwd", "float32", "float32"), ("bwd", "float32", "float32", "float32")}

    @pytest.mark.parametrize("order", ["vjp of autocast", "vjp of jit of autocast"])
    def test_residuals_are_kept_in_16_bits(self, order):
        """Activations low; what needs float32, integers and arguments as they are."""
        rows, n = jnp.ones((16, 4)), jnp.arange(5)

        @jax.custom_vjp
        def fn(x, w, n):
            return jnp.tanh(x @ w)

        def fwd(x, w, n):
            h = x @ w
            return jnp.tanh(h), (h[:, :1], h[:, :2], jnp.exp(h)[:, :3], x, w, n)

        def bwd(kept, g):
            one, two, three, x, w, n = kept
            g = g * (one.sum() + two.sum() + three.sum() + n.sum().astype(jnp.float32))
            return g @ w.T, x.T @ g, None

        fn.defvjp(fwd, bwd)
        taken = cast(lambda x, w, n: fn(x @ w, w, n))
        taken = jax.jit(taken) if "jit" in order else taken
        pulled = jax.vjp(lambda x, w: taken(x, w, n), rows, W)[1]
        kept = {(r.shape, str(r.dtype)) for r in jax.tree.leaves(pulled)}
        assert {((16, 1), "bfloat16"), ((16, 2), "bfloat16"), ((16, 3), "float32"), ((5,), "int32")} <= kept
        assert ((16, 4), "bfloat16") in kept

    def test_what_the_backward_rule_computes_in(self):
        @jax.custom_vjp
        def fn(x, w):
            return x @ w

        def bwd(kept, g):
            h, w = kept
            return (jnp.sinh(h) * jax.nn.sigmoid(h) * g) @ w.T, h.T @ jnp.floor(g)

        fn.defvjp(lambda x, w: (x @ w, (x @ w, w)), bwd)
        grad = jax.grad(total(lambda x, w: cast(lambda x, w: fn(x @ w, w) @ w)(x, w)), argnums=(0, 1))
        found = census(grad, X, W)
        assert dtypes_of("sinh", grad, X, W) == {"float32"}
        assert dtypes_of("logistic", grad, X, W) == {"bfloat16"}
        assert dtypes_of("floor", grad, X, W) == {"bfloat16"}
        assert found["sinh", "float32"] == found["logistic", "bfloat16"] == 1

    @pytest.mark.parametrize("argnums", [0, 1])
    def test_what_is_not_perturbed(self, argnums):
        seen = []

        @jax.custom_vjp
        def fn(x, w):
            return x @ w

        def fwd(x, w):
            seen.append((x.perturbed, w.perturbed))
            return x.value @ w.value, (x.value, w.value)

        fn.defvjp(fwd, lambda kept, g: (g @ kept[1].T, kept[0].T @ g), symbolic_zeros=True)
        jax.grad(total(cast(fn)), argnums=argnums)(X, W)
        assert set(seen) == {(argnums == 0, argnums == 1)}

    def test_cotangents_of_integers(self):
        grads = jax.grad(
            total(cast(lambda x, rows, w: vjp_mixed({"x": x}, rows, None, w)["y"])), (0, 1), allow_int=True
        )
        assert [g.dtype for g in grads(X, ROWS, W)] == [jnp.float32, jax.dtypes.float0]

    def test_optimize_remat_recomputes_the_primal(self):
        """Inside jax.checkpoint the forward rule's residuals are not needed in the first pass."""
        fn = lambda x, w: jax.checkpoint(lambda x: optimized(x @ w, w) @ w)(x)
        for taken in (jax.grad(total(cast(fn))), cast(jax.grad(total(fn)))):
            assert matrix_dtypes(taken, X, W) == {"bfloat16"}
            close(jit(taken)(X, W), jax.grad(total(fn))(X, W), rel=0.06)
        assert matrix_dtypes(cast(fn), X, W) == {"bfloat16"}


class TestCastInputs:
    """torch's `custom_fwd(cast_inputs=torch.float32)` is `mp.full_precision` of the function."""

    @pytest.mark.parametrize("case", CASES)
    def test_float32_inside(self, case):
        narrow = jnp.ones((4, 3)) * 0.3
        fn = lambda x, w: mp.full_precision(CASES[case])(x @ narrow @ narrow.T, w) @ narrow

        grad = lambda f: jax.grad(total(f), argnums=(0, 1))
        # Here it is the outside that has an axis of 3.
        expected = {"inside": {"bfloat16"}, "outside": {"float32"}}
        assert matrix_dtypes_by_axis(3, cast(fn), X, W) == expected
        for taken in (grad(cast(fn)), cast(grad(fn))):
            assert matrix_dtypes_by_axis(3, taken, X, W) == expected
            close(jit(taken)(X, W), jit(grad(fn))(X, W), rel=0.06)

    def test_no_op_outside_of_autocast(self):
        grad = lambda f: jax.jit(jax.grad(total(f), argnums=(0, 1)))
        assert bits(grad(mp.full_precision(plain_vjp))(X, W)) == bits(grad(plain_vjp)(X, W))
