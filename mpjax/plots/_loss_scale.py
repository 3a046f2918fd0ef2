"""`mpjax.plots.loss_scale_history`: the loss scale over the steps, and which of them were skipped."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from mpjax._errors import problem
from mpjax.diagnostics import scalars
from mpjax.plots._house import BLUE, RED, drawing, figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW = 20  # Of so many marks for several steps each says how many they are.
_MANY = 100  # Of more marks than so, each is small.
_NUMBER = (int, float, np.generic, np.ndarray, jax.Array)


class _History(NamedTuple):
    """Arrays of shape (n,): steps, scales, steps skipped since the entry before, and the scale at which they were."""

    steps: Any
    scales: Any
    skips: Any
    marks: Any


def loss_scale_history(history: Any, skipped: Any = None, *, steps: Any = None, ax: Any = None) -> "Figure":
    """Draws the loss scale over the steps, and marks those that were skipped.

    Args:
      history: one of these:

        - the scale that each step used, an array of shape (n,) or a list of numbers, with `skipped` beside it;
        - a list of what `mpjax.diagnostics.scalars` returns, or of other mappings with `loss_scale` and `skips_total`;
          those without a `loss_scale` are left out;
        - the path of a file of `mpjax.diagnostics.JsonLines`, of which the same holds;
        - a list of optimizer states, as the steps returned them.

        But for the first, it may be of every so many steps: a mark stands for all steps skipped since the last one.
        Where steps are there twice, as after a run went on from a checkpoint, what comes later replaces them.
      skipped: beside scales: which steps were skipped, booleans of shape (n,), or the running count `skips_total`.
      steps: numbers of the steps, of shape (n,), in order. Default: `step` of each mapping, or 0, 1, 2 ...
      ax: matplotlib axes to draw into. Default: those of a new figure.

    Returns:
      The matplotlib `Figure`. A scale that is no positive number leaves a gap.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: `history` is none of these, or `ax` no axes.
      ValueError: there is no scale; lengths differ; `steps` does not rise, or a running count falls; `skipped` is
        given beside states or mappings, which say it themselves.

    >>> import mpjax as mp
    >>> figure = mp.plots.loss_scale_history([2.0**16, 2.0**16, 2.0**15], [False, True, False])
    >>> figure.axes[0].get_legend().get_texts()[0].get_text()
    '1 step skipped'
    """
    found = _read(history, skipped, steps)
    with drawing(ax, (7.0, 3.2)) as ax:
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

        ax.step(found.steps, found.scales, where="post", color=BLUE, linewidth=1.8)
        if not np.isfinite(found.scales[-2:-1]).any():  # a last entry that no line ends at
            ax.plot(found.steps[-1:], found.scales[-1:], "o", color=BLUE, markersize=4)
        if len(found.steps) == 1:
            ax.set_xlim(found.steps[0] - 1, found.steps[0] + 1)
        if found.skips is not None:
            at = found.skips > 0
            total = int(found.skips.sum())
            label = f"{total:,} {'step' if total == 1 else 'steps'} skipped"
            size, width = (7, 1.8) if at.sum() <= _MANY else (3, 0.6)
            style = {"color": RED, "markersize": size, "markeredgewidth": width, "linestyle": "none"}
            ax.plot(found.steps[at], found.marks[at], "x", label=label, zorder=3, **style)
            several = np.flatnonzero(found.skips > 1)
            for i in several if len(several) <= _FEW else []:
                at, text = (found.steps[i], found.marks[i]), f"{found.skips[i]}"
                ax.annotate(text, at, (0, 6), textcoords="offset points", ha="center", color=RED)
            ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, frameon=False)
        finite = found.scales[np.isfinite(found.scales)]
        # A whole power of two beyond each end, so that a scale that never moves has a place too.
        ax.set_yscale("log", base=2)
        ax.set_ylim(finite.min() / 2, finite.max() * 2)
        ax.yaxis.set_major_locator(LogLocator(base=2, numticks=9))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda scale, position: f"$2^{{{np.log2(scale):.0f}}}$"))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        ax.set(xlabel="step", ylabel="loss scale")
        return figure_of(ax)


def _read(history: Any, skipped: Any, steps: Any) -> _History:
    if isinstance(history, str | os.PathLike):
        history = _lines(Path(history))
    # A state is a tuple too, but not of states.
    if isinstance(history, Mapping) or hasattr(history, "_fields") or not isinstance(history, Iterable):
        raise _refused(TypeError, f"history is a {type(history).__name__}.")
    # An array as it is: its entries one by one would be as many copies from the device.
    entries: Any = history if hasattr(history, "dtype") else list(history)
    if hasattr(entries, "dtype") or (entries and isinstance(entries[0], _NUMBER)):
        return _of_scales(jax.device_get(entries), skipped, steps)
    if skipped is not None:
        raise ValueError(
            problem(
                "skipped is given beside states or mappings.",
                expected="nothing: they count the skipped steps themselves",
                write="mp.plots.loss_scale_history(history)",
            )
        )
    return _of_rows(entries, steps)


def _lines(path: Path) -> list[Any]:
    # What follows the last end of a line was cut short by a crash, or is being written.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise _refused(ValueError, f"{path} has a line that is not JSON: {error.doc[:80]!r}.") from error


def _of_scales(scales: Any, skipped: Any, steps: Any) -> _History:
    scales = np.asarray(scales, np.float64)
    if scales.ndim != 1:
        raise _refused(ValueError, f"history has the shape {scales.shape}.")
    steps = _checked_steps(np.arange(len(scales)) if steps is None else steps, len(scales))
    scales = _drawable(scales)
    # A step whose scale was no number has its mark at the last that was one.
    known = np.maximum.accumulate(np.where(np.isfinite(scales), np.arange(len(scales)), 0))
    return _History(steps, scales, None if skipped is None else _skips(np.asarray(skipped), steps), scales[known])


def _of_rows(entries: list[Any], steps: Any) -> _History:
    rows = [entry if isinstance(entry, Mapping) else scalars(entry) for entry in entries]
    if steps is None:
        known = all("step" in row for row in rows)
        numbered: list[tuple[Any, Mapping[str, Any]]] = []
        for step, row in [(row["step"] if known else i, row) for i, row in enumerate(rows)]:
            # A run that went on from a checkpoint writes the steps since then once more.
            while numbered and numbered[-1][0] >= step:
                numbered.pop()
            numbered.append((step, row))
    else:
        numbered = list(zip(_checked_steps(steps, len(rows)), rows, strict=True))
    numbered = [(step, row) for step, row in numbered if "loss_scale" in row]
    steps = np.array([step for step, _ in numbered])
    scales = _drawable(np.array([float(row["loss_scale"]) for _, row in numbered], np.float64))
    skips = None
    if all("skips_total" in row for _, row in numbered):
        skips = _skips(np.array([int(row["skips_total"]) for _, row in numbered]), steps)
    # A state comes after its step, and its scale has backed off already.
    return _History(steps, scales, skips, np.concatenate([scales[:1], scales[:-1]]))


def _checked_steps(steps: Any, count: int) -> Any:
    steps = np.asarray(steps)
    if steps.shape != (count,) or (np.diff(steps) <= 0).any():
        raise ValueError(
            problem(
                f"steps has the shape {steps.shape}, for {count} scales."
                if steps.shape != (count,)
                else "steps does not rise from each entry to the next.",
                expected="the number of each step, in order",
                write="steps=range(0, 1000, 10)",
            )
        )
    return steps


def _skips(skipped: Any, steps: Any) -> Any:
    """How many steps were skipped at each entry, since the one before."""
    if skipped.dtype == bool and skipped.shape == steps.shape:
        return skipped.astype(np.int64)
    if np.issubdtype(skipped.dtype, np.integer) and skipped.shape == steps.shape:
        # What came before the first entry is known where that is the first step.
        skips = np.diff(skipped, prepend=0 if steps[0] == 0 else skipped[0])
        if (skips >= 0).all():
            return skips
        what = f"skipped counts {skipped[skips.argmin() - 1]} steps, and then {skipped[skips.argmin()]}."
    else:
        what = f"skipped is of {skipped.dtype} and of the shape {skipped.shape}, for {len(steps)} scales."
    raise ValueError(
        problem(
            what,
            expected="a boolean for each scale, or the running count of skipped steps",
            write="skipped=~last_step_finite, or skipped=skips_total",
        )
    )


def _drawable(scales: Any) -> Any:
    """Scales with a gap for what is no positive number.

    Raises:
      ValueError: nothing is left.
    """
    drawable = np.isfinite(scales) & (scales > 0)
    if not drawable.any():
        raise _refused(ValueError, f"history has no positive loss scale in {len(scales)} entries.")
    return np.where(drawable, scales, np.nan)


def _refused(kind: type[Exception], what: str) -> Exception:
    return kind(
        problem(
            what,
            expected="the loss scale of each step, results of mp.diagnostics.scalars, the path of a file of "
            "mp.diagnostics.JsonLines, or optimizer states",
            write="mp.plots.loss_scale_history([mp.diagnostics.scalars(opt_state) ...])",
        )
    )
