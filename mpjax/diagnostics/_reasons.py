"""Why an operation made infinities or NaNs, in words."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mpjax.diagnostics._located import ValueRange


def reason(eqn: Any, operands: Sequence[ValueRange], largest: float | None, dtype: Any, of_infinities: bool) -> str:
    """What went wrong, as far as the numbers show it.

    Args:
      eqn: the equation.
      operands: its operands.
      largest: the largest magnitude of the non-finite results in float32, if it is finite there.
      dtype: of the first result that is not finite.
      of_infinities: whether NaN was made of infinities.
    """
    if largest is not None:
        return f"The value {largest:.3g} is past {dtype}'s largest number, {float(jnp.finfo(dtype).max):.5g}."
    if of_infinities:
        return "Infinities met: inf - inf, 0 * inf or inf / inf; such as a row that is masked with -inf everywhere."
    for primitives, position, is_so, words in _REASONS:
        if eqn.primitive.name in primitives and is_so(operands[position]):
            return words
    return f"The result is outside of {dtype}'s range, or undefined."


_REASONS: tuple[tuple[tuple[str, ...], int, Any, str], ...] = (
    (("div", "rem"), 1, lambda x: x.zeros, "The divisor is zero."),
    (("log", "log2"), 0, lambda x: x.zeros, "The logarithm of zero."),
    (("log", "log2"), 0, lambda x: x.min is not None and x.min < 0, "The logarithm of a negative number."),
    (("log1p",), 0, lambda x: x.min is not None and x.min <= -1, "log1p of -1 or less."),
    (("rsqrt",), 0, lambda x: x.zeros, "One over the square root of zero."),
    (("sqrt", "rsqrt"), 0, lambda x: x.min is not None and x.min < 0, "The square root of a negative number."),
    (("pow", "integer_pow"), 0, lambda x: x.zeros, "A negative power of zero, or a power outside of the range."),
    (("exp", "exp2"), 0, lambda x: x.max is not None and x.max > 10, "The exponential of so large a number."),
    (("gather",), 0, lambda x: x.finite, "An index is out of bounds, which JAX answers with NaN."),
)
