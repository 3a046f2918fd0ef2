"""Gradient accumulation: one step over several microbatches, summed in float32."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._compat import is_float0, no_gradient
from mpjax._dtypes import FLOAT32, wide_dtype
from mpjax._errors import listing, problem
from mpjax._tree import agreed, all_finite, path_name
from mpjax._typing import Tree
from mpjax.fp8._markers import weights_first


def accumulate(
    grad_fn: Callable[..., Any],
    microbatches: int,
    *,
    batch_argnums: int | Sequence[int] | None = None,
    aux: Literal["mean", "stack"] = "mean",
    on_overflow: Literal["skip", "drop"] = "skip",
    axis_name: str | Sequence[str] | None = None,
) -> Callable[..., Any]:
    """Runs a gradient function over a batch in pieces, one after the other, and returns the mean.

    It is one `lax.scan` over the microbatches, so that memory is that of one microbatch and one float32 sum of the
    gradients, however many there are. Gradients stay SCALED, with one loss scale for all microbatches; nothing is
    kept from one call to the next. For windows of several steps put `optax.MultiSteps` inside `mpjax.loss_scaled`.

    The batch is split along its leading axis: row r goes to microbatch `r % microbatches`. With rows sharded over
    devices each device thus keeps its own, as long as their number divides the rows of one microbatch.

    All microbatches weigh the same. Where a loss is a mean over a number that varies (tokens that are not masked),
    return `microbatches * jnp.sum(losses * mask) / tokens` instead, with the whole batch's `tokens` as a keyword.

    Weights that `mixed_float8` brings into 8 bits are so once, before the loop.

    Args:
      grad_fn: `mpjax.value_and_grad(loss_fn, loss_scale, ...)` or jax's own: returns `(loss, grads)` or
        `((loss, aux), grads)`, with a loss that is a mean over the rows it is given.
      microbatches: how many, at least 1. It must divide the batch's leading axis.
      batch_argnums: the positional arguments to split; by default all after the first. Each is any tree of arrays
        with a common leading axis. A PRNG key of shape () in them is split with `jax.random.split`, so that every
        microbatch has its own noise. All other arguments, and keywords, are handed on whole.
      aux: what becomes of auxiliary outputs. `"mean"` averages every number in float32 (float64 and complex kept),
        integers and booleans too, as `jnp.mean` does: a count over the batch is `microbatches` times its mean.
        `"stack"` returns each leaf with a new leading axis of length `microbatches`.
      on_overflow: `"skip"`: a non-finite gradient in any microbatch makes the mean non-finite, so that
        `loss_scaled` skips the step. `"drop"`: microbatches with a non-finite gradient are left out. As long as
        the loss scale is too high, those are the ones with large gradients.
      axis_name: with `"drop"` under `shard_map` or `pmap`, the axes that have to agree: all devices drop a
        microbatch that overflowed on one. Under `jit` with sharded arrays nothing is needed.

    Returns:
      A function of `grad_fn`'s arguments that returns what it returns: the mean loss in float32 and the mean
      gradients, in float32 for half-precision parameters too (float64 and complex kept). Leaves without a gradient
      (float0, `None`) stay what they are.

      With `"drop"` it returns `(value, grads, dropped)`: means over the microbatches kept, and which were not, a bool
      array of shape (microbatches,). Tell the optimizer, `tx.update(grads, opt_state, params,
      overflowed=dropped.any())`, and the loss scale backs off although the step is taken. When all were dropped the
      gradients and the averaged aux are NaN, so that the step is skipped, and the loss is the mean of all.

    Raises:
      TypeError: `microbatches` is not a whole number, `grad_fn` does not return `(loss, grads)`, or aux holds what has
        no mean.
      ValueError: `microbatches` is below 1 or does not divide the batch, the arrays to split differ in their leading
        axes or have none (all are listed), an option is none of its values, or `batch_argnums` names no argument.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> loss_fn = lambda w, x: jnp.mean((w * x) ** 2)
    >>> grad_fn = mp.value_and_grad(loss_fn, mp.StaticLossScale(8.0))
    >>> loss, grads = mp.accumulate(grad_fn, microbatches=2)(jnp.bfloat16(1), jnp.array([1.0, 2, 3, 4]))
    >>> float(loss), float(grads), grads.dtype.name
    (7.5, 120.0, 'float32')

    References:
      What the float32 sums are for: in bfloat16, `optax.microbatch` adds up 1024 ones to 256.
    """
    count = _whole_number(microbatches)
    _check_choice("aux", aux, ("mean", "stack"))
    _check_choice("on_overflow", on_overflow, ("skip", "drop"))
    drop = on_overflow == "drop"

    @functools.wraps(grad_fn)
    def accumulated(*args: Any, **kwargs: Any) -> Any:
        batch = {position: args[position] for position in _positions(batch_argnums, len(args))}
        _check_batch(batch, count)
        pieces = jax.tree.map(lambda x: _fold(x, count), batch)

        def one(i: Any) -> Any:
            mine = jax.tree.map(lambda piece: piece(i), pieces)
            call = [mine.get(position, arg) for position, arg in enumerate(args)]
            return _checked_result(grad_fn(*call, **kwargs))

        # Traced once, here, for the shapes of what it returns, and only evaluated in the loop.
        jaxpr, shapes = jax.make_jaxpr(one, return_shape=True)(jnp.zeros([], jnp.int32))
        run, structure = weights_first(jaxpr), jax.tree.structure(shapes)
        if aux == "mean":
            _check_has_mean(shapes[1])

        def to_sum(result: Any) -> Any:
            """What is added up: gradients that are numbers, and aux unless it is stacked."""
            _, metrics, grads = result
            return [g for g in jax.tree.leaves(grads) if not is_float0(g)], metrics if aux == "mean" else None

        def body(sums: Tree, i: Any) -> tuple[Tree, Any]:
            # Python's numbers come back as such, and weakly typed.
            result = jax.tree.unflatten(structure, [_as_array(x) for x in run(i)])
            loss, metrics, grads = result
            finite = agreed(all_finite(grads), axis_name) if drop else None
            added = jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, to_sum(result))
            if finite is not None:
                added = jax.tree.map(lambda new, old: jnp.where(finite, new, old), added, sums)
            return added, (loss, finite, metrics if aux == "stack" else None)

        # zeros_like and not zeros: under shard_map they have to vary over the same axes as the sums.
        zeros = jax.tree.map(lambda s: jnp.zeros_like(s, _sum_dtype(s.dtype)), to_sum(shapes))
        sums, (losses, finite, stacked) = jax.lax.scan(body, zeros, jnp.arange(count, dtype=jnp.int32))

        kept = jnp.asarray(count) if finite is None else finite.sum()
        # 0 / 0 is the NaN that says that nothing was kept.
        grads, metrics = jax.tree.map(lambda s: s / kept.astype(s.dtype), sums)
        losses = losses.astype(_sum_dtype(losses.dtype))
        counted: Any = True if finite is None else finite | ~finite.any()
        loss = jnp.mean(losses, where=counted)

        moving = iter(grads)
        grads = jax.tree.map(lambda s: no_gradient(s) if is_float0(s) else next(moving), shapes[2])
        metrics = stacked if aux == "stack" else metrics
        value = (loss, *metrics) if metrics else loss
        return (value, grads) if finite is None else (value, grads, ~finite)

    return accumulated


def _whole_number(microbatches: Any) -> int:
    is_number = isinstance(microbatches, int | np.integer) and not isinstance(microbatches, bool)
    if not is_number or microbatches < 1:
        raise (ValueError if is_number else TypeError)(
            problem(
                f"microbatches is {microbatches!r}.",
                expected="a whole number of at least 1",
                write="mp.accumulate(grad_fn, microbatches=4)",
            )
        )
    return int(microbatches)


def _check_choice(name: str, value: Any, choices: tuple[str, str]) -> None:
    if value not in choices:
        raise ValueError(
            problem(
                f"{name} is {value!r}.",
                expected=" or ".join(map(repr, choices)),
                write=f'mp.accumulate(grad_fn, microbatches=4, {name}="{choices[0]}")',
            )
        )


def _positions(argnums: Any, count: int) -> list[int]:
    """The arguments to split, counted from 0."""
    wanted = range(1, count) if argnums is None else argnums if isinstance(argnums, tuple | list) else (argnums,)
    try:
        positions = [operator.index(n) for n in wanted]
    except TypeError:
        positions = []
    if not positions or not all(-count <= n < count for n in positions):
        raise ValueError(
            problem(
                f"batch_argnums is {argnums!r}, but the function was called with {count} positional arguments.",
                expected="positions of positional arguments; by default all after the first",
                write="mp.accumulate(grad_fn, microbatches=4, batch_argnums=1)(params, batch)",
            )
        )
    return [n % count for n in positions]


def _is_key(x: Any) -> bool:
    """Whether a leaf is one PRNG key, which is split by its own rule and not along an axis."""
    return hasattr(x, "dtype") and bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key)) and x.shape == ()


def _check_batch(batch: dict[int, Tree], count: int) -> None:
    """Raises a ValueError unless all leaves but keys have one leading axis that `count` divides."""
    leaves = [(path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(batch) if not _is_key(x)]
    without = [f"{name}: {_described(x)}" for name, x in leaves if not getattr(x, "shape", ())]
    if without or not leaves:
        raise ValueError(
            problem(
                f"arguments to split hold no leading axis at\n{listing(without or ['(no arrays at all)'])}",
                expected="arrays with the batch along their first axis, or PRNG keys of shape ()",
                write="mp.accumulate(grad_fn, microbatches=4, batch_argnums=1), or pass what is whole by keyword",
            )
        )
    rows = sorted({x.shape[0] for _, x in leaves})
    shapes = [f"{name}: {_described(x)}" for name, x in leaves]
    if len(rows) > 1:
        raise ValueError(
            problem(
                f"arguments to split differ in their leading axis:\n{listing(shapes)}",
                expected="the same number of rows in all",
                write="mp.accumulate(grad_fn, microbatches=4, batch_argnums=1), naming those that are batches",
            )
        )
    if rows[0] % count or not rows[0]:
        fits = max((n for n in range(1, min(count, rows[0]) + 1) if rows[0] % n == 0), default=1)
        raise ValueError(
            problem(
                f"microbatches={count} does not divide the {rows[0]} rows of\n{listing(shapes)}",
                expected="microbatches of the same size, of one row at least",
                write=f"microbatches={fits}, or a batch of {count * max(1, round(rows[0] / count))} rows",
            )
        )


def _described(x: Any) -> str:
    return f"{x.dtype}{x.shape}" if hasattr(x, "dtype") and hasattr(x, "shape") else type(x).__name__


def _fold(x: Any, count: int) -> Callable[[Any], Any]:
    """The function from a microbatch's number to its part of a leaf."""
    if _is_key(x):
        keys = jax.random.split(x, count)
        return lambda i: keys[i]
    # Microbatches along the second axis: along the first, each would lie on a few of the devices.
    x = jnp.asarray(x)
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:])
    return lambda i: jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)


def _checked_result(result: Any) -> tuple[Any, tuple[Any, ...], Any]:
    """Splits what `grad_fn` returned into loss, a tuple of aux or nothing, and gradients."""
    value, grads = result if isinstance(result, tuple) and len(result) == 2 else (None, None)
    loss: Any
    loss, *aux = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.inexact):
        found = f"tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise TypeError(
            problem(
                f"grad_fn returned no loss of shape () and gradients, but a {found}.",
                expected="(loss, grads), or ((loss, aux), grads)",
                write="mp.accumulate(mp.value_and_grad(loss_fn, loss_scale), microbatches=4)",
            )
        )
    return loss, tuple(aux), grads


def _check_has_mean(aux: Tree) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(aux)
    numbers = (jnp.number, jnp.bool_)
    rows = [
        f"{path_name(path[1:]) or '<root>'}: {x.dtype}{x.shape}"
        for path, x in leaves
        if is_float0(x) or not any(jnp.issubdtype(x.dtype, kind) for kind in numbers)
    ]
    if rows:
        raise TypeError(
            problem(
                f"aux has no mean at\n{listing(rows)}",
                expected="numbers or booleans",
                write='mp.accumulate(grad_fn, microbatches=4, aux="stack")',
            )
        )


def _as_array(x: Any) -> Any:
    """A strongly typed array of a number; float0 and keys stay."""
    return jnp.asarray(x, jnp.result_type(x)) if isinstance(x, bool | int | float | complex) else x


def _sum_dtype(dtype: Any) -> np.dtype[Any]:
    return wide_dtype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else FLOAT32
