"""A softmax that is computed in float32 and kept for the backward pass in the compute dtype, once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._dtypes import FLOAT32


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def probabilities(logits: Any, axes: tuple[int, ...], dtype: Any) -> Any:
    """`exp(logits) / sum(exp(logits))` in float32, rounded to `dtype` at the end.

    Its derivative is computed from the rounded result. The alternative keeps the float32 exponentials beside the
    rounded probabilities: three times the memory, for the digits that the matrix work behind it drops anyway.

    Args:
      logits: floating, with their maximum taken off already.
      axes: what is summed over.
      dtype: of the result.
    """
    shares = jnp.exp(logits.astype(FLOAT32))
    return (shares / shares.sum(axes, keepdims=True)).astype(dtype)


@probabilities.defjvp
def _(axes: tuple[int, ...], dtype: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
    shares = probabilities(*primals, axes, dtype)
    weighted = shares.astype(FLOAT32) * tangents[0].astype(FLOAT32)
    tangent = weighted - shares.astype(FLOAT32) * weighted.sum(axes, keepdims=True)
    return shares, tangent.astype(dtype)
