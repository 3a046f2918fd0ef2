"""Functions that are computed in float32 and kept for the backward pass in the compute dtype."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._dtypes import FLOAT32


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def probabilities(logits: Any, axes: tuple[int, ...], dtype: Any) -> Any:
    """The softmax of `logits` in float32, rounded to `dtype` at the end.

    The difference from the maximum has the dtype of the logits. In 16 bits that moves a share by at most 0.37 of the
    rounding of the largest one (|z| exp(-|z|) is at most 1/e), and lets the TPU compiler fuse the whole softmax into
    the product before it: 5 to 10% of the cycles of an attention layer.

    The backward pass keeps the rounded exponentials and the float32 sums. The alternative keeps float32 exponentials
    beside the rounded shares: three times the memory, for digits that the matrix work behind it drops anyway.

    Args:
      logits: floating.
      axes: what is summed over.
      dtype: of the result.
    """
    shares, _, _ = _softmax(logits, axes, dtype)
    return shares


def _softmax(logits: Any, axes: tuple[int, ...], dtype: Any) -> tuple[Any, Any, Any]:
    shifted = logits - jax.lax.stop_gradient(logits.max(axes, keepdims=True))
    exponentials = jnp.exp(shifted.astype(FLOAT32))
    total = exponentials.sum(axes, keepdims=True)
    return (exponentials / total).astype(dtype), exponentials, total


@probabilities.defjvp
def _(axes: tuple[int, ...], dtype: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (logits,) = primals
    shares, exponentials, total = _softmax(logits, axes, dtype)

    # Rematerialised, so that a scan over layers stacks the rounded exponentials and not their float32 copies.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def change(exponentials: Any, total: Any, tangent: Any) -> Any:
        wide, tangent = exponentials.astype(FLOAT32) / total, tangent.astype(FLOAT32)
        return (wide * (tangent - (wide * tangent).sum(axes, keepdims=True))).astype(dtype)

    return shares, change(exponentials.astype(dtype), total, tangents[0])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def saturated(x: Any, dtype: Any) -> Any:
    """Casts to `dtype`, what is beyond its range to its largest number; the gradient passes through.

    A mask of -1e9 or of float32's smallest number is -inf as float16 or bfloat16, and the softmax of a row of them
    NaN.
    """
    limits = jnp.finfo(dtype)
    return jnp.clip(x, float(limits.min), float(limits.max)).astype(dtype)


@saturated.defjvp
def _(dtype: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
    return saturated(*primals, dtype), tangents[0].astype(dtype)
