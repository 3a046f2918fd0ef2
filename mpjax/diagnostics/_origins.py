"""Values that know where what is not finite in them comes from."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.diagnostics._located import BadOperation, ValueRange
from mpjax.diagnostics._place import is_float_array
from mpjax.diagnostics._taps import expanded

NONE = frozenset[int]()


class Value(NamedTuple):
    """An array, and the numbers of the origins of what is not finite in it.

    Attributes:
      array: it.
      nan, inf: the origins of its NaNs and of its infinities.
      flag: for integers and booleans, the origins of what failed a check for finite numbers that they depend on.
    """

    array: Any
    nan: frozenset[int] = NONE
    inf: frozenset[int] = NONE
    flag: frozenset[int] = NONE

    @property
    def bad(self) -> frozenset[int]:
        """The origins of all that is not finite in it."""
        return self.nan | self.inf


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where something non-finite comes from.

    Attributes:
      kind: `"input"`, `"constant"` or `"operation"`.
      values: the numbers of an input or constant.
      causes: for an operation that makes NaN of infinities, the origins of those.
      operation: the operation.
    """

    kind: str
    values: ValueRange | None
    causes: frozenset[int] = NONE
    operation: BadOperation | None = None


@jax.jit
def _has(x: Any) -> Any:
    return jnp.stack([jnp.isnan(x).any(), jnp.isinf(x).any()])


def nan_and_inf(x: Any) -> tuple[bool, bool]:
    """Whether an array holds NaN, and whether it holds infinities."""
    if not hasattr(x, "dtype") or not is_float_array(x):
        return False, False
    if not x.shape:
        return bool(np.isnan(np.asarray(x))), bool(np.isinf(np.asarray(x)))
    nan, inf = np.asarray(_has(x)).tolist()
    return nan, inf


def inherited(sources: Sequence[Value], array: Any) -> Value:
    """A part of a value, or values put together: non-finite for the same reasons, where it still is."""
    nan, inf = nan_and_inf(array) if any(v.bad for v in sources) else (False, False)
    return Value(
        array,
        NONE.union(*(v.nan for v in sources)) if nan else NONE,
        NONE.union(*(v.inf for v in sources)) if inf else NONE,
        NONE.union(*(v.flag for v in sources)),
    )


def selected(which: Value, case: int, value: Value) -> Value:
    """One case of a select, without what is not finite in it if that is not selected."""
    if not value.bad:
        return value
    chosen = expanded(which.array.astype(jnp.int32) == case, value.array)
    return inherited([value], jnp.where(chosen, value.array, jnp.zeros_like(value.array)))


def is_check(eqn: Any) -> bool:
    """Whether an equation asks if numbers are finite: `isfinite`, or `isnan`, which compares a number with itself."""
    name = eqn.primitive.name
    return name == "is_finite" or (name == "ne" and eqn.invars[0] is eqn.invars[1])
