"""Marks: what is known of a float value beside its array, and how they combine."""

import dataclasses
import enum
from collections.abc import Iterable
from typing import Any


class Mark(enum.Enum):
    """What a float value is."""

    FREE = "parameters, inputs, constants: nothing decided yet"
    LOW = "an activation made by matrix work, in the compute dtype"
    NORMED = "an activation combined with a statistic: float32, but holding no more than LOW did"
    STAT = "a statistic: a reduction of activations, and what is computed from it"
    FULL = "its range or accuracy needs float32"


@dataclasses.dataclass
class Value:
    """A value in the evaluation.

    Attributes:
      array: an array or tracer, in the compute dtype where the mark is LOW, else in its own dtype.
      mark: None for everything that is not float32 in the original program.
      const: the number, where the value is a scalar constant or a broadcast of one.
      other: the array in the dtype that it is not in, once that has been asked for.
    """

    array: Any
    mark: Mark | None = None
    const: float | None = None
    other: Any = None


def is_weight(value: Value) -> bool:
    """Whether a value is a parameter or an input, as given, and no number."""
    return value.mark is Mark.FREE and value.const is None


def follow_mark(marks: Iterable[Mark | None]) -> Mark | None:
    """The mark of an element-wise result: DESIGN section 5, row FOLLOW."""
    found = {mark for mark in marks if mark is not None}
    if not found:
        return None
    if Mark.FULL in found:
        return Mark.FULL
    if Mark.STAT in found:
        return Mark.NORMED if found & {Mark.LOW, Mark.NORMED} else Mark.STAT
    for mark in (Mark.LOW, Mark.NORMED):
        if mark in found:
            return mark
    return Mark.FREE


def full_mark(marks: Iterable[Mark | None]) -> Mark:
    """The mark of what has to be computed in float32: the reciprocal root of a variance is a statistic still."""
    found = {mark for mark in marks if mark is not None}
    return Mark.STAT if Mark.STAT in found and found <= {Mark.STAT, Mark.FREE} else Mark.FULL


def reduced_mark(marks: Iterable[Mark | None]) -> Mark:
    """The mark of a sum: a statistic where activations are summed."""
    found = {mark for mark in marks if mark is not None}
    return Mark.STAT if found and found <= {Mark.LOW, Mark.NORMED, Mark.STAT} else Mark.FULL


def boundary_mark(mark: Mark | None) -> Mark | None:
    """The mark with which a value leaves a loop or branch: a normalised activation comes back to LOW."""
    return {Mark.NORMED: Mark.LOW, Mark.STAT: Mark.FULL}.get(mark, mark) if mark else None


def join_marks(a: Mark | None, b: Mark | None) -> Mark | None:
    """The mark of a value that is one or the other: FREE below LOW below FULL."""
    order = [Mark.FREE, Mark.LOW, Mark.FULL]
    a, b = boundary_mark(a), boundary_mark(b)
    if a is None or b is None:
        return None
    return max(a, b, key=order.index)
