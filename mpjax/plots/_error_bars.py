"""`mpjax.plots.error_bars`: the error that each operation in low precision makes."""

import math
from typing import TYPE_CHECKING, Any

from mpjax._autocast._rules import file_and_line
from mpjax._errors import problem
from mpjax.diagnostics import Comparison, OperationError
from mpjax.plots._house import BLUE, GREY, ORANGE, SKY, check_limit, drawing, figure_of, from_left

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST = 46  # characters of an operation's name


def error_bars(comparison: Any, *, limit: int = 20, ax: Any = None) -> "Figure":
    """Draws what each operation in low precision does to a function's results, the worst on top.

    A bar is the error of the results where this operation alone is in low precision; a dashed line, where all are. A
    circle is the error of what the operation itself gives where it alone is, a diamond where all are; forward or
    backward, whichever is larger. An operation whose circle is far right of its bar is inaccurate, and it does not
    matter.

    Args:
      comparison: a result of `mpjax.diagnostics.compare`.
      limit: the most operations to draw; those without an error are never drawn.
      ax: matplotlib axes to draw into. Default: those of a new figure.

    Returns:
      The matplotlib `Figure`. Errors are relative, on a logarithmic axis, where 0 has no place: there is no mark. What
      is infinite reaches beyond the right edge.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: `comparison` is something else, or `ax` no axes.
      ValueError: no operation has an error, or `limit` is no whole number from 1.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> def fn(w, x):
    ...     return jnp.sum(x @ w)
    >>> found = mp.diagnostics.compare(fn, "mixed_bfloat16")(jnp.full((4, 4), 0.11), jnp.full((2, 4), 0.7))
    >>> figure = mp.plots.error_bars(found)
    >>> figure.axes[0].get_yticklabels()[0].get_text()
    'dot_general  ...'
    """
    if not isinstance(comparison, Comparison):
        raise TypeError(
            problem(
                f"comparison is a {type(comparison).__name__}.",
                expected="a result of mp.diagnostics.compare; what mp.aot.compare returns is for memory_bars",
                write="mp.plots.error_bars(mp.diagnostics.compare(fn, policy)(*args))",
            )
        )
    check_limit(limit)
    found = [row for row in comparison.operations if row.total or row.local or row.local_backward]
    if not found:
        raise ValueError(
            problem(
                "no operation of comparison has an error.",
                expected="some in low precision, on numbers that it does not hold exactly",
                write='mp.diagnostics.compare(fn, "mixed_bfloat16")(*args)',
            )
        )
    rows = found[:limit]
    totals = [row.total for row in rows]
    local = [max(row.local, row.local_backward or 0.0) for row in rows]
    accumulated = [max(row.accumulated, row.accumulated_backward or 0.0) for row in rows]
    finite = [x for x in (*totals, *local, *accumulated, comparison.total) if 0 < x < math.inf] or [1.0]
    left, right = min(finite) / 3, max(finite) * 3
    with drawing(ax, (8.0, 1.5 + 0.28 * max(len(rows), 3))) as ax:
        _draw_bars(ax, totals, left, right)
        # Where both are the same, the diamond is inside the circle.
        _draw_marks(ax, local, right, "o", "white", 7.5, "its output, this alone")
        _draw_marks(ax, accumulated, right, "D", BLUE, 3.5, "its output, all")
        if comparison.total:
            label = f"results, all in low precision ({comparison.total:.2g})"
            ax.axvline(min(comparison.total, right), color=GREY, linestyle="--", linewidth=1.2, label=label)
        left_out = f" ({len(found) - limit} operations that do less are left out)" if len(found) > limit else ""
        ax.set(xscale="log", xlabel=f"error relative to {comparison.reference}{left_out}")
        ax.set(xlim=(left, right), ylim=(len(rows) - 0.4, -0.6))
        ax.set_yticks(range(len(rows)), [_name(row) for row in rows])
        ax.grid(visible=False, axis="y")
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2, frameon=False)
        return figure_of(ax)


def _draw_bars(ax: Any, totals: list[float], left: float, right: float) -> None:
    finite = {i: total - left for i, total in enumerate(totals) if 0 < total < math.inf}
    infinite = [i for i, total in enumerate(totals) if total == math.inf]
    style = {"left": left, "height": 0.6, "edgecolor": GREY, "linewidth": 0.6}
    if finite:
        label = "results, this alone in low precision"
        ax.barh([*finite], [*finite.values()], facecolor=SKY, label=label, **style)
    if infinite:
        # Across the right edge: there is no end to see.
        ax.barh(infinite, 10 * right, facecolor=ORANGE, hatch="xxx", label="results, this alone: infinite", **style)
    for i, total in enumerate(totals):
        ax.text(1.03, i, f"{total:.2g}", transform=ax.get_yaxis_transform(), va="center", fontsize=8)


def _draw_marks(ax: Any, errors: list[float], right: float, marker: str, face: str, size: float, label: str) -> None:
    """Marks of the errors that are not 0; of infinite ones at the edge."""
    where = [i for i, x in enumerate(errors) if x]
    style = {"linestyle": "none", "markersize": size, "markeredgewidth": 1.2, "clip_on": False, "zorder": 3}
    if where:
        at = [min(errors[i], right) for i in where]
        ax.plot(at, where, marker, color=BLUE, markerfacecolor=face, label=label, **style)


def _name(row: OperationError) -> str:
    """What it is, in which module, at which line of which file: the module is what is shortened."""
    ends = [row.primitive, file_and_line(row.source).rsplit("/", 1)[-1]]
    room = max(_LONGEST - sum(map(len, ends)), 12)
    return "  ".join(filter(None, (ends[0], from_left(row.path, room), ends[1])))
