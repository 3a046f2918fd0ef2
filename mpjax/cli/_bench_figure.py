"""The figure of `mpjax bench`: times by precision, with the middle half of the runs."""

from collections.abc import Sequence

import matplotlib.style
from matplotlib.figure import Figure

from mpjax.cli._bench_measure import PRODUCT, STEP, Measurement

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
}


def draw(rows: Sequence[Measurement], title: str, *, with_rates: bool) -> Figure:
    """Draws a bar for each precision, of the median; the line on it is the middle half of the runs."""
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        figure.suptitle(title if with_rates else f"{title}\nseconds of a CPU: no measure of what a TPU or GPU gains")
        for ax, kind in zip(figure.subplots(1, 2), (PRODUCT, STEP), strict=True):
            of_it = [row for row in rows if row.kind == kind]
            medians = [1e3 * row.median for row in of_it]
            below = [m - 1e3 * row.middle_half[0] for m, row in zip(medians, of_it, strict=True)]
            above = [1e3 * row.middle_half[1] - m for m, row in zip(medians, of_it, strict=True)]
            spread = {"xerr": (below, above), "error_kw": {"ecolor": "#000000", "capsize": 3, "elinewidth": 1}}
            bars = ax.barh([row.precision for row in of_it], medians, color="#56B4E9", **spread)
            if with_rates:
                rates = [f"{row.flops / row.median / 1e12:.0f} TFLOP/s" for row in of_it]
                ax.bar_label(bars, rates, label_type="center")
            ax.invert_yaxis()
            ax.set(title=kind, xlabel="ms, median and middle half of the runs", xlim=(0, None))
        return figure
