"""`mpjax.autocast`: the public entry."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._autocast import _custom_rules, _higher_order
from mpjax._autocast._interpreter import Context, evaluate, marked
from mpjax._autocast._rules import Rules, default_rules
from mpjax._compat import open_jaxpr
from mpjax._dtypes import FLOAT32, is_float8
from mpjax._errors import problem
from mpjax._policy import default_policy, get_policy

_HIGHER_ORDER: dict[str, Callable[..., Any]] = {
    "jit": _higher_order.call,
    "remat2": _higher_order.remat,
    "cond": _higher_order.cond,
    "scan": _higher_order.scan,
    "while": _higher_order.while_loop,
    "shard_map": _higher_order.shard_map,
    "custom_jvp_call": _custom_rules.custom_jvp,
}


def autocast(fn: Callable[..., Any], policy: Any = None, rules: Rules | None = None) -> Callable[..., Any]:
    """Evaluates a float32 function in mixed precision: matrix work in the compute dtype, what needs float32 in it.

    The function is traced to a jaxpr in its own dtypes and evaluated again under a table of rules: dots and
    convolutions in the compute dtype; exponentials, logarithms, sums, statistics and losses in float32; what is
    between them in the precision of its inputs. It composes both ways with `grad`, `jit`, `vmap`, `scan`,
    `remat` and `shard_map`. `jit`, `scan`, `while`, `cond`, `checkpoint`, `shard_map` and `custom_jvp` are
    entered; running sums in loop carries stay float32. Functions with a `custom_vjp`, kernels and callbacks are
    left as written, with a warning where they hold matrix work.

    What the user decided stays: float64, complex, integer and fp8 values, values that are in half precision
    already, explicit casts and accumulation dtypes.

    Args:
      fn: any function of pytrees, in float32.
      policy: a policy or its name; its compute dtype counts. Default: `mpjax.default_policy()`.
      rules: the table. Default: `mpjax.default_rules()`.

    Returns:
      A function of the same arguments whose results have the dtypes that `fn`'s have.

    Raises:
      NotImplementedError: the policy computes in fp8.

    Warns:
      UserWarning: matrix work that is left in float32, with its source line.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> loss_fn = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
    >>> cast = mp.autocast(loss_fn, "mixed_bfloat16")
    >>> w, x = jnp.ones((2, 2)), jnp.ones((3, 2))
    >>> jax.grad(cast)(w, x).dtype.name, "bf16" in str(jax.make_jaxpr(cast)(w, x))
    ('float32', True)
    """
    chosen = default_policy() if policy is None else get_policy(policy)
    table = default_rules() if rules is None else rules
    if is_float8(chosen.compute_dtype):
        raise NotImplementedError(
            problem(
                f"the policy {chosen} computes in {chosen.compute_dtype}.",
                expected="a compute dtype of 16 or 32 bits",
                write='mp.autocast(fn, "mixed_bfloat16")',
            )
        )

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if chosen.compute_dtype == FLOAT32:
            return fn(*args, **kwargs)
        leaves, structure = jax.tree.flatten((args, kwargs))
        moves = [is_array(x) for x in leaves]
        out_structure: Any = None
        static: list[Any] = []

        def flat(*arrays: Any) -> Any:
            nonlocal out_structure
            moving = iter(arrays)
            merged = [next(moving) if m else x for x, m in zip(leaves, moves, strict=True)]
            call_args, call_kwargs = jax.tree.unflatten(structure, merged)
            outs, out_structure = jax.tree.flatten(fn(*call_args, **call_kwargs))
            static[:] = [None if is_array(x) else x for x in outs]
            return [x for x in outs if is_array(x)]

        arrays = [x for x, m in zip(leaves, moves, strict=True) if m]
        jaxpr, consts = open_jaxpr(jax.make_jaxpr(flat)(*arrays))
        ctx = Context(chosen.compute_dtype, table, _HIGHER_ORDER)
        ins = [marked(jnp.asarray(x), var.aval) for x, var in zip(arrays, jaxpr.invars, strict=True)]
        outs = iter(evaluate(ctx, jaxpr, consts, ins))
        # What is no array (a name, a function) is handed on as it is.
        return jax.tree.unflatten(out_structure, [ctx.widen(next(outs)) if x is None else x for x in static])

    return wrapped


def is_array(x: Any) -> bool:
    """Whether a leaf is a value that jax traces."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | int | float | complex)
