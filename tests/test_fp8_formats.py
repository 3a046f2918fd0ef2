"""8-bit formats: casts against ml_dtypes, scales against whole-number arithmetic, what must not be hidden."""

import functools
import math
from fractions import Fraction

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given

import mpjax as mp
from mpjax import fp8

pytestmark = pytest.mark.usefixtures("quick_compiles")
FORMATS = list(fp8.FORMATS)
FLOATS = st.floats(width=32)
TINY = 2.0**-140  # subnormal in float32


def sqnr(got, true):
    """How far the error is below the signal, in dB."""
    got, true = np.asarray(got, np.float64), np.asarray(true, np.float64)
    return 10 * np.log10((true**2).sum() / ((got - true) ** 2).sum())


@functools.partial(jax.jit, static_argnums=(1, 2))
def round_trip(x, dtype, block=None):
    """The array that 8 bits and scales stand for."""
    return fp8.dequantize(fp8.quantize(x, dtype, block))


def same(a, b):
    """Equal numbers, any NaN being equal to any other."""
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def exact_scale(amax, dtype):
    """The smallest power of two that brings amax into a format, in fractions."""
    if not np.isfinite(amax) or amax == 0:
        return 1.0
    largest = Fraction(fp8.format_of(dtype).max)
    exponent = math.frexp(amax)[1] - math.frexp(float(largest))[1]
    exponent += Fraction(float(amax)) > largest * Fraction(2) ** exponent
    return 2.0 ** min(max(exponent, -126), 126)


@pytest.mark.parametrize(
    ("dtype", "largest", "tiny", "smallest", "has_inf", "backward"),
    [
        ("float8_e4m3fn", 448, 2**-6, 2**-9, False, "float8_e5m2"),
        ("float8_e5m2", 57344, 2**-14, 2**-16, True, "float8_e5m2"),
        ("float8_e4m3fnuz", 240, 2**-7, 2**-10, False, "float8_e5m2fnuz"),
        ("float8_e5m2fnuz", 57344, 2**-15, 2**-17, False, "float8_e5m2fnuz"),
    ],
)
def test_facts(dtype, largest, tiny, smallest, has_inf, backward):
    found = fp8.format_of(dtype)
    assert (found.max, found.tiny, found.smallest, found.has_inf, found.backward) == (
        *(largest, tiny, smallest, has_inf),
        jnp.dtype(backward),
    )
    every = np.arange(256, dtype=np.uint8).view(found.dtype).astype(np.float64)
    assert np.nanmax(every[np.isfinite(every)]) == largest
    assert np.isinf(every).any() == has_inf
    assert every[every > 0].min() == smallest


@pytest.mark.parametrize(
    ("dtype", "values", "saturated", "as_is"),
    [
        (
            "e4m3",
            [0.3, -1.06, 448, 464, 480, 1e30],
            [0.3125, -1, 448, 448, 448, 448],
            [0.3125, -1, 448, 448, None, None],
        ),
        ("e5m2", [0.3, 57344, 61439, 61440, 1e30], [0.3125, *[57344] * 4], [0.3125, 57344, 57344, np.inf, np.inf]),
        ("e4m3fnuz", [0.3, 240, 248, 1e30], [0.3125, 240, 240, 240], [0.3125, 240, None, None]),
        ("e5m2fnuz", [0.3, 57344, 1e30], [0.3125, 57344, 57344], [0.3125, 57344, None]),
    ],
)
def test_casts(dtype, values, saturated, as_is):
    values = np.array(values, np.float32)
    same(fp8.cast(values, dtype), np.array(saturated, np.float32))
    same(fp8.cast(values, dtype, saturate=False), np.array([np.nan if x is None else x for x in as_is], np.float32))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("saturate", [True, False])
def test_infinities_and_nans_are_not_hidden(dtype, saturate):
    x = jnp.array([np.inf, -np.inf, np.nan, 1.0])
    for got in (fp8.cast(x, dtype, saturate=saturate), fp8.quantize(x, dtype, saturate=saturate).values):
        assert np.isfinite(np.asarray(got, np.float32)).tolist() == [False, False, False, True]
        if dtype == "float8_e5m2":
            assert np.asarray(got, np.float32)[:2].tolist() == [np.inf, -np.inf]
    # In one block of two, the other one is as it would be alone.
    found = fp8.quantize(jnp.array([[np.inf, 1.0], [3.0, 0.1]]), dtype, (1, -1))
    assert np.isfinite(found.scale).all()
    same(found.values[1], fp8.quantize(jnp.array([3.0, 0.1]), dtype).values)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("source", [np.float32, ml_dtypes.bfloat16])
def test_every_exponent_against_ml_dtypes(dtype, source):
    """All bit patterns of 16 bits, as bfloat16 and as the upper half of float32 with noise below."""
    patterns = np.arange(2**16, dtype=np.uint32)
    noise = np.random.default_rng(0).integers(0, 2**16, patterns.size, dtype=np.uint32)
    x = ((patterns << 16) | noise).view(np.float32) if source is np.float32 else patterns.astype(np.uint16).view(source)
    with np.errstate(invalid="ignore"):
        true = x.astype(np.float32).astype(fp8.format_of(dtype).dtype)
    same(jax.jit(lambda x: fp8.cast(x, dtype, saturate=False))(x), true)


@given(amax=FLOATS.map(abs), dtype=st.sampled_from(FORMATS))
@example(amax=0.0, dtype="float8_e4m3fn")
@example(amax=TINY, dtype="float8_e5m2")
@example(amax=float(np.finfo(np.float32).max), dtype="float8_e4m3fn")
@example(amax=np.inf, dtype="float8_e4m3fn")
@example(amax=np.nan, dtype="float8_e5m2")
@example(amax=448.0, dtype="float8_e4m3fn")
@example(amax=float(np.nextafter(np.float32(448), np.float32(449))), dtype="float8_e4m3fn")
def test_scales_are_the_smallest_powers_of_two(amax, dtype):
    scale = float(fp8.power_of_two_scale(np.float32(amax), dtype))
    assert scale == exact_scale(amax, dtype)
    assert np.isfinite(scale)
    assert np.isfinite(1 / np.float32(scale))
    if np.isfinite(amax):
        largest = fp8.format_of(dtype).max
        assert amax / scale <= largest
        assert amax / scale > largest / 2 or scale == 2.0**-126 or amax == 0


BLOCKS = [None, (1, -1), (-1, 1), (1, 128), (128, 128), (1, 32), (5, 7), (1, 1)]


@pytest.mark.parametrize(
    ("dtype", "block"), [*(("float8_e4m3fn", block) for block in BLOCKS), ("float8_e5m2", (1, 128))], ids=str
)
def test_round_trip_against_numpy(dtype, block):
    """Rows of very different sizes, in blocks that do not divide the shape, against a loop over the blocks."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(130, 260)).astype(np.float32) * np.exp2(rng.integers(-30, 30, (130, 1))).astype(np.float32)
    rows, columns = (n if length == -1 else length for n, length in zip(x.shape, block or (-1, -1), strict=True))
    found = jax.jit(lambda x: fp8.quantize(x, dtype, block))(x)
    got = np.asarray(fp8.dequantize(found))
    starts = [(i, j) for i in range(0, x.shape[0], rows) for j in range(0, x.shape[1], columns)]
    if len(starts) > 2000:  # the oracle is slow
        starts = starts[::97]
    for i, j in starts:
        part = x[i : i + rows, j : j + columns]
        scale = np.float32(exact_scale(np.abs(part).max(), dtype))
        assert found.scale[i // rows, j // columns] == scale
        true = (part / scale).astype(fp8.format_of(dtype).dtype).astype(np.float32) * scale
        np.testing.assert_array_equal(got[i : i + rows, j : j + columns], true)


@pytest.mark.parametrize(
    ("dtype", "block", "least"),
    [
        ("float8_e4m3fn", None, 25),
        ("float8_e4m3fn", (1, -1), 25),
        ("float8_e4m3fn", (-1, 1), 25),
        ("float8_e4m3fn", (1, 128), 25),
        ("float8_e4m3fn", (128, 128), 25),
        ("float8_e4m3fnuz", (1, -1), 25),
        ("float8_e5m2", (1, -1), 20),
    ],
)
def test_signal_to_noise_of_a_round_trip(dtype, block, least):
    x = np.random.default_rng(2).normal(size=(256, 256)).astype(np.float32)
    assert sqnr(round_trip(x, dtype, block), x) >= least


def test_amax():
    x = jnp.array([[1.0, -2.0, 3.0], [np.nan, 0.0, -8.0]])
    same(fp8.amax(x), np.array([[np.nan]]))
    same(fp8.amax(x, (1, 2)), np.array([[2.0, 3.0], [np.nan, 8.0]]))
    same(fp8.amax(x.astype(jnp.bfloat16), (-1, 1)), np.array([[np.nan, 2.0, 8.0]]))
    same(fp8.amax(jnp.float32(-3.0)), np.float32(3.0))
    same(fp8.amax(jnp.zeros((0, 4)), (-1, 2)), np.zeros((1, 2)))


def test_mx():
    """32 numbers to an 8-bit exponent: exact, from the smallest to the largest."""
    x = np.random.default_rng(3).normal(size=(8, 96)).astype(np.float32) * np.exp2(np.arange(-60, 60, 15))[:, None]
    x = x.astype(np.float32)
    mx = jax.jit(lambda x: fp8.quantize(x, "e4m3", (1, 32), scale_dtype=jnp.float8_e8m0fnu))(x)
    assert mx.scale.dtype == jnp.float8_e8m0fnu
    assert mx.scale.shape == (8, 3)
    same(fp8.dequantize(mx), round_trip(x, "e4m3", (1, 32)))
    for amax in (np.float32(3e38), np.float32(1e-37), np.float32(0)):
        scale = fp8.power_of_two_scale(amax, "e4m3")
        assert float(scale.astype(jnp.float8_e8m0fnu).astype(jnp.float32)) == float(scale)


def test_weight_blocks_are_those_of_the_transpose():
    w = np.random.default_rng(4).normal(size=(256, 256)).astype(np.float32)
    a, b = (round_trip(x, "float8_e4m3fn", (128, 128)) for x in (w, w.T))
    np.testing.assert_array_equal(a, b.T)


def test_a_scale_that_is_given():
    x = jnp.array([1.0, 1000.0, np.inf])
    found = fp8.quantize(x, "e4m3", scale=jnp.array([2.0]))
    same(found.values, np.array([0.5, 448.0, np.nan]))
    same(fp8.quantize(x, "e4m3", scale=jnp.array([2.0]), saturate=False).values, np.array([0.5, np.nan, np.nan]))
    assert found.scale.tolist() == [2.0]


@pytest.mark.parametrize(("block", "dtype"), [(None, "float32"), ((1, 128), "bfloat16")])
def test_fake_quantization(block, dtype):
    """The values are those of a round trip; what comes back as a gradient is what went in, bit for bit."""
    rng = np.random.default_rng(6)
    x, c = (jnp.asarray(rng.normal(size=(16, 256)) * np.exp2(rng.integers(-20, 20, (16, 1))), dtype) for _ in range(2))
    fn = lambda x: fp8.fake_quantize(x, "e4m3", block)
    out, back = jax.vjp(fn, x)
    same(out, round_trip(x, "e4m3", block).astype(dtype))
    assert out.dtype == dtype
    same(back(c)[0], c)
    same(jax.jvp(fn, (x,), (c,))[1], c)


def test_a_quantized_is_a_pytree_that_goes_through_vmap_and_jit():
    x = np.random.default_rng(5).normal(size=(3, 40, 16)).astype(np.float32)
    found = jax.jit(jax.vmap(lambda x: fp8.quantize(x, "e4m3", (32, -1))))(x)
    assert found.values.shape == (3, 40, 16)
    assert found.scale.shape == (3, 2, 1)
    for i in range(3):
        np.testing.assert_array_equal(fp8.dequantize(found)[i], round_trip(x[i], "e4m3", (32, -1)))
    assert fp8.dequantize(found, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fp8.format_of("bf16"), ValueError, r"dtype is bfloat16.\n  expected: an 8-bit dtype: float8_e4m3fn"),
        (lambda: fp8.cast(jnp.ones(2), "int8"), TypeError, "is not a floating dtype"),
        (lambda: fp8.quantize(jnp.ones((2, 2)), "e4m3", (1,)), ValueError, r"block is \(1,\), for .* shape \(2, 2\)"),
        (lambda: fp8.amax(jnp.ones((2, 2)), (0, 1)), ValueError, "a length for each axis; -1 for the whole axis"),
        (lambda: fp8.cast(jnp.ones(2, jnp.int32), "e4m3"), TypeError, "x is in int32.\n  expected: a floating dtype"),
        (lambda: fp8.quantize(jnp.ones(2, jnp.complex64), "e4m3"), TypeError, "x is in complex64"),
        (
            lambda: fp8.quantize(jnp.ones((4, 4)), "e4m3", (1, -1), scale=jnp.ones(2)),
            ValueError,
            r"scale has shape \(2,\).\n  expected: a scale for each block: shape \(4, 1\)",
        ),
        (
            lambda: jax.grad(lambda x: fp8.dequantize(fp8.quantize(x, "e4m3")).sum())(jnp.ones(2)),
            NotImplementedError,
            "a derivative is taken of a cast to 8 bits(.|\n)*mp.fp8.fake_quantize",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_room_is_reached_from_the_top():
    assert mp.fp8 is fp8
