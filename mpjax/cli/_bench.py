"""`mpjax bench`: how fast this machine is in each precision, and which to train in."""

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

import mpjax as mp
from mpjax._errors import problem
from mpjax._hardware import hardware_of
from mpjax.cli._bench_measure import PRODUCT, STEP, Measurement, measure, products, steps
from mpjax.cli._checks import CommandError, start_backend
from mpjax.cli._show import write_results

_BFLOAT16, _FLOAT16, _FLOAT8 = "mixed_bfloat16", "mixed_float16", "mixed_float8"


def run(*, size: int | None, runs: int, json: Path | None, png: Path | None) -> None:
    """Measures and prints.

    Args:
      size: rows and columns of matrices; `None` for a default by device.
      runs: how often each is measured.
      json: a file to write everything to, or `None`.
      png: a file to draw to, or `None`.

    Raises:
      CommandError: JAX does not start, or a file cannot be written.
    """
    device = start_backend()[0]
    is_cpu = device.platform == "cpu"
    size = size or (1024 if is_cpu else 4096)
    turns = 1 if is_cpu else 10
    try:
        rows = measure(products(size, device), runs, turns) + measure(steps(size, device), runs, turns)
    except jax.errors.JaxRuntimeError as error:
        raise CommandError(
            problem(
                f"--size is {size}: {str(error).splitlines()[0]}",
                expected="matrices that this device has the memory for",
                write=f"mpjax bench --size {max(size // 2, 1)}",
            )
        ) from error
    told = cpu_conclusions(rows) if is_cpu else conclusions(rows, str(mp.default_policy(device)))
    if not hardware_of(device).has_fp8(device):
        told.append("There is no row for fp8: this device has no matrix units for it.")

    console = Console(highlight=False, markup=False)
    title = f"{device.platform} ({device.device_kind}), {size} x {size}, {runs} runs that take turns"
    console.print(_table(rows, title, with_rates=not is_cpu))
    for sentence in told:
        console.print(sentence)

    facts = {
        "device": {"platform": device.platform, "kind": device.device_kind},
        "size": size,
        "measurements": [
            {"kind": row.kind, "precision": row.precision, "seconds": row.seconds, "median": row.median}
            | {"middle_half": row.middle_half, "flops": row.flops, "finite": row.finite}
            for row in rows
        ],
        "conclusions": told,
    }

    def draw() -> Any:
        from mpjax.cli._bench_figure import draw

        return draw(rows, title, with_rates=not is_cpu)

    write_results(json_format.dumps(facts, indent=2), draw, json, png)


def _table(rows: Sequence[Measurement], title: str, *, with_rates: bool) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("")
    table.add_column("precision")
    for header in ("median\nms", "middle half\nms", *(["TFLOP/s"] if with_rates else [])):
        table.add_column(header, justify="right", no_wrap=True)
    for kind in (PRODUCT, STEP):
        for row in rows:
            if row.kind == kind:
                low, high = (f"{1e3 * seconds:.3f}" for seconds in row.middle_half)
                cells = [row.kind, row.precision, f"{1e3 * row.median:.3f}", f"{low} to {high}"]
                table.add_row(*cells, *([f"{row.flops / row.median / 1e12:.1f}"] if with_rates else []))
        table.add_section()
    return table


def cpu_conclusions(rows: Sequence[Measurement]) -> list[str]:
    """What times on a CPU say of training: next to nothing."""
    broken = [f"{row.kind} in {row.precision}" for row in rows if not row.finite]
    return [
        f"Not finite: {', '.join(broken)}." if broken else "Each of them runs here, and its results are finite.",
        "These are seconds of a CPU. They say how long each takes on this one, and nothing of training on a TPU or "
        "GPU: a CPU computes in 16 bits in another way, often by way of float32, and what is slower here may be the "
        "fastest there. So no row is set against another, and no precision is recommended for its time.",
        "On this machine train in float32, which mp.default_policy() is. What a step takes on hardware that is not "
        "here: mpjax fit module:function --target v5e. How fast that hardware is: mpjax bench, there.",
    ]


def conclusions(rows: Sequence[Measurement], default: str) -> list[str]:
    """What follows from times on an accelerator.

    Args:
      rows: all measurements.
      default: the policy that `mpjax.default_policy` has for this device.
    """
    by_name = {row.precision: row for row in rows if row.kind == STEP}
    reference, fp8 = by_name.pop("float32"), by_name.pop(_FLOAT8, None)
    faster = [row for row in by_name.values() if row.finite and row.is_faster_than(reference)]
    if faster:
        best = min(faster, key=lambda row: row.median)
        bfloat16 = by_name[_BFLOAT16]
        why = ""
        if best.precision == _FLOAT16 and bfloat16 in faster and not best.is_faster_than(bfloat16):
            best, why = bfloat16, " float16 is no faster beyond what the runs vary, and needs a loss scale."
        factor = reference.median / best.median
        told = [f'Train with mp.get_policy("{best.precision}"): its step is {factor:.2f}x as fast as float32\'s.{why}']
    else:
        told = ["No precision's step is faster than float32's beyond what the runs vary: at this size, stay with it."]
        told.append("Larger matrices may tell otherwise (--size), and 16 bits save memory (mpjax fit).")
    half = by_name[_BFLOAT16]
    if fp8 and fp8.is_faster_than(half):
        # Not recommended for its time alone: whether a model bears it is another question.
        factor = half.median / fp8.median
        told.append(f"{_FLOAT8}'s step is {factor:.2f}x as fast as bfloat16's. What it does to a model: mpjax compare.")
    elif fp8:
        told.append(f"{_FLOAT8}'s step is no faster than bfloat16's beyond what the runs vary.")
    broken = [f"{row.kind} in {row.precision}" for row in rows if not row.finite]
    told += [f"Not finite: {', '.join(broken)}."] if broken else []
    told.append(
        f"mp.default_policy() here is {default}. This was one network of square matrices: yours has other shapes, and "
        "smaller ones gain less."
    )
    return told
