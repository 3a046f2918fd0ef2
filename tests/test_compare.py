"""`mpjax.diagnostics.compare` and `suggest`: planted culprits, exact numbers, every primitive that is entered."""

import inspect
import io
import json
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from jax.sharding import PartitionSpec as P

import mpjax as mp
from mpjax.diagnostics import compare, suggest
from mpjax.diagnostics._measured import _error
from mpjax.diagnostics._pairs import relative_error

KEYS = list(jax.random.split(jax.random.key(0), 8))


def normal(i: int, *shape: int) -> jax.Array:
    return jax.random.normal(KEYS[i], shape)


def unstabilised_softmax(x):
    e = jnp.exp(x)  # culprit
    return e / jnp.sum(e, axis=-1, keepdims=True)


def variance_of_squares(x):
    return jnp.mean(x * x, axis=-1) - jnp.mean(x, axis=-1) ** 2  # culprit


def cumulative_sum(x):
    positions = jnp.cumsum(x)  # culprit
    return positions / x.size


def large_sine(w, x):
    angle = x @ w  # culprit
    return jnp.sin(angle)


def residual_stream(w, x):
    for _ in range(8):
        y = jnp.tanh(x @ w) * 0.04
        x = x + y  # culprit
    return x - jnp.mean(x, axis=-1, keepdims=True)


def half_norm(x):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centred = x - mean  # culprit
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)


def large_logits(q, k):
    logits = q @ k.T  # culprit
    return jax.nn.softmax(logits)


def distances(x, y):
    products = x @ y.T  # culprit
    squares = jnp.sum(x * x, axis=-1)[:, None] + jnp.sum(y * y, axis=-1)
    return jnp.exp(2 * products - squares)


def overflowing_product(w, v, x):
    hidden = x @ w  # culprit
    return (hidden * 1e-4) @ v


def vanishing_gradient(w, x):
    scores = x @ w  # culprit
    return jnp.mean(jnp.tanh(scores)) * 1e-5


def moving_average(decay, x):
    def step(carry, row):
        carry = decay * carry + row  # culprit
        return carry, None

    return jax.lax.scan(step, jnp.zeros_like(x[0]), x)[0]


def log_of_complement(w, x):
    p = jax.nn.sigmoid(x @ w)  # culprit
    return jnp.log(1 - p)


class Culprit(NamedTuple):
    fn: Any
    primitive: str
    args: tuple[Any, ...]
    tolerance: float
    policy: str = "mixed_bfloat16"
    low: tuple[str, ...] = ()
    through: Any = None

    @property
    def rules(self):
        rules = mp.default_rules()
        for name in self.low:
            rules = rules.with_rule(name, "low", "a wrong rule, for a test")
        return rules

    @property
    def line(self) -> str:
        lines, first = inspect.getsourcelines(self.fn)
        return f"test_compare.py:{first + next(i for i, x in enumerate(lines) if '# culprit' in x)}"


CULPRITS = [
    Culprit(unstabilised_softmax, "exp", (normal(0, 4, 16) * 8,), 1e-2, "mixed_float16", ("exp",)),
    Culprit(variance_of_squares, "reduce_sum", (100 + normal(0, 4, 64),), 1e-1, low=("reduce_sum",)),
    Culprit(cumulative_sum, "cumsum", (jnp.ones(100_000),), 1e-2, "mixed_float16", ("cumsum",)),
    Culprit(large_sine, "dot_general", (normal(0, 16, 16) * 40, normal(1, 8, 16)), 1e-2),
    Culprit(residual_stream, "add", (normal(0, 16, 16), 900 + normal(1, 4, 16)), 1e-1, "mixed_float16"),
    Culprit(half_norm, "sub", (100 + normal(0, 4, 64),), 1e-2, low=("sub",)),
    Culprit(large_logits, "dot_general", (normal(0, 8, 64), 16 * normal(1, 64) + 0.3 * normal(2, 8, 64)), 1e-2),
    Culprit(distances, "dot_general", (10 + normal(0, 8, 32) * 0.1, 10 + normal(1, 8, 32) * 0.1), 1e-2),
    Culprit(
        overflowing_product,
        "dot_general",
        (300 + normal(0, 8, 8), normal(1, 8, 4), 300 + normal(2, 4, 8)),
        1e-2,
        "mixed_float16",
    ),
    Culprit(
        vanishing_gradient,
        "dot_general",
        (normal(0, 8, 4), normal(1, 64, 8)),
        1e-2,
        "mixed_float16",
        through=jax.value_and_grad,
    ),
    Culprit(moving_average, "add", (jnp.float32(0.999), jnp.ones((2000, 2))), 2e-2, low=("add",)),
    Culprit(log_of_complement, "logistic", (normal(0, 8, 4) + 1, 1 + normal(1, 16, 8) * 0.1), 2e-2, low=("logistic",)),
]
named = pytest.mark.parametrize("culprit", CULPRITS, ids=lambda c: c.fn.__name__)


@named
def test_names_the_culprit_first_and_the_fix_repairs_it(culprit):
    found = compare(culprit.fn, culprit.policy, culprit.rules, through=culprit.through)(*culprit.args)
    worst = found.operations[0]
    assert worst.primitive == culprit.primitive
    assert f"/{culprit.line} " in worst.source
    assert found.total > 10 * culprit.tolerance or found.total > 0.2
    assert found.fix is not None
    assert culprit.line in found.fix.code
    assert found.fix.after <= culprit.tolerance


@pytest.mark.slow
@named
def test_suggest_repairs_it_with_one_exception(culprit):
    rules = suggest(culprit.fn, culprit.policy, culprit.tolerance, culprit.rules, through=culprit.through)(
        *culprit.args
    )
    assert [rule.line for rule in rules.lines] == [culprit.line]
    assert not rules.paths


W, X = 40 * normal(0, 16, 16), normal(1, 8, 16)


def angles(w, x):
    return jnp.sin(x @ w)


@jax.custom_vjp
def with_rule(w, x):
    return angles(w, x)


with_rule.defvjp(
    lambda w, x: (angles(w, x), (w, x)),
    lambda res, ct: (res[1].T @ (ct * jnp.cos(res[1] @ res[0])), (ct * jnp.cos(res[1] @ res[0])) @ res[0].T),
)


@jax.custom_jvp
def with_tangents(w, x):
    return angles(w, x)


@with_tangents.defjvp
def _(primals, tangents):
    return jax.jvp(angles, primals, tangents)


def sharded(w, x):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(angles, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P("batch"))(w, x)


def summed_over_devices(w, x):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    mean = lambda w, x: jax.lax.pmean(angles(w, x), "batch")
    return jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())(w, x)


def scanned(w, x):
    return jax.lax.scan(lambda carry, row: (carry + 1, angles(w, row)), jnp.float32(0), x[:, None], reverse=True)[1]


def looped(w, x):
    return jax.lax.fori_loop(0, 3, lambda i, y: angles(w, x + 0 * y), x)


def until(w, x):
    def body(state):
        i, y = state
        return i + 1, angles(w, x) + y

    return jax.lax.while_loop(lambda state: state[0] < 3, body, (jnp.int32(0), jnp.zeros_like(x)))[1]


WRAPPED = {
    "plain": angles,
    "jit": jax.jit(angles),
    "remat": jax.checkpoint(angles),
    "custom_vjp": with_rule,
    "custom_jvp": with_tangents,
    "vmap": lambda w, x: jax.vmap(lambda row: angles(w, row))(x),
    "scan": scanned,
    "fori": looped,
    "while": until,
    "cond": lambda w, x: jax.lax.cond(x[0, 0] > -100, angles, lambda w, x: x, w, x),
    "switch": lambda w, x: jax.lax.switch(jnp.int32(1), [lambda w, x: x, angles, lambda w, x: 2 * x], w, x),
    "shard_map": sharded,
    "psum": summed_over_devices,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_enters(name):
    """Forward and backward: the dot is blamed wherever it stands, with the errors that the program really has."""
    fn = WRAPPED[name]
    loss = lambda w, x: jnp.mean(jnp.square(fn(w, x)))
    through = None if name == "while" else jax.value_and_grad  # JAX has no gradient of a while loop
    found = compare(loss, "mixed_bfloat16", through=through)(W, X)
    worst = found.operations[0]
    assert (worst.primitive, worst.ruled) == ("dot_general", True)
    assert 0.001 < worst.local < 0.01
    assert found.fix is not None
    assert found.fix.after < 1e-5 < 0.01 < found.total
    if through:
        assert worst.local_backward is not None
        assert worst.local_backward > 0.01


@pytest.mark.parametrize("policy", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_total_is_the_error_of_the_program_that_runs(policy):
    """But for roundings that fall the other way: XLA's own tanh of 16 bits is not the rounded one of float32."""

    def loss_fn(params, x):
        y = jax.nn.gelu(x @ params["a"] + params["b"])
        return jnp.mean(jax.nn.logsumexp(y @ params["c"], axis=-1))

    params = {"a": normal(0, 16, 32), "b": normal(1, 32), "c": normal(2, 32, 8)}
    found = compare(loss_fn, policy, through=jax.value_and_grad)(params, X)
    exact = jax.value_and_grad(loss_fn)(params, X)
    cast = jax.jit(
        jax.value_and_grad(mp.autocast(loss_fn, policy)), compiler_options={"xla_allow_excess_precision": False}
    )
    low = cast(params, X)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(low), jax.tree.leaves(exact), strict=True):
        name = "/".join(str(getattr(k, "key", getattr(k, "idx", ""))) for k in path)
        expected = np.linalg.norm(np.asarray(x - y)) / np.linalg.norm(np.asarray(y))
        np.testing.assert_allclose(found.outputs[name], expected, rtol=0.1, atol=2e-7)
    grads = [np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree[1])]) for tree in (low, exact)]
    expected = np.linalg.norm(grads[0] - grads[1]) / np.linalg.norm(grads[1])
    np.testing.assert_allclose(found.total, max(expected, found.outputs["0"]), rtol=0.1)


def test_branches_and_loops_that_differ():
    """Low precision takes another branch, and another number of iterations, than the reference."""

    def fn(w, x):
        y = x @ w  # 257 in float32, 256 in bfloat16
        picked = jax.lax.cond(y[0, 0] > 256, lambda: jnp.float32(1), lambda: jnp.float32(5))
        limit = jnp.int32(y[0, 0])
        count = jax.lax.while_loop(lambda i: i < limit, lambda i: i + 1, jnp.int32(250))
        return picked, count.astype(jnp.float32)

    found = compare(fn, "mixed_bfloat16")(jnp.ones((257, 1)), jnp.ones((1, 257)))
    assert found.outputs == pytest.approx({"0": 4.0, "1": 1 / 257})
    assert found.total == pytest.approx(4.0)


def test_low_precision_of_the_code_itself():
    def fn(x):
        half = x.astype(jnp.bfloat16)
        return half.astype(jnp.float32) - jnp.mean(x)

    found = compare(fn, "mixed_bfloat16")(100 + normal(0, 64) * 0.1)
    worst = found.operations[0]
    assert (worst.primitive, worst.ruled, found.fix) == ("convert_element_type", False, None)
    assert "is narrow because the code says so: no rule changes it" in str(found)
    with pytest.raises(ValueError, match=r"no exceptions bring the error of the results to 0\.01") as error:
        suggest(fn, "mixed_bfloat16", 1e-2)(100 + normal(0, 64) * 0.1)
    assert "the rules as they are" in str(error.value)
    assert "convert_element_type" in str(error.value)


def test_what_only_reads_narrow_numbers_is_not_called_narrow():
    found = compare(lambda w, x: jnp.sin(x.astype(jnp.float16).astype(jnp.float32) @ w), "float32")(W, X)
    assert [row.primitive for row in found.operations if row.total] == ["convert_element_type"]
    with pytest.raises(ValueError, match="no exceptions bring") as error:
        suggest(lambda w, x: jnp.sin(x.astype(jnp.float16).astype(jnp.float32) @ w), "mixed_bfloat16", 1e-9)(W, X)
    narrow = str(error.value).split("because the code says so:")[1].split("expected:")[0]
    assert "convert_element_type" in narrow
    assert "sin" not in narrow.replace("<lambda>", "")


def test_numbers_that_are_not_finite_in_float32_already():
    def fn(x):
        return {"loss": jnp.log(x).sum(), "other": x}

    found = compare(fn, "mixed_bfloat16")(-jnp.ones(3))
    assert (found.total, found.not_finite) == (0, ("loss",))
    assert "not finite in float32 already: loss" in str(found)
    assert json.loads(found.to_json())["not_finite"] == ["loss"]
    assert "suggest" not in str(found), "there is nothing to lower"


def test_files_with_any_name():
    """A cell of a notebook, a copy of a file."""
    source = "import jax.numpy as jnp\ndef fn(w, x):\n    y = x @ w\n    return jnp.sin(y)\n"
    for file in ("<ipython-input-3-0a1b>", "/home/me/a copy (2)/model.py"):
        names: dict[str, Any] = {}
        exec(compile(source, file, "exec"), names)
        found = compare(names["fn"], "mixed_bfloat16")(W, X)
        short = file.rsplit("/", 1)[-1]
        assert found.operations[0].source == f"{file}:3 (fn)"
        assert f'with_line("{short}:3", "full"' in found.fix.code
        assert found.fix.after == 0


def test_reference_in_float64_sees_what_float32_loses():
    fn = lambda x: jnp.sum(x + 1e4) - 1e4 * x.size
    x = normal(0, 1000)
    assert compare(fn, "float32")(x).total == 0
    found = compare(fn, "float32", reference="float64")(x)
    assert found.total > 0
    assert {row.primitive for row in found.operations if row.total} >= {"add", "reduce_sum"}
    assert jnp.float32(1).dtype == jnp.asarray(1.0).dtype, "x64 is off again"


def test_rows_of_a_linen_model_and_rules_for_its_modules():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sin(nn.Dense(16, name="angle", kernel_init=nn.initializers.normal(40.0))(nn.Dense(16)(x)))

    model = Model()
    params = model.init(KEYS[0], X)
    found = compare(model.apply, "mixed_bfloat16")(params, X)
    assert {row.path for row in found.operations[:2]} == {"Model/angle", "Model/Dense_0"}
    rules = suggest(model.apply, "mixed_bfloat16", found.total / 1.2)(params, X)
    assert [rule.pattern for rule in rules.paths] + [rule.line for rule in rules.lines]


@pytest.mark.slow
def test_suggest_takes_several_places_that_overflow():
    def fn(w, x):
        with jax.named_scope("first"):
            a = jnp.log(x @ w)
        with jax.named_scope("harmless"):
            b = a @ (w / 300)
        with jax.named_scope("second"):
            c = jnp.log(x @ (w + 1))
        return a + b + c

    w, x = 300 + normal(0, 8, 8), 300 + normal(1, 4, 8)
    assert compare(fn, "mixed_float16")(w, x).total == np.inf
    rules = suggest(fn, "mixed_float16", 1e-2)(w, x)
    assert len(rules.lines) + len(rules.paths) == 2
    np.testing.assert_allclose(mp.autocast(fn, "mixed_float16", rules)(w, x), fn(w, x), rtol=1e-2)


def test_suggest_where_results_are_equally_wrong():
    """One exception alone does not change the largest error."""

    def fn(w, x):
        first = jnp.sin(x @ w)
        second = -jnp.sin(x @ w)
        return first, second

    rules = suggest(fn, "mixed_bfloat16", 1e-3)(W, X)
    first = inspect.getsourcelines(fn)[1] + 1
    assert {rule.line for rule in rules.lines} == {f"test_compare.py:{first + i}" for i in (0, 1)}


@pytest.mark.slow
def test_suggest_leaves_most_of_the_work_as_it_is():
    """The line in Flax that makes every product would do, and so would the whole model."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(6):
                std = 20.0 if i in (1, 4) else 0.2
                y = nn.Dense(16, name=f"dense_{i}", kernel_init=nn.initializers.normal(std))(x)
                x = jnp.tanh(x + jnp.sin(y))
            return x

    model = Model()
    params = model.init(KEYS[0], X)
    total = compare(model.apply, "mixed_bfloat16")(params, X).total
    rules = suggest(model.apply, "mixed_bfloat16", total / 10)(params, X)
    assert not rules.lines
    assert {"Model/dense_1", "Model/dense_4"} <= {rule.pattern.replace("\\", "") for rule in rules.paths}
    assert len(rules.paths) < 5


def test_suggest_changes_nothing_where_nothing_is_needed():
    assert suggest(angles, "mixed_bfloat16", 1e-2)(W / 400, X) is mp.default_rules()


def test_gradients_that_are_zero_in_theory_do_not_drown_the_others():
    """The bias of the keys has no gradient; in low precision it has rounding errors."""

    def loss_fn(params, q, v):
        weights = jax.nn.softmax((q @ params["w"] + params["b"]) @ q.T, axis=0)
        return jnp.sum(jnp.square(weights @ v))

    params = {"w": normal(0, 8, 8), "b": jnp.zeros(8)}
    found = compare(loss_fn, "mixed_bfloat16", through=jax.grad)(params, normal(1, 4, 8), normal(2, 4, 8))
    assert found.total < 0.1


@pytest.mark.parametrize(("low", "exact", "expected"), [
    ([1.0, 2.0], [1.0, 2.0], 0.0),
    ([1.5, 2.0], [1.0, 2.0], 0.5 / 5**0.5),
    ([1e30, 3e30], [1e30, 2e30], 1 / 5**0.5),
    ([1e-30, 3e-30], [1e-30, 2e-30], 1 / 5**0.5),
    ([1e-5], [0.0], 1.0),
    ([np.inf], [1.0], np.inf),
    ([np.nan, 1.0], [1.0, 1.0], np.inf),
    ([-np.inf, 2.0], [-np.inf, 1.0], 1.0),
    ([np.nan, 2.0], [np.nan, 1.0], 1.0),
    ([-np.inf], [np.inf], np.inf),
])  # fmt: skip
def test_relative_error(low, exact, expected):
    assert float(relative_error(jnp.float32(low), jnp.float32(exact))) == pytest.approx(expected)


def test_reads_as_text_table_and_json():
    found = compare(overflowing_product, "mixed_float16")(300 + normal(0, 8, 8), normal(1, 8, 4), 300 + normal(2, 4, 8))
    assert 'mp.default_rules().with_line("test_compare.py:' in str(found)
    assert "total error inf -> " in str(found)
    data = json.loads(found.to_json())
    assert (data["total"], data["operations"][0]["total"]) == ("inf", "inf")
    assert data["fix"]["bytes"] > 1
    for width in (80, 200):
        console = rich.console.Console(width=width, file=io.StringIO())
        console.print(found)
        shown = console.file.getvalue()
        # On a terminal of any width no name or number is cut; columns with nothing in them have no room.
        assert "dot_general" in shown
        assert "accumulated" in shown
        assert "…" not in shown
        assert "bwd" not in shown
        assert "module" not in shown
    assert "bwd" not in str(found)


def test_prints_the_worst_rows_and_counts_the_others():
    def fn(x):
        for i in range(15):
            with jax.named_scope(f"layer_{i}"):
                x = jnp.tanh(x @ np.eye(4, dtype=np.float32))
        return x

    found = compare(fn, "mixed_bfloat16")(normal(0, 4, 4))
    assert len(found.operations) == 30
    assert "and 5 more operations" in str(found)
    assert "without any error" not in str(found)


def test_prints_no_rows_without_an_error():
    found = compare(lambda w, x: jnp.where(jnp.arange(16) > 3, x @ w, 0.0), "mixed_bfloat16")(W, X)
    assert {"iota", "gt"} <= {row.primitive for row in found.operations}
    assert "iota" not in str(found)
    assert "operations without any error: " in str(found)


@pytest.mark.parametrize(("sums", "expected"), [
    ([(1e300, 1.0, 4.0), (1e300, 0.0, 5.0)], 1 / 3),
    ([(1e-300, 1.0, 4.0), (1e-300, 0.0, 5.0)], 1 / 3),
    ([(1.0, np.inf, 0.0)], np.inf),
    ([(1.0, 1.0, 0.0)], 1.0),
    ([(1.0, 0.0, 0.0)], 0.0),
])  # fmt: skip
def test_error_of_several_arrays(sums, expected):
    """Each has a scale, and sums of squares over it: in float64 the square of a scale is out of range."""
    assert _error(sums) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["compare", "suggest"])
def test_bad_input(name):
    def call(fn, *args, **options):
        made = (
            compare(fn, "mixed_bfloat16", **options)
            if name == "compare"
            else suggest(fn, "mixed_bfloat16", 1, **options)
        )
        return made(*args)

    with pytest.raises(ValueError, match="reference is 'bfloat16'"):
        call(angles, W, X, reference="bfloat16")
    with pytest.raises(ValueError, match=f"{name} was called under jit"):
        jax.jit(lambda w: call(angles, w, X))(W)
    with pytest.raises(TypeError, match=f"an argument of {name} is a jax.ShapeDtypeStruct"):
        call(angles, jax.ShapeDtypeStruct((16, 16), jnp.float32), X)
    with pytest.raises(ValueError, match="the function returns no float array"):
        call(lambda w, x: jnp.argmax(x @ w), W, X)


@pytest.mark.parametrize("tolerance", [0, -1.0, float("inf"), float("nan"), "1e-2", True])
def test_bad_tolerance(tolerance):
    with pytest.raises(ValueError, match="tolerance is"):
        suggest(angles, "mixed_bfloat16", tolerance)
