"""What a case of the zoo is, and the small data sets that the cases share."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax


def accepted(**options: Any) -> dict[str, Any]:
    """Those of XLA's options that this release of it knows."""
    identity = jax.jit(lambda: 1).lower()
    known = {}
    for name, value in options.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            identity.compile(compiler_options={name: value})
            known[name] = value
    return known


@functools.cache
def compiler_options() -> dict[str, Any]:
    # Compiling is what these tests spend their time on; the third option went away after JAX 0.10. Without the last,
    # XLA drops the rounding to 16 bits between two operations that it runs in float32, as a CPU does, and the errors
    # measured are too small.
    return accepted(
        xla_backend_optimization_level=0,
        xla_llvm_disable_expensive_passes=True,
        xla_cpu_use_fusion_emitters=False,
        xla_allow_excess_precision=False,
    )


def jit(fn: Callable[..., Any]) -> Any:
    return jax.jit(fn, compiler_options=compiler_options())


ROWS, LENGTH, WIDTH, VOCABULARY = 8, 8, 16, 17


@dataclasses.dataclass(frozen=True)
class Case:
    """A small model in the ordinary float32 style.

    Attributes:
      make: returns (fn, params, batch). `fn(params, batch)` is a loss, or a pair of it and more; every array of the
        batch has ROWS rows. The name of the case is that of `make`.
      framework: what it is written in.
      has_aux: whether `fn` returns a pair.
      loss_bound: how far from the float32 loss the bfloat16 one may be, relatively: by one of its last digits, mostly.
      gradient_bound: |g - g32| / |g32| over all gradients.
      rows_meet: why the loss of the whole is not the mean of the losses of its parts, where it is not.
      check_vma: whether the float32 model passes shard_map's check. A recurrent layer does not, whose carry starts as
        zeros that do not vary over the mesh.
      not_by_hand: why bfloat16 parameters and inputs do not make the model compute in bfloat16, where they do not.
      vmap_axes: which of parameters and batch are mapped.
    """

    make: Callable[[], tuple[Callable[..., Any], Any, Any]]
    framework: str
    has_aux: bool = False
    loss_bound: float = 2.0**-8
    gradient_bound: float = 0.03
    rows_meet: str = ""
    check_vma: bool = True
    not_by_hand: str = ""
    vmap_axes: tuple[int | None, int] = (None, 0)

    @property
    def name(self) -> str:
        return self.make.__name__


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integers(seed: int, high: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(high, size=shape, dtype=np.int32)


def tokens(seed: int = 0) -> dict[str, np.ndarray]:
    """Token sequences and what comes next in them."""
    stream = integers(seed, VOCABULARY, ROWS, LENGTH + 1)
    return {"x": stream[:, :-1], "y": stream[:, 1:]}


def images(seed: int = 0, classes: int = 10) -> dict[str, np.ndarray]:
    return {"x": normal(seed, ROWS, 8, 8, 3), "y": integers(seed, classes, ROWS)}


def cross_entropy(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
