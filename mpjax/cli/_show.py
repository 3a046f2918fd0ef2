"""What `explain`, `compare` and `fit` share: the policy, the table, the files."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpjax as mp
from mpjax.cli._checks import CommandError, write_whole


def policy_named(text: str) -> mp.Policy:
    """A policy by its name.

    Raises:
      CommandError: there is none; with the library's own message.
    """
    return try_to(mp.get_policy, text)


def rules_of(preset: str) -> mp.Rules | None:
    """The rules of a preset; None for the default, which the library then names as such in what it prints."""
    return None if preset == "mpjax" else mp.default_rules(preset)


def try_to(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function of the library's, whose errors are told as they are.

    Raises:
      CommandError: it raises one.
    """
    try:
        return fn(*args, **kwargs)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise CommandError(str(error)) from error


def show(value: Any) -> None:
    """Prints a table: on a terminal as wide as that is, in a pipe as plain text with a line for each row."""
    if not sys.stdout.isatty():
        print(value)
        return
    from rich.console import Console

    Console(highlight=False, markup=False).print(value)


def write_results(as_json: str, draw: Callable[[], Any], json: Path | None, png: Path | None) -> None:
    """Writes the files that were asked for, and says where they are.

    Args:
      as_json: the content of the one file.
      draw: returns the matplotlib figure of the other.
      json: the file for it, or `None`.
      png: the file for the figure, or `None`.

    Raises:
      CommandError: one cannot be written, or there is nothing to draw.
    """
    if json:
        write_whole(json, f"{as_json}\n".encode())
        print(f"JSON: {json}")
    if png:
        buffer = io.BytesIO()
        try_to(draw).savefig(buffer, format="png", dpi=150)  # there may be nothing to draw
        write_whole(png, buffer.getvalue())
        print(f"Figure: {png}")
