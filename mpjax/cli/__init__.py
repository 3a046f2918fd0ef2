"""The `mpjax` command: what this machine is good for, tools for a function of yours, and a demonstration.

Nothing heavy is imported until a subcommand runs.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from mpjax.cli._checks import CommandError, output_file, require
from mpjax.cli._parser import make_parser


def main(argv: list[str] | None = None) -> int:
    """Runs the `mpjax` command.

    Args:
      argv: the arguments after the command's name. Default: those of the process.

    Returns:
      The exit code: 0, or 1 after an error that is told on stderr.

    Raises:
      SystemExit: the arguments cannot be read (code 2), or help or the version was asked for (code 0).
    """
    options = vars(make_parser().parse_args(argv))
    command = options.pop("command")
    try:
        if command == "info":
            _run_info(as_json=options["json"])
        elif command == "demo":
            _run_demo(**options)
        else:
            _run_tool(command, options)
    except CommandError as error:
        print(f"mpjax {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"mpjax {command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _run_info(*, as_json: bool) -> None:
    if not as_json:
        require("info", "rich")
    from mpjax.cli._info import run

    run(as_json=as_json)


def _run_demo(steps: int, out: Path, seed: int) -> None:
    require("demo", "flax", "rich", "matplotlib", "sklearn")
    from mpjax.cli._demo import run

    run(steps, out, seed)


def _run_tool(command: str, options: dict[str, Any]) -> None:
    """Runs `explain`, `compare`, `fit` or `bench`, each a file with a function `run` of the options."""
    require(command, "rich", *(["matplotlib"] if options["png"] else []))
    # Before the long work: a file that cannot be written.
    for option in ("json", "png"):
        output_file(f"--{option}", options[option])
    importlib.import_module(f"mpjax.cli._{command}").run(**options)
