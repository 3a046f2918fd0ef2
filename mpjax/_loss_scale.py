"""Loss scales: numbers that keep small float16 gradients from flushing to zero.

Multiplying the loss by S multiplies every gradient by S, which lifts gradients below float16's smallest number,
2**-24, into its range. Dividing the gradients by S in float32 gives them back unchanged, since S is a power of
two. This file has what all loss scales share and the ones that never change.

References:
  Micikevicius et al., Mixed Precision Training, ICLR 2018, https://arxiv.org/abs/1710.03740
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._errors import problem
from mpjax._state import rebuild, register_state, register_with_flax
from mpjax._tree import check_flag, map_inexact
from mpjax._typing import T

# The powers of two that are normal float32 numbers: below 2**-126, 1 / scale or scale itself is flushed to 0.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**127


class LossScale:
    """What all loss scales have: `scale`, `unscale`, `adjust` (jmp's methods) and `loss_scale`."""

    loss_scale: Any
    _leaves: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        register_with_flax(type(self))

    def _factor(self) -> Any:
        """The number to multiply by, or None for 1."""
        return None

    def scale(self, tree: T) -> T:
        """Multiplies floats by the scale, in float32 or wider.

        The scale is never cast to the loss's dtype: 65536 is inf in float16.

        Args:
          tree: a loss of shape (), or any tree. Leaves that are not floating or complex, and fp8 leaves, stay.

        Returns:
          The scaled tree; float16 and bfloat16 leaves become float32.
        """
        factor = self._factor()
        return tree if factor is None else multiply(tree, factor)

    def unscale(self, tree: T) -> T:
        """Divides floats by the scale, in float32 or wider: `unscale(scale(x)) == x`.

        Args:
          tree: gradients of a scaled loss, any tree.

        Returns:
          The true gradients; float16 and bfloat16 leaves become float32, float64 and complex ones are kept.
        """
        factor = self._factor()
        # Division and not a product with 1 / scale: the reciprocal of 2**127 is not a normal float32.
        return map_inexact((lambda x: x) if factor is None else (lambda x: _apply(jnp.divide, x, factor)), tree)

    def adjust(self, grads_finite: Any) -> Self:
        """Returns the next state, given whether this step's gradients were all finite.

        Args:
          grads_finite: a boolean of shape (), as `mpjax.all_finite(grads)` gives it.
        """
        check_flag(grads_finite, "grads_finite")
        return self

    def _replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, not validated."""
        new: Self = rebuild(type(self), **{**vars(self), **changes})
        return new


def _apply(op: Callable[..., Any], x: Any, factor: Any) -> Any:
    """`op(x, factor)` with the factor in x's own real dtype, which is float32 or wider."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        # By parts: a complex product would turn (inf + 0j) into inf + nan j.
        factor = jnp.asarray(factor, x.real.dtype)
        return jax.lax.complex(op(x.real, factor), op(x.imag, factor))
    return op(x, jnp.asarray(factor, x.dtype))


def multiply(tree: T, factor: Any) -> T:
    """Multiplies every number of a tree, in float32 or wider; Python numbers by Python numbers stay such."""

    def one(x: Any) -> Any:
        if isinstance(x, float | complex) and isinstance(factor, int | float):
            return x * factor
        return _apply(jnp.multiply, x, factor)

    return map_inexact(one, tree)


@register_state()
@dataclasses.dataclass(frozen=True)
class NoOpLossScale(LossScale):
    """No scaling, for bfloat16 and float32: nothing is multiplied and the state has no leaves.

    >>> import mpjax as mp
    >>> mp.NoOpLossScale().scale(3.0)
    3.0
    """

    loss_scale: float = dataclasses.field(default=1.0, init=False)


@register_state()
@dataclasses.dataclass(frozen=True)
class StaticLossScale(LossScale):
    """A fixed scale: no state, never adjusted.

    Args:
      loss_scale: a power of two from 2**-126 to 2**127. Choose it so that max|gradient| * scale < 65504.

    Raises:
      ValueError: the scale is zero, negative, NaN, inf or not a power of two.

    >>> import mpjax as mp
    >>> scale = mp.StaticLossScale(1024)
    >>> float(scale.scale(0.5)), float(scale.unscale(512.0))
    (512.0, 0.5)
    """

    loss_scale: float = 1024.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_scale", power_of_two(self.loss_scale, "loss_scale", "StaticLossScale"))
        super().__post_init__()

    def _factor(self) -> float:
        return self.loss_scale


def bad_value(what: str, expected: str, write: str) -> ValueError:
    return ValueError(problem(what, expected=expected, write=write))


def power_of_two(value: Any, name: str = "loss_scale", cls: str = "DynamicLossScale") -> float:
    """Checks one number of the configuration and returns it as a Python float."""
    is_number = isinstance(value, int | float | np.number | np.ndarray | jax.Array) and not isinstance(value, bool)
    if not is_number or jnp.issubdtype(getattr(value, "dtype", np.float32), jnp.complexfloating):
        raise TypeError(
            problem(f"{name} is {value!r}.", expected="a positive, finite power of two", write=f"{name}=2.0**16")
        )
    if np.shape(value) != ():
        raise bad_value(
            f"{name} has shape {np.shape(value)}.",
            "one number; an ensemble has one state a member",
            "jax.vmap(mp.DynamicLossScale)(loss_scales)",
        )
    try:
        number = float(value)
    except OverflowError:  # a Python integer past float64
        number = math.inf
    if not (math.isfinite(number) and number > 0):
        raise bad_value(f"{name} is {number}.", "a positive, finite power of two", f"mp.{cls}({name}=2.0**k)")
    if math.frexp(number)[0] != 0.5 or not SMALLEST_SCALE <= number <= LARGEST_SCALE:
        nearest = min(max(2.0 ** math.ceil(math.log2(number)), SMALLEST_SCALE), LARGEST_SCALE)
        raise bad_value(
            f"{name} is {number}, not a power of two from 2**-126 to 2**127.",
            "a power of two: multiplying and dividing by it is exact",
            f"mp.{cls}({name}=2.0**{int(math.log2(nearest))})",
        )
    return number
