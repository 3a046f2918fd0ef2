"""What users hand over for a loss scale or a factor, as mpjax's own."""

from typing import Any

import jax
import jax.numpy as jnp
import jmp
import numpy as np

from mpjax._dynamic_loss_scale import DynamicLossScale
from mpjax._errors import problem
from mpjax._loss_scale import LossScale, NoOpLossScale, StaticLossScale, multiply
from mpjax._typing import T


def as_loss_scale(loss_scale: Any) -> LossScale:
    """Returns `loss_scale` as one of mpjax's; jmp's three classes are converted, field by field.

    Raises:
      TypeError: it is neither.
    """
    match loss_scale:
        case NoOpLossScale() | StaticLossScale() | DynamicLossScale():
            return loss_scale
        case jmp.NoOpLossScale():
            return NoOpLossScale()
        case jmp.StaticLossScale():
            return StaticLossScale(float(loss_scale.loss_scale))
        case jmp.DynamicLossScale():
            return DynamicLossScale(
                loss_scale.loss_scale,
                loss_scale.counter,
                int(loss_scale.period),
                float(loss_scale.factor),
                float(loss_scale.min_loss_scale),
            )
    raise TypeError(
        problem(
            f"loss_scale is {loss_scale!r}, a {type(loss_scale).__name__}.",
            expected="a loss scale: NoOpLossScale, StaticLossScale or DynamicLossScale, mpjax's or jmp's",
            write="mp.DynamicLossScale() or mp.StaticLossScale(1024.0)",
        )
    )


def scale_gradients(grads: T, scale: Any) -> T:
    """Multiplies every number of a tree by one factor, in float32 or wider.

    Args:
      grads: any tree. Python floats stay Python floats when `scale` is a Python number; float16 and bfloat16
        arrays become float32; integers, booleans, PRNG keys, `None`, float0 and fp8 leaves stay as they are.
      scale: a Python number, a real array of shape (), or a loss scale, mpjax's or jmp's.

    Raises:
      TypeError: `scale` is not one real number.

    >>> import mpjax as mp
    >>> mp.scale_gradients([1.0, -2.0, {"bias": 3.0}], 0.5)
    [0.5, -1.0, {'bias': 1.5}]
    """
    if isinstance(scale, LossScale | jmp.NoOpLossScale | jmp.StaticLossScale | jmp.DynamicLossScale):
        return as_loss_scale(scale).scale(grads)
    is_number = isinstance(scale, int | float | np.number | np.ndarray | jax.Array) and not isinstance(scale, bool)
    dtype = getattr(scale, "dtype", np.float32)
    is_real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if not is_number or not is_real or np.shape(scale) != ():
        raise TypeError(
            problem(
                f"scale is {scale!r}.",
                expected="one real number: a Python float or an array of shape ()",
                write="mp.scale_gradients(grads, 0.5)",
            )
        )
    return multiply(grads, scale)
