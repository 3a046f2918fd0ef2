"""The arguments of the `mpjax` command."""

import argparse
import importlib.metadata
from pathlib import Path
from typing import Any

_ARGUMENTS = """\
arguments to call the function with:
  The module says them: example_args is a tuple of arguments, a dict of keyword
  arguments, or a function without parameters that returns one of the two.
  jax.ShapeDtypeStructs do for arrays; jax.eval_shape(init, ...) makes them of
  any size, with no memory behind them.

      def example_args():
          batch = jax.ShapeDtypeStruct((64, 512), "float32")
          return jax.eval_shape(init, jax.random.key(0)), batch

  --args NAME takes another name of the module than example_args, and
  --args module:NAME one of another module.
"""
_FILLED = """
  Structs have no values, which this command needs: floats are drawn from a
  normal distribution with a standard deviation of 1, in the first argument (the
  parameters) divided by the square root of the last dimension but one where
  there are two and more; integers are 0 or 1. Real values tell more.
"""
_PLACED = """
where the arguments lie on a mesh:
  Data parallel: the last argument is the batch, and every array in it is split
  over all devices along its leading dimension; the other arguments are whole on
  every device. A module that has example_shardings says it itself: a
  PartitionSpec for each argument, or a tree of them, or a function of the mesh
  that returns that.

      example_shardings = (PartitionSpec("data"), PartitionSpec("data"))
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command. Of the options of a subcommand, each is a parameter of its `run`."""
    parser = argparse.ArgumentParser(prog="mpjax", description="Mixed precision for JAX.")
    parser.add_argument("--version", action="version", version=f"mpjax {importlib.metadata.version('mpjax')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,explain,compare,fit,bench,demo}")
    _add_info(commands)
    _add_explain(commands)
    _add_compare(commands)
    _add_fit(commands)
    _add_bench(commands)
    _add_demo(commands)
    return parser


def _add_info(commands: Any) -> None:
    info = commands.add_parser(
        "info",
        help="devices, versions and the precision to train in here",
        description="Prints this machine's devices, the versions in use, the table behind mpjax.default_policy "
        "with this machine's row marked, and the policy to train with here.",
    )
    info.add_argument("--json", action="store_true", help="print the same as JSON")


def _add_explain(commands: Any) -> None:
    explain = _add_tool(
        commands,
        "explain",
        "which operation of a function runs in which precision, and why",
        "Prints what mpjax.autocast does with each operation of a function, by module and source line. Nothing is run.",
        _ARGUMENTS,
    )
    _add_precision(explain)
    _add_files(explain, "FLOPs by module and dtype")


def _add_compare(commands: Any) -> None:
    compare = _add_tool(
        commands,
        "compare",
        "which operation of a function loses the accuracy in low precision",
        "Runs a function under mpjax.autocast beside a reference, and prints the error that each operation makes alone "
        "and that has accumulated, the worst first. For a small batch.",
        _ARGUMENTS + _FILLED,
    )
    _add_precision(compare)
    compare.add_argument(
        "--reference",
        choices=("float32", "float64"),
        default="float32",
        help="what errors are measured against (default: %(default)s)",
    )
    compare.add_argument("--seed", type=_natural, default=0, help="of arguments without values (default: %(default)s)")
    _add_files(compare, "errors by operation")


def _add_fit(commands: Any) -> None:
    fit = _add_tool(
        commands,
        "fit",
        "whether a function fits a TPU or GPU that is not here, and what it takes",
        "Compiles a function for a TPU or GPU on a machine that has none, in several precisions, and prints memory, "
        'bytes, FLOPs by dtype and estimated cycles side by side. Needs pip install "mpjax[aot-tpu]" or '
        '"mpjax[aot-gpu]". The function may be a whole training step with a jit of its own; float32 is as written.',
        _ARGUMENTS + _PLACED,
    )
    fit.add_argument("--target", required=True, help="v5e, v6e, h100 ...: a name of mpjax.aot.TARGETS, or cpu")
    fit.add_argument(
        "--mesh", dest="chips", metavar="CHIPS", help="a slice such as 4x4, or a number of GPUs (default: one device)"
    )
    fit.add_argument(
        "--axes", default="data", help="names of the mesh's axes, with commas between them (default: %(default)s)"
    )
    fit.add_argument(
        "--policies",
        default="float32,mixed_bfloat16",
        help="with commas between them, or semicolons between policies that have commas (default: %(default)s)",
    )
    _add_grad(fit)
    _add_files(fit, "memory by policy")


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="how fast this machine is in each precision, and what follows",
        description="Measures a matrix product and a training step of a small network in float32, bfloat16, float16 "
        "and fp8 on this machine's first device, and prints what to train in. Times are medians of runs that take "
        "turns, with the middle half of them. On a CPU no conclusion is drawn from them.",
    )
    bench.add_argument(
        "--size", type=_positive, help="rows and columns of each matrix (default: 4096, or 1024 on a CPU)"
    )
    bench.add_argument("--runs", type=_positive, default=11, help="times that each is measured (default: %(default)s)")
    _add_files(bench, "of the measurements")


def _add_demo(commands: Any) -> None:
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


def _add_tool(commands: Any, name: str, summary: str, description: str, epilog: str) -> argparse.ArgumentParser:
    tool: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=_Formatter,
    )
    tool.add_argument("function", help="module:function, or path/to/file.py:function")
    tool.add_argument(
        "--args", dest="args_name", metavar="NAME", help="where the arguments are (default: example_args; see below)"
    )
    return tool


def _add_precision(tool: argparse.ArgumentParser) -> None:
    tool.add_argument(
        "--policy", default="mixed_bfloat16", help="a policy, as mpjax.get_policy reads it (default: %(default)s)"
    )
    tool.add_argument(
        "--rules",
        dest="preset",
        choices=("mpjax", "torch", "tensorflow", "matmul"),
        default="mpjax",
        help="the table of rules, as mpjax.default_rules has it (default: %(default)s)",
    )
    _add_grad(tool)


def _add_grad(tool: argparse.ArgumentParser) -> None:
    tool.add_argument(
        "--grad",
        dest="with_gradients",
        action="store_true",
        help="the function's value and its gradients with respect to the first argument; it may return a pair of the "
        "loss and something else",
    )


def _add_files(tool: argparse.ArgumentParser, figure: str) -> None:
    tool.add_argument("--json", type=Path, metavar="FILE", help="write all of it as JSON")
    tool.add_argument("--png", type=Path, metavar="FILE", help=f"write a figure: {figure}")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the epilog, which has code in it, and fills those of the description."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


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
