"""`mpjax.explain`: reads the rewritten program back, equation by equation."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from mpjax._autocast import Rules, default_rules, noted
from mpjax._autocast._decide import Action, Decision
from mpjax._autocast._interpreter import NOTE
from mpjax._autocast._regions import modules_of
from mpjax._autocast._tables import Kind
from mpjax._compat import inner_jaxprs, is_backward, is_literal, name_scopes, open_jaxpr, source_line
from mpjax._policy import default_policy, get_policy
from mpjax.diagnostics._explanation import Cast, Explanation, NotEntered, Operation
from mpjax.diagnostics._flops import flops, operand_bytes
from mpjax.diagnostics._place import REPEATED


def explain(
    fn: Callable[..., Any],
    policy: Any = None,
    rules: Rules | None = None,
    *,
    through: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Callable[..., Explanation]:
    """Says in which precision `mpjax.autocast` computes each operation of a function, and why.

    The function is traced, not run: `jax.ShapeDtypeStruct`s do as arguments. What is listed is read back from the
    rewritten program.

    Args:
      fn: any function of pytrees, in float32.
      policy: a policy or its name. Default: `mpjax.default_policy()`.
      rules: the table. Default: `mpjax.default_rules()`.
      through: a transformation of the function, such as `jax.value_and_grad`, to list the backward pass too.

    Returns:
      A function of the same arguments that returns an `Explanation`: operations grouped by module, source line and
      dtypes, the casts that were put in, what was not entered, and totals. It prints as a table.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> def loss_fn(w, x):
    ...     return jnp.mean(jnp.tanh(x @ w) ** 2)
    >>> found = mp.explain(loss_fn, "mixed_bfloat16")(jnp.ones((4, 4)), jnp.ones((8, 4)))
    >>> [(row.primitive, *row.inputs[:1], row.mark) for row in found.operations][:2]
    [('dot_general', 'bfloat16', 'LOW'), ('tanh', 'float32', 'NORMED')]
    >>> found.flops["bfloat16"]
    256
    """
    chosen = default_policy() if policy is None else get_policy(policy)
    table = default_rules() if rules is None else rules

    def explained(*args: Any, **kwargs: Any) -> Explanation:
        cast, notes = noted(fn, chosen, table)
        leaves, structure = jax.tree.flatten((args, kwargs))
        moving = [hasattr(x, "dtype") and hasattr(x, "shape") for x in leaves]

        def flat(*arrays: Any) -> Any:
            given = iter(arrays)
            merged = [next(given) if m else x for x, m in zip(leaves, moving, strict=True)]
            call_args, call_kwargs = jax.tree.unflatten(structure, merged)
            outs = (through(cast) if through else cast)(*call_args, **call_kwargs)
            return [x for x in jax.tree.leaves(outs) if hasattr(x, "dtype")]

        jaxpr, _ = open_jaxpr(jax.make_jaxpr(flat)(*(x for x, m in zip(leaves, moving, strict=True) if m)))

        def under(policy: Any) -> Explanation:
            return explain(fn, policy, rules, through=through)(*args, **kwargs)

        return _read(jaxpr, notes, table, str(chosen), under)

    return explained


class _Seen(NamedTuple):
    """An equation of the rewritten program.

    Attributes:
      eqn: it.
      path: the modules that it is in.
      note: the original equation and what was decided for it, where it comes from one.
      times: how often it runs.
      backward: whether it is of a backward pass.
    """

    eqn: Any
    path: str
    note: tuple[Any, Decision] | None
    times: int
    backward: bool


def _walk(
    jaxpr: Any,
    notes: list[Any],
    path: tuple[str, ...] = (),
    note: Any = None,
    times: int = 1,
    backward: bool = False,
) -> Iterator[_Seen]:
    for eqn in _alive(jaxpr):
        scopes = name_scopes(eqn)
        numbers = [int(name.removeprefix(NOTE)) for name in scopes if name.startswith(NOTE)]
        here = notes[numbers[-1]] if numbers else note
        inside = (*path, *modules_of(scopes))
        # What stands in a loop that was transposed says nothing of that itself.
        back = (backward or is_backward(eqn)) and REPEATED not in scopes
        yield _Seen(eqn, "/".join(inside), here, times, back)
        if not _is_operation(eqn):
            # A while loop's count is not known: its body is listed once.
            repeats = times * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else times
            for inner in inner_jaxprs(eqn):
                yield from _walk(inner, notes, inside, here, repeats, back)


def _alive(jaxpr: Any) -> list[Any]:
    """The equations that something reads: of a softmax that is rewritten as a whole, the first half is left unread."""
    needed = {atom for atom in jaxpr.outvars if not is_literal(atom)}
    alive = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            alive.append(eqn)
            needed.update(atom for atom in eqn.invars if not is_literal(atom))
    return alive[::-1]


def _is_operation(eqn: Any) -> bool:
    """Whether an equation is listed itself, and not what is inside it."""
    known = default_rules()
    name = eqn.primitive.name
    if not inner_jaxprs(eqn) or name in ("reduce", "reduce_window"):
        return True
    return name in known and known.of(name).kind is not Kind.OPAQUE


def _read(jaxpr: Any, notes: list[Any], rules: Rules, policy: str, under: Callable[[Any], Explanation]) -> Explanation:
    operations: dict[Any, list[Any]] = defaultdict(lambda: [0, 0])
    casts: dict[Any, int] = defaultdict(int)
    unentered: dict[Any, None] = {}
    moved: dict[str, int] = defaultdict(int)
    without = "made by a transformation outside of autocast" if notes else "the policy computes in float32: as written"
    for eqn, path, note, times, backward in _walk(jaxpr, notes):
        name, line = eqn.primitive.name, source_line(eqn)
        if note and eqn.primitive is note[0].primitive and _was_left(*note, rules):
            unentered[NotEntered(note[0].primitive.name, path, line, note[1].reason)] = None
        # A call that is an activation as a whole, as `jnp.take` of an embedding is: the reason is nowhere inside it.
        is_call = not _is_operation(eqn)
        if is_call and not (note and eqn.primitive is note[0].primitive and note[1].action is Action.NARROW):
            continue
        inputs, outputs = _dtypes(eqn.invars), _dtypes(eqn.outvars)
        if name == "convert_element_type" and not (note and note[0].primitive.name == name):
            casts[path, line, inputs[0], outputs[0]] += times
            continue
        reason = note[1].reason if note else without
        mark = note[1].mark.name if note and note[1].mark else ""
        direction = "backward" if backward else "forward"
        group = operations[path, line, name, direction, inputs, outputs, mark, reason]
        group[0] += times
        if is_call:
            continue
        group[1] += times * flops(eqn)
        for dtype, size in operand_bytes(eqn).items():
            moved[dtype] += times * size
    return Explanation(
        policy,
        tuple(Operation(*(*key, count, work)) for key, (count, work) in operations.items()),
        tuple(Cast(*(*key, count)) for key, count in casts.items()),
        tuple(unentered),
        dict(moved),
        under,
    )


def _was_left(eqn: Any, decision: Decision, rules: Rules) -> bool:
    """Whether a body was not entered."""
    opaque = rules.of(eqn.primitive.name).kind is Kind.OPAQUE
    return decision.action is Action.WIDE and bool(inner_jaxprs(eqn)) and opaque


def _dtypes(atoms: Any) -> tuple[str, ...]:
    return tuple(str(getattr(atom.aval, "dtype", "")) for atom in atoms)
