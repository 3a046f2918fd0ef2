"""Exceptions to the rules that a function could do with, and which of them helps most."""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from mpjax._autocast import Rules
from mpjax._autocast._rules import file_and_line
from mpjax.diagnostics._measured import Measured
from mpjax.diagnostics._sites import Site

# Exceptions for more of the work than this are another policy: several smaller ones are better, if they do.
_MOST = 0.5
# So many exceptions in a row may lower nothing: a later layer makes what an earlier one loses as large again.
_PATIENCE = 2
# Totals this near to the lowest count as the same: then the cheapest exception is taken.
_SAME = 1.05


class Exemption(NamedTuple):
    """What could be kept in float32 by one rule.

    Attributes:
      method: of `Rules`: `"with_line"` or `"with_path"`.
      name: the line or module.
      argument: the same as the method takes it.
      sites: what it covers, in the order of the program.
      cost: floating-point operations and bytes of what is in low precision there now.
    """

    method: str
    name: str
    argument: str
    sites: tuple[Site, ...]
    cost: int

    def added(self, rules: Rules) -> Rules:
        """The rules with this one."""
        return getattr(rules, self.method)(self.argument, "full", "loses accuracy in low precision")

    @property
    def code(self) -> str:
        """The call that adds it."""
        name = json.dumps(self.argument, ensure_ascii=False)
        return f'.{self.method}({name}, "full", "loses accuracy in low precision")'

    @property
    def words(self) -> str:
        """What it keeps in float32."""
        if self.method == "with_path":
            return f"module {self.name}"
        kinds = [*dict.fromkeys(site.primitive for site in self.sites)]
        return f"{', '.join(kinds[:3])}{' ...' if len(kinds) > 3 else ''} at {self.name}"


def exemptions(measured: Measured) -> list[Exemption]:
    """A rule for each line and each module that has something in low precision which rules decide over."""
    ruled = [site for site in measured.narrow if measured.sites[site].ruled]
    lines = dict.fromkeys(file_and_line(site.source) for site in ruled if site.source)
    files = {line.rpartition(":")[0] for line in lines}

    def exemption(method: str, name: str, argument: str, sites: Iterable[Site]) -> Exemption:
        covered = tuple(sites)
        return Exemption(method, name, argument, covered, sum(measured.sites[site].cost for site in covered))

    def of_line(line: str) -> Exemption:
        short = _short(line, files)
        return exemption("with_line", short, short, (s for s in ruled if file_and_line(s.source) == line))

    def of_module(path: str) -> Exemption:
        inside = (s for s in ruled if f"{s.path}/".startswith(f"{path}/"))
        return exemption("with_path", path, re.escape(path), inside)

    return [*map(of_line, lines), *map(of_module, dict.fromkeys(site.path for site in ruled if site.path))]


def cheapest(measured: Measured, site: Site) -> Exemption | None:
    """The exemption that covers an operation and the least beside it; None if none does."""
    return min((x for x in exemptions(measured) if site in x.sites), key=lambda x: x.cost, default=None)


def best(measured: Measured, tolerance: float, most: float) -> Exemption | None:
    """The exception to add next, of those that cost no more than `most`; None if there is none.

    The cheapest that meets the tolerance; if none does, the one with the lowest error. Of those that leave the same
    error (it may be infinite in several places) it is the one that does most harm alone, or comes first: what follows
    its inputs is then in float32 as well.
    """
    narrow = frozenset(measured.narrow)
    found = [(x, measured.total(narrow.difference(x.sites))) for x in exemptions(measured) if x.cost <= most]
    enough = [(x, total) for x, total in found if total <= tolerance]
    if enough:
        return min(enough, key=lambda row: row[0].cost)[0]
    if not found:
        return None
    lowest = min(total for _, total in found)
    near = [x for x, total in found if total <= lowest * _SAME]
    order = list(measured.sites)
    return min(near, key=lambda x: (-measured.total(x.sites), min(map(order.index, x.sites)), x.cost))


def fewest(
    measure: Callable[[Collection[Exemption]], Measured], tolerance: float
) -> tuple[list[Exemption], Measured, float]:
    """Exceptions that bring the error of the results under a tolerance, none of which can be left out.

    Args:
      measure: the function with these exceptions.
      tolerance: for the error of its results.

    Returns:
      The exceptions, the function with them, and the error that is left: above the tolerance if no exception helps.
    """
    start = measure([])
    found = _one_by_one(measure, start, tolerance, math.inf)
    most = _MOST * sum(known.cost for known in start.sites.values())
    if found[2] <= tolerance and any(x.cost > most for x in found[0]):
        smaller = _one_by_one(measure, start, tolerance, most)
        found = smaller if smaller[2] <= tolerance else found
    return found


def _one_by_one(
    measure: Callable[[Collection[Exemption]], Measured], start: Measured, tolerance: float, most: float
) -> tuple[list[Exemption], Measured, float]:
    """As `fewest`, of exceptions that cost no more than `most` each."""
    chosen: list[Exemption] = []
    measured, now = start, start.run(start.narrow)
    lowest, stuck = (chosen, measured, now), 0
    while now.total > tolerance and stuck <= _PATIENCE and (step := best(measured, tolerance, most)):
        # Where two places are infinite, one exception alone changes nothing that can be seen.
        hidden = now.total == math.inf and measured.total(step.sites) > tolerance
        chosen = [*chosen, step]
        measured = measure(chosen)
        now = measured.run(measured.narrow)
        before = lowest[2]
        if hidden or now.total < before.total * 0.99 or sum(now.entries) < sum(before.entries) * 0.99:
            lowest, stuck = (chosen, measured, now), 0
        else:
            stuck += 1
    chosen, measured, now = lowest
    for x in chosen[:-1] if now.total <= tolerance else []:
        tried = measure([y for y in chosen if y is not x])
        new = tried.run(tried.narrow)
        if new.total <= tolerance:
            chosen, measured, now = [y for y in chosen if y is not x], tried, new
    return chosen, measured, now.total


def _short(line: str, files: Collection[str]) -> str:
    """A file and line without folders, unless two files have one name."""
    name = line.rsplit("/", 1)[-1]
    same = [file for file in files if file.rsplit("/", 1)[-1] == name.rpartition(":")[0]]
    return name if len(same) == 1 else line.lstrip("/")
