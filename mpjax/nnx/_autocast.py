"""Autocast for functions that take Flax NNX modules."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx

from mpjax._autocast import Rules
from mpjax._autocast import autocast as autocast_arrays
from mpjax._policy import default_policy, get_policy

# The name under which NNX matches the modules inside the traced function with those outside.
_TAG = "mpjax.nnx.autocast"


def autocast(
    fn: Callable[..., Any], policy: Any = None, rules: Rules | None = None, *, cast_outputs: bool = False
) -> Callable[..., Any]:
    """`mpjax.autocast` for functions that take or return NNX modules and variables.

    Modules are split before the call and merged inside. What the function changes in them (batch statistics, random
    number counts, any other variable, new ones too) is changed in the modules that were passed, with the dtypes that
    `fn` by itself gives them. Inside `nnx.jit`, `nnx.grad` and their like it works as outside.

    NNX gives its modules no name scopes: for `rules.with_path` and `explain`, use `jax.named_scope`.

    Args:
      fn: any function of pytrees and NNX modules, in float32.
      policy: a policy or its name. Default: `mpjax.default_policy()`.
      rules: the table. Default: `mpjax.default_rules()`.
      cast_outputs: whether floating results, not those in modules, are cast to the policy's output dtype.

    Returns:
      A function of the same arguments.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> from flax import nnx
    >>> model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    >>> loss_fn = mp.nnx.autocast(lambda model, x: (model(x) ** 2).mean(), "mixed_bfloat16")
    >>> loss = loss_fn(model, jnp.arange(8.0).reshape(2, 4))
    >>> model.mean[...].dtype.name, bool((model.mean[...] != 0).all())
    ('float32', True)
    """
    chosen = default_policy() if policy is None else get_policy(policy)

    def pure(graph: Any, state: Any, layout: _Layout, others: list[Any]) -> Any:
        with nnx.merge_context(_TAG, True) as context:
            nodes = context.merge(graph, state)
        args, kwargs = layout.joined(nodes, others)
        out_layout, out_nodes, out_others = _Layout.of(fn(*args, **kwargs))
        with nnx.split_context(_TAG) as context:
            out_graph, out_state = context.split((nodes, out_nodes))
        return out_graph, out_state, out_layout, out_others

    cast = autocast_arrays(pure, chosen, rules)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        layout, nodes, others = _Layout.of((args, kwargs))
        with nnx.update_context(_TAG):
            with nnx.split_context(_TAG) as context:
                graph, state = context.split(nodes)
            out_graph, out_state, out_layout, out_others = cast(graph, state, layout, others)
            with nnx.merge_context(_TAG, False) as context:
                _, out_nodes = context.merge(out_graph, out_state)
        return out_layout.joined(out_nodes, chosen.cast_to_output(out_others) if cast_outputs else out_others)

    return wrapped


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A tree with its modules and variables taken out.

    Attributes:
      structure: the tree.
      is_node: for each leaf, whether it is a module or a variable.
    """

    structure: Any
    is_node: tuple[bool, ...]

    @classmethod
    def of(cls, tree: Any) -> tuple["_Layout", tuple[Any, ...], list[Any]]:
        leaves, structure = jax.tree.flatten(tree, is_leaf=nnx.graph.is_graph_node)
        is_node = tuple(map(nnx.graph.is_graph_node, leaves))
        nodes = tuple(x for x, node in zip(leaves, is_node, strict=True) if node)
        return cls(structure, is_node), nodes, [x for x, node in zip(leaves, is_node, strict=True) if not node]

    def joined(self, nodes: Iterable[Any], others: Iterable[Any]) -> Any:
        nodes, others = iter(nodes), iter(others)
        return jax.tree.unflatten(self.structure, [next(nodes if node else others) for node in self.is_node])
