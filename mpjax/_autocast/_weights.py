"""Float32 weights: dots with low operands whose weight gradients come out in float32, and copies on more devices.

Not for convolutions: cuDNN has no convolution of low operands with a float32 result, and XLA widens the operands.

Left to itself, the gradient of `dot(x, w.astype(bfloat16))` is rounded to bfloat16 before it is widened again: digits
that the accumulator had are lost, and over several devices the partial gradients are added up in bfloat16.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from mpjax._compat import matrix_tangent
from mpjax._dtypes import FLOAT32


def _as_low(tangent: Any, other: Any, *, matrix: Any, position: int, dtype: Any, method: None, **params: Any) -> Any:
    operands = [jax.lax.convert_element_type(tangent, dtype), other]
    return matrix.bind(*operands[:: 1 - 2 * position], **params, preferred_element_type=dtype)


def _transpose(cotangent: Any, backward: Any, other: Any, *, dtype: Any, **_: Any) -> Any:
    return backward(cotangent, other, dtype)


def _batch(operands: Sequence[Any], axes: Sequence[Any], **params: Any) -> tuple[Any, int]:
    return jax.vmap(functools.partial(_as_low, **params), in_axes=tuple(axes))(*operands), 0


# A dot with one float32 operand, cast to the dtype of the result, and a low one. It is linear in the first, and
# transposed it gives a float32 gradient: the accumulator, never rounded. JAX has no way to say that of an existing
# primitive, whose transpose has the dtype of its result.
_float32_tangent = matrix_tangent("float32_tangent", _as_low, _transpose, _batch)


def dot(primitive: Any, operands: Sequence[Any], low: Any, params: dict[str, Any]) -> Any:
    """Binds a dot to operands of which the float32 ones, weights and inputs, are cast here.

    Args:
      primitive: `dot_general`.
      operands: as the primitive takes them.
      low: the compute dtype, also that of the result.
      params: the primitive's parameters, `low` as the result's dtype among them.
    """
    others = {name: value for name, value in params.items() if name != "preferred_element_type"}

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
                part = _float32_tangent.bind(
                    tangent, narrow[1 - i], matrix=primitive, position=i, dtype=low, method=None, **others
                )
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
