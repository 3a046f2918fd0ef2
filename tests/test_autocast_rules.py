"""Rules of autocast: exceptions by path, rules for primitives, other libraries' tables."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jaxprs import census, dtypes, dtypes_of, matrix_dtypes, matrix_dtypes_by_axis, trace

import mpjax as mp
from mpjax._autocast._tables import Kind

K = jax.random.split(jax.random.key(0), 8)
X = jax.random.normal(K[0], (8, 4))
W = jax.random.normal(K[1], (4, 4)) * 0.5
# Only matrix work of modules that a rule names has an axis of 3, in any derivative.
V = jax.random.normal(K[2], (4, 3)) * 0.5
U = jax.random.normal(K[3], (3, 4)) * 0.5
EXCEPTED = {"inside": {"float32"}, "outside": {"bfloat16"}}


def cast(fn, rules=None):
    return mp.autocast(fn, "mixed_bfloat16", rules)


def where(fn, *args):
    return matrix_dtypes_by_axis(3, fn, *args)


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
            x = jnp.tanh(x @ w["v"]) @ w["u"]
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
        with pytest.warns(UserWarning, match="match no path") as caught:
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


# Rules for source lines -----------------------------------------------------------------------


def here(fn, offset):
    """The line that many below a function's first, as a rule takes it."""
    return f"test_autocast_rules.py:{fn.__code__.co_firstlineno + offset}"


def two_products(x, w):
    y = x @ w
    return (y * 2) @ w


def softmax_twice(x, w):
    a = jax.nn.softmax(x @ w)
    b = jax.nn.softmax(x @ w)
    return a @ w + b @ w


class TestLineRules:
    def dots(self, fn, rules, through=None):
        found = mp.explain(fn, "mixed_bfloat16", rules, through=through)(X, W)
        rows = [row for row in found.operations if row.primitive == "dot_general"]
        return [(int(row.source.split(":")[1]) - fn.__code__.co_firstlineno, row.dtype, row.reason) for row in rows]

    @pytest.mark.parametrize("kind", ["full", "keep"])
    def test_one_line_and_no_other(self, kind):
        rules = mp.default_rules().with_line(here(two_products, 1), kind, "for a test")
        (first, second) = self.dots(two_products, rules)
        assert first == (1, "float32", "for a test")
        assert second[:2] == (2, "bfloat16")

    def test_holds_for_the_backward_pass(self):
        rules = mp.default_rules().with_line(here(two_products, 1), "full", "for a test")
        loss = lambda grad: lambda x, w: jax.grad(lambda x, w: jnp.sum(grad(x, w)), (0, 1))(x, w)
        assert {(line, dtype) for line, dtype, _ in self.dots(two_products, rules, loss)} == {
            (1, "float32"),
            (2, "bfloat16"),
        }

    def test_holds_in_the_functions_that_the_line_calls(self):
        """Also in one of JAX's, of which the second call is the first one's trace."""
        rules = mp.default_rules("torch").with_rule("exp", "low", "for a test")
        found = mp.explain(softmax_twice, "mixed_bfloat16", rules.with_line(here(softmax_twice, 2), "full", "it is 2"))
        exps = [row.dtype for row in found(X, W).operations if row.primitive == "exp"]
        assert sorted(exps) == ["bfloat16", "float32"]

    def test_folders_and_columns_tell_lines_apart(self):
        rules = mp.default_rules().with_line("models/net.py:41", "full", "for a test")
        assert rules.at_line("/home/me/models/net.py:41:8 (forward)") is rules.lines[0]
        assert rules.at_line("/home/me/models/net.py:41 (forward)") is rules.lines[0]
        assert rules.at_line("/home/me (2)/8:9/models/net.py:41:8 (<lambda>.<locals>.fn)") is rules.lines[0]
        for other in ("/other/net.py:41", "models/net.py:410:8 (f)", "models/net.py:4", "/submodels/net.py:41", ""):
            assert rules.at_line(other) is None

    def test_the_last_rule_for_a_line_holds(self):
        line = here(two_products, 1)
        rules = mp.default_rules().with_line(line, "keep", "first").with_line(line, "full", "second")
        assert self.dots(two_products, rules)[0] == (1, "float32", "second")

    def test_regions_and_paths_come_first(self):
        def fn(x, w):
            with jax.named_scope("inside"):
                return two_products(x, w)

        rules = ruled((r"inside", "full")).with_line(here(two_products, 1), "keep", "line")
        assert {reason for _, _, reason in self.dots_of(fn, rules)} == {"for a test"}

    def dots_of(self, fn, rules):
        found = mp.explain(fn, "mixed_bfloat16", rules)(X, W)
        return [(r.source, r.dtype, r.reason) for r in found.operations if r.primitive == "dot_general"]

    def test_a_line_that_nothing_comes_from(self):
        rules = mp.default_rules().with_line("test_autocast_rules.py:1", "full", "for a test")
        with pytest.warns(UserWarning, match=r"rules that match no line: 'test_autocast_rules.py:1'. The lines are"):
            mp.autocast(two_products, "mixed_bfloat16", rules)(X, W)

    @pytest.mark.parametrize("line", ["model.py", "41", ":41", "model.py:x", None, 41, "model.py:41:"])
    def test_bad_line(self, line):
        with pytest.raises(ValueError, match="line is") as error:
            mp.default_rules().with_line(line, "full", "?")
        assert "expected: a file and the number of a line in it" in str(error.value)

    def test_bad_kind(self):
        with pytest.raises(ValueError, match="kind is 'float32'") as error:
            mp.default_rules().with_line("model.py:41", "float32", "?")
        assert "write:    mp.default_rules().with_line('model.py:41', \"full\"" in str(error.value)


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
