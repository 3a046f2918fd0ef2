"""A function of trees as a jaxpr of its arrays, with the names of what goes in and comes out."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpjax._autocast._autocast import is_array
from mpjax._compat import is_float0, open_jaxpr
from mpjax._tree import path_name

# Stands for an array among the leaves of a tree.
_ARRAY = object()


class Traced(NamedTuple):
    """A traced call.

    Attributes:
      jaxpr, consts: the program.
      arrays: its operands.
      inputs: their names: argument and tree path.
      outputs: the tree paths of its results.
      structure, static: the tree of the function's result, and its leaves with the arrays taken out.
    """

    jaxpr: Any
    consts: list[Any]
    arrays: list[Any]
    inputs: list[str]
    outputs: list[str]
    structure: Any
    static: list[Any]

    def result(self, arrays: Sequence[Any]) -> Any:
        """The result of the function, from those of the program."""
        moving = iter(arrays)
        return jax.tree.unflatten(self.structure, [next(moving) if x is _ARRAY else x for x in self.static])


def trace(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    """Traces a call. What is no array, Python numbers among it, is static."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    names = [
        "/".join(filter(None, (name, path_name(path))))
        for name, arg in zip(
            _argument_names(fn, args, kwargs), (*args, *(kwargs[k] for k in sorted(kwargs))), strict=True
        )
        for path, _ in jax.tree_util.tree_leaves_with_path(arg)
    ]
    moving = [is_array(x) and not is_float0(x) for x in leaves]
    found: list[Any] = []

    def flat(*arrays: Any) -> list[Any]:
        given = iter(arrays)
        merged = [next(given) if m else x for x, m in zip(leaves, moving, strict=True)]
        call_args, call_kwargs = jax.tree.unflatten(structure, merged)
        outs, tree = jax.tree_util.tree_flatten_with_path(fn(*call_args, **call_kwargs))
        results = [is_array(x) and not is_float0(x) for _, x in outs]
        kept = [(path, x) for (path, x), m in zip(outs, results, strict=True) if m]
        static = [_ARRAY if m else x for (_, x), m in zip(outs, results, strict=True)]
        found[:] = [path_name(path) or "result" for path, _ in kept], tree, static
        return [x for _, x in kept]

    arrays = [jnp.asarray(x) for x, m in zip(leaves, moving, strict=True) if m]
    jaxpr, consts = open_jaxpr(jax.make_jaxpr(flat)(*arrays))
    inputs = [name for name, m in zip(names, moving, strict=True) if m]
    return Traced(jaxpr, consts, arrays, inputs, *found)


def _argument_names(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """A name for each argument, as the function's signature has it."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # some builtins have none
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    given = names[: len(args)]
    return [*given, *(f"{rest}/{i}" for i in range(len(args) - len(given))), *sorted(kwargs)]
