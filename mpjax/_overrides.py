"""Exceptions by tree path: which rule holds for a leaf, and what is wrong when two or none do."""

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from mpjax._errors import listing, problem
from mpjax._tree import cast_leaf, is_float_leaf, path_name
from mpjax._typing import T

P = TypeVar("P")


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


def check_pattern(pattern: str) -> None:
    """Raises an error if `pattern` is not a regular expression, as a string."""
    if not isinstance(pattern, str):
        raise TypeError(
            problem(
                f"override {pattern!r} is a {type(pattern).__name__}.",
                expected="a regular expression as a string; case is ignored",
                write="r'.*norm.*'",
            )
        )
    try:
        _compiled(pattern)
    except re.error as error:
        raise ValueError(
            problem(
                f"override {pattern!r} is not a regular expression: {error}.",
                expected="a pattern for whole paths such as params/LayerNorm_0/scale",
                write="r'.*norm.*'",
            )
        ) from None


def cast_by_path(tree: T, default: P, overrides: Sequence[tuple[str, P]], dtype_of: Callable[[P], np.dtype[Any]]) -> T:
    """Casts float leaves to the dtype of `default`, or of the override whose pattern matches their whole path.

    Raises:
      ValueError: overrides that match one path disagree.

    Warns:
      UserWarning: an override matches no path of the tree.
    """
    unused = {pattern for pattern, _ in overrides}
    names = []

    def one(path: tuple[Any, ...], x: Any) -> Any:
        if not is_float_leaf(x):
            return x
        name = path_name(path)
        if path:
            names.append(name)
        # The name leaves out the .value of NNX's variables; a dataclass may have a parameter of that name.
        spellings = {name, path_name(path, keep_value=True)}
        found = [(p, value) for p, value in overrides if any(map(_compiled(p).fullmatch, spellings))]
        unused.difference_update(pattern for pattern, _ in found)
        if any(value != found[0][1] for _, value in found):
            raise ValueError(
                problem(
                    f"{len(found)} overrides match {name!r} and disagree:\n"
                    f"{listing([f'{pattern!r}: {value}' for pattern, value in found])}",
                    expected="patterns that match one path to name the same policy",
                    write="narrower patterns, such as r'.*/norm_1/scale' in place of r'.*norm.*'",
                )
            )
        return cast_leaf(x, dtype_of(found[0][1] if found else default))

    result = jax.tree_util.tree_map_with_path(one, tree)
    # A bare array has no path that a pattern could match: nothing to report.
    if unused and names:
        warnings.warn(
            problem(
                f"overrides that match no path: {', '.join(map(repr, sorted(unused)))}. The paths are\n"
                f"{listing(names)}",
                expected="each pattern to match the whole path of at least one float leaf",
                write="r'.*norm.*', with .* on both sides; cast batches with a policy that has no overrides",
            ),
            UserWarning,
            stacklevel=4,  # the caller of Policy.cast_to_*
        )
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
