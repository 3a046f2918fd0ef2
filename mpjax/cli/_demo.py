"""`mpjax demo`: two networks in four precisions, one table and one figure."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mpjax.cli._checks import figure_path, start_backend, write_whole
from mpjax.cli._demo_figure import draw
from mpjax.cli._demo_report import print_report
from mpjax.cli._demo_tasks import BATCH, PRECISIONS, TASKS, Digits
from mpjax.cli._demo_train import train


def run(steps: int, out: Path, seed: int) -> None:
    """Trains, prints and draws.

    Args:
      steps: training steps of each run.
      out: a folder for `demo.png`, or a path that ends in `.png`.
      seed: of initial parameters and batch order, the same in all four precisions.

    Raises:
      CommandError: JAX does not start, or the figure cannot be written.
    """
    path = figure_path(out, "demo.png")
    device = start_backend()[0]
    digits = Digits.load()

    console = Console(highlight=False, markup=False)
    console.print(
        f"{len(digits.train_images)} training and {len(digits.test_images)} test images of handwritten digits, "
        f"{steps} steps of {BATCH} images on {device.platform} ({device.device_kind}); the same initial parameters "
        "and batches in all four precisions."
    )
    for task in TASKS:
        console.print(f"{task.name}: {task.about}")
    with _progress(console, steps * len(TASKS) * len(PRECISIONS)) as begin:
        runs = [
            train(task, precision, digits, steps, seed, begin(f"{task.name}, {precision.name}"))
            for task in TASKS
            for precision in PRECISIONS
        ]
    print_report(console, runs)
    write_whole(path, draw(runs))
    console.print(f"Figure: {path}", soft_wrap=True)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[str], Callable[[int], None]]]:
    """A bar on a terminal, a line for each run elsewhere; `begin(title)` returns what counts that run's steps."""
    if not console.is_terminal:

        def begin_line(title: str) -> Callable[[int], None]:
            console.print(f"training {title}")
            return lambda steps: None

        yield begin_line
        return

    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=total)

        def begin(title: str) -> Callable[[int], None]:
            progress.update(bar, description=title)
            return lambda steps: progress.advance(bar, steps)

        yield begin
