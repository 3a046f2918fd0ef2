"""Float32 weights: dots with low operands whose weight gradients come out in float32, and copies on more devices.

Not for convolutions: cuDNN has no convolution of low operands with a float32 result, and XLA widens the operands.

Left to itself, the gradient of `dot(x, w.astype(bfloat16))` is rounded to bfloat16 before it is widened again: digits
that the accumulator had are lost, and over several devices the partial gradients are added up in bfloat16.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from mpjax._compat import float32_tangent
from mpjax._dtypes import FLOAT32


def dot(primitive: Any, operands: Sequence[Any], low: Any, params: dict[str, Any]) -> Any:
    """Binds a dot to operands of which the float32 ones, weights and inputs, are cast here.

    Args:
      primitive: `dot_general`.
      operands: as the primitive takes them.
      low: the compute dtype, also that of the result.
      params: the primitive's parameters, `low` as the result's dtype among them.
    """

    def narrowed(operands: Sequence[Any]) -> list[Any]:
        return [jax.lax.convert_element_type(x, low) if x.dtype == FLOAT32 else x for x in operands]

    @jax.custom_jvp
    def product(*operands: Any) -> Any:
        return primitive.bind(*narrowed(operands), **params)

    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        narrow = narrowed(primals)
        out = primitive.bind(*narrow, **params)
        change = None
        for i, tangent in enumerate(tangents):
            if isinstance(tangent, SymbolicZero):
                continue
            changed = [*narrow[:i], tangent, *narrow[i + 1 :]]
            if tangent.dtype == FLOAT32:
                part = float32_tangent(primitive, i, changed, params)
            else:
                part = primitive.bind(*changed, **params)
            change = part if change is None else change + part
        return out, jnp.zeros_like(out) if change is None else change

    product.defjvp(jvp, symbolic_zeros=True)
    return product(*operands)


def across(primitive: Any, weight: Any, forward: Any, backward: Any, params: dict[str, Any]) -> Any:
    """Makes a weight known to more devices: in one dtype on the way there, in another one back, where gradients add up.

    The result is float32 again, so that what reads it finds a weight; the compiler drops the two casts between.

    Args:
      primitive: `all_gather`, `pvary` or their like.
      weight: float32.
      forward: the dtype in which it travels.
      backward: the dtype in which its gradients are summed.
      params: the primitive's parameters.
    """

    def through(x: Any, dtype: Any) -> Any:
        narrow = jax.lax.convert_element_type(x, dtype)
        return jax.lax.convert_element_type(primitive.bind(narrow, **params), FLOAT32)

    @jax.custom_jvp
    def known(weight: Any) -> Any:
        return through(weight, forward)

    @known.defjvp
    def _(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        return known(*primals), through(tangents[0], backward)

    return known(weight)
