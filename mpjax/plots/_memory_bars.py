"""`mpjax.plots.memory_bars`: the memory that programs take, against what the chip has."""

from typing import TYPE_CHECKING, Any

from mpjax._errors import problem
from mpjax.aot import Comparison
from mpjax.aot._report import in_bytes
from mpjax.plots._house import GREY, RED, SKY, drawing, figure_of, from_left

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNITS = (("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0))
# Of a chip with more than so many times what the largest takes, the limit is said and not drawn.
_FAR = 20


def memory_bars(comparison: Any, *, ax: Any = None) -> "Figure":
    """Draws the peak memory of each program that was compiled, against that of the chip.

    A bar is the peak on each device, its hatched end what a program takes beyond that to run: temporaries are one block
    with gaps in it. The line is what a program may use.

    Args:
      comparison: a result of `mpjax.aot.compare`.
      ax: matplotlib axes to draw into. Default: those of a new figure.

    Returns:
      The matplotlib `Figure`. Beside each bar stands what it takes, and whether it fits.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: `comparison` is something else, or `ax` no axes.
      ValueError: there are no programs in it.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> fn, x = lambda x: jnp.tanh(x @ x), jax.ShapeDtypeStruct((512, 512), jnp.float32)
    >>> found = mp.aot.compare({"float32": fn, "bfloat16": mp.autocast(fn, "mixed_bfloat16")}, "cpu", x)
    >>> figure = mp.plots.memory_bars(found)
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['float32', 'bfloat16']
    """
    if not isinstance(comparison, Comparison):
        raise TypeError(
            problem(
                f"comparison is a {type(comparison).__name__}.",
                expected="a result of mp.aot.compare; what mp.diagnostics.compare returns is for error_bars",
                write='mp.plots.memory_bars(mp.aot.compare({"float32": fn, "bfloat16": half}, "v5e", *args))',
            )
        )
    if not comparison.reports:
        raise ValueError(
            problem(
                "comparison has no programs in it.",
                expected="one or more",
                write='mp.aot.compare({"float32": fn}, "v5e", *args)',
            )
        )
    reports = list(comparison.reports.values())
    first = reports[0]
    most = max(report.needed_bytes for report in reports)
    limit = first.memory_limit if first.memory_limit and first.memory_limit <= _FAR * most else None
    unit, power = next((name, power) for name, power in _UNITS if most >= 2**power or not power)
    with drawing(ax, (7.5, 1.3 + 0.42 * max(len(reports), 2))) as ax:
        peaks = [report.peak_bytes / 2**power for report in reports]
        beyond = [(report.needed_bytes - report.peak_bytes) / 2**power for report in reports]
        style = {"height": 0.6, "edgecolor": GREY, "linewidth": 0.8}
        ax.barh(range(len(reports)), peaks, facecolor=SKY, label="peak", **style)
        if any(beyond):
            ax.barh(
                range(len(reports)),
                beyond,
                left=peaks,
                facecolor="white",
                hatch="////",
                label="needed beyond the peak",
                **style,
            )
        for i, report in enumerate(reports):
            verdict = {None: "", True: ", fits", False: ", does not fit"}[report.fits]
            text = f"{in_bytes(report.needed_bytes)}{verdict}"
            ax.text(1.01, i, text, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
        if limit:
            ax.axvline(limit / 2**power, color=RED, linestyle="--", linewidth=1.6, label=f"limit: {in_bytes(limit)}")
        ax.set_yticks(range(len(reports)), [from_left(name, 40) for name in comparison.reports])
        ax.set(xlim=(0, 1.06 * max(most, limit or 0) / 2**power), ylim=(len(reports) - 0.4, -0.6))
        ax.grid(visible=False, axis="y")
        where = f"each {first.title} of {first.devices}" if first.devices > 1 else first.title
        far = f", which has {in_bytes(first.memory_limit)}" if first.memory_limit and not limit else ""
        ax.set(xlabel=f"memory on {where}{far} ({unit})")
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.2, frameon=False)
        return figure_of(ax)
