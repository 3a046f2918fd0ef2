"""`mpjax.plots.underflow_heatmap`: what each leaf's gradients lose to small numbers, step by step."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from mpjax._dtypes import canonical_dtype
from mpjax._errors import problem
from mpjax.diagnostics import TreeStats
from mpjax.plots._house import check_limit, drawing, figure_of, from_left

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW = 120  # Of so many cells each has room for its number.
_NARROW = 100  # More columns than so are too narrow for an edge.
_TICKS, _LETTERS = 12, 48  # The most labels of steps, and letters in them.


def underflow_heatmap(
    stats: Any, steps: Any = None, *, dtype: Any = "float16", subnormal: bool = True, limit: int = 30, ax: Any = None
) -> "Figure":
    """Draws what share of each leaf's numbers a format makes subnormal or 0, over the steps.

    A row is a leaf, a column a step that was measured. Shares are of the finite numbers that are not 0 already: what a
    float16 backward pass has flushed on its way is not in them, so measure float32 gradients to see all of it, and
    `mpjax.scale_gradients` of them to see what a loss scale saves.

    Args:
      stats: results of `mpjax.diagnostics.tree_stats` of the same tree, one a step, or stacked by `jax.lax.scan`.
      steps: the number of each step. Default: 0, 1, 2 ...
      dtype: the format, one of those that the statistics have.
      subnormal: whether numbers that become subnormal count: they lose digits, and those that become 0 lose all.
      limit: the most rows. Of more leaves, those are drawn that lose most.
      ax: matplotlib axes to draw into. Default: those of a new figure.

    Returns:
      The matplotlib `Figure`. A leaf in which all numbers are 0 already has no cell at that step.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: `stats` holds something else, or `ax` is no axes.
      ValueError: there are no statistics, of different leaves, or not of this format; lengths differ; `limit` is no
        whole number from 1; and as `mpjax.get_policy` for a dtype.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> grads = [{"a": jnp.full(4, 1e-3 / 2**i), "b": jnp.full(4, 1e-6 / 2**i)} for i in (0, 8, 16)]
    >>> stats = [mp.diagnostics.tree_stats(tree) for tree in grads]
    >>> figure = mp.plots.underflow_heatmap(stats, steps=[0, 100, 200])
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['a', 'b']
    """
    name = str(canonical_dtype(dtype))
    whole = _stacked(stats)
    count = len(whole.size)
    steps = np.arange(count) if steps is None else np.asarray(steps)
    if steps.shape != (count,):
        raise _refused(ValueError, f"steps has the shape {steps.shape}, for statistics of {count} steps.")
    check_limit(limit)
    shares = jax.device_get(whole.fractions(name))
    some = whole.size - whole.non_finite - whole.zeros > 0
    lost = np.where(some, shares["zero"] + subnormal * shares["subnormal"], np.nan).T
    # Those that lose most; layer_2 before layer_10.
    worst = np.argsort(-np.nan_to_num(lost, nan=-1.0).max(1), kind="stable")[:limit]
    shown = sorted(worst, key=lambda i: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", whole.paths[i])])
    left_out = len(lost) - len(shown)
    lost = lost[shown]
    with drawing(ax, (7.5, 1.2 + 0.22 * max(len(shown), 7))) as ax:
        figure = figure_of(ax)
        # It goes from dark to light: a scale for the colour-blind too, and on paper.
        edge = {"edgecolor": "white", "linewidth": 0.3} if count <= _NARROW else {}
        image = ax.pcolormesh(100 * lost, cmap="cividis", vmin=0, vmax=100, **edge)
        ax.grid(visible=False)
        ax.patch.set(facecolor="white", edgecolor="#BBBBBB", hatch="////")  # where there are no numbers
        ax.invert_yaxis()
        ax.set_yticks(np.arange(len(shown)) + 0.5, [from_left(whole.paths[i], 40) for i in shown])
        labels = min(_TICKS, max(_LETTERS // (len(f"{steps[-1]}") + 2), 1))
        ticks = np.arange(0, count, -(-count // labels))
        ax.set_xticks(ticks + 0.5, [f"{steps[i]}" for i in ticks])
        if lost.size <= _FEW:
            for row, column in np.argwhere(np.isfinite(lost)):
                share = lost[row, column]
                style = {"color": "white" if share < 0.5 else "black", "fontsize": 7, "ha": "center", "va": "center"}
                ax.text(column + 0.5, row + 0.5, f"{100 * share:.0f}", **style)
        ax.set(xlabel="step", ylabel=f"{left_out} leaves that lose no more are left out" if left_out else "")
        figure.colorbar(image, ax=ax, label=f"% {'subnormal or ' if subnormal else ''}zero in {name}")
        return figure


def _stacked(stats: Any) -> TreeStats:
    """The statistics of all steps in arrays of the shape (steps, leaves, ...), on the host."""
    several = stats if isinstance(stats, Iterable) else [stats]
    entries: list[Any] = [stats] if isinstance(stats, TreeStats) else list(several)
    if not all(isinstance(entry, TreeStats) for entry in entries):
        raise _refused(TypeError, f"stats is a {type(stats).__name__} of something else.")
    kinds = {(entry.paths, entry.formats, entry.exponents, np.ndim(entry.size)) for entry in entries}
    if len(kinds) != 1:
        raise _refused(ValueError, f"stats is of {len(kinds)} different trees or kinds.")
    if not entries[0].paths:
        raise _refused(ValueError, "stats is of a tree without leaves.")
    join = np.concatenate if np.ndim(entries[0].size) > 1 else np.stack
    whole: TreeStats = jax.tree.map(lambda *x: join(x), *jax.device_get(entries))
    return whole


def _refused(kind: type[Exception], what: str) -> Exception:
    return kind(
        problem(
            what,
            expected="statistics of one tree at several steps, and the number of each step",
            write="mp.plots.underflow_heatmap([mp.diagnostics.tree_stats(grads) ...], steps=[0, 100 ...])",
        )
    )
