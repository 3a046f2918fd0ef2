"""The one file that may touch what JAX moves between releases; it exports capabilities, not versions."""

from typing import Any

import jax
import numpy as np


def is_tracer(x: Any) -> bool:
    """Whether `x` stands for a value that is not known yet (inside jit, vmap, grad ...)."""
    # jax.core.Tracer is the one name of jax.core that JAX 0.10 to 0.12 still documents.
    return isinstance(x, jax.core.Tracer)


def is_float0(x: Any) -> bool:
    """Whether `x` is JAX's gradient of an integer: a placeholder that takes no arithmetic."""
    # A plain ndarray in JAX 0.10, a TypedNdArray later: only the dtype says what it is.
    return getattr(x, "dtype", None) == jax.dtypes.float0


def no_gradient(x: Any) -> np.ndarray | None:
    """The gradient of a leaf that has none: as `jax.grad` gives it for an array, `None` for anything else."""
    return np.zeros(np.shape(x), jax.dtypes.float0) if hasattr(x, "dtype") or isinstance(x, int) else None
