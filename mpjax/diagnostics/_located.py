"""What `locate_nonfinite` returns: data, and how it is said in words."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax._errors import listing
from mpjax.diagnostics._place import Frame


@dataclasses.dataclass(frozen=True)
class ValueRange:
    """The numbers of one array.

    Attributes:
      name: which it is: an argument with its tree path, a result's path, or which operand.
      dtype, shape: of the array.
      min, max: of its finite numbers (of a complex array, of their magnitudes); None where it has none.
      zeros, inf, nan: how many there are, infinities of both signs together.
      positive_inf: how many of the infinities are positive.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    min: float | None
    max: float | None
    zeros: int
    inf: int
    nan: int
    positive_inf: int

    @classmethod
    def of(cls, name: str, array: Any) -> "ValueRange":
        """The numbers of an array; of one that holds no numbers (keys) only its type."""
        dtype, shape = str(array.dtype), tuple(array.shape)
        if not jnp.issubdtype(array.dtype, jnp.number):
            return cls(name, dtype, shape, None, None, 0, 0, 0, 0)
        numbers = np.asarray(array)
        numbers = np.abs(numbers) if np.iscomplexobj(numbers) else numbers
        numbers = numbers.astype(np.float64)
        finite = numbers[np.isfinite(numbers)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (None, None)
        inf, nan = int(np.isinf(numbers).sum()), int(np.isnan(numbers).sum())
        return cls(name, dtype, shape, low, high, int((numbers == 0).sum()), inf, nan, int((numbers == np.inf).sum()))

    @property
    def amax(self) -> float | None:
        """The largest magnitude of its finite numbers."""
        return None if self.min is None or self.max is None else max(abs(self.min), abs(self.max))

    @property
    def finite(self) -> bool:
        """Whether all its numbers are."""
        return not self.inf and not self.nan

    def __str__(self) -> str:
        size = math.prod(self.shape)
        counts = [f"{n:,} {what}" for n, what in ((self.nan, "NaN"), (self.inf, "inf")) if n]
        held = "no finite number" if self.min is None else f"{self.min:.4g} to {self.max:.4g}"
        state = f", {' and '.join(counts)} of {size:,}" if counts else ", all finite"
        return f"{self.name}: {self.dtype}[{','.join(map(str, self.shape))}], {held}{state}"


@dataclasses.dataclass(frozen=True)
class BadOperation:
    """An operation that makes infinities or NaNs.

    Attributes:
      primitive: its name in a jaxpr.
      direction: `"forward"` or `"backward"`.
      path: the modules that it is in, as name scopes give them.
      source: file, line and function.
      frames: the calls, loops, branches and devices around it, the outermost first.
      operands, results: their numbers; inside `shard_map` those of the device in `frames`.
      reason: what went wrong.
      largest: for an operation in 16 bits, the largest magnitude that its non-finite results have in float32, where
        that is finite; otherwise None.
      expected: whether it is what loss scaling lives with: a backward overflow in 16 bits that is finite in float32 and
        would fit without the scale. None if the loss scale is not known.
      of_infinities: whether it makes NaN of infinities (inf - inf, 0 * inf), and not of finite numbers.
    """

    primitive: str
    direction: str
    path: str
    source: str
    frames: tuple[Frame, ...]
    operands: tuple[ValueRange, ...]
    results: tuple[ValueRange, ...]
    reason: str
    largest: float | None
    expected: bool | None
    of_infinities: bool

    def frame(self, kind: str) -> Frame | None:
        """The innermost frame of a kind, such as `"scan"`."""
        return next((frame for frame in reversed(self.frames) if frame.kind == kind), None)

    @property
    def where(self) -> str:
        """Direction, module, line and frames in one line."""
        parts = [self.direction, self.path and f"in {self.path}", f"at {self.source}", *map(str, self.frames)]
        return ", ".join(filter(None, parts))


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """Where a function's infinities and NaNs come from. True if they reach its results.

    Attributes:
      kind: what is to blame: `"operation"`, `"input"` or `"constant"`; empty where all results are finite.
      operation: the operation to blame, or None.
      then: the first operation that makes NaN of the infinities of the first, or None.
      inputs: arguments that are not finite.
      constants: constants in the program that are not finite and reach the results, with their lines.
      outputs: results that are not finite.
      skipped: whether a check for finite numbers failed and the results depend on it, as in a skipped step.
      masked: operations whose infinities and NaNs reach no result, such as masks of -inf.
      loss_scale: the loss scale, if it is known.
    """

    kind: str
    operation: BadOperation | None
    then: BadOperation | None
    inputs: tuple[ValueRange, ...]
    constants: tuple[ValueRange, ...]
    outputs: tuple[ValueRange, ...]
    skipped: bool
    masked: tuple[BadOperation, ...]
    loss_scale: float | None

    def __bool__(self) -> bool:
        return bool(self.kind)

    @property
    def expected(self) -> bool | None:
        """Whether this is an overflow that loss scaling expects; None if the loss scale is not known."""
        return self.operation.expected if self.operation else False

    def to_dict(self) -> dict[str, Any]:
        """Everything, as dicts, lists, strings and numbers."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if self.operation:
            lines = self._blamed(self.operation)
        elif self.kind == "input":
            lines = ["The numbers that come in are not finite: your data or your state holds them."]
        elif self.kind == "constant":
            lines = ["A constant in the program is not finite, and it reaches the results."]
        else:
            lines = ["All results are finite."]
        for title, ranges in (
            ("inputs that are not finite", self.inputs),
            ("constants that are not finite", self.constants),
            ("results that are not finite", self.outputs),
        ):
            lines += _block(title, [str(row) for row in ranges])
        if self.skipped:
            lines.append("A check for finite numbers failed, and the results depend on it: the step was skipped.")
        rows = dict.fromkeys(f"{row.primitive}, {row.direction}, at {row.source}" for row in self.masked)
        return "\n".join(lines + _block("made on the way, and in no result", list(rows)))

    def _blamed(self, found: BadOperation) -> list[str]:
        made = " and ".join(
            f"{sum(n):,} {what}"
            for n, what in (([r.inf for r in found.results], "inf"), ([r.nan for r in found.results], "NaN"))
            if any(n)
        )
        source = "infinities" if found.of_infinities else "finite numbers"
        lines = [f"{found.primitive} makes {made} of {source}: {found.where}.", f"  {found.reason}"]
        lines += [f"  {row}" for row in (*found.operands, *found.results)]
        if found.largest is not None:
            lines.append(f"  {self._advice(found)}")
        if self.then:
            lines.append(f"Then {self.then.primitive} makes NaN of the infinities: {self.then.where}.")
        return lines

    def _advice(self, found: BadOperation) -> str:
        if found.expected:
            mantissa, exponent = math.frexp(self.loss_scale or 1)
            scale = f"2^{exponent - 1}" if mantissa == 0.5 else f"{self.loss_scale:g}"
            return f"Expected at a loss scale of {scale}: the step is skipped, and the scale backs off."
        if found.direction == "forward":
            return (
                "A smaller loss scale does not help the forward pass: compute this in float32 (mpjax.full_precision), "
                "or in bfloat16."
            )
        if found.expected is None:
            return "Under loss scaling this is expected, and the scale backs off; pass loss_scale= to be told."
        return "It overflows without a loss scale too: compute this in float32 (mpjax.full_precision), or in bfloat16."


def _block(title: str, rows: Sequence[str]) -> list[str]:
    return [f"{title}:", listing(list(rows))] if rows else []
