"""Dtypes set on Flax NNX modules, and the report of what was set. Flax is not imported: who has a module has it."""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from mpjax._dtypes import is_castable
from mpjax._errors import problem
from mpjax._overrides import Overrides
from mpjax._tree import cast_leaf, is_float_leaf

P = TypeVar("P")


class Setting(NamedTuple):
    """One dtype that was set.

    Attributes:
      path: of the module, as in `"encoder/layers/0"`; of the parameter, where `attribute` is `"value"`.
      module: the class of the module, or of the parameter's variable.
      attribute: `"dtype"` (of computation), `"param_dtype"` (of parameters made later) or `"value"`.
      before: the dtype there was, `"None"` where the module follows its inputs.
      after: the dtype there is.
    """

    path: str
    module: str
    attribute: str
    before: str
    after: str


class AppliedPolicy(NamedTuple):
    """What `Policy.apply_to` did; `print` it for a table.

    Attributes:
      settings: what was set, by path; what was so already is among them.
      without_dtype: paths of modules that hold parameters and have no `dtype`: they compute in what their code says.
    """

    settings: tuple[Setting, ...]
    without_dtype: tuple[str, ...]

    def __str__(self) -> str:
        rows = [Setting._fields, *(row._replace(path=row.path or "<root>") for row in self.settings)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(Setting._fields))]
        lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"{path or '<root>'}: no dtype to set, computes as its code says" for path in self.without_dtype]
        return "\n".join(lines)


def apply_to_module(
    module: Any,
    default: P,
    overrides: Sequence[tuple[str, P]],
    compute_dtype: Callable[[P], np.dtype[Any]],
    param_dtype: Callable[[P], np.dtype[Any]],
) -> AppliedPolicy:
    """Sets the dtypes of modules by their paths, and casts their parameters by theirs; see `Policy.apply_to`."""
    # Loaded, if the argument is what it has to be.
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(module, nnx.Module):
        raise TypeError(
            problem(
                f"module is a {type(module).__name__}.",
                expected="a Flax NNX module; Linen's are immutable and take dtypes when they are made",
                write="policy.apply_to(module), or Module(dtype=policy.compute_dtype, param_dtype=policy.param_dtype)",
            )
        )
    exceptions = Overrides(overrides)
    names: list[str] = []
    settings, without_dtype = [], []
    changes: list[tuple[Callable[[], None], Callable[[], None]]] = []  # what sets a dtype, and what takes that back

    def policy_at(path: str, inherited: P) -> P:
        found = exceptions.of(path)
        return inherited if found is None else found

    modules = dict(nnx.iter_modules(module))
    parameters: dict[Any, list[tuple[Any, Any]]] = {parts: [] for parts in modules}
    for parts, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param):
            # In lists and dicts too: the module around them is its owner.
            owner = next(parts[:end] for end in range(len(parts) - 1, -1, -1) if parts[:end] in modules)
            parameters[owner].append((parts, variable))

    for parts, one in modules.items():
        path = "/".join(map(str, parts))
        held = [attribute for attribute in ("dtype", "param_dtype") if _holds_dtype(one, attribute)]
        if not held and not parameters[parts]:
            continue
        names.append(path or "<root>")
        policy = policy_at(path, default)
        for attribute, dtype_of in (("dtype", compute_dtype), ("param_dtype", param_dtype)):
            if attribute in held:
                before, after = getattr(one, attribute), dtype_of(policy_at(_joined(path, attribute), policy))
                shown = "None" if before is None else str(jnp.dtype(before))
                settings.append(Setting(path, type(one).__name__, attribute, shown, str(after)))
                set_to = functools.partial(setattr, one, attribute)
                changes.append((functools.partial(set_to, after), functools.partial(set_to, before)))
            elif attribute == "dtype" and parameters[parts]:
                without_dtype.append(path)
        for variable_parts, variable in parameters[parts]:
            value = variable.get_value()
            if is_float_leaf(value):
                name = "/".join(map(str, variable_parts))
                names.append(name)
                after = param_dtype(policy_at(name, policy))
                settings.append(Setting(name, type(variable).__name__, "value", str(value.dtype), str(after)))
                set_to = variable.set_value
                changes.append((functools.partial(set_to, cast_leaf(value, after)), functools.partial(set_to, value)))
    # Where warnings are errors, this is one; nothing is set yet.
    exceptions.warn_of_unused(names, "module or parameter", stacklevel=3)  # the caller of Policy.apply_to
    _all_or_none(changes)
    return AppliedPolicy(tuple(settings), tuple(without_dtype))


def _joined(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _holds_dtype(module: Any, attribute: str) -> bool:
    """Whether a module has an attribute for a dtype that policies choose: a floating one, or `None` so far."""
    if isinstance(inspect.getattr_static(type(module), attribute, None), property):
        return False  # it is computed from something else
    try:
        value = getattr(module, attribute)
        return value is None or is_castable(jnp.dtype(value))
    except (AttributeError, TypeError):
        return False


def _all_or_none(changes: list[tuple[Callable[[], None], Callable[[], None]]]) -> None:
    done = []
    try:
        for change, undo in changes:
            change()
            done.append(undo)
    except Exception:
        for undo in reversed(done):
            undo()
        raise
