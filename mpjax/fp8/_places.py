"""Names for the places in a program that bring arrays into 8 bits."""

from typing import Any

from mpjax._compat import inner_jaxprs, source_line
from mpjax.diagnostics._place import Place
from mpjax.fp8._markers import is_marker


def site_key(eqn: Any, here: Place) -> tuple[str, str, str]:
    """What tells a place that brings arrays into 8 bits from others: its module, its source line and role.

    And the lines of the calls that lead to it: the linear layers of Flax and equinox are one line each, and neither NNX
    nor equinox has a module name for each layer.
    """
    return here.module, source_line(eqn, 100) or here.line, eqn.params["role"]


def site_names(jaxpr: Any, *, whole: bool = False) -> dict[tuple[str, str, str], str]:
    """A name for each place in a program that brings arrays into 8 bits: its module, which of those in it, and role.

    Line numbers are not in it: a checkpoint is to survive an edit.

    Args:
      jaxpr: the program.
      whole: whether to leave out those with more than one scale for an array.

    Returns:
      Names by `site_key`, in the order of the program.
    """
    found: dict[tuple[str, str, str], str] = {}
    lines: dict[str, dict[str, int]] = {}

    def walk(jaxpr: Any, outer: Place) -> None:
        for eqn in jaxpr.eqns:
            here = outer.inside(eqn)
            if is_marker(eqn):
                key = module, line, role = site_key(eqn, here)
                known = lines.setdefault(module, {})
                index = known.setdefault(line, len(known))
                if not whole or eqn.params["block"] is None:
                    found[key] = f"{module or 'main'}:{index}/{role}"
            else:
                for inner in inner_jaxprs(eqn):
                    walk(inner, here)

    walk(jaxpr, Place())
    return found
