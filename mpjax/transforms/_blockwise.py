"""Arrays in 8 or 16 bits with a scale for each row or block of values: the small format for moments."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpjax._dtypes import FLOAT32


class BlockScaled(NamedTuple):
    """An array in which each row of the last axis, or each block of one, has a scale of its own.

    It is `values * scales` where a scale is positive, and `values**2 * -scales` where it is negative.

    Attributes:
      values: the array's shape, and the dtype that it is stored in.
      scales: float32, powers of two or their negatives: the array's shape, but for the last axis, which has one for
        each block. Blocks are a whole row, or as many values as a power of two says; the last may have fewer.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> values = jnp.array([4.0, 8.0, -8.0], jnp.float8_e4m3fn)
    >>> mp.transforms.BlockScaled(values, jnp.array([-0.5, 0.25])).decode()
    Array([ 8., 32., -2.], dtype=float32)
    """

    values: jax.Array
    scales: jax.Array

    def decode(self) -> jax.Array:
        """The array, in float32."""
        values, scale = self.values.astype(FLOAT32), _to_values(self.scales, self.values.shape)
        return jnp.where(scale < 0, values * values * -scale, values * scale)


def saves(x: Any, dtype: Any, block_size: int | None) -> bool:
    """Whether blocks take fewer bytes than `x` does: not so where the last axis is very short."""
    if not x.shape:
        return False
    n = x.shape[-1]
    scales = math.ceil(n / (block_size or max(n, 1)))
    return bool(n * dtype.itemsize + scales * FLOAT32.itemsize < n * x.dtype.itemsize)


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)  # or each operation is compiled by itself in tx.init
def encode(x: jax.Array, dtype: Any, block_size: int | None, key: jax.Array | None) -> BlockScaled:
    """Stores a float32 array in blocks.

    A block that has no negative value is stored as square roots, which doubles the range of exponents: a second
    moment is divided by its root, and what is small must not become 0. In such a block nothing but 0 does.

    Scales are powers of two, so that encoding what was decoded gives the same bits again. They are of the finite
    values; the others become inf, or NaN in a dtype without inf.

    Args:
      x: float32, of shape (..., n).
      dtype: float16 or an 8-bit dtype.
      block_size: a power of two, or `None` for whole rows.
      key: for stochastic rounding, which keeps the expected value; `None` rounds to nearest.
    """
    info = jnp.finfo(dtype)
    digits, smallest = 2.0**-info.nmant, 2.0 ** int(info.minexp)
    # The largest value of a block has this exponent, one under the largest of the dtype, which may lack digits there.
    top = 2.0 ** (math.frexp(float(info.max))[1] - 2)
    finite = jnp.isfinite(x)
    known = jnp.where(finite, x, 0)
    size = jnp.abs(known)

    # By minima and maxima, since a TPU takes longer to move booleans about than to compute with all of this.
    of_roots = _of_blocks(known, block_size).min(-1) >= 0
    largest = _of_blocks(size, block_size).max(-1)
    # What the largest may be rounded up to: its own power of two, or the next.
    power = _power_of_two(jnp.where(of_roots, jnp.sqrt(largest), largest), carry=(1 << (23 - info.nmant)) - 1)
    lowest, highest = jnp.where(of_roots, 2.0**-63, 2.0**-126), jnp.where(of_roots, 2.0**63, 2.0**127)
    power = jnp.clip(power, lowest * top, highest) / top
    scales = jnp.where(of_roots, -power * power, power)

    # From here on in units of the scale. Products with powers of two are exact; a GPU's quotients need not be.
    unit = _to_values(jnp.where(of_roots, -power, power), x.shape)
    as_root, inverse = unit < 0, _inverse(jnp.abs(unit))
    wanted = jnp.where(as_root, jnp.sqrt(size), size) * inverse
    step = jnp.maximum(_power_of_two(wanted), smallest) * digits
    if key is None:
        rounded = jnp.round(wanted * _inverse(step)) * step
    else:
        lower = jnp.floor(wanted * _inverse(step)) * step
        upper = lower + step
        low, high = (jnp.where(as_root, bound * bound, bound) for bound in (lower, upper))
        middle = jnp.where(as_root, size * inverse * inverse, wanted)
        rounded = jnp.where(jax.random.uniform(key, x.shape) * (high - low) < middle - low, upper, lower)
    rounded = jnp.where(as_root & (x > 0), jnp.maximum(rounded, smallest * digits), rounded)
    rounded = jnp.minimum(rounded, (2 - digits) * top)
    # A zero has no sign: some dtypes have NaN where it would be.
    values = jnp.where(rounded > 0, jnp.copysign(rounded, x), 0)
    return BlockScaled(jnp.where(finite, values, x).astype(dtype), scales)


def encode_like(x: jax.Array, stored: BlockScaled, key: jax.Array | None) -> BlockScaled:
    """Encodes in the dtype and the blocks of another array of the same shape."""
    return encode(x, stored.values.dtype, _size_of_blocks(x.shape[-1], stored.scales.shape[-1]), key)


def _power_of_two(x: jax.Array, carry: int = 0) -> jax.Array:
    """The largest power of two up to a positive number, after `carry` units in its last place are added."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) + carry
    return jax.lax.bitcast_convert_type(bits & 0x7F800000, FLOAT32)


def _inverse(power: jax.Array) -> jax.Array:
    """One by a power of two, which both are normal numbers."""
    return jax.lax.bitcast_convert_type(0x7F000000 - jax.lax.bitcast_convert_type(power, jnp.int32), FLOAT32)


def _of_blocks(x: jax.Array, block_size: int | None) -> jax.Array:
    """Shape (..., n) as (..., blocks, block_size), zeros at the end."""
    n = x.shape[-1]
    if block_size is None:
        return x[..., None, :]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % block_size)])
    return x.reshape(*x.shape[:-1], -1, block_size)


def _to_values(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Each block's scale beside its values."""
    block_size = _size_of_blocks(shape[-1], scales.shape[-1])
    if block_size is None:
        return jnp.broadcast_to(scales, shape)
    spread = jnp.broadcast_to(scales[..., None], (*scales.shape, block_size))
    return spread.reshape(*scales.shape[:-1], -1)[..., : shape[-1]]


def _size_of_blocks(n: int, blocks: int) -> int | None:
    """The one power of two that cuts `n` values into so many blocks; `None` for a whole row."""
    return None if blocks == 1 else 1 << (math.ceil(n / blocks) - 1).bit_length()
