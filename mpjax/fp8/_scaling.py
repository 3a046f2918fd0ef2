"""Scales for 8-bit formats: powers of two, one for a tensor, a row or a block."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._dtypes import FLOAT32
from mpjax._errors import problem
from mpjax.fp8._formats import cast, floating, format_of


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("block",))
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array in 8 bits, with its scales: a pytree of two arrays.

    Attributes:
      values: in an 8-bit dtype; multiplied by the scales they are what the array stands for.
      scale: powers of two, as many along each axis as there are blocks.
      block: the length of a block along each of the last axes, -1 for a whole axis.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> found = mp.fp8.quantize(jnp.ones((4, 256)), "e4m3", (1, 128))
    >>> found.values.dtype.name, found.scale.shape
    ('float8_e4m3fn', (4, 2))
    """

    values: Any
    scale: Any
    block: tuple[int, ...]


def amax(x: Any, block: tuple[int, ...] | None = None) -> Any:
    """The largest magnitude in an array, or in each block of it; NaN where there is a NaN.

    Args:
      x: floating, any shape.
      block: the length of a block along each axis; -1 for the whole axis. The last one may be shorter. Default: one
        block.

    Returns:
      float32, with as many axes as `x`, each as long as there are blocks along it; 0 for an empty block.

    Raises:
      ValueError: `block` is not one length for each axis.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> x = jnp.array([[1.0, -2.0, 3.0], [4.0, 0.0, -8.0]])
    >>> mp.fp8.amax(x).tolist(), mp.fp8.amax(x, (1, 2)).tolist()
    ([[8.0]], [[2.0, 3.0], [4.0, 8.0]])
    """
    x = jnp.asarray(x)
    lengths = _lengths(x.shape, block)
    counts = _counts(x.shape, lengths)
    magnitudes = jnp.abs(x.astype(FLOAT32))
    if all(n == 1 for n in counts):
        return magnitudes.max(keepdims=True, initial=0.0)
    # Whole axes and single numbers are reduced or kept as they are: no reshape, which a sharded axis might not survive.
    whole = tuple(i for i, n in enumerate(counts) if n == 1)
    magnitudes = magnitudes.max(whole, keepdims=True, initial=0.0)
    if all(n == 1 or length == 1 for n, length in zip(counts, lengths, strict=True)):
        return magnitudes
    shape, within = [], []
    padding = []
    for size, length, n in zip(magnitudes.shape, lengths, counts, strict=True):
        length = 1 if n == 1 else length
        padding.append((0, n * length - size))
        shape += [n, length]
        within.append(len(shape) - 1)
    return jnp.pad(magnitudes, padding).reshape(shape).max(tuple(within), initial=0.0)


def power_of_two_scale(amax: Any, dtype: Any) -> Any:
    """The smallest power of two that brings numbers up to `amax` into an 8-bit format, when divided by it.

    A power of two costs no rounding, neither here nor when it is multiplied back in. Rounded up, so that nothing
    saturates: what NVIDIA's recipe for MXFP8 does too (arXiv 2506.08027).

    Args:
      amax: float32, any shape.
      dtype: the format.

    Returns:
      float32: from 2**-126 to 2**126, so that one over it is finite as well; 1 where `amax` is 0, infinite or NaN.

    Raises:
      ValueError: the dtype does not have 8 bits.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> mp.fp8.power_of_two_scale(jnp.array([0.0, 448.0, 449.0, 7.0, jnp.inf]), "e4m3").tolist()
    [1.0, 1.0, 2.0, 0.015625, 1.0]
    """
    amax = jnp.asarray(amax).astype(FLOAT32)
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32) & np.int32(0x7FFFFFFF)
    largest = int(np.float32(format_of(dtype).max).view(np.int32))
    # Exponents subtract; one more where the digits of amax are past those of the largest number. In whole numbers, for
    # log2 and exp2 are not exact.
    exponent = (bits >> 23) - np.int32(largest >> 23) + ((bits & 0x7FFFFF) > (largest & 0x7FFFFF)).astype(jnp.int32)
    scale = jax.lax.bitcast_convert_type((jnp.clip(exponent, -126, 126) + 127) << 23, FLOAT32)
    # By the bits too: what is below the normal numbers counts as 0 in comparisons on a CPU.
    return jnp.where((bits > 0) & (bits < 0x7F800000), scale, jnp.ones_like(scale))


def quantize(
    x: Any,
    dtype: Any,
    block: tuple[int, ...] | None = None,
    *,
    scale: Any = None,
    scale_dtype: Any = FLOAT32,
    saturate: bool = True,
) -> Quantized:
    """Brings an array into an 8-bit format, with a scale for each block.

    `block` says what shares a scale: `None` all of it; `(1, -1)` a row, `(-1, 1)` a column; `(1, 128)` DeepSeek-V3's
    blocks of activations and `(128, 128)` its blocks of weights (arXiv 2412.19437); `(1, 32)` with
    `scale_dtype=jnp.float8_e8m0fnu` is MX (OCP Microscaling Formats 1.0), with scales rounded up.

    Args:
      x: floating, any shape.
      dtype: the format.
      block: as in `amax`.
      scale: powers of two to use, one for each block as `amax` has them. Default: those of `power_of_two_scale` for
        `amax(x)`, with which nothing saturates.
      scale_dtype: the dtype that scales are kept in; each holds powers of two.
      saturate: as in `cast`.

    Returns:
      A `Quantized`. Infinities and NaNs in `x` are infinities or NaNs in it; their block's scale is finite.

    Raises:
      ValueError: the dtype does not have 8 bits; `block` is not one length for each axis; `scale` has another shape.
      TypeError: `x` is not floating.
      NotImplementedError: a derivative is taken; `fake_quantize` has one.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> x = jnp.array([[0.001, 0.002], [1000.0, 3000.0]])
    >>> mp.fp8.dequantize(mp.fp8.quantize(x, "e4m3", (1, -1)), jnp.float32).tolist()
    [[0.0009765625, 0.001953125], [1024.0, 3072.0]]
    """
    x = floating(x)
    block = (-1,) * x.ndim if block is None else block
    lengths = _lengths(x.shape, block)
    scale = power_of_two_scale(amax(x, block), dtype) if scale is None else jnp.asarray(scale).astype(FLOAT32)
    if scale.shape != (counts := _counts(x.shape, lengths)):
        raise ValueError(
            problem(
                f"scale has shape {scale.shape}.",
                expected=f"a scale for each block: shape {counts}",
                write="mp.fp8.power_of_two_scale(mp.fp8.amax(x, block), dtype)",
            )
        )
    scaled = x.astype(FLOAT32) * _spread(1.0 / scale, x.shape, lengths)
    return Quantized(cast(scaled, dtype, saturate=saturate), scale.astype(scale_dtype), block)


def dequantize(quantized: Quantized, dtype: Any = FLOAT32) -> Any:
    """The array that a `Quantized` stands for; exact in float32 and bfloat16 unless it leaves their range.

    The compiler may not drop the rounding to 8 bits: XLA for GPUs takes two casts, there and back, for none.

    Args:
      quantized: of `quantize`; of `jax.vmap` of it, with axes of the map in front.
      dtype: of the result.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> mp.fp8.dequantize(mp.fp8.quantize(jnp.array([300.0, 1.03]), "e4m3")).tolist()
    [288.0, 1.0]
    """
    shape, scale = quantized.values.shape, quantized.scale.astype(FLOAT32)
    lengths = _lengths(shape, (1,) * (len(shape) - len(quantized.block)) + quantized.block)
    wide = jax.lax.optimization_barrier(quantized.values).astype(FLOAT32)
    return (wide * _spread(scale, shape, lengths)).astype(dtype)


def fake_quantize(x: Any, dtype: Any, block: tuple[int, ...] | None = None, *, scale_dtype: Any = FLOAT32) -> Any:
    """What 8 bits and scales hold of an array, in the array's own dtype; derivatives go through as if nothing was done.

    For trying out what a format does to a model, and for training with it: the straight-through estimator.

    Args:
      x: floating, any shape.
      dtype: the format.
      block: as in `quantize`.
      scale_dtype: as in `quantize`.

    Returns:
      An array of the shape and dtype of `x`.

    Raises:
      ValueError, TypeError: as `quantize`.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> x, c = jnp.array([300.0, 1.03]), jnp.array([0.25, 1000.0])
    >>> mp.fp8.fake_quantize(x, "e4m3").tolist()
    [288.0, 1.0]
    >>> jax.grad(lambda x: (c * mp.fp8.fake_quantize(x, "e4m3")).sum())(x).tolist()
    [0.25, 1000.0]

    References:
      Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, arXiv 1308.3432.
    """

    @jax.custom_jvp
    def rounded(x: Any) -> Any:
        return dequantize(quantize(x, dtype, block, scale_dtype=scale_dtype), x.dtype)

    rounded.defjvp(lambda primals, tangents: (rounded(*primals), *tangents))
    return rounded(floating(x))


def _lengths(shape: tuple[int, ...], block: tuple[int, ...] | None) -> tuple[int, ...]:
    """How long a block is along each axis."""
    if block is None:
        return tuple(max(size, 1) for size in shape)
    if len(block) != len(shape) or not all(isinstance(n, int) and (n == -1 or n > 0) for n in block):
        raise ValueError(
            problem(
                f"block is {block!r}, for an array of shape {shape}.",
                expected="a length for each axis; -1 for the whole axis",
                write='mp.fp8.quantize(x, "float8_e4m3fn", (1, 128))',
            )
        )
    return tuple(max(size, 1) if n == -1 else n for size, n in zip(shape, block, strict=True))


def _counts(shape: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(-(-size // length), 1) for size, length in zip(shape, lengths, strict=True))


def _spread(scale: Any, shape: tuple[int, ...], lengths: tuple[int, ...]) -> Any:
    """Scales of blocks as something that broadcasts with the array."""
    for axis, (size, length) in enumerate(zip(shape, lengths, strict=True)):
        if scale.shape[axis] > 1 and length > 1:
            scale = jax.lax.slice_in_dim(jnp.repeat(scale, length, axis), 0, size, axis=axis)
    return scale
