"""Autocast, one primitive at a time: the dtypes that it is bound with, and its value to the last bit.

A case is a primitive and a small function that binds it. Its operands are brought to a known state (never decided
on, an activation in the compute dtype, or float32 because of an exponential before it), and the result is compared
with the same function of operands that were cast by hand to what the primitive's row of the table says.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core.primitives as primitives
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

import mpjax as mp
from mpjax._autocast._tables import ROWS, Kind
from mpjax._compat import inner_jaxprs, open_jaxpr

KIND = {name: row.kind for row in ROWS for name in row.primitives}
POLICIES = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}


def values(*shape, low=-2.0, high=2.0, seed=0):
    """float32 numbers with more digits than 16 bits hold, so that a missing or superfluous cast shows."""
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


A, B, C = (values(4, 4, seed=i) for i in range(3))
ROW = values(8, seed=3)
UNIT, UNIT_B, UNIT_C = (values(4, 4, low=0.1, high=0.9, seed=i) for i in range(4, 7))
ABOVE_ONE, ABOVE_ONE_B = (values(4, 4, low=1.1, high=3.0, seed=i) for i in range(7, 9))
SYMMETRIC = A + A.T
DEFINITE = A @ A.T + 4 * np.eye(4, dtype=np.float32)
TRIANGLE = np.tril(A) + 3 * np.eye(4, dtype=np.float32)
IMAGE = values(1, 6, 6, 2, seed=9)
KERNEL = values(3, 3, 2, 2, seed=10)
INDICES = np.array([[0], [2], [2]], np.int32)


class Case(NamedTuple):
    """A primitive and a function of float32 arrays that binds it.

    Attributes:
      primitive: its name in a jaxpr.
      fn: the function.
      args: its float32 operands.
      comparable: whether there are values to compare; not where the CPU has no implementation or the result is random.
    """

    primitive: str
    fn: Callable[..., Any]
    args: tuple[np.ndarray, ...]
    comparable: bool = True


def case(primitive, fn, *args, comparable=True):
    return Case(primitive, fn, args, comparable)


def elementwise():
    """`lax` functions whose name is the primitive's."""
    yield from (case(n, getattr(lax, n), A) for n in ("exp", "exp2", "expm1", "sin", "cos", "tan", "sinh", "cosh"))
    yield from (case(n, getattr(lax, n), A) for n in ("asinh", "cbrt", "bessel_i0e", "bessel_i1e"))
    yield from (case(n, getattr(lax, n), UNIT) for n in ("log", "log1p", "rsqrt", "asin", "acos", "atanh", "erf_inv"))
    yield from (case(n, getattr(lax, n), ABOVE_ONE) for n in ("acosh", "lgamma", "digamma"))
    yield from (case(n, getattr(lax, n), A) for n in ("neg", "abs", "sign", "floor", "ceil", "atan", "tanh"))
    yield from (case(n, getattr(lax, n), A) for n in ("logistic", "erf", "erfc", "square", "is_finite"))
    yield from (case(n, getattr(lax, n), A, B) for n in ("add", "sub", "mul", "div", "max", "min", "rem", "atan2"))
    yield from (case(n, getattr(lax, n), A, B) for n in ("nextafter", "eq", "ne", "lt", "le", "gt", "ge"))
    # Not in JAX 0.10.
    yield from (case(n, getattr(lax, n), UNIT) for n in ("log2", "one_minus_square") if hasattr(lax, n))
    yield from (case("polynomial", lambda x, a, b: lax.polynomial(x, [a, b]), A, B, C) for _ in "1" if POLYNOMIAL)
    yield case("pow", lax.pow, UNIT, A)
    yield case("sqrt", lax.sqrt, UNIT)
    yield case("round", lax.round, A)
    yield case("integer_pow", lambda x: lax.integer_pow(x, 3), A)
    yield case("polygamma", lax.polygamma, np.ones_like(A), ABOVE_ONE)
    yield case("zeta", lax.zeta, ABOVE_ONE, ABOVE_ONE_B)
    yield case("igamma", lax.igamma, ABOVE_ONE, ABOVE_ONE_B)
    yield case("igammac", lax.igammac, ABOVE_ONE, ABOVE_ONE_B)
    yield case("igamma_grad_a", lax.igamma_grad_a, ABOVE_ONE, ABOVE_ONE_B)
    yield case("regularized_incomplete_beta", lax.betainc, ABOVE_ONE, ABOVE_ONE_B, UNIT)
    yield case("clamp", lax.clamp, -UNIT, A, UNIT_B)
    yield case("select_n", lambda x, y: lax.select_n(MASK, x, y), A, B)
    # A fan-out: its transpose adds cotangents up.
    yield case("add_any", lambda x, y: jax.linear_transpose(lambda v: (v, v), x)((x, y))[0], A, B)
    # The total order that sorting compares with.
    yield from (case(n, getattr(primitives, f"{n}_p").bind, A, B) for n in ("eq_to", "le_to", "lt_to"))
    yield case("name", lambda x: checkpoint_name(x, "kept"), A)
    yield case("copy", lambda x: jnp.array(x, copy=True), A)
    yield case("complex", lax.complex, A, B)


POLYNOMIAL = hasattr(lax, "polynomial")
MASK = np.arange(16).reshape(4, 4) % 3 == 0


def matrices():
    yield case("dot_general", lambda x, y: lax.dot_general(x, y, (((1,), (0,)), ((), ()))), A, B)
    yield case("conv_general_dilated", conv, IMAGE, KERNEL)
    yield case("ragged_dot_general", lambda x, w: lax.ragged_dot(x, w, jnp.array([1, 3])), A, values(2, 4, 4, seed=11))
    yield case("cholesky", lambda x: lax.linalg.cholesky(x, symmetrize_input=False), DEFINITE)
    yield case("cholesky_update", lax.linalg.cholesky_update, TRIANGLE.T.copy(), A[0])
    yield case("eig", lambda x: lax.linalg.eig(x)[0], A)
    yield case("eigh", lambda x: lax.linalg.eigh(x, symmetrize_input=False)[1], SYMMETRIC)
    yield case("fft", lambda x: lax.fft(x, "RFFT", (4,)), A)
    yield case("hessenberg", lambda x: lax.linalg.hessenberg(x)[0], A)
    yield case("householder_product", lax.linalg.householder_product, A, UNIT[0])
    yield case("ormqr", lambda a, t, c: lax.linalg.ormqr(a, t, c), A, UNIT[0], B)
    yield case("lu", lambda x: lax.linalg.lu(x)[0], A)
    yield case("qr", lambda x: lax.linalg.qr(x)[0], A)
    yield case("schur", lambda x: lax.linalg.schur(x)[0], A)
    yield case("svd", lambda x: lax.linalg.svd(x)[1], A)
    yield case("symmetric_product", lambda a, c: lax.linalg.symmetric_product(a, c), A, SYMMETRIC)
    yield case("triangular_solve", lambda a, b: lax.linalg.triangular_solve(a, b, lower=True), TRIANGLE, B)
    yield case("tridiagonal", lambda x: lax.linalg.tridiagonal(x)[0], SYMMETRIC)
    yield case("tridiagonal_solve", lax.linalg.tridiagonal_solve, UNIT[0], ABOVE_ONE[0] + 2, UNIT[1], B)


def conv(x, k):
    return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def sums():
    yield case("reduce_sum", lambda x: lax.reduce_sum(x, (1,)), A)
    yield case("reduce_prod", lambda x: lax.reduce_prod(x, (1,)), A)
    yield from (case(n, lambda x, n=n: getattr(lax, n)(x, 1), A) for n in ("cumsum", "cumprod", "cumlogsumexp"))
    yield case("reduce_window_sum", lambda x: window(x, 0, lax.add), IMAGE)
    # In place, so that the sums start from an activation too, and twice at one index.
    yield case("scatter-add", lambda x, u: lax.scatter_add(x, INDICES, u, SCATTER), A, values(3, 4, seed=12))
    yield case("scatter-sub", lambda x, u: lax.scatter_sub(x, INDICES, u, SCATTER), A, values(3, 4, seed=12))
    yield case("scatter-mul", lambda x, u: lax.scatter_mul(x, INDICES, u, SCATTER), A, values(3, 4, seed=12))
    # The gradient and the tangent of a maximum pool.
    yield case("select_and_scatter_add", lambda x, ct: jax.vjp(max_pool, x)[1](ct)[0], IMAGE, values(1, 3, 3, 2))
    yield case("select_and_gather_add", lambda x, t: jax.jvp(max_pool, (x,), (t,))[1], IMAGE, values(*IMAGE.shape))


SCATTER = lax.ScatterDimensionNumbers((1,), (0,), (0,))


def window(x, start, fn):
    # A number, and no tracer, so that `lax` sees a sum or a maximum in it.
    return lax.reduce_window(x, np.asarray(start, x.dtype), fn, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def max_pool(x):
    return window(x, -np.inf, lax.max)


def moves():
    yield case("broadcast_in_dim", lambda x: lax.broadcast_in_dim(x, (3, 4, 4), (1, 2)), A)
    yield case("reshape", lambda x: lax.reshape(x, (2, 8)), A)
    yield case("transpose", lambda x: lax.transpose(x, (1, 0)), A)
    yield case("squeeze", lambda x: lax.squeeze(x, (0,)), A[None])
    yield case("rev", lambda x: lax.rev(x, (0,)), A)
    yield case("slice", lambda x: lax.slice(x, (1, 0), (3, 4)), A)
    yield case("dynamic_slice", lambda x: lax.dynamic_slice(x, AT, (2, 4)), A)
    yield case("dynamic_update_slice", lambda x, u: lax.dynamic_update_slice(x, u, AT), A, B[:2])
    yield case("gather", lambda x: lax.gather(x, INDICES, GATHER, (1, 4)), A)
    for name, fn in {"scatter": lax.scatter, "scatter-max": lax.scatter_max, "scatter-min": lax.scatter_min}.items():
        yield case(name, lambda x, u, f=fn: f(x, INDICES[:2], u, SCATTER), A, values(2, 4, seed=12))
    yield case("concatenate", lambda x, y: lax.concatenate([x, y], 0), A, B)
    yield case("pad", lambda x, v: lax.pad(x, v, ((1, 1, 0), (0, 0, 0))), A, A[0, 0])
    yield case("split", lambda x: lax.split(x, (1, 3))[1], A)
    yield case("tile", lambda x: lax.tile(x, (2, 1)), A)
    yield case("stack", lambda x, y: lax.stack([x, y]), A, B)
    yield case("unstack", lambda x: lax.unstack(x)[1], A)
    yield case("sort", lambda x: lax.sort(x, num_keys=1), A)
    yield case("sort", lambda x, y: lax.sort((x, y), num_keys=1)[1], A, B)
    yield case("top_k", lambda x: lax.top_k(x, 2)[0], A)
    yield case("approx_top_k", lambda x: lax.approx_max_k(x, 2)[0], A)
    yield from (case(n, lambda x, n=n: getattr(lax, n)(x, 1, jnp.int32), A) for n in ("argmax", "argmin"))
    yield from (case(n, lambda x, n=n: getattr(lax, n)(x, (1,)), A) for n in ("reduce_max", "reduce_min"))
    yield from (case(n, lambda x, n=n: getattr(lax, n)(x, 1), A) for n in ("cummax", "cummin"))
    yield case("reduce_window_max", max_pool, IMAGE)
    yield case("reduce_window_min", lambda x: window(x, np.inf, lax.min), IMAGE)


AT = (np.int32(1), np.int32(0))
GATHER = lax.GatherDimensionNumbers((1,), (0,), (0,))


SPLIT = P("d")


def on_mesh(body, n=1, ins=SPLIT, out=SPLIT, check=True):
    """A function of arrays that are split over two devices."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(ins,) * n, out_specs=out, check_vma=check))


def collectives():
    yield case("psum_invariant", on_mesh(lambda x: lax.psum(x, "d"), out=P()), A)
    yield case("psum", on_mesh(lambda x: lax.psum(x, "d"), out=P(), check=False), A)
    yield case("reduce_scatter", on_mesh(lambda x: lax.psum_scatter(x, "d", tiled=True)), A)
    yield case("all_gather", on_mesh(lambda x: lax.all_gather(x, "d")), A)
    yield case("all_gather_invariant", on_mesh(lambda x: lax.all_gather(x, "d", to="invarying"), out=P()), A)
    yield case("all_to_all", on_mesh(lambda x: lax.all_to_all(x, "d", 1, 0, tiled=True)), A)
    yield case("ppermute", on_mesh(lambda x: lax.ppermute(x, "d", [(0, 1), (1, 0)])), A)
    yield case("pmax", on_mesh(lambda x: lax.pmax(x, "d"), out=P()), A)
    yield case("pmin", on_mesh(lambda x: lax.pmin(x, "d"), out=P()), A)
    yield case("pbroadcast", on_mesh(lambda x: lax.pbroadcast(x, "d", 0), check=False), A, comparable=False)
    yield case("ragged_all_to_all", on_mesh(ragged, 2), A[0], B[0], comparable=False)
    yield case("pvary", on_mesh(lambda x: lax.pcast(x, "d", to="varying"), ins=P()), A)


def ragged(x, y):
    zero, one = jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.int32)
    places = [lax.pcast(v, "d", to="varying") for v in (zero, one, zero, one)]
    return lax.ragged_all_to_all(x, y, *places, axis_name="d")


def notes():
    yield case("optimization_barrier", lambda x, y: lax.optimization_barrier((x, y))[1], A, B)
    yield case("sharding_constraint", lambda x: lax.with_sharding_constraint(x, over_devices()), A)
    yield case("device_put", lambda x: jax.device_put(x, jax.devices()[0]), A)
    yield case("reshard", lambda x: reshard(x, over_devices(AxisType.Explicit)), A)
    yield case("layout_constraint", lambda x: with_layout_constraint(x, Layout((1, 0))), A)
    yield case("dce_sink", lambda x: (lax.dce_sink(x), x)[1], A)


def over_devices(kind=AxisType.Auto):
    return NamedSharding(jax.make_mesh((2,), ("d",), axis_types=(kind,)), P("d"))


def opaque():
    yield case("convert_element_type", lambda x: lax.convert_element_type(x, jnp.int32), A * 1000)
    yield case("bitcast_convert_type", lambda x: lax.bitcast_convert_type(x, jnp.uint8), A)
    yield case("reduce_precision", lambda x: lax.reduce_precision(x, 5, 4), A)
    yield case("random_gamma", lambda x: jax.random.gamma(jax.random.key(0), x), ABOVE_ONE, comparable=False)
    yield case("rng_uniform", lambda x, y: lax.rng_uniform(x, y, (4,)), A[0, 0], ABOVE_ONE[0, 0], comparable=False)
    yield case("reduce", lambda x: lax.reduce(x, one(x), lambda a, b: a * b + b, (1,)), A)
    yield case("reduce_window", lambda x: window(x, 1, lambda a, b: a * b + b), IMAGE)
    yield case("pallas_call", lambda x: kernel(x), A)
    yield case("pure_callback", lambda x: jax.pure_callback(np.sin, jax.typeof(x), x), A)
    yield case("io_callback", lambda x: io_callback(np.sin, jax.typeof(x), x), A)
    yield case("debug_callback", lambda x: (jax.debug.callback(lambda v: None, x), x)[1], A)
    yield case("debug_print", lambda x: (jax.debug.print("{}", x[0, 0] * 0), x)[1], A)
    yield case("composite", lax.composite(lambda x: x * 3, "mpjax.test"), A)
    yield case("custom_linear_solve", lambda x: lax.custom_linear_solve(lambda v: v * 3, x, lambda f, b: b / 3), A)
    yield case("call_exported", lambda x: EXPORTED(x) if x.dtype == jnp.float32 else NotImplemented, A)
    yield case("ffi_call", lambda x: jax.ffi.ffi_call("unknown", jax.typeof(x))(x), A, comparable=False)
    yield case("get", lambda x: jax.new_ref(x)[...], A)
    yield case("swap", lambda x, y: replaced(jax.new_ref(x), y), A, B)
    yield case("addupdate", lambda x, y: added(jax.new_ref(x), y), A, B)


def one(x):
    return jnp.ones((), x.dtype)


def replaced(ref, value):
    ref[...] = value
    return ref[...]


def added(ref, value):
    jax.ref.addupdate(ref, ..., value)
    return ref[...]


def double(x_ref, o_ref):
    o_ref[...] = x_ref[...] + x_ref[...]


def kernel(x):
    return pl.pallas_call(double, jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


EXPORTED = jax.export.export(jax.jit(lambda x: x * 3))(jax.ShapeDtypeStruct((4, 4), jnp.float32)).call

LOCAL = [*elementwise(), *matrices(), *sums(), *moves()]
CASES = [*LOCAL, *collectives(), *notes(), *opaque()]


def id_of(case):
    several = [c.primitive for c in CASES].count(case.primitive) > 1
    return f"{case.primitive} of {len(case.args)}" if several else case.primitive


by_case = pytest.mark.parametrize("case", CASES, ids=[id_of(c) for c in CASES])


def arrive(state, x):
    """Brings a value to a state without changing it, but for rounding it to the compute dtype when that is LOW."""
    if state == "LOW":
        return lax.dot_general(x, jnp.ones((), x.dtype), (((), ()), ((), ())))
    return x + lax.expm1(jnp.zeros_like(x)) if state == "FULL" else x


def program(case, states):
    def fn(*args):
        operands = [arrive(state, x) for state, x in zip(states, args, strict=True)]
        with jax.named_scope("under_test"):
            return case.fn(*operands)

    return fn


def signature(jaxpr, primitive=None, inside=False):
    """The dtypes of operands and results of the equations of a primitive under test, or of all equations."""
    found = []
    for eqn in jaxpr.eqns:
        here = inside or "under_test" in str(eqn.source_info.name_stack)
        if primitive is None or (here and eqn.primitive.name == primitive):
            dtypes = [[str(getattr(a.aval, "dtype", None)) for a in atoms] for atoms in (eqn.invars, eqn.outvars)]
            found.append((eqn.primitive.name, *dtypes))
        for inner in inner_jaxprs(eqn):
            found += signature(inner, primitive, here)
    return found


def traced(fn, *args):
    return open_jaxpr(jax.make_jaxpr(fn)(*args))[0]


def states_of(n):
    yield from (("FREE",) * n, ("LOW",) * n, ("FULL",) * n)
    if n > 1:
        yield from (("LOW",) + ("FREE",) * (n - 1), ("FREE",) * (n - 1) + ("LOW",), ("LOW",) + ("FULL",) * (n - 1))


def bound_in(primitive, states, low):
    """The table's promise: the dtype of each operand where it is in a given state."""
    kind = KIND[primitive]
    if primitive in ("scatter-max", "scatter-min"):
        return [jnp.float32] * len(states)  # the function that they combine with is written in float32
    if primitive in ("square", "integer_pow") and low is jnp.float16:
        return [jnp.float32] * len(states)  # 257**2 is infinite there
    if kind is Kind.LOW:
        return [low] * len(states)
    if kind is Kind.PASS:
        return [low if s == "LOW" else jnp.float32 for s in states]
    if kind is Kind.FOLLOW and "LOW" in states and "FULL" not in states:
        return [low] * len(states)
    return [jnp.float32] * len(states)


@by_case
@pytest.mark.parametrize("policy", POLICIES)
def test_dtypes_and_bits(case, policy):
    low = POLICIES[policy]
    for states in states_of(len(case.args)):
        fn = program(case, states)
        cast = mp.autocast(fn, policy)
        dtypes = bound_in(case.primitive, states, low)
        rounded = [x.astype(low) if state == "LOW" else x for x, state in zip(case.args, states, strict=True)]
        by_hand = [jnp.asarray(x).astype(dtype) for x, dtype in zip(rounded, dtypes, strict=True)]

        def scoped(*args):
            with jax.named_scope("under_test"):
                return case.fn(*args)

        bound = signature(traced(cast, *case.args), case.primitive)
        assert bound, "the case does not bind its primitive"
        expected = signature(traced(scoped, *by_hand), case.primitive)
        # Autocast's own casts are of this primitive too.
        assert (bound[-1:] if case.primitive == "convert_element_type" else bound) == expected, states
        # Every state is traced; what would only compile the same operations once more is not run.
        if case.comparable and set(states) != {"FULL"} and (low is jnp.bfloat16 or set(states) == {"LOW"}):
            got, dtype = cast(*case.args), jax.eval_shape(fn, *case.args).dtype
            assert bits(got) == bits(case.fn(*by_hand).astype(dtype)), states


def test_every_primitive_of_the_table_has_a_case():
    covered = {c.primitive for c in CASES}
    assert covered <= set(KIND)
    assert not covered & set(WITHOUT)
    assert covered | set(WITHOUT) == set(KIND)


def reasons(**names):
    return {name: reason.replace("_", " ") for reason, row in names.items() for name in row}


WITHOUT = reasons(
    integers_or_booleans_alone=(
        *("mulhi", "population_count", "and", "or", "xor", "not", "clz", "shift_left", "shift_right_arithmetic"),
        *("shift_right_logical", "reduce_and", "reduce_or", "reduce_xor", "lu_pivots_to_permutation"),
    ),
    keys_and_random_bits_alone=(
        *("rng_bit_generator", "random_bits", "random_seed", "random_split", "random_fold_in", "random_wrap"),
        *("random_unwrap", "random_clone", "threefry2x32"),
    ),
    no_operands_or_tokens_alone=("iota", "empty2", "axis_index", "after_all", "create_token"),
    a_complex_operand_see_TestComplex=("real", "imag", "conj"),
    made_in_the_lowering_of_qr=("geqrf", "geqp3"),
    made_by_explicit_sharding_from_values_marked_unreduced=("unreduced_psum", "unreduced_reduce_scatter"),
    lives_between_linearisation_and_transposition=("custom_lin",),
    gone_from_a_jaxpr_that_has_been_differentiated_or_traced=("stop_gradient", "stage"),
    made_by_no_public_function=("select_and_scatter",),
    new_in_a_later_release=() if POLYNOMIAL else ("log2", "one_minus_square", "polynomial"),
)


@by_case
def test_other_dtypes_are_left_alone(case, x64):
    """float64, complex, integer and half-precision operands: the same equations, with the same dtypes."""
    accepted = []
    for dtype in (jnp.float64, jnp.complex64, jnp.int32, jnp.float8_e4m3fn, *POLICIES.values()):
        args = [np.asarray(x * 3 if dtype is jnp.int32 else x).astype(dtype) for x in case.args]
        state = "FREE" if dtype is jnp.float8_e4m3fn else "LOW"
        fn = program(case, (state,) * len(args))
        try:
            plain = signature(traced(fn, *args))
        except (TypeError, ValueError, NotImplementedError, OverflowError, np.exceptions.ComplexWarning):
            continue  # JAX itself has no such operation, or no infinity to start a maximum with.
        accepted.append(dtype)
        for policy, low in POLICIES.items():
            if low is not dtype:
                assert signature(traced(mp.autocast(fn, policy), *args)) == plain, dtype
    assert jnp.float64 in accepted or case.primitive in ("call_exported",)


FOLLOWING = [c for c in LOCAL if KIND[c.primitive] is Kind.FOLLOW]
FOLLOWING = [c for c in FOLLOWING if jax.eval_shape(c.fn, *c.args).dtype == jnp.float32]


@pytest.mark.parametrize("case", FOLLOWING, ids=[id_of(c) for c in FOLLOWING])
def test_what_only_sums_read_is_computed_in_float32(case):
    """Look-ahead: a float16 square overflows at 256, and XLA fuses the cast into the sum."""

    def summed(*args):
        with jax.named_scope("under_test"):
            return jnp.sum(case.fn(*args))

    def fn(*args):
        return summed(*(arrive("LOW", x) for x in args))

    cast = mp.autocast(fn, "mixed_float16")
    rounded = [jnp.asarray(x).astype(jnp.float16).astype(jnp.float32) for x in case.args]
    assert signature(traced(cast, *case.args), case.primitive) == signature(traced(summed, *rounded), case.primitive)
    assert bits(cast(*case.args)) == bits(summed(*rounded))


class TestConstants:
    """A constant follows the activation beside it, unless the compute dtype cannot hold it."""

    OPERATIONS = {
        "add": lambda x, c: x + c,
        "sub": lambda x, c: c - x,
        "mul": lambda x, c: x * c,
        "div": lambda x, c: x / c,
        "max": lambda x, c: jnp.maximum(x, c),
        "select_n": lambda x, c: lax.select(MASK, x, jnp.full_like(x, c)),
    }

    @pytest.mark.parametrize("name", OPERATIONS)
    @pytest.mark.parametrize("constant", [0.0, 0.1, -3.0, 6e4, np.inf, -np.inf], ids=str)
    @pytest.mark.parametrize("policy", POLICIES)
    def test_that_it_holds(self, name, constant, policy):
        self.check(name, constant, policy, POLICIES[policy])

    @pytest.mark.parametrize("name", OPERATIONS)
    @pytest.mark.parametrize("constant", [1e9, -1e9, 7e4, 1e-6, 1e-8, -1e-12], ids=str)
    def test_that_float16_does_not_hold(self, name, constant):
        self.check(name, constant, "mixed_float16", jnp.float32)

    def check(self, name, constant, policy, dtype):
        operation = self.OPERATIONS[name]

        def fn(x):
            x = arrive("LOW", x)
            with jax.named_scope("under_test"):
                return operation(x, constant)

        cast = mp.autocast(fn, policy)
        rounded = jnp.asarray(A).astype(POLICIES[policy])
        (equation,) = signature(traced(cast, A), name)
        assert set(equation[1]) - {"bool"} == {jnp.dtype(dtype).name}
        assert bits(cast(A)) == bits(operation(rounded.astype(dtype), constant).astype(jnp.float32))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_softmax_that_matrix_work_reads_is_rounded_once(policy, platform, monkeypatch):
    """On a TPU the difference from the maximum is rounded too."""
    monkeypatch.setattr("mpjax._compat.target_platform", lambda: platform)

    def fn(x):
        x = arrive("LOW", x)
        e = jnp.exp(x - x.max(-1, keepdims=True))
        return arrive("LOW", e / e.sum(-1, keepdims=True))

    low = POLICIES[policy]
    rounded = jnp.asarray(A).astype(low)
    logits = rounded if platform == "tpu" else rounded.astype(jnp.float32)
    e = jnp.exp((logits - logits.max(-1, keepdims=True)).astype(jnp.float32))
    assert bits(mp.autocast(fn, policy)(A)) == bits((e / e.sum(-1, keepdims=True)).astype(low).astype(jnp.float32))


class TestComplex:
    """What is made of complex numbers, and what they are made of, is float32."""

    @pytest.mark.parametrize("part", [lax.real, lax.imag, jnp.abs, lambda z: lax.real(lax.conj(z))], ids=list("riac"))
    @pytest.mark.parametrize("state", ["FREE", "LOW", "FULL"])
    def test_parts(self, part, state):
        """They meet an activation as a parameter would."""
        z = A + 1j * B

        def fn(z, x):
            with jax.named_scope("under_test"):
                return part(z) * arrive(state, x)

        cast = mp.autocast(fn, "mixed_bfloat16")
        (product,) = signature(traced(cast, z, C), "mul")
        dtype = jnp.bfloat16 if state == "LOW" else jnp.float32
        assert set(product[1]) == {jnp.dtype(dtype).name}
        assert bits(cast(z, C)) == bits((part(z).astype(dtype) * jnp.asarray(C).astype(dtype)).astype(jnp.float32))

    def test_a_part_in_matrix_work(self):
        z = A + 1j * B
        cast = mp.autocast(lambda z, x: lax.real(z) @ x, "mixed_bfloat16")
        (product,) = [s for s in signature(traced(cast, z, C)) if s[0] == "dot_general"]
        assert product[1:] == (["bfloat16"] * 2, ["bfloat16"])

    def test_a_complex_number_of_activations(self):
        cast = mp.autocast(lambda x, y: lax.complex(arrive("LOW", x), arrive("LOW", y)), "mixed_bfloat16")
        rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (A, B)]
        assert bits(cast(A, B)) == bits(lax.complex(*rounded))
