"""Regions that autocast leaves in float32, or exactly as written: `mp.full_precision` and `mp.keep_precision`."""

import jax
import jax.numpy as jnp
import pytest
from helpers import bits
from jax.sharding import PartitionSpec as P
from jaxprs import dtypes, dtypes_of, matrix_dtypes, matrix_dtypes_by_axis, trace

import mpjax as mp

K = jax.random.split(jax.random.key(0), 8)
X = jax.random.normal(K[0], (8, 4))
W = jax.random.normal(K[1], (4, 4)) * 0.5
# Only a region's own matrix work has an axis of 3, in any derivative.
V = jax.random.normal(K[2], (4, 3)) * 0.5
U = jax.random.normal(K[3], (3, 4)) * 0.5
REGIONS = {"full": mp.full_precision, "keep": mp.keep_precision}


def cast(fn, rules=None):
    return mp.autocast(fn, "mixed_bfloat16", rules)


def where(fn, *args):
    return matrix_dtypes_by_axis(3, fn, *args)


EXCEPTED = {"inside": {"float32"}, "outside": {"bfloat16"}}


def body(x, v, u):
    return jnp.tanh(x @ v) @ u


@jax.custom_jvp
def body_jvp(x, v, u):
    return jnp.tanh(x @ v) @ u


@body_jvp.defjvp
def _(primals, tangents):
    return jax.jvp(body, primals, tangents)


@jax.custom_vjp
def body_vjp(x, v, u):
    return jnp.tanh(x @ v) @ u


body_vjp.defvjp(lambda x, v, u: (body(x, v, u), (x, v, u)), lambda kept, g: jax.vjp(body, *kept)[1](g))
INNER = {
    "plain": body,
    "jit": jax.jit(body),
    "custom_jvp": body_jvp,
    "custom_vjp": body_vjp,
    "scan": lambda x, v, u: jax.lax.scan(lambda c, _: (body(c, v, u), None), x, length=2)[0],
    "cond": lambda x, v, u: jax.lax.cond(x[0, 0] > 0, body, lambda x, v, u: x, x, v, u),
    "remat": jax.checkpoint(body),
}


def around(inner, region=mp.full_precision):
    return lambda x, w, v, u: region(inner)(jnp.tanh(x @ w), v, u) @ w


def on_mesh(fn):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(fn, mesh=mesh, in_specs=(P("d"), P(), P(), P()), out_specs=P("d"))


def loss(fn):
    return lambda *args: (fn(*args) ** 2).sum()


TRANSFORMS = {
    "none": lambda f: f,
    "jit": jax.jit,
    "grad": lambda f: jax.grad(loss(f), argnums=(0, 1, 2, 3)),
    "jit of grad": lambda f: jax.jit(jax.grad(loss(f), argnums=(1, 2))),
    "jvp": lambda f: lambda *args: jax.jvp(f, args, args)[1],
    "jacfwd": lambda f: jax.jacfwd(loss(f), argnums=1),
    "hessian": lambda f: jax.hessian(loss(f), argnums=2),
    "vmap": lambda f: lambda x, *args: jax.vmap(f, in_axes=(0, None, None, None))(x[None], *args)[0],
    "grad of vmap": lambda f: jax.grad(loss(jax.vmap(f, in_axes=(0, None, None, None))), argnums=1),
    "scan": lambda f: lambda x, *args: jax.lax.scan(lambda c, _: (f(c, *args), None), x, length=2)[0],
    "grad of scan": lambda f: TRANSFORMS["grad"](TRANSFORMS["scan"](f)),
    "while": lambda f: lambda x, *args: jax.lax.fori_loop(0, 2, lambda _, c: f(c, *args), x),
    "cond": lambda f: lambda x, *args: jax.lax.cond(x[0, 0] > 0, f, lambda x, *_: x, x, *args),
    "grad of cond": lambda f: TRANSFORMS["grad"](TRANSFORMS["cond"](f)),
    "remat": jax.checkpoint,
    "grad of remat": lambda f: TRANSFORMS["grad"](jax.checkpoint(f)),
    "shard_map": on_mesh,
    "grad of shard_map": lambda f: TRANSFORMS["grad"](on_mesh(f)),
}


@pytest.mark.parametrize("region", REGIONS)
class TestARegionSurvives:
    @pytest.mark.parametrize("inner", INNER)
    @pytest.mark.parametrize("order", ["grad of autocast", "autocast of grad"])
    def test_what_is_inside(self, inner, order, region):
        fn = around(INNER[inner], REGIONS[region])
        assert where(cast(fn), X, W, V, U) == EXCEPTED
        grad = TRANSFORMS["grad"]
        taken = grad(cast(fn)) if order == "grad of autocast" else cast(grad(fn))
        assert where(taken, X, W, V, U) == EXCEPTED

    @pytest.mark.parametrize("transform", TRANSFORMS)
    @pytest.mark.parametrize("order", ["outside", "inside"])
    def test_transforms(self, transform, order, region):
        fn, transform = around(body, REGIONS[region]), TRANSFORMS[transform]
        if transform is TRANSFORMS["grad of vmap"]:
            fn = lambda x, *args: around(body, REGIONS[region])(x[None], *args)[0]
        got = transform(cast(fn)) if order == "outside" else cast(transform(fn))
        assert where(got, X, W, V, U) == EXCEPTED

    def test_another_policy(self, region):
        fn = mp.autocast(around(body, REGIONS[region]), "mixed_float16")
        assert where(fn, X, W, V, U) == {"inside": {"float32"}, "outside": {"float16"}}
        fn = mp.autocast(around(body, REGIONS[region]), "float32")
        assert where(fn, X, W, V, U) == {"inside": {"float32"}, "outside": {"float32"}}

    def test_values_are_those_of_float32(self, region):
        fn = jax.jit(REGIONS[region](body))
        assert bits(jax.jit(cast(fn))(X, V, U)) == bits(fn(X, V, U))
        grad = jax.jit(jax.grad(loss(cast(fn)), argnums=(0, 1, 2)))
        # The square and its sum are outside of the region; nothing in them is an activation.
        assert bits(grad(X, V, U)) == bits(jax.jit(jax.grad(loss(fn), argnums=(0, 1, 2)))(X, V, U))

    def test_no_op_without_autocast(self, region):
        fn = REGIONS[region](body)
        assert str(jax.make_jaxpr(fn)(X, V, U)) == str(jax.make_jaxpr(body)(X, V, U))
        assert bits(fn(X, V, U)) == bits(body(X, V, U))
        assert fn.__name__ == "body"

    def test_an_exception_leaves_nothing_behind(self, region):
        def failing(x):
            raise RuntimeError("on purpose")

        def fn(x, w):
            with pytest.raises(RuntimeError, match="on purpose"):
                REGIONS[region](failing)(x @ w)
            return x @ w

        assert matrix_dtypes(cast(fn), X, W) == {"bfloat16"}
        with pytest.raises(RuntimeError, match="on purpose"):
            cast(REGIONS[region](failing))(X)
        assert matrix_dtypes(cast(lambda x, w: x @ w), X, W) == {"bfloat16"}

    def test_low_again_by_another_autocast(self, region):
        """torch's autocast(enabled=True) inside autocast(enabled=False)."""
        again = lambda x, v, u: cast(lambda x, v, u: x @ v)(x, v, u) @ u
        found = trace(cast(around(again, REGIONS[region])), X, W, V, U)
        inside = [dtypes(e.invars[:2]) for e in found if e.primitive.name == "dot_general" and (3,) in _axes(e)]
        assert inside == [("bfloat16",) * 2, ("float32",) * 2]


def _axes(eqn):
    return [tuple(n for n in a.aval.shape if n == 3) for a in eqn.invars]


class TestNesting:
    """What a region makes tells which one holds: of `full` it stays float32, of `keep` it follows an activation."""

    @pytest.mark.parametrize(
        ("outer", "inner", "dtype"),
        [
            ("full", "full", "float32"),
            ("full", "keep", "bfloat16"),
            ("keep", "full", "float32"),
            ("keep", "keep", "bfloat16"),
        ],
    )
    def test_the_innermost_wins(self, outer, inner, dtype):
        fn = lambda x, w: REGIONS[outer](lambda x: REGIONS[inner](jnp.sin)(x))(x) + x @ w
        assert dtypes_of("add", cast(fn), X[:4], W) == {dtype}

    def test_what_follows_the_inner_one_is_in_the_outer_one(self):
        region = mp.full_precision(lambda x, v, u: mp.keep_precision(jnp.sin)(x @ v) @ u)
        fn = lambda x, w, v, u: region(x @ w, v, u) @ w
        assert where(cast(fn), X, W, V, U) == EXCEPTED


class TestArguments:
    @pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
    def test_half_precision_comes_into_full_precision_as_float32(self, half, x64):
        seen = {}

        def record(tree, *, name, wide, n):
            seen.update(tree=jax.tree.map(lambda a: str(a.dtype), tree), name=name, n=n, wide=str(wide.dtype))
            return tree["half"]

        tree = {"half": X.astype(half), "key": jnp.arange(2, dtype=jnp.int32), "single": X.astype(jnp.float32)}
        out = mp.full_precision(record)(tree, name="kept", wide=jnp.ones(2, jnp.float64), n=1.5)
        assert seen == {
            "tree": {"half": "float32", "key": "int32", "single": "float32"},
            "name": "kept",
            "n": 1.5,
            "wide": "float64",
        }
        assert out.dtype == jnp.float32

    def test_keep_precision_takes_what_it_is_given(self):
        seen = []

        def record(x):
            seen.append(str(x.dtype))
            return x

        fn = lambda x, w: (
            mp.keep_precision(record)(x @ w).sum()
            + mp.keep_precision(record)(x.astype(jnp.float16)).astype(jnp.float32).sum()
        )
        cast(fn)(X, W)
        assert seen == ["float32", "float16"]

    @pytest.mark.parametrize("region", REGIONS)
    def test_an_activation_comes_in_as_float32(self, region):
        """Inside autocast it is bfloat16 by then, and in the original program float32."""
        found = trace(cast(lambda x, w: REGIONS[region](jnp.tanh)(x @ w)), X, W)
        assert [dtypes(e.invars) for e in found if e.primitive.name == "tanh"] == [("float32",)]

    @pytest.mark.parametrize("half", ["float16", "bfloat16"])
    @pytest.mark.parametrize("region", REGIONS)
    def test_explicit_casts_inside_stay(self, half, region):
        low = lambda x, v, u: (jnp.tanh(x.astype(half) @ v.astype(half)) @ u.astype(half)).astype(jnp.float32)
        found = where(cast(around(low, REGIONS[region])), X, W, V, U)
        assert found == {"inside": {half}, "outside": {"bfloat16"}}

    def test_an_explicit_cast_that_is_returned_stays(self):
        half = mp.keep_precision(lambda x: x.astype(jnp.float16))
        assert cast(lambda x, w: half(x @ w))(X, W).dtype == jnp.float16
