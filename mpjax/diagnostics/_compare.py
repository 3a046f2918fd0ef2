"""`compare` and `suggest`: which operations lose accuracy in low precision, and the rules that keep it."""

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax

from mpjax._autocast import Rules, default_rules
from mpjax._compat import is_tracer
from mpjax._errors import listing, problem
from mpjax._policy import default_policy, get_policy
from mpjax.diagnostics._comparison import Comparison, Fix, OperationError
from mpjax.diagnostics._exemptions import Exemption, cheapest, fewest
from mpjax.diagnostics._explain import explain
from mpjax.diagnostics._measured import Found, Measured, Reference, reference_dtype
from mpjax.diagnostics._sites import Site

# A fix is worth a line if it lowers the error by a twentieth.
_WORTHWHILE = 0.95


def compare(
    fn: Callable[..., Any],
    policy: Any = None,
    rules: Rules | None = None,
    *,
    reference: str = "float32",
    through: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Callable[..., Comparison]:
    """Says which operations lose accuracy under `mpjax.autocast`, and which rule would keep it.

    The program that autocast makes is evaluated beside a reference: once with everything in low precision, and once for
    each operation with that one alone. The precision of an operation is a switch that is read as the program runs, so
    that it is compiled once; each evaluation takes three times the arithmetic of the function. For a look at a small
    batch, not for every step. `jit`, `scan`, `while`, `cond`, `checkpoint` and `shard_map` are entered; a kernel or a
    callback counts as one operation in its own dtypes.

    Operations are grouped by module, source line and primitive. Casts of operands belong to the operation that reads
    them. What the code itself narrows is measured too.

    Args:
      fn: any function of pytrees, in float32. For NNX modules, a function of the state and the graph of `nnx.split`.
      policy: a policy or its name. Default: `mpjax.default_policy()`.
      rules: the table. Default: `mpjax.default_rules()`.
      reference: `"float32"`, with matrix products in full float32 on every device, or `"float64"`, against which
        float32 operations have errors too; it takes devices that have float64.
      through: a transformation of the function, such as `jax.value_and_grad`, to compare gradients too.

    Returns:
      A function of the same arguments that returns a `Comparison`: a row for each operation, the one that does most to
      the results first, and the cheapest rule for the worst that rules decide over, tried out. It prints as a table.

    Raises:
      ValueError: `reference` is neither; it is called under `jit`, or the function returns no float array.
      TypeError: an argument is a `jax.ShapeDtypeStruct`, which has no values.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> def fn(w, x):
    ...     angle = x @ w
    ...     return jnp.sin(angle)
    >>> found = mp.diagnostics.compare(fn, "mixed_bfloat16")(jnp.full((4, 4), 99.7), jnp.full((2, 4), 3.3))
    >>> found.operations[0].primitive, found.total > 0.1, found.fix.after
    ('dot_general', True, 0.0)
    """
    dtype = reference_dtype(reference)
    chosen = default_policy() if policy is None else get_policy(policy)
    table = default_rules() if rules is None else rules

    @functools.wraps(fn)
    def compared(*args: Any, **kwargs: Any) -> Comparison:
        exact = _reference("compare", fn, dtype, through, args, kwargs)
        measured = Measured(fn, chosen, table, through, exact)
        everything = measured.run(measured.narrow)
        accumulated, total = everything.operations, everything.total
        rows = []
        for site, known in measured.sites.items():
            alone = measured.run([site]) if known.narrow else Found({}, [], {})
            keys = (site, False), (site, True)
            rows.append(
                OperationError(
                    *site,
                    alone.operations.get(keys[0], 0.0),
                    accumulated.get(keys[0], 0.0),
                    alone.operations.get(keys[1], 0.0) if keys[1] in accumulated else None,
                    accumulated.get(keys[1]),
                    alone.total,
                    known.reason,
                    known.ruled,
                )
            )
        rows.sort(key=lambda row: (-row.total, -row.local))
        found = fix(measured, rows, total)
        return Comparison(str(chosen), reference, tuple(rows), everything.outputs, total, exact.not_finite, found)

    def fix(measured: Measured, rows: list[OperationError], total: float) -> Fix | None:
        worst = next((row for row in rows if row.ruled and row.total), None)
        found = worst and cheapest(measured, Site(worst.path, worst.source, worst.primitive))
        if not found:
            return None
        args, kwargs = measured.reference.call
        changed = found.added(table)
        new = Measured(fn, chosen, changed, through, measured.reference)
        after = new.total(new.narrow)
        if not after < total * _WORTHWHILE:
            return None

        def moved(rules: Rules) -> int:
            return sum(explain(fn, chosen, rules, through=through)(*args, **kwargs).bytes.values())

        start = "mp.default_rules()" if rules is None else "rules"
        return Fix(changed, f"{start}{found.code}", found.words, total, after, moved(changed) / moved(table))

    return compared


def suggest(
    fn: Callable[..., Any],
    policy: Any,
    tolerance: float,
    rules: Rules | None = None,
    *,
    reference: str = "float32",
    through: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Callable[..., Rules]:
    """Finds rules under which a function stays within a tolerance of float32, with few exceptions.

    One line or module after the other is put into float32: the cheapest that meets the tolerance, else the one that
    lowers the error most; then what turned out not to be needed is taken out. Where one of them is most of the work,
    several smaller ones are taken instead if they do. Each step is measured with the rules as autocast applies them.
    What it takes is that of `compare` for each step.

    Args:
      fn: any function of pytrees, in float32.
      policy: a policy or its name.
      tolerance: for the relative error of the results, as `Comparison.total` has it.
      rules: the table to start from. Default: `mpjax.default_rules()`.
      reference: `"float32"` or `"float64"`, as in `compare`.
      through: a transformation of the function, such as `jax.grad`, to hold gradients to the tolerance.

    Returns:
      A function of the same arguments that returns the rules, for `mpjax.autocast(fn, policy, rules)`. If nothing is
      needed, they are those that it started from.

    Raises:
      ValueError: no exceptions are enough, `tolerance` is no positive number, or as in `compare`.
      TypeError: as in `compare`.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> def fn(w, x):
    ...     with jax.named_scope("angle"):
    ...         angle = x @ w
    ...     return jnp.sin(angle)
    >>> w, x = jnp.full((4, 4), 99.7), jnp.full((2, 4), 3.3)
    >>> rules = mp.diagnostics.suggest(fn, "mixed_bfloat16", 1e-3)(w, x)
    >>> bool(jnp.allclose(mp.autocast(fn, "mixed_bfloat16", rules)(w, x), fn(w, x)))
    True
    """
    dtype = reference_dtype(reference)
    chosen = get_policy(policy)
    table = default_rules() if rules is None else rules
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < math.inf:
        raise ValueError(
            problem(
                f"tolerance is {tolerance!r}.",
                expected="a positive number, for the relative error of the results",
                write='suggest(fn, "mixed_bfloat16", 1e-2)(*args)',
            )
        )

    @functools.wraps(fn)
    def suggested(*args: Any, **kwargs: Any) -> Rules:
        exact = _reference("suggest", fn, dtype, through, args, kwargs)

        def with_(exceptions: Collection[Exemption]) -> Rules:
            return functools.reduce(lambda rules, x: x.added(rules), exceptions, table)

        found, measured, total = fewest(lambda x: Measured(fn, chosen, with_(x), through, exact), tolerance)
        if total <= tolerance:
            return with_(found)
        own = [" ".join(filter(None, site)) for site in measured.narrow if not measured.sites[site].ruled]
        better = (
            f"suggest(fn, {str(chosen)!r}, {total * 1.1:.2g})(*args)" if total < math.inf else "compare(fn, policy)"
        )
        raise ValueError(
            problem(
                f"no exceptions bring the error of the results to {tolerance:g}: it is {total:.3g} with\n"
                f"{listing([f'rules{x.code}' for x in found] or ['the rules as they are'])}\n"
                f"  what is narrow because the code says so:\n{listing(own or ['nothing'])}",
                expected="a tolerance that float32 meets, and no low precision in the code that spoils it",
                write=better,
            )
        )

    return suggested


def _reference(name: str, fn: Any, dtype: Any, through: Any, args: tuple[Any, ...], kwargs: Any) -> Reference:
    leaves = jax.tree.leaves((args, kwargs))
    if any(map(is_tracer, leaves)):
        raise ValueError(
            problem(
                f"{name} was called under jit or another transformation, where values are not known.",
                expected="a call outside, with the transformation inside",
                write=f"{name}(fn, policy, through=jax.value_and_grad)(*args)",
            )
        )
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        raise TypeError(
            problem(
                f"an argument of {name} is a jax.ShapeDtypeStruct.",
                expected="arrays: errors depend on their values",
                write=f"{name}(fn, policy)(params, batch), with a real batch",
            )
        )
    found = Reference(through(fn) if through else fn, dtype, args, kwargs)
    if not found.floats:
        raise ValueError(
            problem(
                "the function returns no float array.",
                expected="results that low precision can change",
                write=f"{name}(lambda *args: jnp.mean(fn(*args)), policy)(*args)",
            )
        )
    return found
