"""`locate_nonfinite`: the operation, the line, the module and the iteration, in golden scenarios."""

import inspect
import json

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo_linen
import zoo_nnx
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import mpjax as mp

W, X = jnp.eye(4), jnp.ones((8, 4))
POLICIES = pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])


def locate(fn, *args, **options):
    return mp.diagnostics.locate_nonfinite(fn, **options)(*args)


def check(found, fn, text, primitive, direction="forward", path=""):
    """What every scenario checks: the primitive, its line, direction and module."""
    assert found
    assert found.kind == "operation"
    operation = found.operation
    lines, first = inspect.getsourcelines(fn)
    (offset,) = [i for i, line in enumerate(lines) if text in line]
    assert operation.primitive == primitive
    assert operation.source.startswith(f"{__file__}:{first + offset}")
    assert (operation.direction, operation.path) == (direction, path)
    assert str(found).startswith(f"{primitive} makes ")
    return operation


class TestForward:
    @POLICIES
    def test_exp(self, policy):
        def fn(w, x):
            with jax.named_scope("head"):
                y = x @ w
                return jnp.exp(y).sum()

        found = locate(mp.autocast(fn, policy), W * 100, X)
        operation = check(found, fn, "exp(", "exp", path="head")
        assert (operation.operands[0].dtype, operation.operands[0].amax) == ("float32", 100)
        assert (operation.results[0].inf, operation.results[0].nan) == (32, 0)
        assert operation.largest is None, "no float32 would hold it"
        assert [(row.name, row.inf) for row in found.outputs] == [("result", 1)]

    def test_float16_ends_where_float32_goes_on(self):
        def fn(w, x):
            y = x @ w
            return ((y * y) @ w).sum()

        cast = mp.autocast(fn, "mixed_float16")
        operation = check(locate(cast, W * 300, X), fn, "y * y", "mul")
        assert operation.largest == 90_000
        assert not operation.expected
        assert "past float16's largest number, 65504." in operation.reason
        assert "does not help the forward pass" in str(locate(cast, W * 300, X))
        assert not locate(mp.autocast(fn, "mixed_bfloat16"), W * 300, X)

    @POLICIES
    def test_zero_by_zero(self, policy):
        def fn(w, x):
            y = x @ w
            return (y / y).sum()

        operation = check(locate(mp.autocast(fn, policy), W * 0, X), fn, "y / y", "div")
        assert operation.reason == "The divisor is zero."
        assert operation.operands[1].zeros == operation.results[0].nan == 32

    @POLICIES
    def test_a_row_that_is_masked_everywhere(self, policy):
        def fn(w, x, mask):
            logits = jnp.where(mask, x @ w, -jnp.inf)
            return jax.nn.softmax(logits) @ w

        mask = jnp.ones((8, 4), bool).at[3, 1].set(False)
        fine = locate(mp.autocast(fn, policy), W, X, mask)
        assert not fine
        assert str(fine).startswith("All results are finite.")
        found = locate(mp.autocast(fn, policy), W, X, mask.at[5].set(False))
        operation = check(found, fn, "softmax(", "sub")
        assert operation.of_infinities
        assert operation.results[0].nan == 4
        assert "Infinities met" in operation.reason
        assert any("constant" not in row.name and row.inf for row in found.constants)

    @POLICIES
    def test_layer_norm_of_huge_values(self, policy):
        """Flax's fast variance is E[x^2] - E[x]^2: inf - inf. The other one is inf, and makes zeros of everything."""

        def located(norm):
            params = norm.init(jax.random.key(0), X)
            return locate(mp.autocast(lambda p, x: norm.apply(p, x * 1e20).sum(), policy), params, X.at[:, 0].set(3.0))

        found, other = located(nn.LayerNorm()), located(nn.LayerNorm(use_fast_variance=False))
        assert found
        assert not other
        for operation in (found.operation, other.masked[0]):
            assert (operation.primitive, operation.direction, operation.path) == ("square", "forward", "LayerNorm")
            assert "normalization.py" in operation.source
        assert found.then.primitive == "sub"

    def test_finite_numbers_beside_infinities(self):
        """A mask of -inf in an operand does not hide what the operation does to the other numbers."""

        def fn(x):
            y = jnp.where(x > 0, x, -jnp.inf)
            return jnp.exp(y)

        assert not locate(fn, X.at[0].set(-1.0))
        check(locate(fn, X.at[0].set(-1.0).at[1].set(100.0)), fn, "exp(", "exp")

    def test_an_infinity_that_becomes_nan(self):
        def fn(x):
            y = jnp.exp(x * 100)
            return y - y

        found = locate(fn, X)
        check(found, fn, "exp(", "exp")
        assert (found.then.primitive, found.then.of_infinities) == ("sub", True)
        assert "Then sub makes NaN of the infinities: forward" in str(found)

    @pytest.mark.parametrize("name", ["sum", "scatter", "dot", "cast"])
    def test_any_operation_in_float16_is_tried_in_float32(self, name):
        fn = {
            "sum": lambda x: jax.lax.reduce(x, np.float16(0), jax.lax.add, (0,)),
            "scatter": lambda x: jnp.zeros(2, jnp.float16).at[jnp.zeros(4, int)].add(x),
            "dot": lambda x: x @ x,
            "cast": lambda x: (x.astype(jnp.float32) * 3).astype(jnp.float16),
        }[name]
        found = locate(fn, jnp.full(4, 30_000, jnp.float16))
        assert found.operation.largest == {"sum": 120_000, "scatter": 120_000, "dot": 3.6e9, "cast": 90_000}[name]

    def test_a_primitive_with_a_dtype_of_its_own(self):
        """It cannot be tried in float32: then nothing is said of it."""

        def impl(x):
            if x.dtype != jnp.float16:
                raise TypeError("float16 alone")
            return x * 4

        primitive = jax.extend.core.Primitive("float16_alone")
        primitive.def_impl(impl)
        primitive.def_abstract_eval(lambda x: x)
        operation = locate(primitive.bind, jnp.full(4, 30_000, jnp.float16)).operation
        assert (operation.primitive, operation.largest) == ("float16_alone", None)
        assert operation.reason == "The result is outside of float16's range, or undefined."

    def test_an_index_out_of_bounds(self):
        def fn(x):
            return x.at[9].get(mode="fill")

        operation = check(locate(fn, X), fn, "fill", "gather")
        assert "out of bounds" in operation.reason


class TestBackward:
    @POLICIES
    def test_log_of_zero(self, policy):
        def fn(w, x):
            with jax.named_scope("head"):
                y = x @ w
                return jnp.where(y > 0, jnp.log(y), 0.0).sum()

        found = locate(jax.value_and_grad(mp.autocast(fn, policy)), W.at[0, 0].set(0.0), X)
        check(found, fn, "log(", "div", "backward", "head")
        assert [row.name for row in found.outputs] == ["1"]
        assert "log" in {row.primitive for row in found.masked}, "finite where it is selected"

    @pytest.mark.parametrize("jit", [jax.jit, lambda fn: fn], ids=["jit", "eager"])
    def test_loss_scaling_expects_it(self, jit):
        def fn(w, x):
            return jnp.tanh(x @ w).mean()

        cast = mp.autocast(fn, "mixed_float16")
        scale = mp.StaticLossScale(2.0**30)
        found = locate(jit(mp.grad(cast, scale)), W, X, loss_scale=scale)
        assert found
        assert found.expected
        assert found.operation.direction == "backward"
        assert found.operation.results[0].dtype == "float16"
        assert 65504 < found.operation.largest < 2.0**30
        assert "Expected at a loss scale of 2^30: the step is skipped" in str(found)
        unknown = locate(jit(mp.grad(cast, scale)), W, X)
        assert unknown
        assert unknown.expected is None
        assert "pass loss_scale= to be told" in str(unknown)

    def test_what_an_overflow_does_next_is_not_blamed(self):
        """The cotangent overflows; the product with it makes NaN of that, and overflows by itself too."""

        def fn(w, x):
            y = x @ w
            return jnp.square(y).mean()

        x, scale = jax.random.normal(jax.random.key(0), (8, 4)), mp.StaticLossScale(2.0**24)
        found = locate(mp.grad(mp.autocast(fn, "mixed_float16"), scale), W, x, loss_scale=scale)
        operation = check(found, fn, "square(y)", "convert_element_type", "backward")
        assert all(row.finite for row in operation.operands)
        assert found.expected
        assert found.then.primitive == "dot_general"

    def test_an_overflow_without_the_scale_is_not_expected(self):
        def fn(w, x):
            return 1e6 * jnp.tanh(x @ w).sum()

        cast = mp.autocast(fn, "mixed_float16")
        found = locate(mp.grad(cast, mp.StaticLossScale(2.0)), W, X, loss_scale=mp.StaticLossScale(2.0))
        assert found.operation.direction == "backward"
        assert found.expected is False
        assert "without a loss scale too" in str(found)

    @pytest.mark.standard_promotion
    def test_a_train_step_that_was_skipped(self):
        """All its results are finite; the loss scale is found in the optimizer's state."""
        tx = mp.loss_scaled(optax.sgd(1e-3), mp.DynamicLossScale(2.0**30))

        @jax.jit
        def train_step(params, opt_state, x):
            cast = mp.autocast(lambda w, x: jnp.tanh(x @ w).mean(), "mixed_float16")
            loss, grads = mp.value_and_grad(cast, mp.get_loss_scale(opt_state))(params, x)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        found = locate(train_step, W, tx.init(W), X)
        assert found
        assert found.skipped
        assert found.expected
        assert not found.outputs
        assert found.loss_scale == 2.0**30
        assert found.operation.frame("jit").label == "train_step"
        assert "the step was skipped" in str(found)


class TestInside:
    @POLICIES
    def test_scan(self, policy):
        def fn(w, x, scales):
            def step(carry, scale):
                with jax.named_scope("block"):
                    return carry, jnp.exp((carry @ w) * scale).mean()

            return jax.lax.scan(step, x, scales)[1]

        found = locate(mp.autocast(fn, policy), W, X, jnp.ones(6).at[3].set(200.0))
        operation = check(found, fn, "exp(", "exp", path="block")
        frame = operation.frame("scan")
        assert (frame.index, frame.count) == (3, 6)
        assert "scan iteration 3 of 6" in str(found)
        assert found.outputs[0].inf == 1

    def test_the_backward_of_a_scan(self):
        def fn(w, rows):
            def step(carry, row):
                return carry + jnp.where(row > 0, jnp.sqrt(row * w), 0.0).sum(), None

            return jax.lax.scan(step, 0.0, rows)[0]

        found = locate(jax.grad(fn), jnp.ones(4), jnp.ones((5, 4)).at[2, 1].set(0.0))
        assert (found.operation.primitive, found.operation.frame("scan").index) == ("div", 2)
        assert (found.then.primitive, found.then.direction) == ("mul", "backward")
        assert found.then.frame("scan").index == 2

    def test_while(self):
        def fn(x):
            def body(state):
                i, y = state
                return i + 1, jnp.square(y)

            return jax.lax.while_loop(lambda state: state[0] < 9, body, (0, x * 10))[1]

        operation = check(locate(fn, X), fn, "square(", "square")
        assert operation.frame("while").index == 5, "1e64 is past float32"

    def test_while_under_vmap(self):
        """Each row ends when it ends: the row that would overflow ended before."""

        def fn(x, n):
            loop = lambda x, n: jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, jnp.exp(c[1])), (0, x))[1]
            return jax.vmap(loop)(x, n)

        assert not locate(fn, jnp.array([100.0, -9.0]), jnp.array([0, 2]))
        operation = check(locate(fn, jnp.array([5.0, 0.0]), jnp.array([2, 3])), fn, "exp(", "exp")
        assert operation.frame("while").index == 1

    def test_references(self):
        def fn(x):
            total = jax.new_ref(x)

            def step(carry, _):
                total[...] = total[...] * 1e20
                return carry, None

            jax.lax.scan(step, 0.0, None, length=4)
            return total[...] - 1.0

        operation = check(locate(fn, X), fn, "1e20", "mul")
        assert operation.frame("scan").index == 1

    def test_what_jax_compiles_for_itself_has_the_line_of_the_call(self):
        def fn(x):
            return jnp.cumprod(x * 1e20, axis=0)

        assert check(locate(fn, X), fn, "cumprod(", "cumprod").frame("jit").label == "cumprod"

    @pytest.mark.parametrize("negative", [False, True])
    def test_cond(self, negative):
        def fn(x, negative):
            return jax.lax.cond(
                negative,
                lambda x: jnp.log(x - 1),  # true
                lambda x: jnp.sqrt(x - 2),  # false
                x,
            )

        text, primitive = ("# true", "log") if negative else ("# false", "sqrt")
        operation = check(locate(fn, X, jnp.asarray(negative)), fn, text, primitive)
        frame = operation.frame("cond")
        assert (frame.index, frame.count) == (int(negative), 2)

    def test_remat(self):
        def fn(w, x):
            @jax.checkpoint
            def layer(x):
                with jax.named_scope("layer"):
                    return jnp.sqrt(jnp.maximum(x @ w, 0.0))

            with jax.named_scope("model"):
                return layer(x).sum()

        # In the forward pass that the backward pass repeats.
        operation = check(locate(jax.grad(fn), W * 0, X), fn, "sqrt(", "div", "forward", "model/layer")
        assert operation.frame("remat")
        assert operation.reason == "The divisor is zero."

    def test_nested_jit(self):
        def fn(x):
            @jax.jit
            def inner(x):
                return jnp.log(x - 1)

            @jax.jit
            def outer(x):
                return inner(x) * 2

            return outer(x)

        operation = check(locate(fn, X), fn, "log(", "log")
        assert [frame.label for frame in operation.frames] == ["outer", "inner"]

    @pytest.mark.parametrize("differentiate", [False, True])
    def test_custom_rules(self, differentiate):
        @jax.custom_vjp
        def safe(x):
            return jnp.sqrt(x)

        def backward(root, ct):
            return (ct / root,)

        safe.defvjp(lambda x: (safe(x), safe(x)), backward)

        @jax.custom_jvp
        def inverse(x):
            return 1 / x

        inverse.defjvp(lambda xs, ts: (inverse(*xs), -ts[0] / xs[0] ** 2))
        if differentiate:
            fn = lambda x: safe(x).sum()
            # JAX gives a backward rule the line of the call.
            check(locate(jax.grad(fn), X * 0), fn, "safe(x)", "div", "backward")
        else:
            found = locate(lambda x: inverse(x), X * 0)
            assert found.operation.primitive == "div"
            assert found.operation.frame("custom_jvp")

    @pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_shard_map(self, check_vma):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

        def fn(w, x):
            def local(w, x):
                with jax.named_scope("local"):
                    y = jnp.exp(x @ w)
                    return jax.lax.psum(y.sum(), ("data", "model"))

            specs = (P(None, "model"), P("data"))
            return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)(w, x)

        operation = check(locate(fn, W, X.at[5, 3].set(100.0)), fn, "exp(", "exp", path="local")
        frame = operation.frame("shard_map")
        assert (frame.index, frame.count, frame.label) == (5, 8, "data=2, model=1")
        assert operation.results[0].shape == (2, 2)
        assert operation.results[0].inf == 1

    @pytest.mark.slow
    def test_loops_inside_of_shard_map(self):
        """A loop is entered; a branch that is not the same on all devices is one operation."""
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

        def fn(x):
            def local(x):
                step = lambda c, _: (jax.lax.ppermute(c * 1e15, "data", [(i, (i + 1) % 8) for i in range(8)]), None)
                x = jax.lax.scan(step, x, None, length=4)[0]
                return jax.lax.cond(jax.lax.axis_index("data") > 3, lambda x: x * 2, lambda x: x * 3, x)

            return jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(x)

        operation = check(locate(fn, X.at[5].set(1e10)), fn, "1e15", "mul")
        assert [frame.kind for frame in operation.frames] == ["shard_map", "scan"]
        assert [frame.index for frame in operation.frames] == [6, 1]

    def test_large_bodies_run_as_a_whole(self):
        """A body that is finite throughout is not entered, so what is called in it is called once, by the compiler."""
        calls = []

        def body(x):
            for _ in range(20):
                x = jnp.tanh(x) + 1.0
            jax.debug.callback(lambda y: calls.append(y), x.sum())
            return x

        found = locate(lambda x: jnp.log(jax.jit(body)(x) - 5), X)
        assert found.operation.primitive == "log"
        assert len(calls) == 1


class TestModules:
    @POLICIES
    def test_linen(self, policy):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dense(4, name="first")(x)
                return jnp.exp(nn.Dense(4, name="second", kernel_init=nn.initializers.constant(60.0))(x))

        model = Model()
        params = model.init(jax.random.key(0), X)
        found = locate(mp.autocast(lambda p, x: model.apply(p, x * 10).sum(), policy), params, X)
        check(found, Model, "exp(", "exp", path="Model")

    def test_nnx(self):
        class Model(nnx.Module):
            def __init__(self, rngs):
                self.dense = nnx.Linear(4, 4, rngs=rngs)

            def __call__(self, x):
                with jax.named_scope("head"):
                    return jnp.log(self.dense(x) * 0)

        graph, state = nnx.split(Model(nnx.Rngs(0)))

        def loss_fn(state, x):
            return nnx.merge(graph, state)(x).sum()

        check(locate(mp.autocast(loss_fn, "mixed_bfloat16"), state, X), Model, "log(", "log", path="head")


class TestInputs:
    @POLICIES
    def test_data(self, policy):
        batch = {"x": X.at[2, 1].set(jnp.inf), "y": X}

        def loss_fn(w, batch):
            y = batch["x"] @ w
            return jnp.mean((y - y.mean()) ** 2 - batch["y"])

        found = locate(jax.grad(mp.autocast(loss_fn, policy)), W, batch)
        assert (found.kind, found.operation) == ("input", None)
        assert [(row.name, row.inf, row.nan) for row in found.inputs] == [("batch/x", 1, 0)]
        assert "batch/x: float32[8,4], 1 to 1, 1 inf of 32" in str(found)

    def test_nan_that_reaches_nothing(self):
        found = locate(lambda x, unused: jnp.where(jnp.isnan(x), 0.0, x), X.at[0].set(jnp.nan), X * jnp.nan)
        assert not found
        assert [row.name for row in found.inputs] == ["x", "unused"]

    def test_a_mask_among_the_arguments_is_not_blamed(self):
        def fn(x, mask):
            return jax.nn.softmax(x + mask).sum()

        mask = jnp.zeros((8, 4)).at[0].set(-jnp.inf)
        check(locate(fn, X, mask), fn, "softmax(", "sub")
        assert not locate(fn, X, mask.at[0, 0].set(0.0))

    def test_constants(self):
        found = locate(lambda x: x * jnp.nan, X)
        assert (found.kind, found.constants[0].nan) == ("constant", 1)
        assert f"{__file__}" in found.constants[0].name
        table = np.full(4, np.inf, np.float32)
        assert locate(lambda x: x + table, X).constants[0].inf == 4
        assert locate(lambda x: (x, jnp.inf * 1), X).kind == ""

    def test_an_infinity_kept_in_the_state_is_not_blamed_for_nan(self):
        def step(best, x):
            loss = jnp.log(x - 2).sum()
            return best, loss

        check(locate(step, jnp.inf * jnp.ones(()), X), step, "log(", "log")
        assert locate(step, jnp.inf * jnp.ones(()), X * 4).kind == "input"

    def test_keyword_and_variable_arguments(self):
        def fn(*xs, name="", scale):
            return sum(xs) * scale

        found = mp.diagnostics.locate_nonfinite(fn)(X, X * jnp.nan, name="a", scale=X * jnp.inf)
        assert [row.name for row in found.inputs] == ["xs/1", "scale"]


class TestValue:
    def test_a_dict_for_json(self):
        data = locate(lambda x: jnp.log(x - 1), X).to_dict()
        assert json.loads(json.dumps(data)) == json.loads(json.dumps(data, allow_nan=False))
        assert data["operation"]["operands"][0]["max"] == 0
        assert data["operation"]["reason"] == "The logarithm of zero."

    def test_what_was_masked(self):
        found = locate(lambda x: jnp.where(x > 0, jnp.log(x), 0.0), X * 0)
        assert not found
        assert [row.primitive for row in found.masked] == ["log"]
        assert "made on the way, and in no result:\n    log, forward, at" in str(found)

    def test_other_dtypes(self):
        keys = jax.random.key(0)
        found = locate(lambda k, n, c: (k, n + 1, (1 / c), None, "text"), keys, jnp.arange(3), jnp.zeros(2, complex))
        assert found.operation.results[0].dtype == "complex64"
        assert [row.name for row in found.outputs] == ["2"]

    def test_the_numbers(self):
        row = mp.diagnostics.ValueRange.of("x", jnp.array([1.0, -3.0, 0.0, jnp.inf, -jnp.inf, jnp.nan], jnp.bfloat16))
        assert (row.min, row.max, row.amax, row.zeros, row.inf, row.positive_inf, row.nan) == (-3, 1, 3, 1, 2, 1, 1)
        assert not row.finite
        assert str(row) == "x: bfloat16[6], -3 to 1, 1 NaN and 2 inf of 6"
        assert mp.diagnostics.ValueRange.of("x", jnp.full(2, jnp.nan)).amax is None


class TestErrors:
    def test_under_jit(self):
        with pytest.raises(ValueError, match=r"called under jit(.|\n)*locate_nonfinite\(jax.jit"):
            jax.jit(lambda x: locate(jnp.exp, x))(X)

    def test_loss_scale(self):
        with pytest.raises(TypeError, match="loss_scale is 'big', a str"):
            locate(jnp.exp, X, loss_scale="big")


@pytest.mark.slow
@pytest.mark.standard_promotion
@pytest.mark.parametrize("make", [zoo_linen.remat_lm, zoo_nnx.CASES[0].make])
def test_models_at_a_loss_scale_that_is_too_high(make):
    """Nothing is found at a scale of 1; at 2^40 it is the backward pass, as expected."""
    fn, params, batch = make()
    loss_fn = lambda params, batch: jnp.asarray(jax.tree.leaves(fn(params, batch))[0])
    cast = mp.autocast(loss_fn, "mixed_float16")
    fine, over = (
        locate(jax.jit(mp.grad(cast, mp.StaticLossScale(scale))), params, batch, loss_scale=scale)
        for scale in (1.0, 2.0**40)
    )
    assert not fine, str(fine)
    assert over
    assert over.expected, str(over)
    assert over.operation.direction == "backward"


def bad_forward(y):
    return jnp.log(y)


def bad_backward(y):
    return jnp.where(y > 0, jnp.log(y), 0.0)


def _custom_jvp(fn):
    ruled = jax.custom_jvp(fn)
    ruled.defjvp(lambda primals, tangents: jax.jvp(fn, primals, tangents))
    return ruled


def _custom_vjp(fn):
    ruled = jax.custom_vjp(fn)
    ruled.defvjp(lambda y: jax.vjp(fn, y), lambda pullback, ct: pullback(ct))
    return ruled


def _sharded(fn):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(fn, mesh=mesh, in_specs=P("data"), out_specs=P("data"))


# The function of one row, or of all, inside of each primitive that holds functions; and the frame that says so.
HOLDERS = {
    "jit": (jax.jit, "jit"),
    "remat": (jax.checkpoint, "remat"),
    "vmap": (jax.vmap, None),
    "scan": (lambda fn: lambda y: jax.lax.scan(lambda c, row: (c, fn(row)), 0.0, y)[1], "scan"),
    "scan of remat": (
        lambda fn: lambda y: jax.lax.scan(jax.checkpoint(lambda c, row: (c, fn(row))), 0.0, y)[1],
        "scan",
    ),
    "fori": (lambda fn: lambda y: jax.lax.fori_loop(0, 2, lambda i, total: total + fn(y), y), "scan"),
    "map": (lambda fn: lambda y: jax.lax.map(fn, y, batch_size=2), "scan"),
    "cond": (lambda fn: lambda y: jax.lax.cond(y[0, 0] > -1, fn, jnp.ones_like, y), "cond"),
    "switch": (lambda fn: lambda y: jax.lax.switch(jnp.int32(y[0, 0] * 0 + 1), [jnp.ones_like, fn], y), "cond"),
    "custom_jvp": (_custom_jvp, None),
    "custom_vjp": (_custom_vjp, None),
    "shard_map": (_sharded, "shard_map"),
}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "float32"])
@pytest.mark.parametrize("name", HOLDERS)
def test_everything_that_holds_functions_forward_and_backward(name, policy):
    holder, kind = HOLDERS[name]
    x = X.at[6, 2].set(0.0)

    def loss(fn):
        return mp.autocast(lambda w, x: holder(fn)(x @ w).sum(), policy)

    assert not locate(jax.value_and_grad(loss(bad_backward)), W + 1, x)
    forward = check(locate(loss(bad_forward), W, x), bad_forward, "log(", "log")
    found = locate(jax.grad(loss(bad_backward)), W, x)
    if name.startswith("custom") and policy != "float32":
        # What autocast makes of a rule has the line of the call.
        backward = found.operation
        assert backward.primitive == "div"
    else:
        backward = check(found, bad_backward, "log(", "div", found.operation.direction)
    for operation in (forward, backward):
        assert kind is None or operation.frame(kind), operation.frames
        if name in ("scan", "scan of remat"):
            assert operation.frame("scan").index == 6
        if name == "shard_map":
            assert operation.frame("shard_map").label == "data=6"
