"""Where the arguments of a program that is only compiled lie."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from mpjax._errors import problem, shortened
from mpjax.aot._devices import devices
from mpjax.aot._targets import target_named


def placed(target: str, avals: tuple[Any, ...], mesh: Mesh | None, shardings: Any) -> tuple[tuple[Any, ...], Mesh]:
    """The arguments as structs that say where they lie, and the mesh that they lie on.

    Args:
      target: the name of a target.
      avals: pytrees of arrays and structs.
      mesh: of devices of the target, or `None`.
      shardings: a prefix of the arguments, of specs, shardings and `None`.

    Raises:
      ValueError, TypeError: as `mpjax.aot.compile_for`.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(avals)
    paths = [f"argument {jax.tree_util.keystr(path, simple=True, separator='/')}" for path, _ in leaves]
    arrays = [leaf for _, leaf in leaves]
    wanted = _broadcast(shardings, avals)
    own = [s or _own(target, path, x) for path, x, s in zip(paths, arrays, wanted, strict=True)]
    if mesh is None:
        mesh = next((s.mesh for s in own if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)), None)
    if mesh is None:
        if any(isinstance(s, PartitionSpec) and tuple(s) for s in own):
            raise ValueError(
                problem(
                    "shardings has a PartitionSpec, and there is no mesh.",
                    expected="the mesh that its axes are of",
                    write=f'mesh=mp.aot.mesh("{target}", "{target_named(target).chips}", ("data",))',
                )
            )
        mesh = Mesh(np.array(devices(target)[:1]), ("device",))
    kind = mesh.devices.flat[0].device_kind
    if kind != target_named(target).device_kind:
        raise ValueError(
            problem(
                f"mesh is of {kind}, and target is {target!r}.",
                expected=f"a mesh of {target_named(target).device_kind}",
                write=f'mesh=mp.aot.mesh("{target}", "{target_named(target).chips}", {mesh.axis_names!r})',
            )
        )
    structs = [_struct(path, x, s, mesh) for path, x, s in zip(paths, arrays, own, strict=True)]
    return jax.tree.unflatten(structure, structs), mesh


def is_place(x: Any) -> bool:
    """Whether a leaf of a tree of shardings."""
    return x is None or isinstance(x, PartitionSpec | Sharding)


def _broadcast(shardings: Any, avals: tuple[Any, ...]) -> list[Any]:
    try:
        return jax.tree.leaves(jax.tree.broadcast(shardings, avals, is_leaf=is_place), is_leaf=is_place)
    except ValueError as error:
        raise ValueError(
            problem(
                f"shardings is no prefix of the arguments: {str(error).splitlines()[0]}",
                expected=f"one for all, or a tuple of {len(avals)} with one for each argument or a tree like it",
                write='shardings=(PartitionSpec(), PartitionSpec("data"))',
            )
        ) from error


def _own(target: str, path: str, x: Any) -> NamedSharding | None:
    """Where an argument itself says that it lies; of one device alone, that is here and means nothing there."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1:
        return None
    kind = sharding.mesh.devices.flat[0].device_kind if isinstance(sharding.mesh, Mesh) else "no device"
    if kind == target_named(target).device_kind:
        return sharding
    raise ValueError(
        problem(
            f"{path} is sharded over {sharding.num_devices} devices of {kind}, and target is {target!r}.",
            expected="shardings over a mesh of mp.aot.mesh",
            write="shardings=..., with jax.ShapeDtypeStructs that have none as arguments",
        )
    )


def _struct(path: str, x: Any, place: Any, mesh: Mesh) -> Any:
    if isinstance(x, bool | int | float | complex):
        return x
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(
            problem(
                f"{path} is {shortened(x)}, no array.",
                expected="pytrees of arrays, jax.ShapeDtypeStructs and Python numbers",
                write="compile_for(target, lambda *arrays: fn(..., *arrays), *arrays), with it inside of the function",
            )
        )
    try:
        sharding = place if isinstance(place, Sharding) else NamedSharding(mesh, place or PartitionSpec())
        sharding.shard_shape(tuple(x.shape))
    except ValueError as error:
        raise ValueError(
            problem(
                f"{path} has shape {tuple(x.shape)} and is to lie by {place}: {str(error).splitlines()[0]}",
                expected=f"axes of the mesh {dict(mesh.shape)}, each dividing the size that it shards",
                write="PartitionSpec(), for an argument that every device has whole",
            )
        ) from error
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=getattr(x, "weak_type", False))
