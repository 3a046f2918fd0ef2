"""Functions that are computed in float32 and kept for the backward pass in the compute dtype."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._dtypes import FLOAT32


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def probabilities(logits: Any, axes: tuple[int, ...], dtype: Any) -> Any:
    """The softmax of `logits` in float32, rounded to `dtype` at the end.

    Its derivative is computed from the rounded result. The alternative keeps the float32 exponentials beside the
    rounded probabilities: three times the memory, for the digits that the matrix work behind it drops anyway.

    Args:
      logits: floating.
      axes: what is summed over.
      dtype: of the result.
    """
    logits = logits.astype(FLOAT32)
    shares = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axes, keepdims=True)))
    return (shares / shares.sum(axes, keepdims=True)).astype(dtype)


@probabilities.defjvp
def _(axes: tuple[int, ...], dtype: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
    shares = probabilities(*primals, axes, dtype)

    # Rematerialised, so that a scan over layers stacks the rounded shares and not their float32 copies.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(shares: Any, tangent: Any) -> Any:
        wide, tangent = shares.astype(FLOAT32), tangent.astype(FLOAT32)
        return (wide * (tangent - (wide * tangent).sum(axes, keepdims=True))).astype(dtype)

    return shares, tangent(shares, tangents[0])


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
