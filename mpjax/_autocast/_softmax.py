"""Functions that are computed in float32 and kept for the backward pass in the compute dtype."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._dtypes import FLOAT32


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def probabilities(logits: Any, axes: tuple[int, ...], dtype: Any, on_tpu: bool) -> Any:
    """The softmax of `logits` in float32, rounded to `dtype` at the end.

    The backward pass keeps the rounded shares alone. JAX's own derivative keeps float32 exponentials beside them:
    three times the memory, for digits that the matrix work behind it drops anyway.

    On a TPU it keeps the rounded exponentials, and the difference from the maximum has the dtype of the logits. Only
    then does the compiler fuse the whole softmax into the product before it, without copies: 10 to 25% of the cycles
    of an attention layer (a scan of six, v5e: 54.9 M instead of 76.4 M; 60.7 M by hand). In 16 bits the difference
    moves a share by at most 0.37 of the rounding of the largest one: |z| exp(-|z|) is at most 1/e.

    Args:
      logits: floating.
      axes: what is summed over.
      dtype: of the result.
      on_tpu: whether the program is traced for a TPU.
    """
    shares, _, _ = _softmax(logits, axes, dtype, on_tpu)
    return shares


def _softmax(logits: Any, axes: tuple[int, ...], dtype: Any, on_tpu: bool) -> tuple[Any, Any, Any]:
    logits = logits if on_tpu else logits.astype(FLOAT32)
    shifted = logits - jax.lax.stop_gradient(logits.max(axes, keepdims=True))
    exponentials = jnp.exp(shifted.astype(FLOAT32))
    total = exponentials.sum(axes, keepdims=True)
    return (exponentials / total).astype(dtype), exponentials, total


@probabilities.defjvp
def _(axes: tuple[int, ...], dtype: Any, on_tpu: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (logits,) = primals
    shares, exponentials, total = _softmax(logits, axes, dtype, on_tpu)
    kept = (exponentials.astype(dtype), total) if on_tpu else (shares,)

    # Rematerialised, so that a scan over layers stacks the rounded values and not their float32 copies.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def change(tangent: Any, low: Any, total: Any = None) -> Any:
        wide, tangent = low.astype(FLOAT32), tangent.astype(FLOAT32)
        wide = wide if total is None else wide / total
        return (wide * (tangent - (wide * tangent).sum(axes, keepdims=True))).astype(dtype)

    return shares, change(tangents[0], *kept)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def saturated(x: Any, dtype: Any) -> Any:
    """Casts to `dtype`, finite numbers beyond its range to its largest number; the gradient passes through.

    A mask of -1e9 or of float32's smallest number is -inf as float16 or bfloat16, and the softmax of a row of them
    NaN. What is infinite already stays so: logits that overflowed are to be seen.
    """
    limits = jnp.finfo(dtype)
    finite = jnp.clip(x, float(limits.min), float(limits.max))
    return jnp.where(jnp.isinf(x), x, finite).astype(dtype)


@saturated.defjvp
def _(dtype: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
    return saturated(*primals, dtype), tangents[0].astype(dtype)
