"""What an evaluation carries along, and how its values change dtype."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import _compat
from mpjax._autocast._marks import Mark, Value
from mpjax._autocast._regions import Region, modules_of, region_of
from mpjax._autocast._rules import Rules
from mpjax._compat import is_tracer, name_scopes, source_line
from mpjax._dtypes import FLOAT32
from mpjax.fp8._recipe import Method


@dataclasses.dataclass(frozen=True)
class Context:
    """What an evaluation carries along.

    Attributes:
      low: the compute dtype.
      reduce: the dtype in which sums over devices are taken, those of weight gradients too.
      rules: the table.
      higher_order: how primitives that hold functions are evaluated, by name.
      cache: functions already rewritten, by their jaxpr and the marks of their inputs.
      path: the name scopes of the equation that is being evaluated.
      region: the region that the path lies in.
      forced: the region that holds where the path lies in none, and why.
      seen: the regions of all paths so far.
      sources: the source lines so far, if there are rules for lines.
      float8: how matrix products are computed in 8 bits, or why not; None if the policy does not ask for them.
      notes: each equation with what was decided for it, if that is to be explained.
    """

    low: np.dtype[Any]
    reduce: np.dtype[Any]
    rules: Rules
    higher_order: dict[str, Callable[..., list[Value]]]
    cache: dict[Any, Any] = dataclasses.field(default_factory=dict)
    path: tuple[str, ...] = ()
    region: Region | None = None
    forced: tuple[Region, str] | None = None
    seen: dict[tuple[str, ...], Region | None] = dataclasses.field(default_factory=dict)
    sources: dict[str, None] = dataclasses.field(default_factory=dict)
    float8: Method | str | None = None
    notes: list[Any] | None = None

    def inside(self, eqn: Any) -> "Context":
        """The same, for one equation: further down the path of name scopes, at its source line."""
        ctx, scopes = self, name_scopes(eqn)
        if scopes:
            path = (*self.path, *scopes)
            if path not in self.seen:
                exception = self.rules.exception(modules_of(path))
                self.seen[path] = region_of(path) or (exception.region if exception else None)
            ctx = dataclasses.replace(self, path=path, region=self.seen[path] or (self.forced and self.forced[0]))
        if self.rules.lines:
            source = source_line(eqn)
            if source:
                self.sources[source] = None
            rule = self.rules.at_line(source)
            if rule and ctx.region is None:
                ctx = dataclasses.replace(ctx, region=rule.region, forced=(rule.region, rule.reason))
        return ctx

    def in_float32(self, reason: str) -> "Context":
        """The same, in float32 where no region says otherwise."""
        return dataclasses.replace(self, region=self.region or Region.FULL, forced=(Region.FULL, reason))

    @property
    def keep_gradients(self) -> tuple[str, ...]:
        """The matrix work whose weight gradients stay in float32, as the accumulator has them.

        None on CPUs, where XLA has no such product: BF16 x BF16 = F32 fails as it runs. No convolution on GPUs: cuDNN
        has none of low operands with a float32 result, and XLA widens the operands.
        """
        if self.reduce == self.low:
            return ()
        return {"cpu": (), "tpu": ("dot_general", "conv_general_dilated")}.get(
            _compat.target_platform(), ("dot_general",)
        )

    @property
    def why_here(self) -> str:
        """Why the region is what it is."""
        inside = region_of(self.path)
        if inside:
            return f"inside {inside.value}"
        exception = self.rules.exception(modules_of(self.path))
        return exception.reason if exception else self.forced[1] if self.forced else "in no region"

    def narrow(self, value: Value) -> Any:
        """The array in the compute dtype."""
        if value.mark in (None, Mark.LOW):
            return value.array
        if value.const is not None:
            return self._constant(value)
        if value.mark is Mark.FREE:
            # A cast for each use: the gradients of a weight's uses are then added up in float32.
            return jax.lax.convert_element_type(value.array, self.low)
        if value.other is None:
            value.other = jax.lax.convert_element_type(value.array, self.low)
        return value.other

    def _constant(self, value: Value) -> Any:
        """A constant in the compute dtype: rounded to its largest number where that is nearest, not to inf.

        bfloat16 ends just below float32's largest number, the usual mask.
        """
        assert value.const is not None, "a constant"
        limit = float(jnp.finfo(self.low).max)
        beyond = np.isfinite(value.const) and abs(value.const) > limit
        if not is_tracer(value.array) and value.array.shape == ():
            return jnp.asarray(np.clip(value.const, -limit, limit) if beyond else value.const, self.low)
        # What it varies over, under shard_map, stays with it.
        array = jax.lax.clamp(-limit, value.array, limit) if beyond else value.array
        return jax.lax.convert_element_type(array, self.low)

    def widen(self, value: Value) -> Any:
        """The array in its original dtype."""
        if value.mark is not Mark.LOW:
            return value.array
        if value.other is None:
            value.other = jax.lax.convert_element_type(value.array, FLOAT32)
        return value.other

    def cast(self, value: Value, mark: Mark | None) -> Value:
        """The value with another mark, in the dtype that goes with it."""
        array = self.narrow(value) if mark is Mark.LOW else self.widen(value)
        return Value(array, mark, value.const)

    def holds(self, const: float | None) -> bool:
        """Whether the compute dtype can hold a constant: 1e9 is inf in float16, 1e-8 is 0."""
        if const is None or const == 0 or not np.isfinite(const):
            return True
        limits = jnp.finfo(self.low)
        return float(limits.tiny) <= abs(const) and abs(const) * (1 - float(limits.eps)) <= float(limits.max)


def is_subject(aval: Any) -> bool:
    """Whether autocast may touch a value: only what the original program has in float32."""
    return getattr(aval, "dtype", None) == FLOAT32


def marked(array: Any, aval: Any) -> Value:
    """A value that enters the evaluation."""
    if not is_subject(aval):
        return Value(array)
    is_number = isinstance(array, int | float | np.generic | np.ndarray) and np.shape(array) == ()
    return Value(jnp.asarray(array, FLOAT32), Mark.FREE, float(array) if is_number else None)
