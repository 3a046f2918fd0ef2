"""How equations are evaluated with known values: plainly, or on each device of a shard_map."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mpjax import _compat
from mpjax._compat import equation_context

# XLA may otherwise keep more digits than a 16-bit dtype has, and with them numbers past its end. A program that runs
# once is not worth being optimised.
_OPTIONS: dict[str, bool | str] = {"xla_allow_excess_precision": False, "xla_backend_optimization_level": "0"}


class World:
    """Values are what they are."""

    def given(self, array: Any) -> Any:
        """A literal or constant, as a value of this world."""
        return jnp.asarray(array)

    def bind(self, eqn: Any, arrays: Sequence[Any], **changes: Any) -> list[Any]:
        """Evaluates one equation, some of its parameters changed."""
        with equation_context(eqn):
            return _compat.bind(eqn, list(arrays), **changes)

    def compiled(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function of arrays, compiled as a whole."""
        return jax.jit(fn, compiler_options=_OPTIONS)

    def row(self, array: Any, i: int) -> Any:
        """One row of a value that is scanned over."""
        return array[i]

    def stack(self, arrays: Sequence[Any]) -> Any:
        """Rows as one value."""
        return jnp.stack(arrays)

    def scalar(self, array: Any) -> Any:
        """The largest entry as a Python number; None where devices differ."""
        return np.max(np.asarray(array)).item()

    def device(self, arrays: Sequence[Any]) -> int | None:
        """The first device on which one of these is not finite, if there are devices."""
        del arrays
        return None

    def on_device(self, array: Any, device: int | None) -> Any:
        """A value as one device has it."""
        del device
        return array


class Devices(World):
    """Values have a dimension in front: one entry for each device along the mesh axes of a shard_map."""

    def __init__(self, eqn: Any) -> None:
        mesh, axes = eqn.params["mesh"], eqn.params["newly_manual_axes"]
        self._axes = tuple(name for name in mesh.axis_names if name in axes)
        self._sizes = tuple(mesh.shape[name] for name in self._axes)
        self.count = int(np.prod(self._sizes))
        self._stacked = PartitionSpec(self._axes)
        self._map = functools.partial(
            jax.shard_map, mesh=mesh, axis_names=axes, check_vma=eqn.params["check_vma"], out_specs=self._stacked
        )
        # Literals come again and again, and each is a program of its own.
        self._given: dict[Any, Any] = {}
        self._in_specs = tuple(eqn.params["in_specs"])

    def split(self, arrays: Sequence[Any]) -> list[Any]:
        """The operands of the shard_map, as its devices have them."""
        split = self._map(lambda *xs: [x[None] for x in xs], in_specs=self._in_specs)
        return jax.jit(split)(*arrays)

    def name(self, device: int) -> str:
        """A device's place in the mesh."""
        where = np.unravel_index(device, self._sizes)
        return ", ".join(f"{name}={i}" for name, i in zip(self._axes, where, strict=True))

    def given(self, array: Any) -> Any:
        """A literal or constant, the same on all devices."""
        array = jnp.asarray(array)
        key = (array.item(), str(array.dtype)) if array.shape == () and array.dtype.kind in "bif" else object()
        if key not in self._given:
            self._given[key] = jax.jit(self._map(lambda: array[None], in_specs=()))()
        return self._given[key]

    def bind(self, eqn: Any, arrays: Sequence[Any], **changes: Any) -> list[Any]:
        """Evaluates one equation on each device."""
        # All values vary over the devices here, and what says that one does from now on has nothing to do.
        if eqn.primitive.name in ("pvary", "pcast"):
            return list(arrays)
        run = self._map(
            lambda *xs: [x[None] for x in World.bind(self, eqn, [x[0] for x in xs], **changes)], in_specs=self._stacked
        )
        return jax.jit(run, compiler_options=_OPTIONS)(*arrays)

    def compiled(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function of one device's arrays."""
        run = self._map(lambda *xs: jax.tree.map(lambda x: x[None], fn(*(x[0] for x in xs))), in_specs=self._stacked)
        return jax.jit(run, compiler_options=_OPTIONS)

    def row(self, array: Any, i: int) -> Any:
        """One row of a value that is scanned over."""
        return array[:, i]

    def stack(self, arrays: Sequence[Any]) -> Any:
        """Rows as one value."""
        return jnp.stack(arrays, axis=1)

    def scalar(self, array: Any) -> Any:
        """The largest entry, if all devices agree on it; None where they differ."""
        values = np.asarray(array).reshape(self.count, -1).max(axis=1)
        return values[0].item() if (values == values[0]).all() else None

    def device(self, arrays: Sequence[Any]) -> int | None:
        """The first device on which one of these is not finite."""
        bad = [~np.asarray(jnp.isfinite(x)).reshape(self.count, -1).all(axis=1) for x in arrays]
        return int(np.argmax(np.any(bad, axis=0)))

    def on_device(self, array: Any, device: int | None) -> Any:
        """A value as one device has it."""
        return np.asarray(array)[device] if jnp.issubdtype(array.dtype, jnp.number) else array[device]
