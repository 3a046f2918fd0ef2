"""Names for the places in a program that bring arrays into 8 bits."""

from typing import Any

from mpjax._compat import inner_jaxprs
from mpjax.diagnostics._place import Place
from mpjax.fp8._markers import is_marker


def site_names(jaxpr: Any, *, whole: bool = False) -> dict[tuple[str, str, str], str]:
    """A name for each place in a program that brings arrays into 8 bits: its module, which of those in it, and role.

    Line numbers are not in it: a checkpoint is to survive an edit.

    Args:
      jaxpr: the program.
      whole: whether to leave out those with more than one scale for an array.

    Returns:
      Names by module path, source line and role, in the order of the program.
    """
    found: dict[tuple[str, str, str], str] = {}
    lines: dict[str, dict[str, int]] = {}

    def walk(jaxpr: Any, outer: Place) -> None:
        for eqn in jaxpr.eqns:
            here = outer.inside(eqn)
            if is_marker(eqn):
                known = lines.setdefault(here.module, {})
                index = known.setdefault(here.line, len(known))
                role = eqn.params["role"]
                if not whole or eqn.params["block"] is None:
                    found[here.module, here.line, role] = f"{here.module or 'main'}:{index}/{role}"
            else:
                for inner in inner_jaxprs(eqn):
                    walk(inner, here)

    walk(jaxpr, Place())
    return found
