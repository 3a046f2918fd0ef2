"""Mixed precision for Flax Linen's `TrainState`: `mpjax.linen`.

Linen's `apply` goes through `mpjax.autocast` and `mpjax.value_and_grad` as it is, and `TrainState.create(tx=...)` takes a
transform made by `mpjax.loss_scaled`. What is here is for states that hold more than parameters, such as `batch_stats`.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.train_state import TrainState

from mpjax._errors import listing, problem
from mpjax._tree import path_name, select_tree
from mpjax.transforms import SkipOnOverflowState

_S = TypeVar("_S", bound=TrainState)


def apply_gradients(
    state: _S, *, grads: Any, keep_statistics: bool = False, overflowed: Any = None, **changes: Any
) -> _S:
    """Like `state.apply_gradients(grads=grads, **changes)`, for a step that may be skipped.

    Parameters and optimizer state of a skipped step stay as they are by `loss_scaled` itself. Here the other fields do
    too: the `batch_stats` that a forward pass with an overflow made hold inf or NaN, and would for good. Flax's own
    fp8 statistics (`_overwrite_with_gradient`) stay as well. `state.step` counts calls, skipped ones too, as Flax does;
    the counts inside the optimizer, which schedules go by, count steps that were taken.

    Args:
      state: a `TrainState` with `tx=mpjax.loss_scaled(...)` or `skip_on_overflow(...)`.
      grads: the still-scaled gradients, of `state.params`' structure.
      keep_statistics: whether `changes` are made on a skipped step too.
      overflowed: handed on to `loss_scaled`: whether an overflow was seen that the gradients do not show.
      **changes: new values of other fields, such as `batch_stats=...`.

    Returns:
      The new state.

    Raises:
      ValueError: `state.tx` skips no steps, or more than one part of it does.
      TypeError: a field's new value differs from the old one in dtype or shape.

    >>> import jax.numpy as jnp, mpjax as mp, optax
    >>> from flax.training.train_state import TrainState
    >>> class State(TrainState):
    ...     batch_stats: dict
    >>> tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale())
    >>> old = State.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=tx, batch_stats={"mean": jnp.zeros(1)})
    >>> bad = jnp.array([jnp.nan])
    >>> state = mp.linen.apply_gradients(old, grads={"w": bad}, batch_stats={"mean": bad})
    >>> state.params, state.batch_stats, int(state.step)
    ({'w': Array([1.], dtype=float32)}, {'mean': Array([0.], dtype=float32)}, 1)
    """
    tx = state.tx
    if overflowed is not None:
        update = optax.with_extra_args_support(tx).update
        state = state.replace(tx=tx._replace(update=lambda *args: update(*args, overflowed=overflowed)))
    new = state.apply_gradients(grads=grads, **changes).replace(tx=tx)
    taken = _skip_state(new.opt_state).last_step_finite
    kept = {} if keep_statistics else {name: select_tree(taken, x, getattr(state, name)) for name, x in changes.items()}
    if isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads:
        statistics = select_tree(taken, new.params[OVERWRITE_WITH_GRADIENT], state.params[OVERWRITE_WITH_GRADIENT])
        kept["params"] = {**new.params, OVERWRITE_WITH_GRADIENT: statistics}
    return new.replace(**kept)


def _skip_state(opt_state: Any) -> SkipOnOverflowState:
    leaves = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=lambda x: isinstance(x, SkipOnOverflowState))
    found = [(path, leaf) for path, leaf in leaves if isinstance(leaf, SkipOnOverflowState)]
    if len(found) != 1:
        rows = listing([path_name(path) or "<root>" for path, _ in found])
        raise ValueError(
            problem(
                f"{len(found)} parts of state.tx skip steps{':' if found else '.'}\n{rows}".rstrip(),
                expected="exactly one, which says whether this step was taken",
                write="TrainState.create(..., tx=mp.loss_scaled(optax.chain(...), policy.loss_scale()))",
            )
        )
    state: SkipOnOverflowState = found[0][1]
    return state
