"""Exceptions to autocast: regions in the code, rules for paths and primitives, other libraries' tables."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import bits
from jax.sharding import PartitionSpec as P
from jaxprs import MATRIX, census, dtypes, dtypes_of, matrix_dtypes, trace

import mpjax as mp
from mpjax._autocast._tables import Kind

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
    """The dtypes of the operands of matrix work, inside the region and outside."""
    found = {"inside": set(), "outside": set()}
    for e in trace(fn, *args):
        if e.primitive.name in MATRIX:
            shapes = [a.aval.shape for a in (*e.invars, *e.outvars)]
            found["inside" if any(3 in s for s in shapes) else "outside"] |= set(dtypes(e.invars[:2]))
    return found


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


# Rules for paths --------------------------------------------------------------------------------


class Block(nn.Module):
    layer: type = nn.Dense

    @nn.compact
    def __call__(self, x):
        return x + self.layer(4)(self.layer(3, name="Router")(nn.LayerNorm()(x)))


class Stack(nn.Module):
    depth: int = 2

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = Block()(x)
        return nn.Dense(4)(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(lambda m, c, _: (m(c), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(4)(scan(Block(), x, None)[0])


class Rematerialised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.remat(Block)(name="Block_0")(x))


def ruled(*paths):
    rules = mp.default_rules()
    for pattern, kind in paths:
        rules = rules.with_path(pattern, kind, "for a test")
    return rules


@functools.cache
def linen(model):
    return model, model.init(K[4], X)


def haiku(with_state=False):
    def net(x):
        return hk.Linear(4, name="head")(hk.nets.MLP([3, 4], name="mlp")(x))

    fn = hk.without_apply_rng(hk.transform(net))
    return fn.apply, fn.init(K[4], X)


def equinox():
    # Equinox names the class, so that a module of a user's own has the user's name.
    class Narrow(eqx.Module):
        down: eqx.nn.Linear
        up: eqx.nn.Linear

        @jax.named_scope("Narrow")
        def __call__(self, x, key=None):
            return self.up(jnp.tanh(self.down(x)))

    model = eqx.nn.Sequential([Narrow(eqx.nn.Linear(4, 3, key=K[4]), eqx.nn.Linear(3, 4, key=K[5]))])
    head = eqx.nn.Linear(4, 4, key=K[6])
    arrays, static = eqx.partition((model, head), eqx.is_array)

    def fn(arrays, x):
        model, head = eqx.combine(arrays, static)
        return jax.vmap(head)(jax.vmap(model)(x))

    return fn, arrays


def scoped():
    def fn(w, x):
        with jax.named_scope("net"), jax.named_scope("narrow"):
            x = body(x, w["v"], w["u"])
        return x @ w["w"]

    return fn, {"v": V, "u": U, "w": W}


def of_linen(model):
    model, variables = linen(model)
    return model.apply, variables


LIBRARIES = {
    "linen": (lambda: of_linen(Stack()), r"Stack/Block_\d/(Router|Dense_0)"),
    "linen, subtree": (lambda: of_linen(Stack()), r".*/block_\d"),
    "linen, scan": (lambda: of_linen(Scanned()), r".*/block_0"),
    "linen, remat": (lambda: of_linen(Rematerialised()), r".*/block_0"),
    "haiku": (haiku, r"mlp"),
    "haiku, layers": (haiku, r"mlp/linear_\d"),
    "equinox": (equinox, r".*Sequential/narrow"),
    "named_scope": (scoped, r"net/narrow"),
    "named_scope, subtree": (scoped, r"NET"),
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("library", LIBRARIES)
class TestPaths:
    @pytest.mark.parametrize("kind", ["full", "keep", "FULL"])
    def test_forward_and_backward(self, library, kind):
        make, pattern = LIBRARIES[library]
        fn, params = make()
        grad = lambda f: jax.grad(lambda p, x: (f(p, x) ** 2).sum(), argnums=(0, 1))
        rules = ruled((pattern, kind))
        for taken in (cast(fn, rules), grad(cast(fn, rules)), cast(grad(fn), rules), jax.jit(grad(cast(fn, rules)))):
            assert where(taken, params, X) == EXCEPTED
        assert where(grad(cast(fn)), params, X) == {"inside": {"bfloat16"}, "outside": {"bfloat16"}}


@pytest.mark.standard_promotion
class TestPathRules:
    def test_one_module_of_several(self):
        fn, params = of_linen(Stack())
        found = [
            dtypes(e.invars[:2])
            for e in trace(cast(fn, ruled((r"Stack/Block_1/Router", "full"))), params, X)
            if e.primitive.name == "dot_general"
        ]
        assert found == [("bfloat16",) * 2] * 2 + [("float32",) * 2] + [("bfloat16",) * 2] * 2

    def test_an_inner_region_comes_before_a_rule(self):
        """The rule says keep, the code full: what the region makes stays float32."""

        def fn(x, w):
            with jax.named_scope("net"):
                return mp.full_precision(jnp.sin)(x) + x @ w

        assert dtypes_of("add", cast(fn, ruled((r"net", "keep"))), X, W) == {"float32"}

    def test_a_region_around_the_module_does_too(self):
        """The pattern matches `net` and is no unused one: no warning."""
        fn = lambda x, w: mp.full_precision(jax.named_scope("net")(jnp.sin))(x) + x @ w
        assert dtypes_of("add", cast(fn, ruled((r"net", "keep"))), X, W) == {"float32"}

    @pytest.mark.parametrize("pattern", ["Router", "Block_1", r"Stack/Block_1/Rout", r"Dense_0"])
    def test_an_unmatched_pattern_is_reported_with_the_paths(self, pattern):
        fn, params = of_linen(Stack())
        with pytest.warns(UserWarning) as caught:
            jax.make_jaxpr(cast(fn, ruled((pattern, "full"))))(params, X)
        (message,) = [str(w.message) for w in caught]
        assert message.startswith(f"rules that match no path: {pattern!r}. The paths are\n")
        assert "    Stack/Block_0/LayerNorm_0\n" in message
        assert "  expected: each pattern to match the whole path of at least one module\n" in message
        assert message.endswith(
            "  write:    r'.*norm.*', with .* on both sides; jax.named_scope gives a path where a library gives none"
        )

    @pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.make_jaxpr], ids=["eager", "jit", "make_jaxpr"])
    def test_the_warning_names_the_users_file(self, wrap):
        with pytest.warns(UserWarning, match="no path") as caught:
            wrap(cast(jax.named_scope("net")(jnp.sin), ruled((r"typo", "full"))))(X)
        assert caught[0].filename == __file__

    def test_one_of_two_patterns_is_unmatched(self):
        fn, params = of_linen(Stack())
        with pytest.warns(UserWarning, match=r"^rules that match no path: '.*typo'\. "):
            jax.make_jaxpr(cast(fn, ruled((r".*router", "full"), (r".*typo", "full"))))(params, X)

    def test_many_paths_are_not_all_listed(self):
        fn, params = of_linen(Stack(5))
        with pytest.warns(UserWarning, match=r"\.\.\. and \d+ more\n"):
            jax.make_jaxpr(cast(fn, ruled((r"typo", "full"))))(params, X)

    def test_patterns_that_disagree(self):
        fn, params = of_linen(Stack())
        rules = ruled((r".*router", "full"), (r".*/block_1", "keep"))
        with pytest.raises(ValueError, match="disagree") as error:
            cast(fn, rules)(params, X)
        assert str(error.value) == (
            "2 rules match 'Stack/Block_1/Router' and disagree:\n"
            "    '.*router': full\n"
            "    '.*/block_1': keep\n"
            "  expected: patterns that match one path to name the same kind\n"
            "  write:    narrower patterns, such as r'.*/norm_1' in place of r'.*norm.*'"
        )

    def test_patterns_that_agree(self):
        fn, params = of_linen(Stack())
        rules = ruled((r".*router", "full"), (r".*/block_\d", "full"))
        assert where(cast(fn, rules), params, X) == EXCEPTED

    @pytest.mark.parametrize(
        ("pattern", "kind", "error", "message"),
        [
            (
                "[",
                "full",
                ValueError,
                "override '[' is not a regular expression: unterminated character set at position 0.\n"
                "  expected: a pattern for whole paths such as params/LayerNorm_0/scale\n"
                "  write:    r'.*norm.*'",
            ),
            (
                3,
                "full",
                TypeError,
                "override 3 is a int.\n"
                "  expected: a regular expression as a string; case is ignored\n"
                "  write:    r'.*norm.*'",
            ),
            (
                ".*norm.*",
                "float32",
                ValueError,
                "kind is 'float32'.\n"
                "  expected: one of full, keep\n"
                '  write:    mp.default_rules().with_path(\'.*norm.*\', "full", "diverges otherwise")',
            ),
            (
                "x",
                None,
                ValueError,
                "kind is None.\n"
                "  expected: one of full, keep\n"
                '  write:    mp.default_rules().with_path(\'x\', "full", "diverges otherwise")',
            ),
        ],
        ids=["no regular expression", "no string", "unknown kind", "no kind"],
    )
    def test_bad_input(self, pattern, kind, error, message):
        with pytest.raises(error) as raised:
            mp.default_rules().with_path(pattern, kind, "?")
        assert str(raised.value) == message

    def test_rules_are_values(self):
        rules = ruled((r".*router", "full"))
        assert mp.default_rules().paths == ()
        assert rules == ruled((r".*router", "full")) != ruled((r".*router", "keep"))
        assert hash(rules) == hash(ruled((r".*router", "full")))


# Rules for primitives and presets -------------------------------------------------------------


class TestPrimitiveRules:
    @pytest.mark.parametrize(
        ("kind", "dtype"), [("low", "bfloat16"), ("full", "float32"), ("follow", "bfloat16"), ("opaque", "float32")]
    )
    @pytest.mark.parametrize("primitive", ["sin", jax.lax.sin_p], ids=["name", "primitive"])
    def test_of_an_activation(self, primitive, kind, dtype):
        rules = mp.default_rules().with_rule(primitive, kind, "for a test")
        fn = lambda x, w: jnp.sin(x @ w) @ w
        assert dtypes_of("sin", cast(fn, rules), X, W) == {dtype}
        assert rules.of("sin").reason == "for a test"
        assert rules.of("sin").kind is Kind[kind.upper()]
        assert mp.default_rules().of("sin").kind is Kind.FULL

    @pytest.mark.parametrize("kind", ["half", "LOWER", None, Kind.LOW])
    def test_an_unknown_kind(self, kind):
        with pytest.raises(ValueError, match="kind is") as error:
            mp.default_rules().with_rule("tanh", kind, "?")
        assert str(error.value) == (
            f"kind is {kind!r}.\n"
            "  expected: one of low, full, sum, follow, pass, opaque\n"
            '  write:    mp.default_rules().with_rule("tanh", "full", "saturates here")'
        )

    def test_an_unlisted_primitive_is_left_as_written(self):
        rule = mp.default_rules().of("of a later release")
        assert (rule.kind, rule.reason) == (Kind.OPAQUE, "not in the rule table: left exactly as written")
        assert "of a later release" not in mp.default_rules()


def activations(x, w):
    """One operation of each kind on an activation each; matrix work reads what it makes."""
    h = x @ w
    positive = jnp.abs(h) + jnp.ones(4)
    made = [jnp.sin(h), jnp.tanh(h), jnp.exp(h), jnp.log(positive), jax.lax.rsqrt(positive), jax.lax.lgamma(positive)]
    made += [jnp.sqrt(positive), jax.lax.erf(h), jnp.log1p(positive), jax.lax.cbrt(positive), jnp.exp2(h)]
    made += [jnp.cumsum(h, 0), h.max(-1, keepdims=True) * jnp.ones((1, 4)), h.sum(-1, keepdims=True) * jnp.ones((1, 4))]
    return [y @ w for y in made]


# Of PyTorch: sin, lgamma and their like are on no list. Of TensorFlow: infer has log and rsqrt, deny has exp and sums.
ALWAYS = {"dot_general": "low", "exp": "full"}
PRESETS = {
    "mpjax": {
        **dict.fromkeys(["tanh", "erf", "sqrt", "abs", "reduce_max"], "low"),
        **dict.fromkeys(["sin", "log", "log1p", "rsqrt", "lgamma", "cbrt", "exp2", "reduce_sum", "cumsum"], "full"),
    },
    "torch": {
        **dict.fromkeys(["tanh", "erf", "sqrt", "abs", "reduce_max", "sin", "lgamma", "cbrt", "exp2"], "low"),
        **dict.fromkeys(["log", "log1p", "rsqrt", "reduce_sum", "cumsum"], "full"),
    },
    "tensorflow": {
        **dict.fromkeys(["tanh", "erf", "sqrt", "abs", "reduce_max", "log", "log1p", "rsqrt"], "low"),
        **dict.fromkeys(["sin", "lgamma", "cbrt", "exp2", "reduce_sum", "cumsum"], "full"),
    },
    "matmul": dict.fromkeys(
        [
            "tanh",
            "erf",
            "sqrt",
            "abs",
            "sin",
            "log",
            "log1p",
            "rsqrt",
            "lgamma",
            "cbrt",
            "exp2",
            "reduce_sum",
            "cumsum",
        ],
        "full",
    ),
}


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("preset", PRESETS)
class TestPresets:
    def test_dtypes(self, preset, policy):
        names = {"low": str(mp.get_policy(policy).compute_dtype), "full": "float32"}
        found = census(mp.autocast(activations, policy, mp.default_rules(preset)), X, W)
        for primitive, kind in {**ALWAYS, **PRESETS[preset]}.items():
            assert {d for name, d in found if name == primitive} == {names[kind]}, primitive

    def test_attention_and_its_gradient(self, preset, policy):
        def attention(q, w):
            return (jax.nn.softmax(q @ w @ q.T) @ q).sum()

        fn = mp.autocast(attention, policy, mp.default_rules(preset))
        grad = jax.grad(fn, argnums=(0, 1))
        assert matrix_dtypes(grad, X, W) == {str(mp.get_policy(policy).compute_dtype)}
        for got, true in zip(grad(X, W), jax.grad(attention, argnums=(0, 1))(X, W), strict=True):
            np.testing.assert_allclose(got, true, atol=0.05 * float(jnp.abs(true).max()))
        assert dtypes_of("exp", grad, X, W) == {"float32"}


class TestPresetTable:
    def test_the_default(self):
        assert mp.default_rules() == mp.default_rules("mpjax")
        assert len({mp.default_rules(preset) for preset in PRESETS}) == len(PRESETS)

    @pytest.mark.parametrize("preset", ["pytorch", "", "Torch"])
    def test_an_unknown_name(self, preset):
        with pytest.raises(ValueError, match="preset is") as error:
            mp.default_rules(preset)
        assert str(error.value) == (
            f"preset is {preset!r}.\n"
            "  expected: one of mpjax, torch, tensorflow, matmul\n"
            '  write:    mp.default_rules("torch")'
        )

    def test_matmul_is_low_in_matrix_work_alone(self):
        def fn(x, w, b):
            return jax.nn.gelu(x @ w + b) @ w

        found = census(cast(fn, mp.default_rules("matmul")), X, W, W[0])
        low = {name for name, dtype in found if dtype == "bfloat16"}
        assert low == {"dot_general", "convert_element_type"}
