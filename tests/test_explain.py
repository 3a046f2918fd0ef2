"""What `mpjax.explain` says: rows, totals, casts, what was left; and that it is what the program does."""

import collections
import dataclasses
import functools
import inspect
import io
import json

import jax
import jax.numpy as jnp
import pytest
import rich.console
from flax import linen as nn
from jax.experimental import pallas as pl
from jaxprs import dtypes

import mpjax as mp
from mpjax._compat import inner_jaxprs, open_jaxpr

X, W, V = jnp.ones((8, 4)), jnp.ones((4, 4)), jnp.ones((4, 3))


def explain(fn, *args, policy="mixed_bfloat16", rules=None, through=None, **kwargs):
    return mp.explain(fn, policy, rules, through=through)(*args, **kwargs)


def rows_of(found, primitive, direction="forward"):
    return [row for row in found.operations if row.primitive == primitive and row.direction == direction]


def row_of(found, primitive, direction="forward"):
    (row,) = rows_of(found, primitive, direction)
    return row


def line_of(fn, text):
    """Where in this file the line of a function is that holds a text."""
    lines, first = inspect.getsourcelines(fn)
    (offset,) = [i for i, line in enumerate(lines) if text in line]
    return first + offset


def tiny(x, w):
    h = jnp.tanh(x @ w)
    return jnp.exp(h).sum()


def test_a_lookup_that_is_narrowed_as_a_whole_has_its_reason():
    found = explain(lambda t, w, i: jnp.take(t, i, axis=0) @ w, X, W, jnp.arange(3))
    row = row_of(found, "jit")
    assert row.reason == "rows of a table that matrix work reads in the end: an activation"
    assert (row.mark, row.flops, row.count) == ("LOW", 0, 1)


GOLDEN = """\
params=float32,compute=bfloat16,output=float32

  operation    count  dtypes                mark    FLOPs  source                        reason
(in no module)
  dot_general  1      bfloat16 -> bfloat16  LOW     256    test_explain.py:{h}:17 (tiny)  tensor-core work; the \
accumulator is float32
  tanh         1      float32 -> float32    NORMED  32     test_explain.py:{h}:8 (tiny)   only what is computed in \
float32 reads it
  exp          1      float32 -> float32    FULL    32     test_explain.py:{e}:11 (tiny)  overflows or loses its \
argument's digits in 16 bits: exp(11.1) is inf in float16, bfloat16 near 8192 has a spacing of 64
  reduce_sum   1      float32 -> float32    FULL    32     test_explain.py:{e}:11 (tiny)  a long sum loses digits in \
16 bits

FLOPs: bfloat16 256 (72.7%), float32 96 (27.3%)
bytes: float32 640 B (80.0%), bfloat16 160 B (20.0%)
casts put in: 2 float32 -> bfloat16, 1 bfloat16 -> float32"""


class TestText:
    def test_a_golden_one(self):
        lines = {"h": line_of(tiny, "h ="), "e": line_of(tiny, "return")}
        assert all(10 <= n < 100 for n in lines.values()), "the table's width is that of two digits"
        assert str(explain(tiny, X, W)) == GOLDEN.format(**lines)

    def test_rich_shows_the_same_cells(self):
        found = explain(tiny, X, W)
        console = rich.console.Console(file=io.StringIO(), width=300)
        console.print(found)
        shown = console.file.getvalue()
        for row in found.operations:
            (line,) = [line for line in shown.splitlines() if f" {row.primitive} " in line]
            for cell in (str(row.count), row.mark, row.reason, row.source.rsplit("/", 1)[-1]):
                assert cell in line
        for line in str(found).split("\n\n")[-1].splitlines():
            assert line in shown

    def test_modules_head_their_rows(self):
        def fn(x, w):
            with jax.named_scope("outer"):
                h = x @ w
                with jax.named_scope("inner"):
                    return jnp.exp(h)

        lines = str(explain(fn, X, W)).splitlines()
        heads = [line for line in lines[3:] if line and not line.startswith(" ")]
        assert heads[:2] == ["outer", "outer/inner"]

    def test_large_amounts_are_shortened(self):
        found = explain(lambda x, w: x @ w, *[jax.ShapeDtypeStruct((4096, 4096), jnp.float32)] * 2)
        assert "FLOPs: bfloat16 137.4 G (100.0%)\nbytes: bfloat16 100.7 MB (100.0%)" in str(found)

    def test_nothing_to_compute(self):
        found = explain(lambda x: x, X)
        assert found.operations == found.casts == found.not_entered == ()
        assert str(found).endswith("FLOPs: none\nbytes: none\ncasts put in: none")

    def test_json(self):
        found = explain(tiny, X, W, through=jax.grad)
        data = json.loads(found.to_json())
        assert list(data) == ["policy", "operations", "casts", "not_entered", "flops", "bytes"]
        as_lists = lambda rows: json.loads(json.dumps([dataclasses.asdict(row) for row in rows]))
        assert data["operations"] == as_lists(found.operations)
        assert data["casts"] == as_lists(found.casts)
        assert data["flops"] == found.flops
        assert data["bytes"] == found.bytes
        assert data["policy"] == "params=float32,compute=bfloat16,output=float32"


class TestRows:
    @pytest.mark.parametrize(
        ("policy", "low"), [("mixed_bfloat16", "bfloat16"), ("mixed_float16", "float16"), ("float32", "float32")]
    )
    def test_dtypes(self, policy, low):
        found = explain(lambda x, w: jnp.tanh(x @ w) @ w, X, W, policy=policy)
        assert {row.inputs + row.outputs for row in rows_of(found, "dot_general")} == {(low,) * 3}
        assert row_of(found, "tanh").dtype == low

    def test_marks_and_reasons(self):
        def fn(x, w):
            h = x @ w
            centred = h - h.mean(-1, keepdims=True)
            return jnp.sum(jnp.exp(jnp.sin(x)) + centred @ w)

        found = explain(fn, X, W)
        assert {row.mark for row in rows_of(found, "dot_general")} == {"LOW"}
        assert row_of(found, "sub").mark == "NORMED"
        assert [row.mark for row in rows_of(found, "reduce_sum")] == ["STAT", "FULL"]
        assert row_of(found, "exp").mark == row_of(found, "sin").mark == "FULL"
        for primitive in ("dot_general", "exp", "reduce_sum"):
            assert {row.reason for row in rows_of(found, primitive)} == {mp.default_rules().of(primitive).reason}

    def test_reasons_of_a_users_own_rules(self):
        rules = mp.default_rules().with_rule("tanh", "full", "it saturates").with_path("net", "full", "it diverges")

        def fn(x, w):
            h = jnp.tanh(x @ w)
            with jax.named_scope("net"):
                return mp.keep_precision(jnp.floor)(jnp.ceil(h))

        found = explain(fn, X, W, rules=rules)
        assert row_of(found, "tanh").reason == "it saturates"
        assert (row_of(found, "ceil").reason, row_of(found, "ceil").mark) == ("it diverges", "FULL")
        assert (row_of(found, "floor").reason, row_of(found, "floor").mark) == ("inside mpjax.keep_precision", "FREE")
        assert row_of(found, "floor").path == "net"

    def test_source_lines(self):
        found = explain(tiny, X, W)
        for primitive, text in {"dot_general": "@", "tanh": "@", "exp": "return", "reduce_sum": "return"}.items():
            row = row_of(found, primitive)
            assert row.source.startswith(f"{__file__}:{line_of(tiny, text)}")
            assert row.source.endswith("(tiny)")

    def test_counts(self):
        def fn(x, w):
            step = lambda c, _: (jnp.tanh(c @ w), None)
            outer = lambda c, _: (jax.lax.scan(step, c, None, length=3)[0], None)
            return jax.lax.scan(outer, x, None, length=5)[0]

        found = explain(fn, X, W)
        assert (row_of(found, "dot_general").count, row_of(found, "dot_general").flops) == (15, 15 * 2 * 8 * 4 * 4)
        assert (row_of(found, "tanh").count, row_of(found, "tanh").flops) == (15, 15 * 8 * 4)

    def test_a_while_loop_is_listed_once(self):
        found = explain(lambda x, w: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x), X, W)
        assert row_of(found, "dot_general").count == 1

    def test_operations_of_one_line_are_one_row(self):
        def fn(x, w):
            for _ in range(4):
                x = x @ w
            return x

        assert row_of(explain(fn, X, W), "dot_general").count == 4

    @pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.vmap], ids=["jit", "remat", "vmap"])
    def test_inside_of_transforms(self, wrap):
        found = explain(lambda x, w: wrap(lambda x: jnp.tanh(x @ w))(x), X, W)
        assert row_of(found, "dot_general").inputs == ("bfloat16", "bfloat16")
        assert row_of(found, "dot_general").mark == "LOW"
        assert row_of(found, "dot_general").flops == 2 * 8 * 4 * 4


def conv(groups=1, batch_groups=1):
    def fn(x, k):
        return jax.lax.conv_general_dilated(
            x,
            k,
            (2, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            batch_group_count=batch_groups,
        )

    return fn


GROUPS = jnp.array([3, 5])
# Products and sums of each result, counted by hand.
FLOPS = {
    "dot": (jnp.matmul, [(8, 4), (4, 3)], 2 * 8 * 3 * 4),
    "batched dot": (functools.partial(jnp.einsum, "bij,bjk->bik"), [(5, 8, 4), (5, 4, 3)], 5 * 2 * 8 * 3 * 4),
    "two contracted": (functools.partial(jnp.einsum, "ijk,jkl->il"), [(8, 4, 2), (4, 2, 3)], 2 * 8 * 3 * 4 * 2),
    "outer product": (functools.partial(jnp.einsum, "i,j->ij"), [(8,), (4,)], 2 * 8 * 4),
    # 9 x 7 with a 3 x 2 kernel and strides (2, 1): 4 x 6 results.
    "conv": (conv(), [(2, 9, 7, 4), (3, 2, 4, 6)], 2 * (2 * 4 * 6 * 6) * 3 * 2 * 4),
    "conv, groups": (conv(groups=2), [(2, 9, 7, 4), (3, 2, 2, 6)], 2 * (2 * 4 * 6 * 6) * 3 * 2 * 2),
    "conv, depthwise": (conv(groups=4), [(2, 9, 7, 4), (3, 2, 1, 8)], 2 * (2 * 4 * 6 * 8) * 3 * 2),
    "conv, batch groups": (conv(batch_groups=2), [(2, 9, 7, 4), (3, 2, 4, 6)], 2 * (1 * 4 * 6 * 6) * 3 * 2 * 4),
    "ragged dot": (lambda x, w: jax.lax.ragged_dot(x, w, GROUPS), [(8, 4), (2, 4, 3)], 2 * 8 * 3 * 4),
}


class TestFlops:
    @pytest.mark.parametrize("case", [name for name in FLOPS if name != "outer product"])
    def test_matrix_work(self, case):
        fn, shapes, expected = FLOPS[case]
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        found = explain(fn, *args)
        assert found.flops == {"bfloat16": expected}
        assert sum(row.flops for row in found.operations) == expected

    @pytest.mark.parametrize("case", ["dot", "batched dot", "two contracted", "ragged dot"])
    def test_of_the_backward_pass(self, case):
        """One product of as many FLOPs as forward for each of the two gradients."""
        fn, shapes, expected = FLOPS[case]
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        grad = lambda f: jax.grad(lambda *args: f(*args).sum(), argnums=(0, 1))
        found = explain(fn, *args, through=grad)
        backward = [r for r in found.operations if r.direction == "backward" and "dot_general" in r.primitive]
        assert sum(row.count for row in backward) == 2
        assert sum(row.flops for row in backward) == 2 * expected

    @pytest.mark.parametrize(
        ("fn", "expected"),
        [
            (lambda x: x + x, 32),
            (lambda x: jnp.exp(x), 32),
            (lambda x: x.sum(), 32),
            (lambda x: x.T.reshape(-1)[::2], 0),
            (lambda x: jnp.cumsum(x, 0), 32),
        ],
        ids=["add", "exp", "sum", "moves", "cumsum"],
    )
    def test_other_work(self, fn, expected):
        assert sum(explain(fn, X).flops.values()) == expected

    def test_totals_by_dtype(self):
        found = explain(lambda x, w: jnp.exp(x @ w).sum(), X, W)
        assert found.flops == {"bfloat16": 2 * 8 * 4 * 4, "float32": 2 * 32}
        # x and w narrowed and the product; the product widened, its exponential twice, and x and w before the dot
        # are operands of casts, which are not counted.
        assert found.bytes == {"bfloat16": 2 * (32 + 16 + 32), "float32": 4 * (32 + 32 + 32)}


class TestCasts:
    def test_one_for_each_operand(self):
        found = explain(lambda x, w: jnp.exp(x @ w), X, W)
        assert [(c.before, c.after, c.count) for c in found.casts] == [
            ("float32", "bfloat16", 2),
            ("bfloat16", "float32", 1),
        ]
        assert all(c.source.startswith(__file__) for c in found.casts)

    def test_in_a_scan(self):
        found = explain(lambda x, w: jax.lax.scan(lambda c, _: (jnp.exp(c @ w), None), x, None, length=7)[0], X, W)
        assert {(c.before, c.after): c.count for c in found.casts if c.count > 2}["bfloat16", "float32"] == 7

    def test_the_users_own_are_operations(self):
        found = explain(lambda x, w: x.astype(jnp.float16) @ w.astype(jnp.float16), X, W)
        assert found.casts == ()
        rows = rows_of(found, "convert_element_type")
        assert [(row.inputs, row.outputs) for row in rows] == [(("float32",), ("float16",))] * 2


def in_pallas(x, w):
    def kernel(x_ref, w_ref, o_ref):
        o_ref[...] = x_ref[...] @ w_ref[...]

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 4), jnp.float32), interpret=True)(x @ w, w)


def in_composite(x, w):
    return jax.lax.composite(lambda x, w: x @ w, name="my.product")(x @ w, w)


def in_a_region(x, w):
    inner = jax.jit(lambda x, w: x @ w)
    return mp.keep_precision(inner)(x @ w, w)


class TestNotEntered:
    @pytest.mark.parametrize(
        ("fn", "primitive", "reason"),
        [
            (in_pallas, "pallas_call", "its body or kernel has a fixed signature"),
            (in_composite, "composite", "its body or kernel has a fixed signature"),
            (in_a_region, "jit", "inside mpjax.keep_precision"),
        ],
        ids=["pallas", "composite", "region"],
    )
    # autocast itself warns of the first two, and explain traces it.
    @pytest.mark.filterwarnings("ignore:autocast leaves")
    def test_one_row_for_each(self, fn, primitive, reason):
        found = explain(fn, X, W)
        assert {(row.primitive, row.reason) for row in found.not_entered} == {(primitive, reason)}
        (row,) = found.not_entered
        assert row.source.startswith(f"{__file__}:{line_of(fn, '(x @ w, w)')}:")
        assert f"not entered: {primitive} at {row.source}: {reason}" in str(found)
        dots = rows_of(found, "dot_general")
        assert sorted(r.inputs for r in dots) == [("bfloat16",) * 2, ("float32",) * 2]

    def test_all_else_is_entered(self):
        found = explain(lambda x, w: jax.nn.relu(jax.checkpoint(jax.jit(jnp.dot))(x, w)), X, W)
        assert found.not_entered == ()
        assert "not entered" not in str(found)


class TestThrough:
    @pytest.mark.parametrize(
        "through", [jax.grad, jax.value_and_grad, functools.partial(jax.grad, argnums=0)], ids=["grad", "both", "first"]
    )
    def test_backward_rows(self, through):
        found = explain(tiny, X, W, through=through)
        assert row_of(found, "dot_general").inputs == ("bfloat16", "bfloat16")
        back = row_of(found, "dot_general", "backward")
        assert (back.inputs, back.mark, back.flops) == (("bfloat16", "bfloat16"), "LOW", 256)
        assert back.source.startswith(f"{__file__}:{line_of(tiny, '@')}")
        assert "dot_general (backward)" in str(found)

    @pytest.mark.parametrize(
        ("layer", "forward"),
        [(lambda x, w: x @ w, 3), (jax.checkpoint(lambda x, w: jnp.sin(x @ w)), 6)],
        ids=["kept", "again"],
    )
    def test_backward_rows_of_a_loop(self, layer, forward):
        """Three layers: their products, those of checkpoint again, and two gradients each."""
        weights = jnp.ones((3, 4, 4))
        fn = lambda x, ws: jnp.sin(jax.lax.scan(lambda x, w: (jnp.tanh(layer(x, w)), None), x, ws)[0]).sum()
        found = explain(fn, jnp.ones((2, 4)), weights, through=functools.partial(jax.grad, argnums=(0, 1)))
        products = [row for row in found.operations if row.primitive == "dot_general"]
        counts = {way: sum(row.count for row in products if row.direction == way) for way in ("forward", "backward")}
        assert counts == {"forward": forward, "backward": 6}

    def test_forward_alone_has_none(self):
        assert {row.direction for row in explain(tiny, X, W).operations} == {"forward"}

    def test_what_autocast_did_not_make(self):
        found = explain(tiny, X, W, through=lambda f: lambda *args: jnp.sinh(f(*args)))
        row = row_of(found, "sinh")
        assert (row.mark, row.reason) == ("", "made by a transformation outside of autocast")


class TestFloat32:
    def test_nothing_is_cast(self):
        found = explain(tiny, X, W, policy="float32")
        assert found.casts == found.not_entered == ()
        assert set(found.flops) == set(found.bytes) == {"float32"}

    def test_no_transformation_made_it(self):
        found = explain(tiny, X, W, policy="float32")
        assert not any("outside of autocast" in row.reason for row in found.operations)


class TestDiff:
    def test_against_float32(self):
        (row,) = explain(tiny, X, W).diff("float32")
        assert (row.primitive, row.before, row.after, row.direction) == (
            "dot_general",
            "bfloat16",
            "float32",
            "forward",
        )
        assert row.source.startswith(f"{__file__}:{line_of(tiny, '@')}")

    def test_the_reason_is_that_of_a_rule(self):
        (row,) = explain(tiny, X, W).diff("float32")
        assert row.reason == mp.default_rules().of("dot_general").reason

    def test_against_itself(self):
        assert explain(tiny, X, W).diff("mixed_bfloat16") == ()

    def test_what_one_dtype_holds_and_the_other_not(self):
        found = explain(lambda x, w: (x @ w + 1e9) @ w, X, W)
        by_primitive = {row.primitive: row for row in found.diff("mixed_float16")}
        assert (by_primitive["add"].before, by_primitive["add"].after) == ("bfloat16", "float32")
        assert by_primitive["add"].reason == "its constant is too large or too small for float16"
        assert (by_primitive["dot_general"].before, by_primitive["dot_general"].after) == ("bfloat16", "float16")

    def test_through_a_gradient_and_rules(self):
        rules = mp.default_rules().with_rule("dot_general", "full", "for a test")
        assert explain(tiny, X, W, rules=rules, through=jax.grad).diff("float32") == ()
        found = explain(tiny, X, W, through=jax.grad).diff("float32")
        assert {row.direction for row in found} == {"forward", "backward"}


class TestArguments:
    def test_shapes_do(self):
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (X, W)]
        assert explain(tiny, *shapes) == explain(tiny, X, W)

    def test_trees_static_arguments_and_keywords(self):
        def fn(params, x, name, *, times, flag=None):
            assert (name, times, flag) == ("kept", 2, None)
            for _ in range(times):
                x = x @ params["w"]
            return {"y": x, "name": name, "n": times}

        found = explain(fn, {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32)}, X, "kept", times=2)
        assert row_of(found, "dot_general").count == 2

    def test_it_is_not_run(self):
        def fn(x):
            jax.debug.callback(lambda _: pytest.fail("it ran"), x)
            return x @ x.T

        assert row_of(explain(fn, X), "dot_general").count == 1

    @pytest.mark.parametrize(
        ("policy", "error", "message"),
        [
            ("halves", ValueError, "halves"),
            ("compute=float8_e5m2,output=float32", ValueError, "expected: float8_e4m3fn"),
        ],
        ids=["unknown", "a format for gradients"],
    )
    def test_a_policy_that_autocast_refuses(self, policy, error, message):
        with pytest.raises(error, match=message):
            mp.autocast(tiny, policy)
        with pytest.raises(error, match=message):
            explain(tiny, X, W, policy=policy)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = nn.scan(
            lambda m, c, _: (jnp.tanh(m(c)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )(nn.Dense(4), x, None)[0]
        return nn.Dense(3)(nn.gelu(x))


def of_a_model(x, w):
    model = Attention()
    params = jax.eval_shape(model.init, jax.random.key(0), x[None])
    return model.apply(jax.tree.map(lambda p: jnp.full(p.shape, w[0, 0]), params), x[None])


def branches(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda x: jnp.exp(x @ w), lambda x: x, x)


def attention(x, w):
    return jax.nn.softmax(x @ w @ x.T) @ x


PROGRAMS = [tiny, branches, attention, of_a_model]
BODIES = ("jit", "scan", "while", "cond", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call", "closed_call")


def that_are_read(jaxpr):
    eqns, before = list(jaxpr.eqns), None
    while before != len(eqns):
        before = len(eqns)
        read = {id(atom) for eqn in eqns for atom in eqn.invars} | set(map(id, jaxpr.outvars))
        eqns = [eqn for eqn in eqns if eqn.effects or any(id(var) in read for var in eqn.outvars)]
    return eqns


def counted(jaxpr, times=1):
    """All operations of a jaxpr that something reads, with their dtypes, as often as they run."""
    found = collections.Counter()
    for eqn in that_are_read(jaxpr):
        if eqn.primitive.name in BODIES:
            for inner in inner_jaxprs(eqn):
                found += counted(inner, times * eqn.params.get("length", 1))
        else:
            found[eqn.primitive.name, dtypes(eqn.invars), dtypes(eqn.outvars)] += times
    return found


@pytest.mark.standard_promotion
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float32"])
@pytest.mark.parametrize("through", [None, jax.grad], ids=["forward", "gradient"])
@pytest.mark.parametrize("fn", PROGRAMS, ids=lambda f: f.__name__)
def test_it_says_what_the_program_does(fn, through, policy):
    wrapped = (lambda f: jax.grad(lambda x, w: f(x, w).sum())) if through else None
    found = explain(fn, X, W, policy=policy, through=wrapped)
    said = collections.Counter()
    for row in found.operations:
        said[row.primitive, row.inputs, row.outputs] += row.count
    for row in found.casts:
        said["convert_element_type", (row.before,), (row.after,)] += row.count
    cast = mp.autocast(fn, policy)
    jaxpr, _ = open_jaxpr(jax.make_jaxpr(wrapped(cast) if through else cast)(X, W))
    assert said == counted(jaxpr)


@pytest.mark.standard_promotion
def test_paths_of_a_model():
    found = explain(of_a_model, X, W)
    counts = {row.path: row.count for row in rows_of(found, "dot_general")}
    names = ["query", "key", "value", "...qhd,...khd->...hqk", "...hqk,...khd->...qhd", "out"]
    assert counts == {
        **{f"Attention/MultiHeadDotProductAttention_0/{name}": 1 for name in names},
        "Attention/Dense_0.<lambda>/Dense_0": 2,
        "Attention/Dense_1": 1,
    }
