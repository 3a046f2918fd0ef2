"""An equation in other float dtypes than it was traced in."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._compat import open_jaxpr
from mpjax.diagnostics._taps import Taps, tapped

# Parameters that hold a function, whose dtypes are its own.
_BODIES = {"jaxpr", "call_jaxpr", "jaxprs", "callback", "exported", "result_avals"}
# What reads and writes references: evaluated once, and never to try something out.
STATEFUL = ("get", "swap", "addupdate")


def widened_params(eqn: Any, dtype: Any, is_old: Callable[[Any], bool]) -> dict[str, Any] | None:
    """The parameters to change so that an equation computes in `dtype` where it has an old one; None if it cannot."""
    if eqn.params.keys() & _BODIES or eqn.primitive.name in STATEFUL:
        return None
    changes: dict[str, Any] = {k: dtype for k, x in eqn.params.items() if isinstance(x, np.dtype) and is_old(x)}
    if update := eqn.params.get("update_jaxpr"):  # what a scatter does to two numbers
        inner, _ = open_jaxpr(update)
        run = functools.partial(tapped, Taps(lambda eqn, path: False), inner, eqn.params["update_consts"])
        both = (jnp.zeros((), dtype),) * 2
        changes["update_jaxpr"], _ = open_jaxpr(jax.make_jaxpr(lambda *xs: run(xs)[0])(*both))
    return changes
