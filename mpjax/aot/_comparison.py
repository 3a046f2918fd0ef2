"""What `mpjax.aot.compare` returns: reports side by side."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mpjax.aot._report import Report


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Reports of several programs for one target, by name; the first is what the others are measured by."""

    reports: Mapping[str, Report]

    @property
    def factors(self) -> dict[str, dict[str, float]]:
        """Of each program and figure, how many times the first program's it is; without those that it has none of."""
        values = {name: {title: n for title, n, _ in report.figures()} for name, report in self.reports.items()}
        first = next(iter(values.values()))
        return {
            name: {title: n / first[title] for title, n in row.items() if first.get(title)}
            for name, row in values.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """All figures and factors, of types that JSON has; without the HLO."""
        return {"reports": {name: r.to_dict() for name, r in self.reports.items()}, "factors": self.factors}

    def to_json(self) -> str:
        """All figures and factors, as JSON; without the HLO."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        columns = {name: {title: show(n) for title, n, show in r.figures()} for name, r in self.reports.items()}
        # In the order of a report, though no one program may have all of them.
        titles = list(dict.fromkeys(title for column in columns.values() for title in column))
        titles.sort(key=lambda title: [title.startswith(start) for start in ("sent", "estimated", "FLOPs")])
        limits = {name: "" if r.fits is None else "yes" if r.fits else "no" for name, r in self.reports.items()}
        cells = [["", *columns]]
        cells += [["fits", *limits.values()]] if any(limits.values()) else []
        for title in titles:
            row = [title]
            for i, (name, column) in enumerate(columns.items()):
                factor = self.factors[name].get(title)
                times = f" ({factor:.3f}x)" if i and factor is not None else ""
                row.append(f"{column.get(title, '-')}{times}")
            cells.append(row)
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        rows = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
        report = next(iter(self.reports.values()))
        return "\n".join([report.heading.partition("\n")[0], "", *rows])
