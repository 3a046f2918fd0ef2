"""The shape of every error message: what was passed, what was expected, what to write instead."""


def problem(what: str, *, expected: str, write: str) -> str:
    """Formats an error message in the three parts that all of mpjax's errors have.

    Args:
      what: what was passed, with its value, dtype or tree path.
      expected: what would have been right.
      write: the line to write instead.
    """
    return f"{what}\n  expected: {expected}\n  write:    {write}"


def listing(rows: list[str], limit: int = 8) -> str:
    """Joins rows for a message, saying how many more there are past `limit`."""
    shown = rows[:limit]
    if len(rows) > limit:
        shown.append(f"... and {len(rows) - limit} more")
    return "\n".join(f"    {row}" for row in shown)
