"""Where arrays are brought into 8 bits: one primitive, so that an evaluation of the traced program finds it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._compat import as_function, inner_jaxprs, open_jaxpr, whole_primitive, with_invariants
from mpjax._errors import problem
from mpjax.fp8._formats import without_derivative
from mpjax.fp8._scaling import Quantized, quantize


def quantized(role: str, x: Any, dtype: Any, block: tuple[int, ...] | None, weight: bool = False) -> Quantized:
    """Brings an array into 8 bits with scales of the moment, at a place that delayed scaling and reports find.

    The values are the bits, in uint8: what `jax.checkpoint` keeps of floats goes through `lax.reduce_precision`, which
    takes float8_e4m3fn to end at 240, as IEEE's would, and makes NaNs of its numbers from 256 up. `as_floats` reads
    them.

    Args:
      role: what the array is: `"lhs"`, `"rhs"` or `"gradient"`.
      x: floating.
      dtype: the format.
      block: as `quantize` takes it.
      weight: whether it is a weight, which is brought into 8 bits once in a step.

    Raises:
      NotImplementedError: a derivative is taken.
    """
    values, scale = _quantize.bind(x, role=role, dtype=dtype, block=block, weight=weight, mapped=0)
    return Quantized(values, scale, (-1,) * x.ndim if block is None else block)


def as_floats(bits: Any, dtype: Any) -> Any:
    """The 8-bit floats that `quantized` has the bits of."""
    return jax.lax.bitcast_convert_type(bits, dtype)


def as_bits(values: Any) -> Any:
    """The bits of 8-bit floats."""
    return jax.lax.bitcast_convert_type(values, jnp.uint8)


def _value(x: Any, *, role: str, dtype: Any, block: tuple[int, ...] | None, weight: bool, mapped: int) -> list[Any]:
    def one(x: Any) -> list[Any]:
        found = quantize(x, dtype, block, saturate=False)
        return [as_bits(found.values), found.scale]

    for _ in range(mapped):
        one = jax.vmap(one)
    return one(x)


def _no_derivative() -> Exception:
    return NotImplementedError(
        problem(
            "a second derivative is taken of a product in fp8, whose rounding has none; or one of mp.fp8.delayed.",
            expected="derivatives of first order, inside of mp.fp8.delayed",
            write='mp.autocast(fn, "mixed_bfloat16"), or mp.fp8.delayed(jax.value_and_grad(loss_fn))(fp8_state, *args)',
        )
    )


differentiable_once = without_derivative(_no_derivative)
_quantize = whole_primitive("fp8_quantize", _value, _no_derivative)


def is_marker(eqn: Any) -> bool:
    """Whether an equation brings an array into 8 bits; its parameters are those of `quantized`."""
    return eqn.primitive is _quantize


def keeps_weights(policy: Any) -> Any:
    """A policy of `jax.checkpoint` that keeps weights in 8 bits too, in place of making them again."""

    def keeps(primitive: Any, *avals: Any, **params: Any) -> Any:
        if primitive is _quantize and params["weight"]:
            return True
        return policy is not None and policy(primitive, *avals, **params)

    return keeps


def weights_first(jaxpr: Any) -> Callable[..., list[Any]]:
    """The function of a loop's closed jaxpr, of whose constants those that are weights are brought into 8 bits here."""
    return with_invariants(jaxpr, keeps_weights(None)) if _has_marker(open_jaxpr(jaxpr)[0]) else as_function(jaxpr)


def _has_marker(jaxpr: Any) -> bool:
    return any(is_marker(eqn) or any(map(_has_marker, inner_jaxprs(eqn))) for eqn in jaxpr.eqns)
