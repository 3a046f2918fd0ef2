"""What `mpjax.diagnostics.compare` returns: data, and how it is shown."""

import dataclasses
import json
from typing import Any

from mpjax._autocast import Rules
from mpjax.diagnostics._explanation import filled, line, rich_table


@dataclasses.dataclass(frozen=True)
class OperationError:
    """What low precision does to one operation, and one operation to the results.

    Errors are relative: the norm of the difference over that of the reference, the largest of those of its results and
    iterations; 1 where the reference is all zeros and the other is not, infinite where one alone is finite.

    Attributes:
      path: the modules that it is in, as name scopes give them.
      source: file, line and function.
      primitive: its name in a jaxpr.
      local: of its own results where it alone is in low precision: its operands are exact, then cast.
      accumulated: of its own results where everything is.
      local_backward, accumulated_backward: the same of its part of the backward pass; None where it has none.
      total: of the function's results where it alone is in low precision, forward and backward.
      reason: why it computes in the dtype that it does.
      ruled: whether rules put it in low precision; otherwise the code itself does, or it is in that of the reference.
    """

    path: str
    source: str
    primitive: str
    local: float
    accumulated: float
    local_backward: float | None
    accumulated_backward: float | None
    total: float
    reason: str
    ruled: bool


@dataclasses.dataclass(frozen=True)
class Fix:
    """A change of the rules, and what it does.

    Attributes:
      rules: the changed rules.
      code: the line that makes them.
      what: what it runs in float32.
      before, after: the error of the function's results, all in low precision but what the rules keep out.
      bytes: of operands and results, as if nothing were fused: the factor by which they grow.
    """

    rules: Rules
    code: str
    what: str
    before: float
    after: float
    bytes: float

    def __str__(self) -> str:
        grown = f"{self.bytes - 1:+.1%} bytes"
        return f"run {self.what} in float32: total error {self.before:.2g} -> {self.after:.2g}, {grown}\n  {self.code}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Where a function loses accuracy in low precision.

    Attributes:
      policy: the policy, as text.
      reference: `"float32"` or `"float64"`.
      operations: a row for each, the one that does most to the results first.
      outputs: the error of each result by its tree path.
      total: of the results: of a tuple the largest of its entries' errors, each entry taken as one vector.
      not_finite: the results that hold NaN or infinity in the reference already, by their tree paths.
      fix: the cheapest rule for the worst operation that rules decide over; None if it lowers `total` by less than a
        twentieth: then see `suggest`, which looks for several.
    """

    policy: str
    reference: str
    operations: tuple[OperationError, ...]
    outputs: dict[str, float]
    total: float
    not_finite: tuple[str, ...]
    fix: Fix | None

    def to_json(self) -> str:
        """Everything but the rules of the fix, as JSON; infinities as strings."""
        fix = self.fix and {k: getattr(self.fix, k) for k in ("code", "what", "before", "after", "bytes")}
        rows = [dataclasses.asdict(row) for row in self.operations]
        names = ("policy", "reference", "total", "outputs", "not_finite")
        found = {name: getattr(self, name) for name in names} | {"operations": rows, "fix": fix}
        return json.dumps(_readable(found), indent=2, allow_nan=False)

    def __str__(self) -> str:
        cells = self._cells
        columns = filled(_HEADER, cells)
        rows = [[row[i] for i in columns] for row in (_HEADER, *cells)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join([self._title, "", *(line(row, widths) for row in rows), "", *self._footer])

    def __rich__(self) -> Any:
        import rich.console

        table = rich_table(self._title, _HEADER, self._cells, whole=("operation", *_NUMBERS))
        return rich.console.Group(table, *self._footer)

    @property
    def _title(self) -> str:
        return f"{self.policy} against {self.reference}: total error {self.total:.2g}"

    @property
    def _cells(self) -> list[tuple[str, ...]]:
        def number(x: float | None) -> str:
            return "" if x is None else f"{x:.2g}"

        return [
            (
                row.primitive,
                row.path,
                row.source.rsplit("/", 1)[-1],
                *map(number, (row.total, row.local, row.accumulated)),
                *map(number, (row.local_backward, row.accumulated_backward)),
                row.reason,
            )
            for row in self._with_errors[:_SHOWN]
        ]

    @property
    def _with_errors(self) -> list[OperationError]:
        names = ("total", "local", "accumulated", "local_backward", "accumulated_backward")
        return [row for row in self.operations if any(getattr(row, name) for name in names)]

    @property
    def _footer(self) -> list[str]:
        lines = []
        shown = self._with_errors
        if len(shown) > _SHOWN:
            lines.append(f"and {len(shown) - _SHOWN} more operations, none of which does more to the results")
        if len(shown) < len(self.operations):
            lines.append(f"operations without any error: {len(self.operations) - len(shown)}")
        if self.not_finite:
            lines.append(
                f"not finite in {self.reference} already: {', '.join(self.not_finite)}; what is in both counts as the "
                "same. mp.diagnostics.locate_nonfinite finds the operation"
            )
        worst = next(iter(self.operations), None)
        if worst and worst.total and not worst.ruled:
            place = " ".join(filter(None, (worst.path, worst.source)))
            lines.append(f"{worst.primitive} ({place}) is narrow because the code says so: no rule changes it")
        if self.fix:
            lines.append(str(self.fix))
        elif any(row.ruled and row.total for row in self.operations):
            lines.append("no rule for the worst operation lowers the total error much; suggest looks for several")
        return lines


_NUMBERS = ("of results", "local", "accumulated", "local bwd", "accum. bwd")
_HEADER = ("operation", "module", "source", *_NUMBERS, "reason")
# Rows that are printed, of those with an error; all of them are in the data.
_SHOWN = 25


def _readable(x: Any) -> Any:
    """A tree for JSON, which has no infinities."""
    if isinstance(x, dict):
        return {key: _readable(value) for key, value in x.items()}
    if isinstance(x, list):
        return list(map(_readable, x))
    return str(x) if isinstance(x, float) and not abs(x) < float("inf") else x
