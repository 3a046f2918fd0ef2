"""Exceptions to the rules that a function could do with, and which of them helps most."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from mpjax._autocast import Rules
from mpjax.diagnostics._measured import Measured
from mpjax.diagnostics._sites import Site

# Totals this near to the lowest count as the same: then the cheapest exception is taken.
_SAME = 1.05


class Exemption(NamedTuple):
    """What could be kept in float32 by one rule.

    Attributes:
      method: of `Rules`: `"with_line"` or `"with_path"`.
      name: the line or module.
      argument: the same as the method takes it.
      sites: what it covers.
      cost: floating-point operations and bytes of what is in low precision there now.
    """

    method: str
    name: str
    argument: str
    sites: frozenset[Site]
    cost: int

    def added(self, rules: Rules) -> Rules:
        """The rules with this one."""
        return getattr(rules, self.method)(self.argument, "full", "loses accuracy in low precision")

    @property
    def code(self) -> str:
        """The call that adds it."""
        return f'.{self.method}({self.argument!r}, "full", "loses accuracy in low precision")'

    @property
    def words(self) -> str:
        """What it keeps in float32."""
        if self.method == "with_path":
            return f"module {self.name}"
        kinds = [*dict.fromkeys(site.primitive for site in self.sites)]
        return f"{', '.join(kinds[:3])}{' ...' if len(kinds) > 3 else ''} at {self.name}"


def exemptions(measured: Measured) -> list[Exemption]:
    """A rule for each line and each module that has something in low precision which rules decide over."""
    lines: dict[str, set[Site]] = defaultdict(set)
    modules: dict[str, set[Site]] = defaultdict(set)
    ruled = [site for site in measured.narrow if measured.sites[site].ruled]
    for site in ruled:
        if site.source:
            lines[site.source.split(" (", 1)[0]].add(site)
        if site.path:
            modules[site.path].update(s for s in ruled if f"{s.path}/".startswith(f"{site.path}/"))

    def cost(sites: Iterable[Site]) -> int:
        return sum(measured.sites[site].cost for site in sites)

    files = {line.rpartition(":")[0] for line in lines}
    named = {_short(line, files): covered for line, covered in lines.items()}
    return [
        *(Exemption("with_line", x, x, frozenset(covered), cost(covered)) for x, covered in named.items()),
        *(Exemption("with_path", x, re.escape(x), frozenset(covered), cost(covered)) for x, covered in modules.items()),
    ]


def cheapest(measured: Measured, site: Site) -> Exemption | None:
    """The exemption that covers an operation and the least beside it; None if none does."""
    return min((x for x in exemptions(measured) if site in x.sites), key=lambda x: x.cost, default=None)


def best(measured: Measured, tolerance: float = 0.0) -> Exemption | None:
    """The exception to add next; None if there is none.

    The cheapest that meets the tolerance; if none does, the one with the lowest error. Of those that leave the same
    error (it may be infinite in several places) it is the one that does most harm alone, or comes first: what follows
    its inputs is then in float32 as well.
    """
    narrow = frozenset(measured.narrow)
    found = [(x, measured.total(narrow - x.sites)) for x in exemptions(measured)]
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
    chosen: list[Exemption] = []
    measured = measure(chosen)
    total = measured.total(measured.narrow)
    while total > tolerance and (step := best(measured, tolerance)):
        tried = measure([*chosen, step])
        new = tried.total(tried.narrow)
        # Where two places are infinite, one exception alone changes nothing that can be seen.
        if not (new < total * 0.99 or (total == float("inf") and measured.total(step.sites) > tolerance)):
            break
        chosen, measured, total = [*chosen, step], tried, new
    for x in chosen[:-1] if total <= tolerance else []:
        tried = measure([y for y in chosen if y is not x])
        new = tried.total(tried.narrow)
        if new <= tolerance:
            chosen, measured, total = [y for y in chosen if y is not x], tried, new
    return chosen, measured, total


def _short(line: str, files: Collection[str]) -> str:
    """A file and line without folders, unless two files have one name."""
    name = line.rsplit("/", 1)[-1]
    same = [file for file in files if file.rsplit("/", 1)[-1] == name.rpartition(":")[0]]
    return name if len(same) == 1 else line.lstrip("/")
