"""What the arrays of an optimizer's state are: moments, masters, averages, counters."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpjax._typing import Tree
from mpjax.transforms import KahanState, MasterWeightsState, ParamsEmaState, StateDtypesState

# Fields that mean something in one type of state only.
_FIELDS: dict[type[Any], dict[str, str]] = {
    MasterWeightsState: {"masters": "masters"},
    KahanState: {"compensation": "compensation"},
    ParamsEmaState: {"average": "EMA", "remainder": "EMA"},
    StateDtypesState: {"scales": "moments"},
    optax.MultiStepsState: {"acc_grads": "accumulator"},
    optax.EmaState: {"ema": "moments"},  # of updates, not of parameters
}

# Fields of optax's states, and of those named like them.
_MOMENTS = {"mu", "nu", "nu_max", "trace", "m1", "m2", "v", "v_row", "v_col", "sum_of_squares", "e_g", "e_x"}
_MOMENTS |= {"exp_avg", "exp_avg_sq", "grad_sum"}


def parts_of_state(state: Tree, kind: str = "", name: str = "") -> Iterator[tuple[str, str, Any]]:
    """The kind, the name and the array of each leaf of an optimizer's state, as `MemoryRow` has them."""
    for path, child in jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: x is not state):
        if not path:
            yield (kind, name, child) if kind else _unnamed(name, child)
        elif kind or not hasattr(state, "_fields"):  # parameters have fields too, but are seldom NamedTuples
            yield from parts_of_state(child, kind, name)
        else:
            field = path[0].name
            found = _FIELDS.get(type(state), {}).get(field, "moments" if field in _MOMENTS else "")
            yield from parts_of_state(child, found, field if found in ("moments", "") else "")


def _unnamed(field: str, leaf: Any) -> tuple[str, str, Any]:
    is_counter = leaf.shape == () or not jnp.issubdtype(leaf.dtype, jnp.inexact)
    return ("counters", "", leaf) if is_counter else ("other", field, leaf)
