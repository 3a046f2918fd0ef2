"""The figure of `mpjax demo`: losses, loss scale, and gradients against fp16's range."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mpjax.cli._demo_tasks import TASKS
from mpjax.cli._demo_train import Run

# Okabe and Ito's colours, which the colour-blind tell apart. Wide lines lie below narrow ones, so that four
# curves on top of each other are still four.
_LINES: dict[str, dict[str, Any]] = {
    "float32": {"color": "#C8C8C8", "linewidth": 6.0, "linestyle": "-"},
    "bf16": {"color": "#56B4E9", "linewidth": 3.2, "linestyle": "-"},
    "fp16 unscaled": {"color": "#D55E00", "linewidth": 1.8, "linestyle": (0, (5, 4))},
    "fp16 scaled": {"color": "#000000", "linewidth": 1.8, "linestyle": (0, (1, 3.5))},
}
_TASK_COLORS = {task.name: color for task, color in zip(TASKS, ("#0072B2", "#E69F00"), strict=True)}
_SMALLEST = -24  # log2 of fp16's smallest number
_PATCH = {"facecolor": "white", "edgecolor": "none", "pad": 2.0}
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.08,
}


def draw(runs: Sequence[Run]) -> bytes:
    """Draws the figure and returns it as a PNG."""
    # The style is put back at the end, whatever the user's own is; pyplot and its global figures are not touched.
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(11, 8), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2)
        for ax, task, letter in zip(axes[0], TASKS, "ab", strict=True):
            _draw_losses(ax, [run for run in runs if run.task is task], f"({letter}) {task.name}: training loss")
        scaled = [run for run in runs if run.precision.is_scaled]
        _draw_scales(axes[1, 0], scaled)
        _draw_gradients(axes[1, 1], next(run for run in scaled if run.task is TASKS[-1]))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()


def _draw_losses(ax: Axes, runs: Sequence[Run], title: str) -> None:
    for run in runs:
        steps, losses = _smoothed(run.metrics.loss)
        ax.plot(steps, losses, label=run.precision.name, **_LINES[run.precision.name])
    window = _window(len(runs[0].metrics.loss))
    shown = "mean cross entropy" if window == 1 else f"mean cross entropy, {window}-step average"
    ax.set(title=title, xlabel="step", ylabel=shown, yscale="log", xlim=_step_limits(runs[0]))
    ax.legend(handlelength=3.5)


def _step_limits(run: Run) -> tuple[float, float]:
    # Set by hand: matplotlib finds none where every loss is NaN.
    steps = len(run.metrics.loss)
    return -0.03 * steps, 1.03 * steps


def _window(steps: int) -> int:
    return max(steps // 50, 1)


def _smoothed(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A moving average, placed at its last step; what is not finite leaves a gap."""
    window = _window(len(losses))
    averages = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    return np.arange(window - 1, len(losses)), np.where(np.isfinite(averages), averages, np.nan)


def _draw_scales(ax: Axes, runs: Sequence[Run]) -> None:
    for run, style in zip(runs, ("-", "--"), strict=True):
        color = _TASK_COLORS[run.task.name]
        exponents = np.log2(run.metrics.scale)
        steps = np.arange(len(exponents))
        ax.step(steps, exponents, where="post", color=color, linestyle=style, linewidth=2, label=run.task.name)
        overflowed = ~run.metrics.finite
        if run.skipped:
            label = f"{run.task.name}: overflow, step skipped ({run.skipped})"
            ax.plot(
                steps[overflowed], exponents[overflowed], "x", color=color, ms=8, mew=1.8, linestyle="none", label=label
            )
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.5, high + 0.5)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(lambda exponent, position: f"$2^{{{exponent:.0f}}}$")
    ax.set(
        title="(c) dynamic loss scale of fp16 scaled", xlabel="step", ylabel="loss scale", xlim=_step_limits(runs[0])
    )
    ax.legend()


def _draw_gradients(ax: Axes, run: Run) -> None:
    """The histogram of Micikevicius et al. 2018, figure 3: where the gradients lie in fp16's range."""
    probe = run.probes[len(run.probes) // 2]
    grads = np.abs(probe.true_grads[np.isfinite(probe.true_grads)])
    exponents = np.log2(grads[grads > 0])
    zeros = np.mean(grads == 0) if len(grads) else 0.0
    scale = np.log2(probe.scale)

    edges = np.arange(-46, 25)
    heights = []
    for shift, color, name in ((0.0, "#D55E00", "as they are"), (scale, "#0072B2", f"times $2^{{{scale:.0f}}}$")):
        shifted = np.clip(exponents + shift, edges[0], edges[-1])
        share = np.histogram(shifted, edges)[0] / max(len(shifted), 1) * 100
        ax.stairs(share, edges, fill=True, color=color, alpha=0.35)
        ax.stairs(share, edges, color=color, linewidth=1.4)
        heights.append(share.max() or 1.0)
        # The first beside the limit that it is about, the second over its histogram; they never meet.
        text = f"{name}:\n{np.mean(shifted < _SMALLEST):.1%} below $2^{{-24}}$" if len(shifted) else ""
        x, side = (np.median(shifted) - 3, "left") if shift and len(shifted) else (_SMALLEST - 0.8, "right")
        ax.text(x, 1.06 * max(heights), text, color=color, ha=side, bbox=_PATCH if shift else None)
    ax.axvspan(edges[0], _SMALLEST, color="#000000", alpha=0.06, linewidth=0)
    limits = {_SMALLEST: "smallest\n$2^{-24}$", -14: "smallest\nnormal $2^{-14}$", np.log2(65504): "largest\n65504"}
    for exponent in limits:
        ax.axvline(exponent, color="#555555", linewidth=1, linestyle="--", zorder=1)
    top = ax.secondary_xaxis("top")
    top.set_xticks(list(limits), list(limits.values()), fontsize=8)
    ax.set(
        title=f"(d) {run.task.name}: float32 gradients in fp16's range",
        xlabel=f"log2 |gradient| (entries that are 0 in float32, {zeros:.1%}, are left out)",
        ylabel="% of nonzero entries",
        xlim=(edges[0], edges[-1]),
        ylim=(0, 1.35 * max(heights)),
    )
