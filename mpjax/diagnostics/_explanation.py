"""What `mpjax.explain` returns: data, and how it is shown."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Operation:
    """Operations of one kind at one place in the code.

    Attributes:
      path: the modules that it is in, as name scopes give them: `LanguageModel/Block_0`.
      source: file, line and function.
      primitive: its name in a jaxpr.
      direction: `"forward"` or `"backward"`.
      inputs, outputs: dtypes of operands and results.
      mark: what autocast knows of the result: FREE, LOW, NORMED, STAT or FULL; empty where it decided nothing.
      reason: why.
      count: how often it runs; the body of a while loop counts once.
      flops: floating-point operations of all of them.
    """

    path: str
    source: str
    primitive: str
    direction: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    mark: str
    reason: str
    count: int
    flops: int

    @property
    def dtype(self) -> str:
        """The dtype that it computes in: of its first floating operand, or of its result; empty without any."""
        return next((d for d in (*self.inputs, *self.outputs) if "float" in d or "complex" in d), "")


@dataclasses.dataclass(frozen=True)
class Cast:
    """Casts that autocast put in at one place; most are fused into the operation beside them."""

    path: str
    source: str
    before: str
    after: str
    count: int


@dataclasses.dataclass(frozen=True)
class NotEntered:
    """A body that autocast left as it is, and why."""

    primitive: str
    path: str
    source: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Difference:
    """Operations whose dtype is another under another policy."""

    path: str
    source: str
    primitive: str
    direction: str
    before: str
    after: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """In which precision each operation of a function runs, and why.

    Attributes:
      policy: the policy, as text.
      operations: operations, grouped.
      casts: what autocast cast.
      not_entered: bodies that it left as they are.
      bytes: of all operands and results by dtype, as if nothing were fused.
    """

    policy: str
    operations: tuple[Operation, ...]
    casts: tuple[Cast, ...]
    not_entered: tuple[NotEntered, ...]
    bytes: dict[str, int]
    _under: Callable[[Any], "Explanation"] = dataclasses.field(repr=False, compare=False)

    @property
    def flops(self) -> dict[str, int]:
        """Floating-point operations by the dtype that they are computed in."""
        found: dict[str, int] = defaultdict(int)
        for row in self.operations:
            if row.flops and row.dtype:
                found[row.dtype] += row.flops
        return dict(found)

    def diff(self, policy: Any) -> tuple[Difference, ...]:
        """What another policy computes in other dtypes, for the same function and arguments."""
        other = self._under(policy)
        mine, theirs = _by_place(self.operations), _by_place(other.operations)
        found = []
        for place in dict.fromkeys((*mine, *theirs)):
            before, after = mine.get(place, {}), theirs.get(place, {})
            if set(before) != set(after):
                # The reason is a rule's, which the side in float32 alone has none of.
                ruled = after if len(other.flops) > 1 or not before else before
                reason = "; ".join(dict.fromkeys((ruled or before or after).values()))
                found.append(Difference(*place, " + ".join(sorted(before)), " + ".join(sorted(after)), reason))
        return tuple(found)

    def to_json(self) -> str:
        """Everything, as JSON."""
        names = ("operations", "casts", "not_entered")
        rows = {name: [dataclasses.asdict(row) for row in getattr(self, name)] for name in names}
        return json.dumps({"policy": self.policy, **rows, "flops": self.flops, "bytes": self.bytes}, indent=2)

    def __str__(self) -> str:
        rows = [cells[1:] for cells in self._cells]
        widths = [max(map(len, column)) for column in zip(_HEADER[1:], *rows, strict=True)]
        lines, path = [self.policy, "", line(_HEADER[1:], widths)], None
        for operation, row in zip(self.operations, rows, strict=True):
            if operation.path != path:
                path = operation.path
                lines.append(path or "(in no module)")
            lines.append(line(row, widths))
        return "\n".join([*lines, "", *self._footer])

    def __rich__(self) -> Any:
        import rich.console

        table = rich_table(self.policy, _HEADER, self._cells, whole=("operation", "count", "mark", "FLOPs"))
        return rich.console.Group(table, *self._footer)

    @property
    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.path,
                row.primitive + (" (backward)" if row.direction == "backward" else ""),
                f"{row.count:,}",
                f"{', '.join(dict.fromkeys(row.inputs))} -> {', '.join(dict.fromkeys(row.outputs))}",
                row.mark,
                _amount(row.flops) if row.flops else "",
                row.source.rsplit("/", 1)[-1],
                row.reason,
            )
            for row in self.operations
        ]

    @property
    def _footer(self) -> Sequence[str]:
        lines = ["FLOPs: " + (_shares(self.flops, "") or "none"), "bytes: " + (_shares(self.bytes, "B") or "none")]
        counts: dict[str, int] = defaultdict(int)
        for cast in self.casts:
            counts[f"{cast.before} -> {cast.after}"] += cast.count
        lines.append("casts put in: " + (", ".join(f"{n:,} {what}" for what, n in counts.items()) or "none"))
        lines += [
            f"not entered: {row.primitive} at {row.source or 'an unknown line'}: {row.reason}"
            for row in self.not_entered
        ]
        return lines


_HEADER = ("module", "operation", "count", "dtypes", "mark", "FLOPs", "source", "reason")


def line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A row of a plain-text table."""
    return ("  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))).rstrip()


def filled(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """The columns that have something in them; all where there are no rows."""
    return [i for i in range(len(header)) if not rows or any(row[i] for row in rows)]


def rich_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, whole: Sequence[str]) -> Any:
    """A table for a terminal, as wide as that is: columns in `whole` are not cut, the others have several lines."""
    import rich.box
    import rich.table
    import rich.text

    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = filled(header, rows)
    for i in columns:
        table.add_column(header[i].replace(" ", "\n"), no_wrap=header[i] in whole, overflow="fold")
    for row in rows:
        table.add_row(*(rich.text.Text(row[i]) for i in columns))
    return table


def _shares(amounts: dict[str, int], unit: str) -> str:
    total = sum(amounts.values()) or 1
    ordered = sorted(amounts.items(), key=lambda row: -row[1])
    return ", ".join(f"{dtype} {_amount(amount, unit)} ({amount / total:.1%})" for dtype, amount in ordered)


def _amount(number: int, unit: str = "") -> str:
    for prefix, size in (("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.4g} {prefix}{unit}"
    return f"{number} {unit}".rstrip()


def _by_place(operations: Sequence[Operation]) -> dict[tuple[str, str, str, str], dict[str, str]]:
    """The dtypes, and why, of each primitive at each place."""
    found: dict[tuple[str, str, str, str], dict[str, str]] = defaultdict(dict)
    for row in operations:
        found[row.path, row.source, row.primitive, row.direction][row.dtype] = row.reason
    return found
