"""`mpjax.autocast`: the public entry."""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._autocast import _custom_rules, _higher_order
from mpjax._autocast._context import Context, marked
from mpjax._autocast._interpreter import evaluate
from mpjax._autocast._regions import modules_of
from mpjax._autocast._rules import Rules, default_rules
from mpjax._compat import as_function, is_staged, looks_for_nans, open_jaxpr, trace_context, weakly_typed
from mpjax._dtypes import BFLOAT16, FLOAT32, is_float8
from mpjax._errors import problem, users_stacklevel
from mpjax._policy import Policy, default_policy, get_policy
from mpjax.fp8._recipe import has_float8

_HIGHER_ORDER: dict[str, Callable[..., Any]] = {
    "jit": _higher_order.call,
    "remat2": _higher_order.remat,
    "cond": _higher_order.cond,
    "scan": _higher_order.scan,
    "while": _higher_order.while_loop,
    "shard_map": _higher_order.shard_map,
    "closed_call": _higher_order.inline,
    "call": _higher_order.inline,
    "eval_jaxpr": _higher_order.inline,
    "custom_jvp_call": _custom_rules.custom_jvp,
    "custom_vjp_call": _custom_rules.custom_vjp,
    "custom_vmap_call": _custom_rules.custom_vmap,
    "remat_opt": _custom_rules.remat_opt,
}


# Stands for an array among the leaves of a tree.
_ARRAY = object()
# Signatures of one function whose rewritten programs are kept for eager calls.
_MOST_KEPT = 64


def autocast(
    fn: Callable[..., Any], policy: Any = None, rules: Rules | None = None, *, cast_outputs: bool = False
) -> Callable[..., Any]:
    """Evaluates a float32 function in mixed precision: matrix work in the compute dtype, what needs float32 in it.

    The function is traced to a jaxpr in its own dtypes and evaluated again under a table of rules: dots and
    convolutions in the compute dtype; exponentials, logarithms, sums, statistics and losses in float32; what is
    between them in the precision of its inputs. It composes both ways with `grad`, `jit`, `vmap`, `scan`,
    `remat` and `shard_map`. `jit`, `scan`, `while`, `cond`, `checkpoint`, `shard_map`, `custom_jvp` and
    `custom_vjp` are entered; running sums in loop carries stay float32, and so does a loop whose condition reads a
    float: 16 bits may never reach its tolerance. Kernels and callbacks are left as written, with a warning where they
    hold matrix work.

    On GPUs and TPUs the weight gradients of dots are float32 as the accumulator has them, and are added up so over the
    devices of a sharded `jit`, unless the policy's reduce dtype is the compute dtype. Those of convolutions are so on
    TPUs alone: cuDNN has no such convolution.

    Sharded weights travel in the compute dtype: those that a sharded `jit` gathers, and under `shard_map` what
    `jax.lax.all_gather` makes of a weight that matrix work alone reads. There too gradients come back, and those of
    replicated weights are added up, in the reduce dtype; for sums that you write yourself see `Policy.cast_to_reduce`.

    A policy that computes in fp8 (`"mixed_float8"`) is the one in bfloat16, but for products of a weight that are large
    enough: their operands are in 8 bits, with scales of the moment, as `mpjax.fp8.Recipe` says. They have derivatives
    of first order alone. On devices without fp8 units they are in bfloat16, with a warning.

    What the user decided stays: float64, complex, integer and fp8 values, values that are in half precision
    already, explicit casts and accumulation dtypes.

    Args:
      fn: any function of pytrees, in float32.
      policy: a policy or its name: its compute dtype, and its reduce dtype for sums over devices (of weight gradients,
        and if it is the compute dtype of activations, `psum(x @ w)`; else those are float32). Default:
        `mpjax.default_policy()`.
      rules: the table. Default: `mpjax.default_rules()`.
      cast_outputs: whether floating results are cast to the policy's output dtype.

    Returns:
      A function of the same arguments whose results have the dtypes that `fn`'s have. Called outside `jit` it
      traces `fn` once for each signature, as `jit` does.

    Raises:
      ValueError: the policy computes in a format for gradients alone, such as float8_e5m2.

    Warns:
      UserWarning: matrix work that is left in float32, with its source line; fp8 on a device without it.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> loss_fn = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
    >>> cast = mp.autocast(loss_fn, "mixed_bfloat16")
    >>> w, x = jnp.ones((2, 2)), jnp.ones((3, 2))
    >>> jax.grad(cast)(w, x).dtype.name, "bf16" in str(jax.make_jaxpr(cast)(w, x))
    ('float32', True)
    """
    chosen = default_policy() if policy is None else get_policy(policy)
    table = default_rules() if rules is None else rules
    _check(chosen, table)
    kept: dict[Any, Any] = {}

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if chosen.compute_dtype == FLOAT32:
            outs = fn(*args, **kwargs)
        else:
            outs = _call(fn, (args, kwargs), chosen, table, kept)
        return chosen.cast_to_output(outs) if cast_outputs else outs

    return wrapped


class _Tree(NamedTuple):
    """A tree with its arrays taken out; what is no array (a name, a function) stays in its place."""

    structure: Any
    static: tuple[Any, ...]

    @classmethod
    def of(cls, tree: Any) -> tuple["_Tree", list[Any]]:
        leaves, structure = jax.tree.flatten(tree)
        static = tuple(_ARRAY if is_array(x) else x for x in leaves)
        return cls(structure, static), [jnp.asarray(x) for x in leaves if is_array(x)]

    def filled(self, arrays: Iterable[Any]) -> Any:
        moving = iter(arrays)
        return jax.tree.unflatten(self.structure, [next(moving) if x is _ARRAY else x for x in self.static])


def _trace(fn: Callable[..., Any], inputs: _Tree, arrays: Sequence[Any]) -> tuple[Any, list[Any], _Tree]:
    """Traces a function of trees in its own dtypes: jaxpr, constants and the tree of its results."""
    outputs: list[_Tree] = []

    def flat(*arrays: Any) -> list[Any]:
        args, kwargs = inputs.filled(arrays)
        tree, outs = _Tree.of(fn(*args, **kwargs))
        outputs.append(tree)
        return outs

    jaxpr, consts = open_jaxpr(jax.make_jaxpr(flat)(*arrays))
    return jaxpr, consts, outputs[-1]


def _check(policy: Policy, rules: Rules) -> None:
    """Raises an error if no weights are computed in a policy's dtype."""
    if is_float8(policy.compute_dtype):
        rules.fp8.method(policy.compute_dtype)


def _context(policy: Policy, rules: Rules, notes: list[Any] | None = None) -> Context:
    if not is_float8(policy.compute_dtype):
        return Context(policy.compute_dtype, policy.reduce_dtype, rules, _HIGHER_ORDER, notes=notes)
    float8: Any = rules.fp8.method(policy.compute_dtype)
    if not (float8.emulate or has_float8()):
        float8 = "this device has no fp8 units"
        warnings.warn(
            problem(
                f"the policy {policy} is computed in bfloat16: {float8}.",
                expected="an NVIDIA GPU from sm_89 on (L4, H100), AMD MI300, TPU7x; `mpjax info` lists them",
                write='"mixed_bfloat16"; to try out what fp8 would give, '
                "mp.default_rules().with_fp8(mp.fp8.Recipe(emulate=True))",
            ),
            UserWarning,
            stacklevel=users_stacklevel(),
        )
    return Context(BFLOAT16, policy.reduce_dtype, rules, _HIGHER_ORDER, float8=float8, notes=notes)


def noted(fn: Callable[..., Any], policy: Policy, rules: Rules) -> tuple[Callable[..., Any], list[Any]]:
    """`fn` under autocast, and a list that each call fills with equations and what was decided for them.

    The rewritten equations carry the number of their note in a name scope.
    """
    _check(policy, rules)
    notes: list[Any] = []
    if policy.compute_dtype == FLOAT32:
        return fn, notes

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        inputs, arrays = _Tree.of((args, kwargs))
        outs, outputs = _evaluated(_context(policy, rules, notes), fn, inputs, arrays)
        return outputs.filled(outs)

    return wrapped, notes


def _evaluated(ctx: Context, fn: Callable[..., Any], inputs: _Tree, arrays: Sequence[Any]) -> tuple[list[Any], _Tree]:
    jaxpr, consts, outputs = _trace(fn, inputs, arrays)
    return _widened(ctx, jaxpr, consts, arrays), outputs


def _widened(ctx: Context, jaxpr: Any, consts: list[Any], arrays: Sequence[Any]) -> list[Any]:
    ins = [marked(x, var.aval) for x, var in zip(arrays, jaxpr.invars, strict=True)]
    outs = [ctx.widen(value) for value in evaluate(ctx, jaxpr, consts, ins)]
    ctx.rules.warn_of_unused(sorted({modules_of(path) for path in ctx.seen}), ctx.sources)
    weak = [getattr(var.aval, "weak_type", False) for var in jaxpr.outvars]
    return [weakly_typed(x) if w and not jax.typeof(x).weak_type else x for x, w in zip(outs, weak, strict=True)]


def _call(fn: Callable[..., Any], args: Any, policy: Policy, rules: Rules, kept: dict[Any, Any]) -> Any:
    inputs, arrays = _Tree.of(args)
    ctx = _context(policy, rules)

    # JAX looks for NaNs where an equation is bound, and not where a kept program is evaluated.
    if looks_for_nans() or any(map(is_staged, arrays)):
        outs, outputs = _evaluated(ctx, fn, inputs, arrays)
        return outputs.filled(outs)
    # Eager: the rewritten function is kept as jit would keep it, so that its loops are not compiled at each call.
    # 1, 1.0 and True are equal, and so are 0.0 and -0.0.
    static = tuple((type(x), repr(x)) if isinstance(x, int | float | complex) else x for x in inputs.static)
    key: Any = (inputs.structure, static, tuple(map(jax.typeof, arrays)), trace_context())
    try:
        found = kept.get(key)
    except TypeError:  # a static argument that has no hash
        key, found = None, None
    if found is None:
        jaxpr, consts, outputs = _trace(fn, inputs, arrays)
        found = as_function(jax.make_jaxpr(lambda *xs: _widened(ctx, jaxpr, consts, xs))(*arrays)), outputs
        # Arrays that the function closes over may be others next time, as in a module that is updated in place.
        if key is not None and not consts:
            kept[key] = found
            if len(kept) > _MOST_KEPT:
                del kept[next(iter(kept))]
    evaluated, outputs = found
    return outputs.filled(evaluated(*arrays))


def is_array(x: Any) -> bool:
    """Whether a leaf is an array. Python numbers are not: a function may branch on them."""
    return isinstance(x, jax.Array | np.ndarray | np.generic)
