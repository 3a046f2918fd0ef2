"""Gradients of a scaled loss with respect to NNX modules; a step that overflowed leaves nothing in them."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mpjax._convert import as_loss_scale
from mpjax._errors import listing, problem
from mpjax._grad import checked_loss, positions, split_aux
from mpjax._tree import agreed, is_inexact_leaf, path_name, select_tree, widen
from mpjax.transforms import global_norm


def value_and_grad(
    loss_fn: Callable[..., Any],
    loss_scale: Any,
    *,
    argnums: Any = 0,
    has_aux: bool = False,
    keep_statistics: bool = False,
    axis_name: str | Sequence[str] | None = None,
) -> Callable[..., Any]:
    """Like `flax.nnx.value_and_grad`, but differentiates the loss times the scale.

    The value is the true loss, the gradients are still SCALED, as with `mpjax.value_and_grad`: give them to an
    `nnx.Optimizer` made with `mpjax.loss_scaled`. What the call changes in modules flows back into them, as in NNX.

    `loss_scaled` skips a step whose gradients are not finite, and that step leaves no trace in the modules either:
    batch statistics, and every other variable that the call changed, get their old values back, bit for bit. What goes
    on are the counts of random numbers, so that the next step has other noise, and what was sown; variables that the
    call made have no value to go back to. The test is the one that `loss_scaled` makes, and the compiler computes it
    once for both: differentiate what you optimise, no more.

    Args:
      loss_fn: takes modules, and returns a real floating loss of shape () or `(loss, aux)`; see `mpjax.value_and_grad`.
      loss_scale: `mpjax.get_loss_scale(optimizer.opt_state)`, or any loss scale of mpjax or jmp.
      argnums: which positional arguments to differentiate: a number or `nnx.DiffState`, or a tuple of them. A number
        means the argument's `nnx.Param`s.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      keep_statistics: whether what a skipped step changed in the modules stays there, as without loss scaling.
      axis_name: under `shard_map` or `pmap`, the axes over which all have to agree, as in `loss_scaled`. The gradients
        need not be summed yet; where their sum alone overflows, the step is skipped and the statistics, finite, stay.

    Returns:
      A function of `loss_fn`'s arguments, keywords included, that returns `(loss, grads)`, or `((loss, aux), grads)`:
      a float32 loss (float64 is kept), and an `nnx.State` of gradients with the dtypes of their parameters, float0
      zeros for integers, which `loss_scaled` leaves alone.

    Raises:
      TypeError: the loss is complex or an integer, `loss_fn` does not return a pair although `has_aux`, or is a
        method of a module; there are no floats to differentiate, or the call changed the shape or dtype of a variable,
        which a skipped step could not take back.
      ValueError: the loss is not of shape (), or `argnums` names no positional argument, or one twice.

    >>> import jax.numpy as jnp, mpjax as mp, optax
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, mp.loss_scaled(optax.adam(1e-2), mp.DynamicLossScale()), wrt=nnx.Param)
    >>> @nnx.jit
    ... def train_step(model, optimizer, x):
    ...     scale = mp.get_loss_scale(optimizer.opt_state)
    ...     loss, grads = mp.nnx.value_and_grad(lambda model: (model(x) ** 2).mean(), scale)(model)
    ...     optimizer.update(model, grads)
    ...     return loss
    >>> float(train_step(model, optimizer, jnp.ones((4, 2)))) > float(train_step(model, optimizer, jnp.ones((4, 2))))
    True
    """
    # In an nnx.Optimizer each array of the state is a variable.
    scale = as_loss_scale(nnx.as_pure(loss_scale))

    if inspect.ismethod(loss_fn) and nnx.graph.is_graph_node(loss_fn.__self__):
        name = f"{type(loss_fn.__self__).__name__}.{loss_fn.__name__}"
        raise TypeError(
            problem(
                f"loss_fn is {name} of one module, whose changes would be lost.",
                expected="a function that takes the module",
                write=f"mp.nnx.value_and_grad({name}, loss_scale)(module, batch)",
            )
        )

    def scaled_loss(*call: Any) -> Any:
        *args, kwargs = call
        loss, aux = split_aux(loss_fn(*args, **kwargs), has_aux)
        loss = checked_loss(loss)
        return scale.scale(loss), (loss, aux)

    @functools.wraps(loss_fn)
    def with_value(*args: Any, **kwargs: Any) -> Any:
        before = {} if keep_statistics else _values((args, kwargs))
        # Keywords travel as one more argument: NNX takes none that are keywords only.
        differentiated = nnx.value_and_grad(
            scaled_loss, argnums=_from_the_front(argnums, len(args)), has_aux=True, allow_int=True
        )
        (_, (loss, aux)), grads = differentiated(*args, kwargs)
        if not any(map(is_inexact_leaf, jax.tree.leaves(grads))):
            raise TypeError(
                problem(
                    f"the arguments to differentiate, argnums={argnums!r}, hold no floats.",
                    expected="a module with at least one nnx.Param, or an nnx.DiffState that names other variables",
                    write="mp.nnx.value_and_grad(loss_fn, loss_scale, argnums=nnx.DiffState(0, nnx.LoRAParam))",
                )
            )
        if not keep_statistics:
            # The very expression of skip_on_overflow, so that the compiler merges the two.
            finite = agreed(jnp.isfinite(global_norm(widen(nnx.as_pure(scale.unscale(grads))))), axis_name)
            _take_back(~finite, before, (args, kwargs))
        return ((loss, aux) if has_aux else loss), grads

    return with_value


def grad(
    loss_fn: Callable[..., Any],
    loss_scale: Any,
    *,
    argnums: Any = 0,
    has_aux: bool = False,
    keep_statistics: bool = False,
    axis_name: str | Sequence[str] | None = None,
) -> Callable[..., Any]:
    """Like `flax.nnx.grad`, but differentiates the loss times the scale: the gradients are still SCALED.

    Arguments and errors are those of `value_and_grad`.

    Returns:
      A function that returns the scaled gradients, or `(grads, aux)`.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> from flax import nnx
    >>> model = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
    >>> grads = mp.nnx.grad(lambda model: model(jnp.ones((1, 1))).sum(), mp.StaticLossScale(8.0))(model)
    >>> grads["kernel"][...]
    Array([[8.]], dtype=float32)
    """
    with_value = value_and_grad(
        loss_fn, loss_scale, argnums=argnums, has_aux=has_aux, keep_statistics=keep_statistics, axis_name=axis_name
    )

    @functools.wraps(loss_fn)
    def without_value(*args: Any, **kwargs: Any) -> Any:
        value, grads = with_value(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return without_value


def _from_the_front(argnums: Any, count: int) -> Any:
    """`argnums` with positions from 0 on, as NNX needs them."""
    several = isinstance(argnums, tuple | list)
    wanted = tuple(argnums) if several else (argnums,)
    numbers = tuple(x.argnum if isinstance(x, nnx.DiffState) else x for x in wanted)
    numbers = positions(numbers if several else numbers[0], count)
    found = tuple(
        dataclasses.replace(x, argnum=i) if isinstance(x, nnx.DiffState) else i
        for x, i in zip(wanted, numbers, strict=True)
    )
    return found if several else found[0]


# What a skipped step does not take back: the next step needs other noise, and what was sown is a record of the call.
_GOES_ON = (nnx.RngState, nnx.Intermediate)


def _values(tree: Any) -> dict[str, tuple[nnx.Variable[Any], Any]]:
    """The variables that a skipped step is to leave alone, with their values, by path."""
    return {
        "/".join(map(str, path[1:])): (variable, variable.get_value())
        for path, variable in nnx.iter_graph(tree)
        if isinstance(variable, nnx.Variable) and not isinstance(variable, _GOES_ON)
    }


def _take_back(skipped: Any, before: dict[str, tuple[nnx.Variable[Any], Any]], tree: Any) -> None:
    """Gives variables their old values back where the step is skipped; also those put in the place of others."""
    after = _values(tree)
    pairs = [
        (path, *after.get(path, (variable, variable.get_value())), old) for path, (variable, old) in before.items()
    ]
    changed = [(path, variable, old, new) for path, variable, new, old in pairs if not _same(old, new)]
    rows = [
        f"{path}: {a} before, {b} after" for path, _, *values in changed for a, b in [map(_types, values)] if a != b
    ]
    if rows:
        raise TypeError(
            problem(
                f"the call changed the shape or dtype of variables, which a skipped step could not take back:\n"
                f"{listing(rows)}",
                expected="variables that keep their shapes and dtypes",
                write="mp.nnx.value_and_grad(loss_fn, loss_scale, keep_statistics=True), which leaves them changed",
            )
        )
    for _, variable, old, new in changed:
        variable.set_value(select_tree(skipped, old, new))


def _same(old: Any, new: Any) -> bool:
    a, b = jax.tree.leaves(old), jax.tree.leaves(new)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _types(value: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(value)
    return ", ".join(f"{path_name(path)} {jnp.result_type(x)}{jnp.shape(x)}".strip() for path, x in leaves)
