"""The dynamic loss scale: a pure state that searches for the largest scale at which nothing overflows."""

import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpjax._compat import is_tracer
from mpjax._errors import problem
from mpjax._loss_scale import (
    LARGEST_SCALE,
    LossScale,
    bad_value,
    power_of_two,
)
from mpjax._state import register_state
from mpjax._tree import check_flag
from mpjax._typing import Scalar

_EXPONENT_BITS = 0x7F800000


@register_state("loss_scale", "counter", "hysteresis_left", "at_floor")
@dataclasses.dataclass(frozen=True, eq=False)
class DynamicLossScale(LossScale):
    """A scale that grows after `period` clean steps and backs off on overflow.

    A pure state: arrays are its leaves, the rest is static, and it goes through `jit`, `scan`, `vmap`,
    donation and checkpoints unchanged, in one trace. A scale that was loaded damaged is repaired at its first use:
    zero, negative, inf and NaN to 2**16 within the bounds, all else to the power of two below it within the bounds.

    Args:
      loss_scale: the initial scale, a power of two. Float32 of shape () once in the state.
      counter: clean steps since the scale last moved, int32.
      period: clean steps in a row after which the scale grows.
      factor: growth factor, a power of two above 1.
      min_loss_scale: the floor. Below 1 is allowed, 0 is not.
      max_loss_scale: the ceiling; growth past it is refused. Float32's largest power of two by default.
      backoff_factor: multiplies the scale on overflow. `1 / factor` by default.
      hysteresis: overflows that it takes to back off; each skips its step all the same.
      hysteresis_refill: what forgives earlier overflows: `"clean"`, any clean step (as Apex does), or
        `"growth"`, only the end of a clean period (as Megatron does).
      hysteresis_left: overflows left before the next back-off, int32.
      at_floor: how often the floor held the scale back, int32: where this rises, scaling cannot help.

    Raises:
      ValueError: a number is out of range; the message says which and what to write.
      TypeError: a scale or factor is not a real number, or a period or count is not a whole number.

    Examples:
      >>> import mpjax as mp
      >>> state = mp.DynamicLossScale(2.0**16, period=2)
      >>> float(state.adjust(False).loss_scale)
      32768.0
      >>> float(state.adjust(True).adjust(True).loss_scale)
      131072.0

    References:
      jmp's class of the same name, whose arguments come first and in the same order; torch's `GradScaler`,
      Apex and Megatron-LM for hysteresis.
    """

    loss_scale: Any = 2.0**16
    counter: Any = 0
    period: int = 2000
    factor: float = 2.0
    min_loss_scale: float = 1.0
    max_loss_scale: float = LARGEST_SCALE
    backoff_factor: float | None = None
    hysteresis: int = 1
    hysteresis_refill: Literal["clean", "growth"] = "clean"
    hysteresis_left: Any = None
    at_floor: Any = 0

    def __post_init__(self) -> None:
        floor, ceiling, factor = (
            power_of_two(getattr(self, name), name) for name in ("min_loss_scale", "max_loss_scale", "factor")
        )
        backoff = None if self.backoff_factor is None else power_of_two(self.backoff_factor, "backoff_factor")
        period, hysteresis = (_whole_number(getattr(self, name), name, 1) for name in ("period", "hysteresis"))
        if floor > ceiling:
            raise bad_value(
                f"min_loss_scale {floor} is above max_loss_scale {ceiling}.", "floor <= ceiling", "min_loss_scale=1"
            )
        if factor <= 1:
            raise bad_value(f"factor is {factor}.", "a growth factor above 1", "factor=2")
        if backoff is not None and backoff >= 1:
            raise bad_value(f"backoff_factor is {backoff}.", "a factor below 1", "backoff_factor=0.5")
        if self.hysteresis_refill not in ("clean", "growth"):
            raise bad_value(
                f"hysteresis_refill is {self.hysteresis_refill!r}.", "'clean' or 'growth'", "hysteresis_refill='clean'"
            )
        # Inside vmap or jit the value is not known: it is taken as it is, and repaired like a loaded one.
        if not is_tracer(self.loss_scale) or jnp.shape(self.loss_scale) != ():
            initial = power_of_two(self.loss_scale)
            if not floor <= initial <= ceiling:
                raise bad_value(
                    f"loss_scale {initial} is outside [{floor}, {ceiling}].",
                    "min_loss_scale <= loss_scale <= max_loss_scale",
                    f"mp.DynamicLossScale({min(max(initial, floor), ceiling)}), or other bounds",
                )
        left = hysteresis if self.hysteresis_left is None else self.hysteresis_left
        values = {
            "loss_scale": jnp.asarray(self.loss_scale, jnp.float32),
            "counter": _count(self.counter, "counter"),
            "hysteresis_left": _count(left, "hysteresis_left"),
            "at_floor": _count(self.at_floor, "at_floor"),
            "period": period,
            "factor": factor,
            "min_loss_scale": floor,
            "max_loss_scale": ceiling,
            "backoff_factor": backoff,
            "hysteresis": hysteresis,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        super().__post_init__()

    def _factor(self) -> Scalar:
        scale = jnp.asarray(self.loss_scale, jnp.float32)
        usable = jnp.isfinite(scale) & (scale > 0)
        floor, ceiling = jnp.float32(self.min_loss_scale), jnp.float32(self.max_loss_scale)
        bounded = jnp.clip(jnp.where(usable, scale, jnp.float32(2.0**16)), floor, ceiling)
        # Clearing the mantissa rounds a normal float32 down to a power of two.
        bits = jax.lax.bitcast_convert_type(bounded, jnp.int32) & jnp.int32(_EXPONENT_BITS)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def adjust(self, grads_finite: Any) -> Self:
        """Returns the next state: one clean step more, or one overflow."""
        finite = check_flag(grads_finite, "grads_finite")
        scale = self._factor()
        # Loaded counters may hold anything.
        counter = jnp.clip(self.counter, 0, self.period)
        left = jnp.clip(self.hysteresis_left, 0, self.hysteresis)

        # >= and not ==: a counter loaded into a state with a shorter period still grows.
        full = counter + 1 >= self.period
        grown = scale * jnp.float32(self.factor)
        grown = jnp.where(jnp.isfinite(grown) & (grown <= self.max_loss_scale), grown, scale)
        refilled = jnp.int32(self.hysteresis)
        if self.hysteresis_refill == "growth":
            refilled = jnp.where(full, refilled, left)

        left = jnp.maximum(left - 1, 0)
        backs_off = left == 0
        lowered = scale * jnp.float32(1 / self.factor if self.backoff_factor is None else self.backoff_factor)
        held = backs_off & (lowered < self.min_loss_scale)
        lowered = jnp.where(backs_off, jnp.maximum(lowered, jnp.float32(self.min_loss_scale)), scale)

        return self._replace(
            loss_scale=jnp.where(finite, jnp.where(full, grown, scale), lowered),
            counter=jnp.where(finite & ~full, counter + 1, 0),
            hysteresis_left=jnp.where(finite, refilled, left),
            at_floor=jnp.where(~finite & held, optax.safe_increment(self.at_floor), self.at_floor),
        )


def _whole_number(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(problem(f"{name} is {value!r}.", expected="a whole number", write=f"{name}={least}"))
    if not least <= value < 2**31:
        raise bad_value(f"{name} is {value}.", f"a whole number from {least} to 2**31 - 1", f"{name}={least}")
    return int(value)


def _count(value: Any, name: str) -> jax.Array:
    """A counter as int32 of shape (): checked here where its value is known, clipped in use where it is not."""
    if isinstance(value, jax.Array | np.ndarray) and (
        value.shape != () or not jnp.issubdtype(value.dtype, jnp.integer)
    ):
        raise TypeError(
            problem(f"{name} is {value!r}.", expected="a whole number, int32 of shape ()", write=f"{name}=0")
        )
    known = value if is_tracer(value) else _whole_number(value.item() if hasattr(value, "item") else value, name, 0)
    return jnp.asarray(known, jnp.int32)
