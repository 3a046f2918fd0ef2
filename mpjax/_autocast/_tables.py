"""The default rules, as data: primitives, class and reason. What each class does is in `_interpreter.py`."""

import enum
from typing import NamedTuple


class Kind(enum.Enum):
    """What happens to an equation."""

    LOW = "float inputs cast to the compute dtype, accumulated in float32; an activation"
    FULL = "computed in float32"
    SUM = "summed in float32; a statistic where activations are summed"
    FOLLOW = "computed in the precision of its inputs"
    PASS = "moved, input by input, in the dtype that each has"
    OPAQUE = "original dtypes restored; result as made"


class Row(NamedTuple):
    """One row of the table."""

    kind: Kind
    reason: str
    primitives: tuple[str, ...]


ROWS = (
    Row(
        Kind.LOW,
        "tensor-core work; the accumulator is float32",
        (
            "dot_general",
            "conv_general_dilated",
            "ragged_dot_general",
        ),
    ),
    Row(
        Kind.FULL,
        "overflows or loses its argument's digits in 16 bits: exp(11.1) is inf in float16, bfloat16 near 8192 has a "
        "spacing of 64",
        (
            *("exp", "exp2", "expm1", "log", "log1p", "log2", "pow", "rsqrt", "cbrt"),
            *("sin", "cos", "tan", "asin", "acos", "sinh", "cosh", "asinh", "acosh", "atanh"),
        ),
    ),
    Row(
        Kind.FULL,
        "a series with cancellation",
        (
            *("erf_inv", "lgamma", "digamma", "polygamma", "igamma", "igammac", "igamma_grad_a"),
            *("bessel_i0e", "bessel_i1e", "zeta", "regularized_incomplete_beta", "polynomial"),
        ),
    ),
    Row(
        Kind.FULL,
        "no half-precision kernel, or badly conditioned",
        (
            *("cholesky", "cholesky_update", "eig", "eigh", "fft", "geqrf", "geqp3", "hessenberg"),
            *("householder_product", "lu", "lu_pivots_to_permutation", "ormqr", "qr", "schur", "svd"),
            *(
                "symmetric_product",
                "complex",
                "triangular_solve",
                "tridiagonal",
                "tridiagonal_solve",
                "custom_linear_solve",
            ),
        ),
    ),
    Row(
        Kind.SUM,
        "a long sum loses digits in 16 bits",
        (
            *("reduce_sum", "reduce_prod", "cumsum", "cumprod", "cumlogsumexp", "reduce_window_sum"),
            *("scatter-add", "scatter-sub", "scatter-mul", "select_and_scatter_add", "select_and_gather_add"),
            *("psum", "psum_invariant", "reduce_scatter", "unreduced_psum", "unreduced_reduce_scatter"),
        ),
    ),
    Row(
        Kind.FOLLOW,
        "element-wise and bounded by its inputs",
        (
            *("add", "add_any", "sub", "mul", "div", "rem", "neg", "abs", "sign", "max", "min", "clamp", "select_n"),
            *("floor", "ceil", "round", "nextafter", "atan", "atan2", "tanh", "logistic", "erf", "erfc", "sqrt"),
            *("square", "integer_pow", "one_minus_square", "is_finite", "eq", "ne", "lt", "le", "gt", "ge"),
            *("eq_to", "le_to", "lt_to", "copy", "name", "real", "imag", "conj", "mulhi"),
        ),
    ),
    Row(
        Kind.FOLLOW,
        "moves or picks values",
        (
            *("broadcast_in_dim", "reshape", "transpose", "squeeze", "rev", "slice", "dynamic_slice"),
            *("dynamic_update_slice", "gather", "scatter", "scatter-max", "scatter-min", "concatenate", "pad"),
            *("split", "tile", "stack", "unstack", "sort", "top_k", "approx_top_k", "argmax", "argmin"),
            *("reduce_max", "reduce_min", "cummax", "cummin", "reduce_window_max", "reduce_window_min"),
            *("select_and_scatter", "all_gather", "all_gather_invariant", "all_to_all", "ppermute", "pmax", "pmin"),
            *("ragged_all_to_all", "pbroadcast"),
        ),
    ),
    Row(
        Kind.PASS,
        "a note to the compiler, not arithmetic",
        (
            *("optimization_barrier", "sharding_constraint", "reshard", "layout_constraint", "device_put"),
            *("pvary", "dce_sink", "stop_gradient"),
        ),
    ),
    Row(
        Kind.OPAQUE,
        "the dtype is part of its meaning",
        (
            *("convert_element_type", "bitcast_convert_type", "reduce_precision", "iota", "empty2", "random_gamma"),
            *("rng_bit_generator", "rng_uniform", "random_bits", "random_seed", "random_split", "random_fold_in"),
            *("random_wrap", "random_unwrap", "random_clone", "threefry2x32", "axis_index", "population_count"),
            *("and", "or", "xor", "not", "clz", "shift_left", "shift_right_arithmetic", "shift_right_logical"),
            *("reduce_and", "reduce_or", "reduce_xor", "after_all", "create_token", "get", "swap", "addupdate"),
        ),
    ),
    Row(
        Kind.OPAQUE,
        "its body or kernel has a fixed signature",
        (
            *("reduce", "reduce_window", "pallas_call", "ffi_call", "custom_lin", "stage"),
            *("pure_callback", "io_callback", "debug_callback", "debug_print", "call_exported", "composite"),
        ),
    ),
)

# Sums over devices: taken in the policy's reduce dtype.
COLLECTIVES = ("psum", "psum_invariant", "reduce_scatter", "unreduced_psum", "unreduced_reduce_scatter")
# What brings the parts of a sharded weight together.
GATHERS = ("all_gather", "all_gather_invariant")

_ELEMENTWISE, MOVES = (row.primitives for row in ROWS if row.kind is Kind.FOLLOW)

# What other libraries do differently: rows that replace ours. Sources: torch's autocast_mode.h (CUDA lists),
# TensorFlow's auto_mixed_precision_lists.h (float16 on GPUs).
PRESETS: dict[str, tuple[Row, ...]] = {
    "mpjax": (),
    "torch": (
        Row(
            Kind.FOLLOW,
            "on none of PyTorch's lists for CUDA: runs in the dtype of its inputs",
            (
                *("sin", "cos", "asinh", "acosh", "atanh", "exp2", "cbrt", "lgamma", "digamma", "polygamma", "igamma"),
                *("igammac", "bessel_i0e", "bessel_i1e", "zeta", "regularized_incomplete_beta", "cumlogsumexp"),
            ),
        ),
    ),
    "tensorflow": (
        Row(
            Kind.FOLLOW,
            "on TensorFlow's infer list: follows its inputs",
            ("log", "log1p", "rsqrt", "reduce_prod"),
        ),
        Row(Kind.FULL, "on TensorFlow's deny list, or on none", ("reduce_sum", "cumsum", "cumprod")),
    ),
    "matmul": (Row(Kind.FULL, "no matrix work: in float32, as written", (*_ELEMENTWISE, "cumsum", "reduce_sum")),),
}
