"""Rounding float32 to the dtypes that weights and moments are stored in, by bit operations.

XLA may remove a cast to half precision that is widened again (`xla_allow_excess_precision`, on by default), and with it
the rounding. `lax.reduce_precision` it respects, but that flushes the subnormal numbers of float16 and fp8. Integers it
leaves alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._dtypes import FLOAT32

_INF = 0x7F800000


def nearest(x: Any, dtype: Any, *, saturate: bool = False) -> jax.Array:
    """Rounds to the nearest value of `dtype`, ties to even: `x.astype(dtype)` bit for bit, and never left out by XLA.

    Past the largest value the result is inf, as IEEE 754 has it, and in float8_e4m3fn, which has no inf, NaN: like
    `astype`, so that an overflow can be seen. NaN stays NaN with its sign, in one quiet form.

    Args:
      x: a float32 array.
      dtype: bfloat16, float16, float8_e4m3fn or float8_e5m2.
      saturate: whether finite numbers past the largest value become the largest; inf stays inf all the same.
    """
    target = _target(dtype)
    sign, magnitude = _sign_and_magnitude(x)
    lower, rest = _truncate(magnitude, target)
    half = np.uint32(1 << 31)
    up = (rest > half) | ((rest == half) & (lower & 1 == 1))
    return _assemble(sign, magnitude, lower + up.astype(jnp.uint32), target, saturate)


def stochastic(x: Any, dtype: Any, key: jax.Array) -> jax.Array:
    """Rounds to one of the two neighbours in `dtype`, the nearer the likelier: the expected result is `x`.

    Values of `dtype` stay as they are, -0.0, inf and NaN included (in float8_e4m3fn, which has no inf, inf is NaN).
    What is past the largest value becomes the largest: no finite number turns into inf.

    The probability of the neighbour away from zero is a multiple of 2**-16 for bfloat16 and float16, which takes 16
    random bits, and of 2**-32 for fp8. That is exact, and the result unbiased, for every float32 in bfloat16; in the
    others for normal numbers, and for subnormal ones from 2**-17 (float16), 2**-18 (float8_e4m3fn) and 2**-25
    (float8_e5m2) up. Below these the bias is at most 2**-17 (fp8: 2**-32) of the smallest positive number of `dtype`.

    Args:
      x: a float32 array.
      dtype: bfloat16, float16, float8_e4m3fn or float8_e5m2.
      key: a typed key, `jax.random.key(0)`. Under `jit` one key serves all shards of an array: the bits are those of
        the whole array, however it is sharded.
    """
    target = _target(dtype)
    sign, magnitude = _sign_and_magnitude(x)
    lower, rest = _truncate(magnitude, target)
    if target.dtype.itemsize == 2:
        # In the middle of its interval, the threshold favours no side where `rest` has more than 16 bits.
        threshold = (jax.random.bits(key, jnp.shape(x), jnp.uint16).astype(jnp.uint32) << 16) | 0x8000
    else:
        threshold = jax.random.bits(key, jnp.shape(x), jnp.uint32)
    return _assemble(sign, magnitude, lower + (rest > threshold).astype(jnp.uint32), target, saturate=True)


class _Target(NamedTuple):
    dtype: np.dtype[Any]
    bits: np.dtype[Any]  # the unsigned integer of its width
    mantissa: int  # bits stored of it
    first: int  # exponent of the smallest normal number, biased as in float32
    overflow: np.uint32  # the code after the largest finite one: inf, or NaN where there is no inf
    nan: np.uint32


def _target(dtype: Any) -> _Target:
    dtype = np.dtype(dtype)
    info = jnp.finfo(dtype)
    bits = np.dtype(f"uint{8 * dtype.itemsize}")
    largest, nan = (np.abs(np.asarray(value, dtype)).view(bits).astype(np.uint32)[()] for value in (info.max, np.nan))
    return _Target(dtype, bits, int(info.nmant), 127 + int(info.minexp), largest + np.uint32(1), nan)


def _sign_and_magnitude(x: Any) -> tuple[jax.Array, jax.Array]:
    bits = jax.lax.bitcast_convert_type(jnp.asarray(x, FLOAT32), jnp.uint32)
    return bits >> 31, bits & 0x7FFFFFFF


def _truncate(magnitude: jax.Array, target: _Target) -> tuple[jax.Array, jax.Array]:
    """The code of the neighbour towards zero, and how far it is to the next one, as a fraction in units of 2**-32."""
    dropped = 23 - target.mantissa
    if target.first == 1:  # the exponents of float32: the code is the upper half of float32's, subnormals included
        return magnitude >> dropped, magnitude << (32 - dropped)
    exponent = jnp.maximum(magnitude >> 23, 1)
    significand = magnitude - ((exponent - 1) << 23)
    scale = jnp.maximum(exponent, target.first)
    below = dropped + scale - exponent
    lower = ((scale - target.first) << target.mantissa) + (significand >> jnp.minimum(below, 31))
    # Far under the smallest subnormal number, the last bits of the fraction are lost, and in the end all of them.
    lost = jnp.minimum(jnp.maximum(below, 32) - 32, 31)
    return lower, (significand >> lost) << (32 - jnp.minimum(below, 32))


def _assemble(sign: jax.Array, magnitude: jax.Array, code: jax.Array, target: _Target, saturate: bool) -> jax.Array:
    code = jnp.minimum(code, target.overflow - int(saturate))
    code = jnp.where(magnitude < _INF, code, jnp.where(magnitude == _INF, target.overflow, target.nan))
    bits = (sign << (8 * target.dtype.itemsize - 1)) | code
    return jax.lax.bitcast_convert_type(bits.astype(target.bits), target.dtype)
