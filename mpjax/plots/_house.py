"""What all plots share: their look, the axes that they are drawn into, and how long names are shortened."""

import contextlib
from collections.abc import Iterator
from typing import Any

from mpjax._errors import problem

# Okabe and Ito's colours, which the colour-blind tell apart. No plot tells things apart by colour alone.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY = "#555555"
_STYLE = {
    "figure.dpi": 120,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "hatch.linewidth": 0.8,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
}


@contextlib.contextmanager
def drawing(ax: Any, size: tuple[float, float]) -> Iterator[Any]:
    """Gives the axes to draw into: the caller's in the caller's style, or a new figure's in this one.

    Args:
      ax: a matplotlib `Axes`, or `None`.
      size: width and height of a new figure, in inches.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: `ax` is something else.
    """
    try:
        import matplotlib.style
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            problem(
                "matplotlib, which draws the plots, is not installed.",
                expected="the packages of the extra viz",
                write='pip install "mpjax[viz]"',
            )
        ) from error
    if ax is None:
        # The style is put back at the end, whatever the user's own is.
        with matplotlib.style.context(["default", _STYLE]):
            yield Figure(figsize=size, layout="constrained").subplots()
    elif isinstance(ax, Axes):
        yield ax
    else:
        raise TypeError(
            problem(
                f"ax is a {type(ax).__name__}.",
                expected="a matplotlib Axes, or None for a new figure",
                write="ax=figure.subplots(), with figure = matplotlib.figure.Figure()",
            )
        )


def figure_of(ax: Any) -> Any:
    """The figure that axes belong to, itself where they are in one of its parts."""
    return ax.figure.figure


def from_left(name: str, limit: int) -> str:
    """A name of at most `limit` characters: what comes last in a path says most."""
    return name if len(name) <= limit else f"…{name[1 - limit :]}"


def percent(share: float) -> str:
    """A share from 0 to 1 as people read it: what is not 0 is not called 0%, nor what is not all of it 100%."""
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{share:.1%}" if share not in (0, 1) else f"{share:.0%}"


def check_limit(limit: Any) -> None:
    """Raises a ValueError if `limit` is no number of rows."""
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(problem(f"limit is {limit!r}.", expected="the most rows to draw, 1 or more", write="limit=30"))
