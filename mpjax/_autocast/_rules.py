"""Rules: which class each primitive belongs to, as an immutable value."""

import dataclasses
import functools
from types import MappingProxyType
from typing import Any

from mpjax._autocast._tables import ROWS, Kind
from mpjax._errors import problem


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with a primitive, and why.

    Attributes:
      kind: the class.
      reason: one sentence.
    """

    kind: Kind
    reason: str


# What is not in the table keeps its own dtypes: never silently narrowed.
UNLISTED = Rule(Kind.OPAQUE, "not in the rule table: left exactly as written")


@dataclasses.dataclass(frozen=True)
class Rules:
    """An immutable table of rules; a change makes a new one.

    >>> import mpjax as mp
    >>> rules = mp.default_rules().with_rule("tanh", "full", "this model's tanh saturates")
    >>> rules.of("tanh").kind.name, mp.default_rules().of("tanh").kind.name
    ('FULL', 'FOLLOW')
    """

    rows: tuple[tuple[str, Rule], ...]

    @functools.cached_property
    def _table(self) -> MappingProxyType[str, Rule]:
        return MappingProxyType(dict(self.rows))

    def of(self, primitive: str) -> Rule:
        """The rule of a primitive, by name."""
        return self._table.get(primitive, UNLISTED)

    def __contains__(self, primitive: object) -> bool:
        return primitive in self._table

    def with_rule(self, primitive: Any, kind: str, reason: str) -> "Rules":
        """Returns these rules with one changed.

        Args:
          primitive: a primitive or its name (`"tanh"`), as jaxprs print it.
          kind: `"low"`, `"full"`, `"sum"`, `"follow"`, `"pass"` or `"opaque"`.
          reason: one sentence.

        Raises:
          ValueError: `kind` is none of these.
        """
        name = getattr(primitive, "name", primitive)
        if not (isinstance(kind, str) and kind.upper() in Kind.__members__):
            raise ValueError(
                problem(
                    f"kind is {kind!r}.",
                    expected=f"one of {', '.join(k.lower() for k in Kind.__members__)}",
                    write='mp.default_rules().with_rule("tanh", "full", "saturates here")',
                )
            )
        table = {**self._table, name: Rule(Kind[kind.upper()], reason)}
        return Rules(tuple(sorted(table.items(), key=lambda row: row[0])))


@functools.cache
def default_rules() -> Rules:
    """The rules that `autocast` uses by default.

    >>> import mpjax as mp
    >>> mp.default_rules().of("dot_general").reason
    'tensor-core work; the accumulator is float32'
    """
    table = {name: Rule(row.kind, row.reason) for row in ROWS for name in row.primitives}
    return Rules(tuple(sorted(table.items(), key=lambda row: row[0])))
