"""Exceptions by tree path: which rule holds for a leaf, and what is wrong when two or none do."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from mpjax._errors import listing, problem
from mpjax._path_patterns import matches_path
from mpjax._tree import cast_leaf, is_float_leaf, path_name
from mpjax._typing import T

P = TypeVar("P")


class Overrides(Generic[P]):
    """Exceptions by path, and which of them were used."""

    def __init__(self, overrides: Sequence[tuple[str, P]]):
        self.overrides = overrides
        self.unused = {pattern for pattern, _ in overrides}

    def of(self, *spellings: str) -> P | None:
        """What the patterns say that match a path, in one of its spellings; None if there are none.

        Raises:
          ValueError: they disagree.
        """
        found = [(p, value) for p, value in self.overrides if any(matches_path(p, name) for name in spellings)]
        self.unused.difference_update(pattern for pattern, _ in found)
        if any(value != found[0][1] for _, value in found):
            raise ValueError(
                problem(
                    f"{len(found)} overrides match {spellings[0]!r} and disagree:\n"
                    f"{listing([f'{pattern!r}: {value}' for pattern, value in found])}",
                    expected="patterns that match one path to name the same policy",
                    write="narrower patterns, such as r'.*/norm_1/scale' in place of r'.*norm.*'",
                )
            )
        return found[0][1] if found else None

    def warn_of_unused(self, names: list[str], what: str, stacklevel: int) -> None:
        """Warns of patterns that matched none of the paths, if there are any."""
        # A bare array has no path that a pattern could match: nothing to report.
        if self.unused and names:
            warnings.warn(
                problem(
                    f"overrides that match no path: {', '.join(map(repr, sorted(self.unused)))}. The paths are\n"
                    f"{listing(names)}",
                    expected=f"each pattern to match the whole path of at least one {what}",
                    write="r'.*norm.*', with .* on both sides; cast batches with a policy that has no overrides",
                ),
                UserWarning,
                stacklevel=stacklevel + 1,
            )


def cast_by_path(tree: T, default: P, overrides: Sequence[tuple[str, P]], dtype_of: Callable[[P], np.dtype[Any]]) -> T:
    """Casts float leaves to the dtype of `default`, or of the override whose pattern matches their whole path.

    Raises:
      ValueError: overrides that match one path disagree.

    Warns:
      UserWarning: an override matches no path of the tree.
    """
    exceptions = Overrides(overrides)
    names = []

    def one(path: tuple[Any, ...], x: Any) -> Any:
        if not is_float_leaf(x):
            return x
        name = path_name(path)
        if path:
            names.append(name)
        # The name leaves out the .value of NNX's variables; a dataclass may have a parameter of that name.
        found = exceptions.of(name, path_name(path, keep_value=True))
        return cast_leaf(x, dtype_of(default if found is None else found))

    result = jax.tree_util.tree_map_with_path(one, tree)
    exceptions.warn_of_unused(names, "float leaf", stacklevel=4)  # the caller of Policy.cast_to_*
    return result


def default_overrides() -> dict[str, str]:
    """The exceptions that most models want: what stays float32 when the rest of the parameters is cast.

    One pattern, so that it is reported only where it matches nothing at all. It keeps, by the name of any part
    of the path: normalisation scales and biases (`LayerNorm_0`, `bn1`, `ln_f`, `rmsnorm`), running statistics
    (`batch_stats`, `running_mean`, `moving_variance`, `mean_ema`, Flax's fp8 `_overwrite_with_gradient`), routers
    of mixtures of experts (`router`) and logits layers (`logits`, `head`, `lm_head`, `classifier`).

    >>> import mpjax as mp
    >>> policy = mp.get_policy("mixed_bfloat16").with_overrides(mp.default_overrides())
    """
    parts = (
        r"[^/]*norm(alization)?\d*(_[^/]*)?",
        r"([^/]*_)?(bn|ln)(\d+|_[^/]*)?",
        r"batch_stats|_overwrite_with_gradient|(running|moving)_(mean|var|variance)|(mean|var)_ema",
        r"([^/]*_)?router(_[^/]*)?",
        r"(to_)?logits(_[^/]*)?|((lm|mlm|cls|output|vocab|classification)_)?head|classifier",
    )
    return {rf"(.*/)?({'|'.join(parts)})(/.*)?": "float32"}
