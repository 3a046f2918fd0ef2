"""`mpjax.plots.exponent_histogram`: how large numbers are, under the ranges of the formats."""

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._errors import problem
from mpjax._tree import instances
from mpjax.diagnostics import GradientMonitorState, TreeStats
from mpjax.diagnostics._summary import without_boxes
from mpjax.plots._house import BLUE, GREEN, GREY, PURPLE, RED, drawing, figure_of, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = ((BLUE, "-"), (RED, "--"), (GREEN, "-."), (PURPLE, ":"))
_BAR = "#BBBBBB"
_HEIGHT = 2.6  # Of the histogram, in inches; and of a line of what is written beside a format's bar.
_LINE = 0.15


class _Counts(NamedTuple):
    """Statistics of all leaves together.

    Attributes:
      name: what they are of.
      stats: of each leaf, on the host.
      numbers: how many are finite and not 0.
      histogram: of these, float64 (bins,), in percent.
    """

    name: str
    stats: TreeStats
    numbers: int
    histogram: Any

    @property
    def left_out(self) -> str:
        """What is in no bin."""
        size, zeros, non_finite = (
            int(x.sum(dtype=np.int64)) for x in (self.stats.size, self.stats.zeros, self.stats.non_finite)
        )
        parts = [(zeros, "are 0"), (non_finite, "are not finite")]
        return " and ".join(f"{percent(count / size)} {what}" for count, what in parts if count)

    @property
    def beyond(self) -> bool:
        """Whether the first or the last bin holds numbers that are smaller or larger than it says."""
        (first, last), some = self.stats.exponents, self.stats.histogram.any(1)
        return bool(self.stats.min_exponent[some].min() < first or self.stats.max_exponent[some].max() > last)

    def lost(self, dtype: str) -> str:
        """What a format would lose."""
        index = self.stats.formats.index(dtype)
        kinds = (("to 0", self.stats.underflow), ("subnormal", self.stats.subnormal), ("to inf", self.stats.overflow))
        shares = [(kind, int(count[:, index].sum(dtype=np.int64)) / self.numbers) for kind, count in kinds]
        return ", ".join(f"{percent(share)} {kind}" for kind, share in shares if share) or "nothing lost"


def exponent_histogram(stats: Any, *, ax: Any = None) -> "Figure":
    """Draws how large numbers are, in powers of two, under the ranges of the formats.

    Above the histogram is a bar for each format: filled over its normal numbers, hatched over its subnormal ones, which
    have fewer digits. Beside it stands how many of the numbers it would round to 0, to subnormal numbers, to inf.

    Args:
      stats: of `mpjax.diagnostics.tree_stats`, of one tree at one step; or an optimizer's state with a
        `mpjax.diagnostics.GradientMonitorState` in it, for the gradients that were measured last, times their loss
        scale; or a mapping of names to such, to draw one upon the other. The formats are those of the first.
      ax: matplotlib axes to draw into. Default: those of a new figure.

    Returns:
      The matplotlib `Figure`. Shares are of the finite numbers that are not 0, of all leaves together.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: `ax` is no axes.
      ValueError: `stats` has no statistics in it, or those of several steps or members of an ensemble, or of no number
        but 0; a monitor has not measured yet.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> stats = mp.diagnostics.tree_stats({"w": jnp.array([1e-9, 1e-6, 1e-3])}, "float16")
    >>> figure = mp.plots.exponent_histogram(stats)
    >>> print(figure.axes[0].texts[0].get_text())
    float16
    33.3% to 0, 33.3% subnormal
    """
    named = stats if isinstance(stats, Mapping) and stats else {"": stats}
    found = [_counts(str(name), one) for name, one in named.items()]
    # Letters say which is which beside the bars, where there is no room for names.
    letters = [f"{chr(ord('a') + i)}: " if len(found) > 1 else "" for i in range(len(found))]
    above = _LINE * (1 + len(found)) * len(found[0].stats.formats) + 0.1
    share = _HEIGHT / (_HEIGHT + above)  # of the height, for the histogram
    with drawing(ax, (7.8, 0.9 + _HEIGHT + above)) as ax:
        from matplotlib.ticker import FuncFormatter, MultipleLocator

        highest = max(float(counts.histogram.max()) for counts in found)
        for i, (letter, counts) in enumerate(zip(letters, found, strict=True)):
            # The fifth has the first one's colour, and another line.
            (color, _), (_, line) = _LINES[i % len(_LINES)], _LINES[(i + i // len(_LINES)) % len(_LINES)]
            edges = np.arange(counts.stats.exponents[0], counts.stats.exponents[1] + 2)
            ax.stairs(counts.histogram, edges, fill=True, color=color, alpha=0.2)
            ax.stairs(counts.histogram, edges, color=color, linestyle=line, linewidth=1.6, label=letter + counts.name)
        first = min(counts.stats.exponents[0] for counts in found)
        last = max(counts.stats.exponents[1] for counts in found) + 1
        _draw_formats(ax, found, letters, first, last, share)
        left_out = "; ".join(letter + x.left_out for letter, x in zip(letters, found, strict=True) if x.left_out)
        notes = [f"{left_out}: left out"] if left_out else []
        notes += ["the outermost bars hold all beyond them"] if any(counts.beyond for counts in found) else []
        ax.set(
            xlim=(first, last),
            ylim=(0, highest / (0.95 * share)),
            xlabel=textwrap.fill("size of the numbers" + (f" ({'; '.join(notes)})" if notes else ""), 75),
            ylabel="% of the numbers",
        )
        apart = next(n for n in (1, 2, 4, 8, 16, 32) if last - first <= 12 * n)
        ax.xaxis.set_major_locator(MultipleLocator(apart))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda exponent, position: f"$2^{{{exponent:.0f}}}$"))
        ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= highest])
        if any(counts.name for counts in found):
            ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.2, frameon=False)
        return figure_of(ax)


def _draw_formats(ax: Any, found: list[_Counts], letters: list[str], first: int, last: int, bottom: float) -> None:
    """A bar for each format, from its smallest number to its largest, and what it would lose beside it."""
    formats = found[0].stats.formats
    height = (0.99 - bottom) / max(len(formats), 1)
    across = ax.get_xaxis_transform()
    for i, name in enumerate(formats):
        info = jnp.finfo(name)
        limits = (info.smallest_subnormal, info.smallest_normal, info.max)
        smallest, normal, largest = (float(np.clip(np.log2(float(x)), first, last)) for x in limits)
        middle = 0.99 - (i + 0.5) * height
        style = {"height": 0.45 * height, "transform": across, "edgecolor": GREY, "linewidth": 0.8}
        ax.barh(middle, normal - smallest, left=smallest, facecolor="white", hatch="////", **style)
        ax.barh(middle, largest - normal, left=normal, facecolor=_BAR, **style)
        lines = [letter + x.lost(name) for letter, x in zip(letters, found, strict=True) if name in x.stats.formats]
        ax.text(1.01, middle, "\n".join([name, *lines]), transform=ax.transAxes, va="center", fontsize=8)
        # Its smallest number beside the bar, or in it where it begins left of the axes.
        text = f"$2^{{{np.log2(float(info.smallest_subnormal)):.0f}}}$"
        x, text, side = (first + 0.4, f"◂ {text}", "left") if smallest == first else (smallest - 0.4, text, "right")
        ax.text(x, middle, text, transform=across, ha=side, va="center", fontsize=7)


def _counts(name: str, given: Any) -> _Counts:
    kinds = (GradientMonitorState, TreeStats)
    held = [x for _, x in instances(given, kinds)]
    if len(held) != 1:
        raise _refused(
            f"stats has {len(held)} times the statistics of gradients in it.",
            "mp.plots.exponent_histogram(mp.diagnostics.tree_stats(grads))",
        )
    one = jax.device_get(without_boxes(held[0][1:] if isinstance(held[0], GradientMonitorState) else held[0]))
    step: Any = None
    scale: Any = None
    if isinstance(one, tuple):
        _, one, step, scale, *_ = one
    if one.histogram.ndim != 2:
        raise _refused(
            f"stats is of {len(one.histogram)} steps or members.",
            "mp.plots.exponent_histogram(jax.tree.map(lambda x: x[-1], stats)), for the last",
        )
    if step is not None:
        if step < 0:
            raise _refused(
                "the gradient monitor has not measured any step yet.",
                "mp.plots.exponent_histogram(opt_state), after the first update",
            )
        name = name or f"gradients of step {step}, times their loss scale $2^{{{np.log2(scale):.0f}}}$"
    histogram = one.histogram.sum(0, dtype=np.int64)
    numbers = int(histogram.sum())
    if not numbers:
        raise _refused("stats is of no finite number but 0.", "mp.diagnostics.tree_stats(grads), after a step")
    return _Counts(name, one, numbers, 100 * histogram / numbers)


def _refused(what: str, write: str) -> ValueError:
    expected = "a result of mp.diagnostics.tree_stats, or a state with a gradient monitor, of one step"
    return ValueError(problem(what, expected=expected, write=write))
