"""Rules: which class each primitive belongs to, as an immutable value."""

import dataclasses
import functools
import re
import warnings
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

from mpjax._autocast._regions import Region
from mpjax._autocast._tables import PRESETS, ROWS, Kind
from mpjax._errors import listing, problem, users_stacklevel
from mpjax._path_patterns import check_pattern, matches_path
from mpjax.fp8 import Recipe


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with a primitive, and why.

    Attributes:
      kind: the class.
      reason: one sentence.
    """

    kind: Kind
    reason: str


@dataclasses.dataclass(frozen=True)
class PathRule:
    """An exception for a module and everything in it.

    Attributes:
      pattern: a regular expression for a whole module path; case is ignored.
      region: what holds inside.
      reason: one sentence.
    """

    pattern: str
    region: Region
    reason: str

    def matches(self, path: tuple[str, ...]) -> bool:
        """Whether the pattern names a module on this path."""
        return any(matches_path(self.pattern, "/".join(path[:end])) for end in range(1, len(path) + 1))


@dataclasses.dataclass(frozen=True)
class LineRule:
    """An exception for what comes from one line of source code.

    Attributes:
      line: file and line, `"model.py:41"`; the file with as many folders in front as tell it from others.
      region: what holds for that line, and in the functions that it calls.
      reason: one sentence.
    """

    line: str
    region: Region
    reason: str

    def matches(self, source: str) -> bool:
        """Whether a source line, as "/home/me/model.py:41:8 (forward)", is this one; 8 is the column."""
        return f"/{file_and_line(source)}".endswith(f"/{self.line}")


def file_and_line(source: str) -> str:
    """Of a source line, as "/home/me/model.py:41:8 (forward)", the file and the line."""
    # A folder's name may have " (" in it.
    found = re.fullmatch(r"(.*?:\d+)(:\d+)?( \([^()]*\))?", source)
    return found[1] if found else source


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
    paths: tuple[PathRule, ...] = ()
    lines: tuple[LineRule, ...] = ()
    fp8: Recipe = dataclasses.field(default_factory=Recipe)

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
        return dataclasses.replace(self, rows=tuple(sorted(table.items(), key=lambda row: row[0])))

    def with_path(self, pattern: str, kind: str, reason: str) -> "Rules":
        """Returns these rules with an exception for some modules and everything in them.

        The path of an operation is made of the name scopes that it was traced in. Flax Linen, haiku and equinox make
        one for each module (`LanguageModel/Block_0/LayerNorm_0`); elsewhere `jax.named_scope` does.
        `mp.full_precision` and `mp.keep_precision` in the code itself come before rules for paths.

        Args:
          pattern: a regular expression for a whole module path; case is ignored.
          kind: `"full"` for float32, `"keep"` for exactly as written.
          reason: one sentence.

        Raises:
          TypeError, ValueError: `pattern` is no regular expression, or `kind` none of these.

        >>> import mpjax as mp
        >>> rules = mp.default_rules().with_path(r".*/router", "full", "its scores decide who computes")
        """
        check_pattern(pattern)
        rule = PathRule(pattern, _region(kind, f"with_path({pattern!r}"), reason)
        return dataclasses.replace(self, paths=(*self.paths, rule))

    def with_line(self, line: str, kind: str, reason: str) -> "Rules":
        """Returns these rules with an exception for what one line of source code does, and the functions it calls.

        For code without modules or name scopes, where `mp.full_precision` cannot be written, or to try something out:
        line numbers move as code is edited, and a rule that matches no line is warned of. `mp.explain` and
        `mp.diagnostics.compare` print the lines; a call may have several in a traceback, and the innermost outside of
        JAX counts. Regions in the code and rules for paths come before rules for lines.

        Args:
          line: file and line, such as `"model.py:41"`, or with folders, `"flax/linen/linear.py:280"`.
          kind: `"full"` for float32, `"keep"` for exactly as written.
          reason: one sentence.

        Raises:
          ValueError: `line` is no file and line, or `kind` none of these.

        >>> import mpjax as mp
        >>> rules = mp.default_rules().with_line("model.py:41", "full", "large arguments of a sine")
        """
        if not (isinstance(line, str) and re.fullmatch(r".*[^:/]:\d+", line)):
            raise ValueError(
                problem(
                    f"line is {line!r}.",
                    expected="a file and the number of a line in it",
                    write='mp.default_rules().with_line("model.py:41", "full", "diverges otherwise")',
                )
            )
        rule = LineRule(line, _region(kind, f"with_line({line!r}"), reason)
        return dataclasses.replace(self, lines=(*self.lines, rule))

    def with_fp8(self, recipe: Recipe) -> "Rules":
        """Returns these rules with another choice of the matrix products that `mixed_float8` computes in fp8, and how.

        Args:
          recipe: a `mpjax.fp8.Recipe`; other policies do not read it.

        Raises:
          TypeError: it is none.

        >>> import mpjax as mp
        >>> rules = mp.default_rules().with_fp8(mp.fp8.Recipe(exclude=(), min_reuse=1000))
        """
        if not isinstance(recipe, Recipe):
            raise TypeError(
                problem(
                    f"recipe is {recipe!r}, a {type(recipe).__name__}.",
                    expected="a mpjax.fp8.Recipe",
                    write="mp.default_rules().with_fp8(mp.fp8.Recipe(emulate=True))",
                )
            )
        return dataclasses.replace(self, fp8=recipe)

    def at_line(self, source: str) -> LineRule | None:
        """The exception that holds for a source line; the last one added where there are several."""
        return next((rule for rule in reversed(self.lines) if rule.matches(source)), None)

    def exception(self, path: tuple[str, ...]) -> PathRule | None:
        """The exception that holds for a path of name scopes.

        Raises:
          ValueError: exceptions that match one path disagree.
        """
        found = [rule for rule in self.paths if rule.matches(path)]
        if any(rule.region is not found[0].region for rule in found):
            raise ValueError(
                problem(
                    f"{len(found)} rules match {'/'.join(path)!r} and disagree:\n"
                    f"{listing([f'{rule.pattern!r}: {rule.region.name.lower()}' for rule in found])}",
                    expected="patterns that match one path to name the same kind",
                    write="narrower patterns, such as r'.*/norm_1' in place of r'.*norm.*'",
                )
            )
        return found[0] if found else None

    def warn_of_unused(self, paths: Iterable[tuple[str, ...]], sources: Iterable[str]) -> None:
        """Warns of exceptions that match none of these paths or source lines."""
        unused_lines = [rule.line for rule in self.lines if not any(map(rule.matches, sources))]
        if unused_lines:
            warnings.warn(
                problem(
                    f"rules that match no line: {', '.join(map(repr, unused_lines))}. The lines are\n"
                    f"{listing(list(sources))}",
                    expected="each rule to match a line of the function; code that was edited has other numbers",
                    write='mp.default_rules().with_path(r".*/norm_1", "full", "..."), which an edit does not break',
                ),
                UserWarning,
                stacklevel=users_stacklevel(),
            )
        unused = [rule.pattern for rule in self.paths if not any(map(rule.matches, paths))]
        if unused:
            warnings.warn(
                problem(
                    f"rules that match no path: {', '.join(map(repr, unused))}. The paths are\n"
                    f"{listing(['/'.join(path) for path in paths])}",
                    expected="each pattern to match the whole path of at least one module",
                    write="r'.*norm.*', with .* on both sides; jax.named_scope gives a path where a library gives none",
                ),
                UserWarning,
                stacklevel=users_stacklevel(),
            )


def _region(kind: Any, call: str) -> Region:
    if not (isinstance(kind, str) and kind.upper() in Region.__members__):
        raise ValueError(
            problem(
                f"kind is {kind!r}.",
                expected=f"one of {', '.join(k.lower() for k in Region.__members__)}",
                write=f'mp.default_rules().{call}, "full", "diverges otherwise")',
            )
        )
    return Region[kind.upper()]


@functools.cache
def default_rules(preset: str = "mpjax") -> Rules:
    """The rules that `autocast` uses by default, or those of another library.

    Args:
      preset: `"mpjax"`; `"torch"`: PyTorch's lists for CUDA, in which sin, cos, erf and special functions follow
        their inputs; `"tensorflow"`: TensorFlow's lists, in which log, rsqrt and softmax follow their inputs;
        `"matmul"`: matrix work alone in the compute dtype, everything else in float32.

    Raises:
      ValueError: `preset` is none of these.

    >>> import mpjax as mp
    >>> mp.default_rules().of("dot_general").reason
    'tensor-core work; the accumulator is float32'
    >>> mp.default_rules("torch").of("sin").kind.name
    'FOLLOW'
    """
    if preset not in PRESETS:
        raise ValueError(
            problem(
                f"preset is {preset!r}.", expected=f"one of {', '.join(PRESETS)}", write='mp.default_rules("torch")'
            )
        )
    table = {name: Rule(row.kind, row.reason) for row in (*ROWS, *PRESETS[preset]) for name in row.primitives}
    return Rules(tuple(sorted(table.items(), key=lambda row: row[0])))
