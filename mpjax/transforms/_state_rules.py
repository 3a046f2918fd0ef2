"""Which leaves of an optimizer's state are moments, and which dtype patterns give them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._dtypes import canonical_dtype, is_float8
from mpjax._errors import listing, problem
from mpjax._path_patterns import check_pattern, matches_path
from mpjax._tree import is_float_leaf, path_name
from mpjax._typing import Tree

# Fields whose leaves keep their dtypes, whatever the patterns say: of optax.inject_hyperparams, and those of mpjax's
# transforms that hold parameters.
_KEPT = ("hyperparams", "masters", "compensation", "average", "remainder")


class Match(NamedTuple):
    """What the rules say for one leaf of a state.

    Attributes:
      name: its path.
      owner: the path of the parameter that it is a moment of, or None.
      dtype: of the patterns that match it, or None.
      patterns: these.
    """

    name: str
    owner: Any
    dtype: np.dtype[Any] | None
    patterns: tuple[str, ...]


def checked_rules(dtypes: Any) -> dict[str, np.dtype[Any]]:
    """The dtypes by pattern, or an error that says what is wrong with them."""
    if not isinstance(dtypes, Mapping) or not dtypes:
        raise TypeError(
            problem(
                f"dtypes is {dtypes!r}.",
                expected="a mapping from patterns to dtypes",
                write='mp.transforms.state_dtypes(inner, {"mu": "bfloat16", "nu": "bfloat16"})',
            )
        )
    for pattern in dtypes:
        check_pattern(pattern)
    return {pattern: canonical_dtype(dtype, f"dtype of {pattern!r}") for pattern, dtype in dtypes.items()}


def matches(state: Tree, params: Tree, rules: Mapping[str, np.dtype[Any]]) -> list[Match]:
    """What the rules say for each leaf of a state that was made for `params`, stored in fewer bits or not.

    Raises:
      ValueError: patterns that match one leaf disagree.
    """
    known = {path for path, _ in jax.tree_util.tree_leaves_with_path(params)}

    def match(path: tuple[Any, ...], x: Any) -> Match:
        name = path_name(path)
        owner = None if any(_is_field(entry, *_KEPT) for entry in path) else _owner(path, known)
        is_float = is_float_leaf(x) or is_float8(jnp.result_type(x))
        if owner is None or not is_float or x.shape == ():
            return Match(name, None, None, ())
        texts = {name, *name.split("/")}
        found = tuple(p for p in rules if any(matches_path(p, text) for text in texts))
        if len({rules[p] for p in found}) > 1:
            raise ValueError(
                problem(
                    f"{len(found)} patterns match {name!r} and disagree:\n"
                    f"{listing([f'{p!r}: {rules[p]}' for p in found])}",
                    expected="patterns that match one path to name the same dtype",
                    write="narrower patterns, such as r'.*/mu/.*embed.*' in place of '.*embed.*'",
                )
            )
        return Match(name, owner, rules[found[0]] if found else None, found)

    return [match(path, x) for path, x in jax.tree_util.tree_leaves_with_path(state)]


def check_all_used(found: list[Match], rules: Mapping[str, np.dtype[Any]]) -> None:
    """Raises a ValueError if a pattern matches no moment. Where there are none, nothing could."""
    moments = [match.name for match in found if match.owner is not None]
    unused = set(rules) - {pattern for match in found for pattern in match.patterns}
    if moments and unused:
        raise ValueError(
            problem(
                f"patterns that match no moment: {', '.join(map(repr, sorted(unused)))}. The moments are\n"
                f"{listing(moments)}",
                expected="each pattern to match the whole path of one, or a part of it",
                write='{"mu": "bfloat16", "nu": "bfloat16"}; what has shape (), hyperparameters and masters stay',
            )
        )


def _owner(path: tuple[Any, ...], known: set[Any]) -> Any:
    """The path of the parameter that a leaf of a state belongs to: the end of its own, but for places in a tuple."""
    ends = [end for end in range(len(path) + 1) if not any(map(_is_field, path[end:]))]
    runs = [path[start:end] for end in ends for start in range(end + 1) if path[start:end] in known]
    return max(runs, key=len, default=None)


def _is_field(entry: Any, *names: str) -> bool:
    return isinstance(entry, jax.tree_util.GetAttrKey) and (not names or entry.name in names)
