"""How autocast calls a function: traces, what is static, results, what messages and profiles name."""

import dataclasses
import functools
import inspect
import re
import traceback

import jax
import jax.extend.source_info_util
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits
from jaxprs import dtypes, dtypes_of, matrix_dtypes, trace

import mpjax as mp

X = jax.random.normal(jax.random.key(0), (4, 4))
W = jax.random.normal(jax.random.key(1), (4, 4)) * 0.5


def cast(fn, policy="mixed_bfloat16", **options):
    return mp.autocast(fn, policy, **options)


class TestTraces:
    def test_eager_calls_trace_once(self, count_traces):
        fn = count_traces(lambda x, w: jnp.tanh(x @ w))
        wrapped = cast(fn)
        results = [wrapped(X, W) for _ in range(3)]
        assert fn.traces == 1
        assert bits(results[0]) == bits(results[2])
        np.testing.assert_allclose(results[0], jnp.tanh(X @ W), atol=0.02)

    def test_other_values_are_no_new_trace_and_other_shapes_are(self, count_traces):
        fn = count_traces(lambda x, w: x @ w)
        wrapped = cast(fn)
        np.testing.assert_allclose(wrapped(X, W), X @ W, atol=0.05)
        np.testing.assert_allclose(wrapped(2 * X, W), 2 * X @ W, atol=0.1)
        assert fn.traces == 1
        wrapped(X[:2], W)
        assert fn.traces == 2
        wrapped(X.astype(jnp.bfloat16).astype(jnp.float32), W)
        assert fn.traces == 2
        wrapped(X.astype(jnp.float16), W.astype(jnp.float16))
        assert fn.traces == 3

    def test_numpy_and_jax_arrays_share_a_trace(self, count_traces):
        fn = count_traces(lambda x, w: x @ w)
        wrapped = cast(fn)
        assert bits(wrapped(np.asarray(X), W)) == bits(wrapped(X, np.asarray(W)))
        assert fn.traces == 1

    def test_eager_gradients(self, count_traces):
        fn = count_traces(lambda x, w: jnp.tanh(x @ w).sum())
        grad = jax.grad(cast(fn))
        first = grad(X, W)
        traces = fn.traces
        assert bits(grad(X, W)) == bits(first)
        assert fn.traces == traces == 1

    @pytest.mark.parametrize(
        "wrap",
        [
            jax.jit,
            lambda f: jax.jit(jax.grad(lambda *a: f(*a).sum())),
            lambda f: jax.jit(jax.vmap(f, in_axes=(0, None))),
            lambda f: jax.jit(lambda x, w: jax.lax.scan(lambda c, _: (f(c, w), None), x, length=5)[0]),
            lambda f: jax.jit(jax.checkpoint(f)),
        ],
        ids=["jit", "grad", "vmap", "scan", "remat"],
    )
    def test_under_jit_it_is_one(self, wrap, count_traces):
        fn = count_traces(lambda x, w: jnp.tanh(x @ w))
        wrapped = wrap(cast(fn))
        for i in range(3):
            wrapped(X + i, W)
        assert fn.traces == 1

    def test_jax_settings_are_part_of_the_signature(self, count_traces):
        fn = count_traces(lambda x: x @ x)
        wrapped = cast(fn)
        wrapped(X)
        with jax.default_matmul_precision("highest"):
            found = trace(wrapped, X)
            wrapped(X)
        assert fn.traces >= 3
        assert "HIGHEST" in str([e.params["precision"] for e in found if e.primitive.name == "dot_general"])

    def test_many_signatures(self, count_traces):
        """What is kept is bounded; what was dropped is traced again, to the same result."""
        fn = count_traces(lambda x, n: x * n)
        wrapped = cast(fn)
        for n in range(100):
            assert float(wrapped(X[0, 0], n)) == pytest.approx(n * float(X[0, 0]))
        assert float(wrapped(X[0, 0], 0)) == 0.0
        assert fn.traces == 101
        assert float(wrapped(X[0, 0], 99)) == pytest.approx(99 * float(X[0, 0]))
        assert fn.traces == 101

    def test_arrays_that_it_closes_over_are_seen_anew(self):
        held = {"w": W}
        wrapped = cast(lambda x: x @ held["w"])
        before = wrapped(X)
        held["w"] = 2 * W
        np.testing.assert_allclose(wrapped(X), 2 * before, rtol=0.01)
        held["w"] = np.zeros((4, 4), np.float32)
        np.testing.assert_array_equal(wrapped(X), jnp.zeros((4, 4)))

    def test_an_unhashable_static_argument(self):
        class Unhashable:
            __hash__ = None
            factor = 2.0

        option = Unhashable()
        wrapped = cast(lambda x, option: x @ x * option.factor)
        first = wrapped(X, option)
        option.factor = 4.0
        np.testing.assert_allclose(wrapped(X, option), 2 * first, rtol=0.01)


# Equal, or equal in their hashes, and yet other programs.
TWINS = [(True, 1), (1, 1.0), (True, 1.0), (0.0, -0.0), (False, 0), (0, 0.0), (0.0, False), (1.0, 1 + 0j)]


class TestStaticArguments:
    def test_branching(self):
        def fn(x, training, depth, kind, rate):
            for _ in range(depth):
                x = jnp.tanh(x @ W) if kind == "tanh" else jnp.floor(x @ W)
            return x * rate if training and rate < 1.0 else x

        wrapped = cast(fn)
        for args in ((True, 2, "tanh", 0.5), (False, 2, "tanh", 0.5), (True, 1, "floor", 0.5), (True, 1, "tanh", 1.5)):
            np.testing.assert_allclose(wrapped(X, *args), fn(X, *args), atol=1.0 if "floor" in args else 0.03)
        assert dtypes_of("tanh", lambda x: wrapped(x, True, 1, "tanh", 0.5), X) == {"bfloat16"}
        assert dtypes_of("tanh", lambda x: wrapped(x, True, 1, "floor", 0.5), X) == set()

    @pytest.mark.parametrize(("a", "b"), TWINS, ids=str)
    @pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
    def test_equal_numbers_share_no_program(self, a, b, swapped):
        seen = []
        wrapped = cast(lambda x, n: (x, seen.append(n), repr(n))[::2])
        for n in (b, a) if swapped else (a, b):
            assert wrapped(X, n)[1] == repr(n)
            assert wrapped(X, n=n)[1] == repr(n)
        assert list(map(repr, seen)) == [repr(n) for n in ((b, b, a, a) if swapped else (a, a, b, b))]

    def test_the_sign_of_zero(self):
        wrapped = cast(lambda x, n: x / n)
        one = jnp.float32(1.0)
        assert [float(wrapped(one, 0.0)), float(wrapped(one, -0.0))] == [np.inf, -np.inf]

    def test_nan_is_kept_too(self, count_traces):
        fn = count_traces(lambda x, n: x + n)
        wrapped = cast(fn)
        assert all(np.isnan(wrapped(X, float("nan"))).all() for _ in range(2))
        assert fn.traces == 1

    @pytest.mark.parametrize(
        ("a", "b"),
        [("a", "b"), (None, 0), (jnp.tanh, jnp.floor), ((1, "x"), (1, "y"))],
        ids=["string", "None", "function", "tree"],
    )
    def test_others_by_equality(self, a, b):
        seen = []
        wrapped = cast(lambda x, option: (seen.append(option), x @ x)[1])
        for option in (a, b, a, b):
            wrapped(X, option)
        assert seen == [a, b]

    def test_keyword_and_position_are_two_signatures_of_one_function(self):
        fn = lambda x, w, *, scale=1.0: x @ w * scale
        np.testing.assert_allclose(cast(fn)(X, w=W, scale=2.0), fn(X, W, scale=2.0), atol=0.1)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("y", "n"), meta_fields=("name",))
@dataclasses.dataclass
class Result:
    y: jax.Array
    n: jax.Array
    name: str


class TestResults:
    @pytest.mark.parametrize("wrap", [lambda f: f, lambda f: lambda *a: f(*a)], ids=["eager", "again"])
    @pytest.mark.parametrize(
        "shape",
        [
            lambda y, n: y,
            lambda y, n: (y, None, {"n": n}),
            lambda y, n: [y, "a name", 3, 2.5, True],
            lambda y, n: Result(y, n, "kept"),
            lambda y, n: {"empty": (), "nested": [Result(y, n, "kept")]},
            lambda y, n: None,
            lambda y, n: (jnp.tanh, y),
        ],
        ids=["array", "None inside", "Python values", "dataclass", "nested", "None", "function"],
    )
    def test_structures(self, shape, wrap):
        fn = lambda x, n: shape(x @ x, n + 1)
        wrapped, n = wrap(cast(fn)), jnp.arange(3)
        expected = fn(X, n)
        for _ in range(2):
            got = wrapped(X, n)
            assert jax.tree.structure(got) == jax.tree.structure(expected)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                assert type(a) is type(b)
                if isinstance(b, jax.Array):
                    assert (a.dtype, a.shape, a.weak_type) == (b.dtype, b.shape, b.weak_type)
                else:
                    assert a == b

    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float32"])
    def test_cast_outputs(self, policy):
        fn = lambda x, n: {"y": x @ x, "n": n, "half": x.astype(jnp.float16), "name": "kept"}
        out = cast(fn, policy, cast_outputs=True)(X, jnp.arange(3))
        chosen = mp.get_policy(policy).output_dtype
        assert (out["y"].dtype, out["n"].dtype, out["half"].dtype) == (chosen, jnp.int32, chosen)
        assert out["name"] == "kept"
        own = cast(fn, policy)(X, jnp.arange(3))
        assert (own["y"].dtype, own["half"].dtype) == (jnp.float32, jnp.float16)

    def test_an_argument_that_is_returned(self):
        found = trace(cast(lambda x, w: (x, x @ w, w)), X, W)
        assert [e.primitive.name for e in found if dtypes(e.outvars) == ("float32",)] == ["convert_element_type"]
        x, _, w = cast(lambda x, w: (x, x @ w, w))(X, W)
        assert bits((x, w)) == bits((X, W))

    def test_name_and_docstring_are_kept(self):
        def named(x):
            """Says what it is."""
            return x

        assert (cast(named).__name__, cast(named).__doc__) == ("named", "Says what it is.")


class TestDtypes:
    def test_x64(self, x64):
        fn = lambda x, w, y: (x @ w, y @ y, x.astype(jnp.float64) @ y)
        y = jnp.eye(4, dtype=jnp.float64) * 3
        out = cast(fn)(X, W, y)
        assert [o.dtype for o in out] == [jnp.float32, jnp.float64, jnp.float64]
        assert bits(out[1:]) == bits(fn(X, W, y)[1:])
        # numpy's float64 is an argument of that dtype here, and a float32 one without x64.
        assert cast(lambda x: x @ x)(np.eye(3)).dtype == jnp.float64

    def test_numpy_float64_without_x64(self):
        assert matrix_dtypes(cast(lambda x: x @ x), np.eye(3)) == {"bfloat16"}
        assert cast(lambda x: x @ x)(np.eye(3)).dtype == jnp.float32

    @pytest.mark.standard_promotion
    @pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
    def test_weak_types_inside(self, wrap):
        """A weakly typed argument does not widen what it meets, with autocast as without."""
        fn = lambda x, a: (x * a, x.astype(jnp.float16) * a, x.astype(jnp.float16) * (a * 2.0))
        a = jnp.asarray(3.0)
        assert a.weak_type
        assert [y.dtype for y in wrap(cast(fn))(X, a)] == [y.dtype for y in fn(X, a)]

    @pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
    def test_weak_types_of_results(self, wrap):
        """What is weakly typed by itself stays so: a caller may multiply a float16 array with it."""
        fn = lambda a: (a, a * 2.0, -a, jnp.float32(2.0) * a)
        got, expected = wrap(cast(fn))(jnp.asarray(3.0)), fn(jnp.asarray(3.0))
        assert [y.weak_type for y in got] == [y.weak_type for y in expected] == [True, True, True, False]

    def test_weak_and_strong_arguments_are_two_signatures(self, count_traces):
        fn = count_traces(lambda a: a * 2)
        wrapped = cast(fn)
        wrapped(jnp.asarray(3.0))
        assert not wrapped(jnp.float32(3.0)).weak_type
        assert fn.traces == 2


def here():
    """The number of the caller's line."""
    return inspect.currentframe().f_back.f_lineno


class TestWhatIsNamed:
    @staticmethod
    def program():
        lines = {}

        def layer(x, w):
            with jax.named_scope("my_layer"):
                lines["dot"] = here() + 1
                h = x @ w
                with jax.named_scope("my_nonlinearity"):
                    lines["tanh"] = here() + 1
                    return jnp.tanh(h)

        return lambda x, w: layer(x, w).sum(), lines

    @pytest.mark.parametrize("order", ["forward", "gradient", "scan", "jit inside"])
    def test_lines_and_scopes_in_the_compiled_program(self, order):
        fn, lines = self.program()
        wrapped = {
            "forward": cast(fn),
            "gradient": jax.grad(cast(fn)),
            "scan": cast(lambda x, w: jax.lax.scan(lambda c, _: (c + fn(c, w), None), x, length=2)[0]),
            "jit inside": cast(jax.jit(fn)),
        }[order]
        text = jax.jit(wrapped).lower(X, W).as_text(debug_info=True)
        for line in lines.values():
            assert f'test_autocast_calls.py":{line}:' in text
        assert re.search(r'my_layer\)?/dot_general"', text)
        assert re.search(r'my_layer\)?/my_nonlinearity\)?/tanh"', text)
        if order == "gradient":
            assert re.search(r"transpose\(jvp\(my_layer\)\)/", text)

    def test_no_frame_of_mpjax_is_a_source_line(self):
        fn, _ = self.program()
        for e in trace(jax.grad(cast(fn)), X, W):
            source = str(jax.extend.source_info_util.summarize(e.source_info))
            assert "mpjax/" not in source.replace("/mpjax/tests", "")

    @pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
    def test_a_shape_error(self, wrap):
        def wrong(x, w):
            return x @ w[:3]

        with pytest.raises(TypeError, match="contracting") as error:
            wrap(cast(wrong))(X, W)
        frames = [entry for entry in error.traceback if entry.name == "wrong"]
        assert frames
        assert str(frames[-1].path) == __file__

    @pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
    def test_debug_nans_names_the_line(self, wrap):
        lines = []

        def fn(x, w):
            h = x @ w
            lines.append(here() + 1)
            return jnp.log(h - h - jnp.ones((4, 4)))

        with jax.debug_nans(True), pytest.raises(FloatingPointError) as error:
            wrap(cast(fn))(X, W)
        # The line stands in a traceback's format or, where JAX adds the trace of the operation, in JAX's own.
        text = "".join(traceback.format_exception(error.value))
        assert re.search(rf'{re.escape(__file__)}(", line |:){lines[0]}\b', text)
