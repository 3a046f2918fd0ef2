"""Mixed precision for Flax Linen's `TrainState`: `mpjax.linen`.

Linen's `apply` goes through `mpjax.autocast` and `mpjax.value_and_grad` as it is, and `TrainState.create(tx=...)` takes
what `mpjax.loss_scaled` makes. What is here is for states that hold more than parameters, such as `batch_stats`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.train_state import TrainState

from mpjax._errors import listing, problem
from mpjax._tree import check_same_structure, instances, path_name, select_tree
from mpjax.transforms import SkipOnOverflowState

_S = TypeVar("_S", bound=TrainState)


def apply_gradients(
    state: _S,
    *,
    grads: Any,
    keep_statistics: bool | str | Collection[str] = False,
    extra_args: Mapping[str, Any] | None = None,
    **changes: Any,
) -> _S:
    """Like `state.apply_gradients(grads=grads, **changes)`, for a step that may be skipped.

    Parameters and optimizer state of a skipped step stay as they are by `loss_scaled` itself. Here the other fields do
    too, bit for bit: the `batch_stats` that a forward pass with an overflow made hold inf or NaN, and would for good.
    Flax's fp8 statistics (`_overwrite_with_gradient`) stay as well. PRNG keys go on, so that the next step has other
    noise; so do fields that are no part of the tree. `state.step` counts calls, skipped ones too, as Flax does; the
    counts inside the optimizer, which schedules go by, count the steps that were taken.

    Args:
      state: a `TrainState`, or of a subclass, with `tx=mpjax.loss_scaled(...)` or `skip_on_overflow(...)`.
      grads: the still-scaled gradients, of `state.params`' structure.
      keep_statistics: what a skipped step changes all the same: all fields, or those named (Flax's fp8 statistics are
        named `"_overwrite_with_gradient"`).
      extra_args: for `tx.update`, such as `{"overflowed": dropped.any()}` after `mpjax.accumulate`.
      **changes: new values of other fields, such as `batch_stats=...`.

    Returns:
      The new state.

    Raises:
      ValueError: no part of `state.tx` skips steps, or more than one; or a field's new value has another structure
        than the old one.
      TypeError: `state` is no train state, or has no such field; or a field's new value has another dtype or shape
        than the old one.

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
    # Flax advises to copy TrainState where it does not fit: what looks like one is one.
    if not all(hasattr(state, name) for name in ("__dataclass_fields__", "apply_gradients", "tx", "opt_state")):
        raise TypeError(
            problem(
                f"state is a {type(state).__name__}.",
                expected="a flax.training.train_state.TrainState, or a state like it",
                write="state = mp.linen.apply_gradients(state, grads=grads, batch_stats=updated['batch_stats'])",
            )
        )
    in_tree = {field.name: field.metadata.get("pytree_node", True) for field in dataclasses.fields(state)}
    named = {keep_statistics} if isinstance(keep_statistics, str) else set()
    named |= set() if isinstance(keep_statistics, str | bool) else set(keep_statistics)
    unknown = sorted({*changes, *named} - {*in_tree, OVERWRITE_WITH_GRADIENT})
    if unknown:
        raise TypeError(
            problem(
                f"{type(state).__name__} has no field {', '.join(map(repr, unknown))}.",
                expected=f"fields of the state: {', '.join(in_tree)}",
                write="class State(TrainState): batch_stats: Any",
            )
        )
    _skip_state(state.opt_state)  # before anything is computed
    old: Any = _with_extra_args(state, extra_args or {})
    new = old.apply_gradients(grads=grads, **changes)
    new = new.replace(tx=changes.get("tx", state.tx))
    if keep_statistics is True:
        return cast("_S", new)
    taken = _skip_state(new.opt_state).last_step_finite
    kept = {
        name: _selected(taken, name, getattr(new, name), getattr(state, name))
        for name, is_in_tree in in_tree.items()
        if is_in_tree and name not in {"step", "params", "opt_state", *named}
        if getattr(new, name) is not getattr(state, name)
    }
    owg = OVERWRITE_WITH_GRADIENT
    if isinstance(grads, Mapping) and owg in grads and owg not in named:
        kept["params"] = {**new.params, owg: _selected(taken, owg, new.params[owg], state.params[owg])}
    return cast("_S", new.replace(**kept))


def _selected(taken: Any, name: str, new: Any, old: Any) -> Any:
    """The new value of a field, or where the step is skipped the old one; of PRNG keys the new one."""
    check_same_structure(new, old, f"the new {name}", f"state.{name}")
    old = jax.tree.map(lambda x, y: y if _is_key(y) else x, old, new)
    return select_tree(taken, {name: new}, {name: old})[name]  # the name is for the paths in an error


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def _with_extra_args(state: _S, extra_args: Mapping[str, Any]) -> _S:
    """The state with a `tx` whose update gets them: `TrainState.apply_gradients` has none to hand on."""
    if not extra_args:
        return state
    update = optax.with_extra_args_support(state.tx).update
    tx = optax.GradientTransformationExtraArgs(
        state.tx.init, lambda *args, **kwargs: update(*args, **kwargs, **extra_args)
    )
    return state.replace(tx=tx)


def _skip_state(opt_state: Any) -> SkipOnOverflowState:
    found = instances(opt_state, SkipOnOverflowState)
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
