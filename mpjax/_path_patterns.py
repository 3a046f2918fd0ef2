"""Patterns for tree paths: regular expressions, matched in polynomial time whoever wrote them.

Python's `re` tries alternatives one after another, which takes it years for `(a+)+$` and forty letters, and nothing can
interrupt it. Here `re` parses a pattern and knows what one character may be; which way through the pattern a path takes
is found by following all ways at once, character by character. (Thompson, Regular expression search algorithm, CACM
1968.) What cannot be matched so, backreferences foremost, is refused.
"""

import functools
import importlib
import re
from collections.abc import Iterable
from typing import Any

from mpjax._errors import problem, shortened

# How `re` itself reads a pattern. Private names of Python 3.11 and later.
_constants, _parser, _compiler = (
    importlib.import_module(f"re.{name}") for name in ("_constants", "_parser", "_compiler")
)

LONGEST_PATTERN = 10_000
# How many characters, groups and tests a pattern may have when its repeats are written out.
_LARGEST = LONGEST_PATTERN
# A look-around may read the rest of the path at each of its characters.
_COST_OF_A_TEST = 50
# Places kept in the sets that were met before, for each pattern.
_KEPT = 50_000
# The place behind the whole pattern.
_END = 0

_REFUSED = {
    "GROUPREF": "a backreference",
    "GROUPREF_EXISTS": "a condition",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repeat",
}

_Scope = tuple[tuple[int, int], ...]


def check_pattern(pattern: str) -> None:
    """Raises an error if `pattern` is not a regular expression for paths, as a string."""
    if not isinstance(pattern, str):
        raise TypeError(
            problem(
                f"override {pattern!r} is a {type(pattern).__name__}.",
                expected="a regular expression as a string; case is ignored",
                write="r'.*norm.*'",
            )
        )
    _compiled(pattern)


def matches_path(pattern: str, path: str) -> bool:
    """Whether a pattern matches a whole path, ignoring case: `re.fullmatch(pattern, path, re.IGNORECASE)`."""
    return _compiled(pattern).reaches(path, 0, True, {})


@functools.lru_cache(maxsize=8192)  # more than the longest policy holds
def _compiled(pattern: str) -> "_Automaton":
    shown = shortened(pattern)
    if len(pattern) > LONGEST_PATTERN:
        raise _refusal(shown, f"has {len(pattern)} characters", f"{LONGEST_PATTERN} characters at most")
    try:
        parsed = _parser.parse(pattern, re.IGNORECASE)
        return _Automaton(parsed, _Builder(shown, parsed.state))
    except (re.error, OverflowError) as error:
        raise ValueError(
            problem(
                f"override {shown} is not a regular expression: {error}.",
                expected="a pattern for whole paths such as params/LayerNorm_0/scale",
                write="r'.*norm.*'",
            )
        ) from None
    except RecursionError:
        raise _refusal(shown, "is nested too deeply", "a few groups inside each other") from None


def _refusal(shown: str, what: str, expected: str) -> ValueError:
    return ValueError(problem(f"override {shown} {what}.", expected=expected, write="r'.*(norm|router).*'"))


class _Builder:
    """What the automata of one pattern share while they are made."""

    def __init__(self, shown: str, state: Any) -> None:
        self.shown, self._state = shown, state
        self._size = 0
        self._leaves: dict[str, re.Pattern[str]] = {}

    def count(self, parts: int = 1) -> None:
        """Counts parts of the pattern, each repeat of them anew."""
        self._size += parts
        if self._size > _LARGEST:
            raise _refusal(self.shown, f"has more than {_LARGEST} parts, repeats written out", "a smaller pattern")

    def leaf(self, item: Any, scope: _Scope) -> re.Pattern[str]:
        """What `re` makes of one character, or of one position, under the flags of the groups around it."""
        key = repr((item, scope))
        if key not in self._leaves:
            for added, removed in reversed(scope):
                item = (_constants.SUBPATTERN, (None, added, removed, _parser.SubPattern(self._state, [item])))
            self._leaves[key] = _compiler.compile(_parser.SubPattern(self._state, [item]))
        return self._leaves[key]


class _Automaton:
    """A pattern as places and the ways between them.

    A set of places stands for all that a path may have matched so far. Sets that were met before are not worked out
    again, so that after a few paths a character costs one look-up.
    """

    def __init__(self, parsed: Any, builder: _Builder, scope: _Scope = ()) -> None:
        self._builder = builder
        # For each place: the characters that lead on, and where to; or the test to pass, if any, and the places beyond.
        self._steps: dict[int, tuple[re.Pattern[str], int]] = {}
        self._jumps: dict[int, tuple[int | None, list[int]]] = {_END: (None, [])}
        self._tests: list[_Test] = []
        self._start = frozenset([self._sequence(parsed, _END, scope)])
        self._known: dict[Any, tuple[bool, dict[str, frozenset[int]]]] = {}
        self._kept = 0

    def reaches(self, path: str, start: int, whole: bool, memo: dict[Any, bool]) -> bool:
        """Whether a match starts at `start`, ending where the path ends if it has to be `whole`."""
        places = self._start
        for i in range(start, len(path) + 1):
            truth = tuple([test.holds(path, i, memo) for test in self._tests]) if self._tests else ()
            ended, onward = self._known.get((places, truth) if truth else places) or self._found(places, truth)
            if i == len(path) or (ended and not whole):
                return ended
            char = path[i]
            if char not in onward:
                onward[char] = self._after(places, truth, char)
            places = onward[char]
            if not places:
                return False
        return False

    def _found(self, places: frozenset[int], truth: tuple[bool, ...]) -> tuple[bool, dict[str, frozenset[int]]]:
        if self._kept > _KEPT:
            self._known.clear()
            self._kept = 0
        self._kept += len(places) + len(truth)
        found: tuple[bool, dict[str, frozenset[int]]] = (_END in self._closure(places, truth), {})
        self._known[(places, truth) if truth else places] = found
        return found

    def _after(self, places: frozenset[int], truth: tuple[bool, ...], char: str) -> frozenset[int]:
        steps = [self._steps[place] for place in self._closure(places, truth) if place in self._steps]
        after = frozenset(next_place for leaf, next_place in steps if leaf.fullmatch(char))
        self._kept += len(after)
        return after

    def _closure(self, places: Iterable[int], truth: tuple[bool, ...]) -> set[int]:
        """The places that are reached without another character."""
        reached, waiting = set(places), list(places)
        while waiting:
            test, beyond = self._jumps.get(waiting.pop(), (None, []))
            if test is None or truth[test]:
                waiting.extend(set(beyond) - reached)
                reached.update(beyond)
        return reached

    def _jump(self, beyond: list[int], test: int | None = None) -> int:
        place = len(self._steps) + len(self._jumps)
        self._jumps[place] = (test, beyond)
        return place

    def _sequence(self, items: Any, then: int, scope: _Scope) -> int:
        for item in reversed(list(items)):
            then = self._part(item, then, scope)
        return then

    def _part(self, item: Any, then: int, scope: _Scope) -> int:
        """Adds a part of the pattern that leads on to the place `then`, and returns the place in front of it."""
        op, argument = item
        name = str(op)
        self._builder.count(1 + _width(argument) // 100 if name == "IN" else 1)
        if name in _REFUSED:
            raise _refusal(self._builder.shown, f"has {_REFUSED[name]}", "a pattern without one")
        if name == "SUBPATTERN":
            _, added, removed, inside = argument
            return self._sequence(inside, then, (*scope, (added, removed)) if added or removed else scope)
        if name == "BRANCH":
            return self._jump([self._sequence(branch, then, scope) for branch in argument[1]])
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, body = argument
            return self._repeat(least, most, body, then, scope)
        if name in ("ASSERT", "ASSERT_NOT", "AT"):
            self._builder.count(_COST_OF_A_TEST)
            self._tests.append(_Test(item, self._builder, scope))
            return self._jump([then], len(self._tests) - 1)
        place = len(self._steps) + len(self._jumps)
        self._steps[place] = (self._builder.leaf(item, scope), then)
        return place

    def _repeat(self, least: Any, most: Any, body: Any, then: int, scope: _Scope) -> int:
        if most is _constants.MAXREPEAT:
            beyond = [then]
            then = self._jump(beyond)
            beyond.append(self._sequence(body, then, scope))
        else:
            end = then
            for _ in range(most - least):
                self._builder.count()
                then = self._jump([end, self._sequence(body, then, scope)])
        for _ in range(least):
            self._builder.count()
            then = self._sequence(body, then, scope)
        return then


class _Test:
    """A condition on a position in the path: an anchor, or what comes after it or before it."""

    def __init__(self, item: Any, builder: _Builder, scope: _Scope) -> None:
        op, argument = item
        self._leaf = builder.leaf(item, scope) if op is _constants.AT else None
        if self._leaf is None:
            direction, inside = argument
            self._wanted = op is _constants.ASSERT
            shortest, longest = (0, 0) if direction > 0 else inside.getwidth()
            if shortest != longest:
                raise re.error("look-behind requires fixed-width pattern")
            self._back = shortest
            self._inside = _Automaton(inside, builder, scope)

    def holds(self, path: str, i: int, memo: dict[Any, bool]) -> bool:
        """Whether it holds in front of character `i`; found once for each path."""
        if (self, i) not in memo:
            memo[self, i] = self._find(path, i, memo)
        return memo[self, i]

    def _find(self, path: str, i: int, memo: dict[Any, bool]) -> bool:
        if self._leaf is not None:
            return self._leaf.match(path, i) is not None
        return self._wanted is (i >= self._back and self._inside.reaches(path, i - self._back, False, memo))


def _width(items: Any) -> int:
    """How many characters the ranges of a class span, which `re` looks at one by one."""
    return sum(value[1] - value[0] for op, value in items if op is _constants.RANGE)
