"""The shape of every error message: what was passed, what was expected, what to write instead."""

import os
import sys

import jax


def problem(what: str, *, expected: str, write: str) -> str:
    """Formats an error message in the three parts that all of mpjax's errors have.

    Args:
      what: what was passed, with its value, dtype or tree path.
      expected: what would have been right.
      write: the line to write instead.
    """
    return f"{what}\n  expected: {expected}\n  write:    {write}"


def shortened(value: object, limit: int = 200) -> str:
    """A value as a message quotes it: its repr, of a long string the beginning and the length."""
    if isinstance(value, str) and len(value) > limit:
        return f"{value[:limit]!r}... ({len(value)} characters)"
    return repr(value)


def users_stacklevel() -> int:
    """The `stacklevel` with which a warning from the caller names the user's line, and none of jax or mpjax."""
    libraries = (os.path.dirname(jax.__file__), os.path.dirname(__file__), "<")
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_code.co_filename.startswith(libraries):
        frame, level = frame.f_back, level + 1
    return level


def listing(rows: list[str], limit: int = 8) -> str:
    """Joins rows for a message, saying how many more there are past `limit`."""
    shown = rows[:limit]
    if len(rows) > limit:
        shown.append(f"... and {len(rows) - limit} more")
    return "\n".join(f"    {row}" for row in shown)
