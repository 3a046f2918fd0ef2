"""States as pytrees: some fields are array leaves, the rest is static, and every transform keeps them all."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from mpjax._errors import problem

C = TypeVar("C", bound=type[Any])


def register_state(*leaves: str) -> Callable[[C], C]:
    """Registers a dataclass as a pytree whose leaves are the named fields; all other fields are static.

    Flattening and unflattening come from the field list, so none can be forgotten (jmp forgets its floor), and
    unflattening never validates, so that `jax.tree.map` may put a PartitionSpec or None where an array was.
    """

    def register(cls: C) -> C:
        static = tuple(f.name for f in dataclasses.fields(cls) if f.name not in leaves)

        def flatten(x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            return tuple(getattr(x, n) for n in leaves), tuple(getattr(x, n) for n in static)

        def flatten_with_keys(x: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
            values, meta = flatten(x)
            return tuple((jax.tree_util.GetAttrKey(n), v) for n, v in zip(leaves, values, strict=True)), meta

        def unflatten(meta: tuple[Any, ...], values: Any) -> Any:
            return rebuild(cls, **dict(zip(static, meta, strict=True)), **dict(zip(leaves, values, strict=True)))

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        cls._leaves = leaves
        return cls

    return register


def rebuild(cls: type[Any], **fields: Any) -> Any:
    """Makes an instance without running its constructor."""
    new = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(new, name, value)
    register_with_flax(cls)
    return new


def register_with_flax(cls: type[Any]) -> None:
    """Teaches `flax.serialization` the class once flax is loaded; mpjax itself never imports flax.

    Called whenever a state is made or rebuilt, so whichever of flax and the state comes first, any step between
    them is enough.
    """
    flax = sys.modules.get("flax.serialization")
    if flax is None or not hasattr(flax, "register_serialization_state") or flax.is_serializable(cls):
        return

    def restore(target: Any, saved: dict[str, Any]) -> Any:
        missing = [name for name in cls._leaves if name not in saved]
        if missing:
            raise ValueError(
                problem(
                    f"the saved {cls.__name__} has no {', '.join(missing)}; it has {sorted(saved)}.",
                    expected=f"the fields {', '.join(cls._leaves)}",
                    write=f"a new state: mp.{cls.__name__}()",
                )
            )
        # In the target's dtypes: under x64, integers that were saved as such would come back with 64 bits.
        return target._replace(
            **{name: jnp.asarray(saved[name], jnp.result_type(getattr(target, name))) for name in cls._leaves}
        )

    flax.register_serialization_state(cls, lambda x: {n: getattr(x, n) for n in cls._leaves}, restore)
