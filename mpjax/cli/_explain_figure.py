"""The figure of `mpjax explain`: how much of each module's work is in which dtype."""

from collections import defaultdict
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from mpjax.diagnostics import Explanation

# Okabe and Ito's colours, which the colour-blind tell apart; hatches for print in black and white.
_LOOKS: dict[str, dict[str, Any]] = {
    "float32": {"color": "#C8C8C8"},
    "bfloat16": {"color": "#56B4E9", "hatch": "//"},
    "float16": {"color": "#E69F00", "hatch": "\\\\"},
    "float8_e4m3fn": {"color": "#009E73", "hatch": ".."},
    "float8_e5m2": {"color": "#CC79A7", "hatch": "xx"},
}
_OTHER = {"color": "#555555"}
_MOST = 24
_LONGEST = 44
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
}


def draw(found: Explanation) -> Figure:
    """Draws FLOPs by module, in the order of the program, with a part of each bar for each dtype."""
    work: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in found.operations:
        if row.flops and row.dtype:
            work[row.path or "(in no module)"][row.dtype] += row.flops
    largest = sorted(work, key=lambda path: -sum(work[path].values()))[:_MOST]
    paths = [path for path in work if path in largest]
    dtypes = list(dict.fromkeys(dtype for path in paths for dtype in work[path]))
    left_out = f"; the {_MOST} with the most work of {len(work)}" if len(work) > _MOST else ""
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(9, 1.6 + 0.3 * max(len(paths), 1)), layout="constrained")
        ax = figure.subplots()
        start = [0.0] * len(paths)
        for dtype in dtypes:
            widths = [float(work[path][dtype]) for path in paths]
            look = {"edgecolor": "white", **_LOOKS.get(dtype, _OTHER)}
            total = found.flops[dtype] / sum(found.flops.values())
            ax.barh(range(len(paths)), widths, left=start, label=f"{dtype} ({total:.1%})", **look)
            start = [a + b for a, b in zip(start, widths, strict=True)]
        names = [path if len(path) <= _LONGEST else f"...{path[3 - _LONGEST :]}" for path in paths]
        ax.set_yticks(range(len(paths)), names)
        ax.invert_yaxis()
        ax.set(title=found.policy, xlabel=f"FLOPs by module{left_out}")
        if dtypes:
            figure.legend(loc="outside upper center", ncols=len(dtypes))
        ax.xaxis.set_major_formatter(EngFormatter())
        if not paths:
            ax.set(xlabel="no operation has FLOPs", xticks=[])
        return figure
