"""`locate_nonfinite`: the public entry, and who is to blame."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jmp
import numpy as np

from mpjax._compat import is_tracer
from mpjax._convert import as_loss_scale
from mpjax._errors import problem
from mpjax._loss_scale import LossScale
from mpjax._tree import instances
from mpjax.diagnostics._located import NonFinite, ValueRange
from mpjax.diagnostics._origins import Origin, Value
from mpjax.diagnostics._search import Search
from mpjax.diagnostics._traced import trace


def locate_nonfinite(fn: Callable[..., Any], *, loss_scale: Any = None) -> Callable[..., NonFinite]:
    """Finds the first operation that makes the infinities and NaNs in a function's results.

    The function is traced, and its operations are evaluated one by one with the arguments; `jit`, `scan`, `while`,
    `cond`, `checkpoint`, `custom_jvp`, `custom_vjp` and `shard_map` are entered. Large bodies are compiled and run
    first, and entered only if something in them is not finite. For a look into a failed step, not for every step: it
    takes many times as long, and nothing is fused. See `record_amax` for every step.

    Transformations and `mpjax.autocast` go inside: `locate_nonfinite(jax.grad(loss_fn))` finds what is wrong in either
    pass, and of a train step that skips overflows, what made it skip. Infinities that reach no result are not blamed: a
    mask of -inf in a softmax is fine. Callbacks in the function run again.

    Args:
      fn: any function of pytrees. For NNX modules, a function of the state and the graph of `nnx.split`.
      loss_scale: the loss scale, a number or one of mpjax's or jmp's, where the function closes over it. Default: the
        one in the arguments, if there is exactly one; `mpjax.value_and_grad` closes over it, `tx.update` is given it.

    Returns:
      A function of the same arguments that returns a `NonFinite`: true if there is something, and it prints as a
      paragraph. Arguments may live on several devices of this process.

    Raises:
      TypeError: `loss_scale` is neither a number nor a loss scale.
      ValueError: it is called under `jit` or another transformation, where values are not known.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> def loss_fn(w, x):
    ...     with jax.named_scope("head"):
    ...         return jnp.mean(jnp.log(x @ w))
    >>> found = mp.diagnostics.locate_nonfinite(jax.grad(loss_fn))(jnp.zeros((2, 1)), jnp.ones((3, 2)))
    >>> found.operation.primitive, found.operation.direction, found.operation.path, found.operation.reason
    ('div', 'backward', 'head', 'The divisor is zero.')
    """
    given = None if loss_scale is None else _number(loss_scale)

    @functools.wraps(fn)
    def located(*args: Any, **kwargs: Any) -> NonFinite:
        if any(map(is_tracer, jax.tree.leaves((args, kwargs)))):
            raise ValueError(
                problem(
                    "locate_nonfinite was called under jit or another transformation, where values are not known.",
                    expected="a call outside, with the transformation inside",
                    write="locate_nonfinite(jax.jit(fn))(*args)",
                )
            )
        scale = _found_scale((args, kwargs)) if given is None else given
        traced = trace(fn, args, kwargs)
        search = Search(scale)
        ins = [search.source("input", name, x) for name, x in zip(traced.inputs, traced.arrays, strict=True)]
        consts = [
            search.constant(x, traced.jaxpr, v) for v, x in zip(traced.jaxpr.constvars, traced.consts, strict=True)
        ]
        outs = search.run(traced.jaxpr, consts, ins)
        return _verdict(search.origins, dict(zip(traced.outputs, outs, strict=True)), scale)

    return located


def _number(loss_scale: Any) -> float:
    if isinstance(loss_scale, int | float) and not isinstance(loss_scale, bool):
        return float(loss_scale)
    return float(np.asarray(as_loss_scale(loss_scale).loss_scale))


def _found_scale(tree: Any) -> float | None:
    """The one loss scale in the arguments, if there is one."""
    kinds = (LossScale, jmp.NoOpLossScale, jmp.StaticLossScale, jmp.DynamicLossScale)
    found = [_number(x) for _, x in instances(tree, kinds)]
    return found[0] if len(found) == 1 else None


def _verdict(origins: list[Origin], outputs: dict[str, Value], scale: float | None) -> NonFinite:
    flagged = frozenset[int]().union(*(v.flag for v in outputs.values()))
    nan = frozenset[int]().union(*(v.nan for v in outputs.values()))
    inf = frozenset[int]().union(*(v.inf for v in outputs.values()))
    reached = _with_causes(origins, nan | inf | flagged)
    # NaN tells more than an infinity, which a result may hold for good: the best loss so far, say.
    blamed = _with_causes(origins, nan or flagged or inf)

    def of(kind: str) -> list[Origin]:
        return [origins[i] for i in blamed if origins[i].kind == kind]

    data = [o for o in of("input") if o.values and (o.values.nan or o.values.positive_inf)]
    operations = of("operation")
    first = next((o for o in operations if not o.causes), None) or next(iter(operations), None)
    kind = "input" if data else "operation" if first else "input" if of("input") else "constant" if blamed else ""
    operation = first.operation if kind == "operation" and first else None
    then = next((o.operation for o in operations if o.causes and o is not first), None) if operation else None
    return NonFinite(
        kind,
        operation,
        then,
        tuple(o.values for o in origins if o.kind == "input" and o.values),
        tuple(o.values for o in map(origins.__getitem__, reached) if o.kind == "constant" and o.values),
        tuple(ValueRange.of(name, v.array) for name, v in outputs.items() if v.bad),
        bool(flagged),
        tuple(o.operation for i, o in enumerate(origins) if i not in reached and o.operation),
        scale,
    )


def _with_causes(origins: list[Origin], start: Iterable[int]) -> list[int]:
    """These origins and what they come from, in the order of the program."""
    found, stack = set[int](), list(start)
    while stack:
        i = stack.pop()
        if i not in found:
            found.add(i)
            stack.extend(origins[i].causes)
    return sorted(found)
