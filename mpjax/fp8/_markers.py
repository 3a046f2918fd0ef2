"""Where arrays are brought into 8 bits: one primitive, so that an evaluation of the traced program finds it."""

from typing import Any

import jax

from mpjax._compat import whole_primitive
from mpjax._errors import problem
from mpjax.fp8._scaling import Quantized, quantize


def quantized(role: str, x: Any, dtype: Any, block: tuple[int, ...] | None) -> Quantized:
    """Brings an array into 8 bits with scales of the moment, at a place that delayed scaling and reports find.

    Args:
      role: what the array is: `"lhs"`, `"rhs"` or `"gradient"`.
      x: floating.
      dtype: the format.
      block: as `quantize` takes it.

    Raises:
      NotImplementedError: a derivative is taken.
    """
    values, scale = _quantize.bind(x, role=role, dtype=dtype, block=block, mapped=0)
    return Quantized(values, scale, (-1,) * x.ndim if block is None else block)


def _value(x: Any, *, role: str, dtype: Any, block: tuple[int, ...] | None, mapped: int) -> list[Any]:
    def one(x: Any) -> list[Any]:
        found = quantize(x, dtype, block, saturate=False)
        return [found.values, found.scale]

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


@jax.custom_jvp
def differentiable_once(x: Any) -> Any:
    """The same, of which a derivative is an error."""
    return x


@differentiable_once.defjvp
def _(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise _no_derivative()


_quantize = whole_primitive("fp8_quantize", _value, _no_derivative)


def is_marker(eqn: Any) -> bool:
    """Whether an equation brings an array into 8 bits; its parameters are those of `quantized`."""
    return eqn.primitive is _quantize
