"""The `mpjax` command: what this machine is good for, and a demonstration.

Nothing heavy is imported until a subcommand runs.
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path

from mpjax.cli._checks import CommandError, require


def main(argv: list[str] | None = None) -> int:
    """Runs the `mpjax` command.

    Args:
      argv: the arguments after the command's name. Default: those of the process.

    Returns:
      The exit code: 0, or 1 after an error that is told on stderr.

    Raises:
      SystemExit: the arguments cannot be read (code 2), or help or the version was asked for (code 0).
    """
    args = _parser().parse_args(argv)
    try:
        if args.command == "info":
            _run_info(as_json=args.json)
        else:
            _run_demo(args.steps, args.out, args.seed)
    except CommandError as error:
        print(f"mpjax {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"mpjax {args.command}: interrupted", file=sys.stderr)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mpjax", description="Mixed precision for JAX.")
    parser.add_argument("--version", action="version", version=f"mpjax {importlib.metadata.version('mpjax')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,demo}")

    info = commands.add_parser(
        "info",
        help="devices, versions and the precision to train in here",
        description="Prints this machine's devices, the versions in use, the table behind mpjax.default_policy "
        "with this machine's row marked, and the policy to train with here.",
    )
    info.add_argument("--json", action="store_true", help="print the same as JSON")

    demo = commands.add_parser(
        "demo",
        help="train two networks in four precisions and compare",
        description="Trains two small networks on scikit-learn's handwritten digits in float32, bfloat16, and "
        "float16 without and with dynamic loss scaling, from the same parameters on the same batches. "
        "Takes a minute or two on a CPU; prints one table and writes one figure.",
    )
    demo.add_argument(
        "--steps", type=_positive, default=1200, help="training steps of each of the eight runs (default: %(default)s)"
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="DIR|FILE.png",
        help="folder for demo.png, or the figure's own path (default: %(default)s)",
    )
    demo.add_argument(
        "--seed", type=_natural, default=0, help="seed of initial parameters and batch order (default: %(default)s)"
    )
    return parser


def _positive(text: str) -> int:
    return _whole_number(text, at_least=1)


def _natural(text: str) -> int:
    return _whole_number(text, at_least=0)


def _whole_number(text: str, at_least: int) -> int:
    # The seed becomes an int32 inside JAX; no one trains the demo for 2**31 steps.
    limit = 2**31
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not at_least <= number < limit:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {at_least} to {limit - 1}")
    return number
