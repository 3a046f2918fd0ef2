"""Gradients of a scaled loss, beside the true one."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._compat import no_gradient
from mpjax._convert import as_loss_scale
from mpjax._dtypes import wide_dtype
from mpjax._errors import listing, problem
from mpjax._tree import is_inexact_leaf, path_name


def value_and_grad(
    loss_fn: Callable[..., Any],
    loss_scale: Any,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Like `jax.value_and_grad`, but differentiates the loss times the scale.

    The value is the true loss: it is finite even where the scaled one overflows. The gradients are still
    SCALED: pass them to an optimizer made by `mpjax.loss_scaled`, or call `loss_scale.unscale(grads)`.

    Args:
      loss_fn: returns a real floating loss of shape (), or `(loss, aux)`. Compute the loss in float32: the
        gradient of a float16 loss starts as the scale in float16, which cannot hold more than 65504.
      loss_scale: `mpjax.get_loss_scale(opt_state)`, or any loss scale of mpjax or jmp.
      argnums: which positional arguments to differentiate, each any tree.
      has_aux: whether `loss_fn` returns `(loss, aux)`; aux is handed on untouched.

    Returns:
      A function of `loss_fn`'s arguments, keywords included, that returns `(loss, grads)`, or
      `((loss, aux), grads)`. The loss is float32 (float64 is kept). Gradients have their parameters' dtypes. Leaves
      that have none get what JAX and equinox give them: float0 zeros for integers, booleans and PRNG keys, `None`
      for what is no array. `loss_scaled` leaves such parameters alone.

    Raises:
      TypeError: the loss is complex or an integer, `loss_fn` does not return a pair although `has_aux`, or the
        arguments to differentiate hold no floats.
      ValueError: the loss is not of shape (), or `argnums` names no positional argument, or one twice.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> loss, grads = mp.value_and_grad(lambda w: jnp.sum(w**2), mp.StaticLossScale(1024.0))(jnp.array([3.0]))
    >>> float(loss), float(grads[0])
    (9.0, 6144.0)
    """
    scale = as_loss_scale(loss_scale)

    @functools.wraps(loss_fn)
    def with_value(*args: Any, **kwargs: Any) -> Any:
        numbers = positions(argnums, len(args))
        chosen = tuple(args[number] for number in numbers)
        leaves, structure = jax.tree.flatten(chosen)
        trainable = [is_inexact_leaf(leaf) for leaf in leaves]
        _check_trainable(chosen, trainable)

        def scaled_loss(floats: list[Any]) -> Any:
            moving = iter(floats)
            merged = [next(moving) if moves else leaf for leaf, moves in zip(leaves, trainable, strict=True)]
            call = list(args)
            for number, value in zip(numbers, jax.tree.unflatten(structure, merged), strict=True):
                call[number] = value
            loss, aux = split_aux(loss_fn(*call, **kwargs), has_aux)
            loss = checked_loss(loss)
            return scale.scale(loss), (loss, aux)

        floats = [leaf for leaf, moves in zip(leaves, trainable, strict=True) if moves]
        (_, (loss, aux)), float_grads = jax.value_and_grad(scaled_loss, has_aux=True)(floats)
        moving = iter(float_grads)
        grads = jax.tree.unflatten(
            structure,
            [next(moving) if moves else no_gradient(leaf) for leaf, moves in zip(leaves, trainable, strict=True)],
        )
        return ((loss, aux) if has_aux else loss), (grads if isinstance(argnums, tuple | list) else grads[0])

    return with_value


def grad(
    loss_fn: Callable[..., Any],
    loss_scale: Any,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Like `jax.grad`, but differentiates the loss times the scale: the gradients are still SCALED.

    Arguments and errors are those of `value_and_grad`.

    Returns:
      A function that returns the scaled gradients, or `(grads, aux)`.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> scale = mp.StaticLossScale(1024.0)
    >>> grads = mp.grad(lambda w: jnp.sum(w**2), scale)(jnp.array([3.0]))
    >>> scale.unscale(grads)
    Array([6.], dtype=float32)
    """
    with_value = value_and_grad(loss_fn, loss_scale, argnums, has_aux)

    @functools.wraps(loss_fn)
    def without_value(*args: Any, **kwargs: Any) -> Any:
        value, grads = with_value(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return without_value


def positions(argnums: Any, count: int) -> tuple[int, ...]:
    """The arguments to differentiate, counted from 0."""
    wanted = tuple(argnums) if isinstance(argnums, tuple | list) else (argnums,)
    try:
        found = tuple(operator.index(n) for n in wanted)
    except TypeError:
        found = (count,)
    if not all(-count <= n < count for n in found):
        raise ValueError(
            problem(
                f"argnums is {argnums!r}, but the function was called with {count} positional arguments.",
                expected="positions of positional arguments",
                write="grad_fn(params, batch), the argument to differentiate without its keyword",
            )
        )
    found = tuple(n % count for n in found)
    if len(set(found)) < len(found):
        raise ValueError(
            problem(f"argnums is {argnums!r}.", expected="each argument at most once", write="argnums=(0, 1)")
        )
    return found


def split_aux(result: Any, has_aux: bool) -> tuple[Any, Any]:
    """What a loss function returned, as (loss, aux); without aux that is None."""
    if not has_aux:
        return result, None
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            problem(
                f"has_aux=True, but the function returned a {type(result).__name__}.",
                expected="a pair (loss, aux)",
                write="return loss, {'accuracy': accuracy}",
            )
        )
    return result


def checked_loss(loss: Any) -> jax.Array:
    """The loss in float32 or wider, or an error if it is not one real number."""
    if not isinstance(loss, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
        raise TypeError(
            problem(
                f"the function returned a {type(loss).__name__}, not a loss.",
                expected="an array of shape (), or a pair (loss, aux) with has_aux=True",
                write="mp.value_and_grad(loss_fn, loss_scale, has_aux=True)",
            )
        )
    array = jnp.asarray(loss)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            problem(
                f"the loss has dtype {array.dtype}.",
                expected="a real floating loss; holomorphic gradients cannot be scaled",
                write="jnp.abs(loss) ** 2 for a complex loss, loss.astype(jnp.float32) for an integer one",
            )
        )
    if array.shape != ():
        raise ValueError(
            problem(f"the loss has shape {array.shape}.", expected="one number, of shape ()", write="loss.mean()")
        )
    return array.astype(wide_dtype(array.dtype))


def _check_trainable(chosen: Any, trainable: list[bool]) -> None:
    if any(trainable):
        return
    leaves = jax.tree_util.tree_leaves_with_path(chosen)
    rows = [f"{path_name(path)}: {getattr(leaf, 'dtype', type(leaf).__name__)}" for path, leaf in leaves]
    raise TypeError(
        problem(
            f"the arguments to differentiate hold no floats:\n{listing(rows or ['(no leaves at all)'])}",
            expected="at least one floating or complex leaf",
            write="argnums=1 if the parameters come second",
        )
    )
