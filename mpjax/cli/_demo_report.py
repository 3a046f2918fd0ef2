"""What `mpjax demo` prints at the end: one table, its footnotes, and what follows from the numbers."""

import math
from collections.abc import Sequence

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from mpjax.cli._demo_tasks import CLASSES, TASKS, Task
from mpjax.cli._demo_train import PROBES, Run

# Two runs that differ by less count as equal: a few of the 360 test images fall on either side by chance.
_SAME_POINTS = 2.0
# Shares of flushed gradients under this are no reason for anything.
_WORTH_SAYING = 0.01


def print_report(console: Console, runs: Sequence[Run]) -> None:
    """Prints the table, the footnotes and the conclusions."""
    console.print()
    console.print(_table(runs))
    console.print()
    for note in _footnotes(runs):
        console.print(note, style="dim")
    console.print()
    for sentence in conclusions(runs):
        console.print(sentence)


def _table(runs: Sequence[Run]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("precision", no_wrap=True)
    for header in (
        "test\nacc.",
        "final\nloss",
        "gradients\nflushed\nto 0",
        "steps\nskipped",
        "final\nscale",
        "param\nKiB",
        "temp\nKiB",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for task in TASKS:
        for run in _of(runs, task):
            table.add_row(
                task.name,
                run.precision.name,
                f"{run.accuracy:.1%}",
                f"{run.final_loss:.4f}",
                f"{run.flushed:.2%}",
                str(run.skipped),
                _power(run.final_scale) if run.precision.is_scaled else "-",
                f"{run.param_bytes / 1024:.0f}",
                "-" if run.temp_bytes is None else f"{run.temp_bytes / 1024:.0f}",
            )
        table.add_section()
    return table


def _footnotes(runs: Sequence[Run]) -> list[str]:
    dtypes = [dtype for run in runs if run.precision.policy != "float32" for dtype in run.matmul_dtypes]
    widened = dtypes.count("f32")
    platform = jax.devices()[0].platform
    temporary = "temp: the compiler's figure for a step's temporary memory, activations included, on this device."
    # On other platforms a float32 result only means float32 accumulation.
    if widened and platform == "cpu":
        temporary += (
            " XLA's CPU backend widens half precision inside matmuls and convolutions "
            f"({widened} of {len(dtypes)} in the compiled bf16 and fp16 steps are float32), so the figure says nothing "
            "about an accelerator."
        )
    return [
        "final loss: mean cross entropy of the last 20 steps, before the loss weight.",
        "flushed: of the gradient entries that float32 has nonzero at the same parameters and batch, those that "
        f"are 0 in the run's own backward pass; mean of {PROBES} batches spread over the run.",
        "param: the parameters that are kept; they are float32 in all four.",
        temporary,
    ]


def conclusions(runs: Sequence[Run]) -> list[str]:
    """What the numbers say: a sentence for each task and one for the loss scale."""
    scales = [_scale_history(run) for run in runs if run.precision.is_scaled]
    return [*(_comparison(_of(runs, task)) for task in TASKS), f"The loss scale {'; it '.join(scales)}."]


def _scale_history(run: Run) -> str:
    first, last = _power(float(run.metrics.scale[0])), _power(run.final_scale)
    moved = f"stayed at {last}" if first == last else f"went from {first} to {last}"
    steps = len(run.metrics.finite)
    return f"{moved} on the {run.task.name}, where {run.skipped} of {steps} steps overflowed and were skipped"


def _comparison(runs: Sequence[Run]) -> str:
    reference, *others = runs
    text = f"On the {reference.task.name} float32 reaches {reference.accuracy:.1%} (guessing: {1 / CLASSES:.0%})"
    apart = {run.precision.name: (run.accuracy - reference.accuracy) * 100 for run in others}
    same = [run for run in others if abs(apart[run.precision.name]) <= _SAME_POINTS]
    if same:
        listed = ", ".join(f"{run.precision.name} ({run.accuracy:.1%})" for run in same)
        text += f"; within {_SAME_POINTS:g} points of it {'is' if len(same) == 1 else 'are'} {listed}"
    for run in others:
        if run in same:
            continue
        points = apart[run.precision.name]
        text += f"; {run.precision.name} ends {abs(points):.1f} points {'below' if points < 0 else 'above'} it"
        if run.flushed >= _WORTH_SAYING:
            text += f", with {run.flushed:.0%} of its gradient entries flushed to 0"
    return text + "."


def _of(runs: Sequence[Run], task: Task) -> list[Run]:
    return [run for run in runs if run.task is task]


def _power(scale: float) -> str:
    return f"2^{math.log2(scale):.0f}"
