"""Aliases used in annotations across the package."""

from typing import Any, TypeAlias, TypeVar

import jax

Tree: TypeAlias = Any
"""Any pytree; jax itself has no static type for one."""

T = TypeVar("T")
"""A pytree that keeps its structure."""

Scalar: TypeAlias = jax.Array
"""An array of shape ()."""
