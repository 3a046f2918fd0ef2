"""Devices with nothing behind them, and meshes of them."""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from mpjax import _compat
from mpjax._errors import problem, shortened
from mpjax.aot._targets import Target, compiler_version, target_named

# Read by libtpu as it loads: a topology without a machine behind it, and no search for one.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # the lock guards a chip
}
# Read by JAX's CUDA plugin as it registers: it would look for a driver.
_NO_GPU_HERE = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}


def devices(target: str, chips: str | None = None) -> list[Any]:
    """Devices to compile for, with nothing behind them: `jax.sharding.Mesh` takes them, an array cannot lie on them.

    Args:
      target: the name of a target, one of `TARGETS`.
      chips: the slice, as its maker writes it: `"4x4"` of v5e, `"2x2x4"` of v4; of GPUs in one machine, their number.
        Default: the smallest.

    Returns:
      A list of devices; of `"cpu"`, this process's own.

    Raises:
      ValueError: there is no such target, or no slice of that shape.
      ImportError: its compiler is not installed.
      RuntimeError: the compiler cannot be used in this process; the message says why.

    >>> import mpjax as mp
    >>> mp.aot.devices("cpu")[:1]
    [CpuDevice(id=0)]
    """
    found = target_named(target)
    compiler_version(target)
    chips = found.chips if chips is None else chips
    sizes = [int(n) if n.isdecimal() else 0 for n in chips.split("x")] if isinstance(chips, str) else [0]
    if not all(sizes):
        raise ValueError(
            problem(
                f"chips is {shortened(chips)}.",
                expected="numbers of chips along each axis of a slice, joined by x",
                write=f'devices("{target}", "{found.chips}")',
            )
        )
    if found.platform == "cpu":
        own = jax.devices("cpu")
        if math.prod(sizes) > len(own):
            raise ValueError(
                problem(
                    f"chips is {chips!r}, and this process has {len(own)} CPU devices.",
                    expected="at most so many",
                    write=f"XLA_FLAGS=--xla_force_host_platform_device_count={math.prod(sizes)} before Python starts",
                )
            )
        return own[: math.prod(sizes)]
    other = "tpu" if found.platform == "cuda" else "cuda"
    if _compat.is_loaded(other):
        raise RuntimeError(
            problem(
                f"this process has loaded the compiler for {'TPUs' if other == 'tpu' else 'GPUs'}, and not that for "
                f"{target!r}.",
                expected="one of them in a process: two end it",
                write=f"a Python process of its own for {target!r}",
            )
        )
    return _topology(target, found, chips, sizes)


def _topology(target: str, found: Target, chips: str, sizes: list[int]) -> list[Any]:
    options = dict(found.options)
    if found.platform == "cuda":
        name = options["topology"] = f"1x1x{math.prod(sizes)}"
    else:
        name = f"{target}:{chips}"
        if math.prod(sizes) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        with _nothing_here(found.platform):
            return list(topologies.get_topology_desc(platform=found.platform, topology_name=name, **options).devices)
    except NotImplementedError as error:
        # JAX looks for plugins once; that of CUDA gives up where it finds no driver.
        raise RuntimeError(
            problem(
                f"JAX started without its CUDA plugin, which {target!r} needs: this machine has no driver.",
                expected="`mp.aot` before anything else that starts JAX, or JAX told that there is no GPU",
                write="JAX_PLATFORMS=cpu in the environment before Python starts",
            )
        ) from error
    except jax.errors.JaxRuntimeError as error:
        if "already in use" in str(error):
            raise RuntimeError(
                problem(
                    f"libtpu is in use by another process on this machine: {str(error).splitlines()[0]}",
                    expected="to compile where no other process holds the TPU",
                    write="compile in the process that holds it, or after that has ended, or on another machine",
                )
            ) from error
        raise ValueError(
            problem(
                f"chips is {chips!r}, which {target!r} has no slice of: {str(error).splitlines()[0]}",
                expected=f"a slice that its hosts make up: multiples of {found.chips}",
                write=f'devices("{target}", "{found.chips}")',
            )
        ) from error


@contextlib.contextmanager
def _nothing_here(platform: str) -> Iterator[None]:
    """Tells a compiler that there is no device of its own, and leaves the user's environment as it was.

    A machine that has TPUs is left to describe itself.
    """
    added = _NO_GPU_HERE if platform == "cuda" else {} if _compat.tpu_chips() else _NO_TPU_HERE
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def mesh(
    target: str, chips: str, axis_names: Sequence[str] = ("data",), axis_sizes: Sequence[int] | None = None
) -> Mesh:
    """A mesh of devices that are not there, as `jax.make_mesh` arranges them.

    Args:
      target: the name of a target, one of `TARGETS`.
      chips: the slice, as in `devices`.
      axis_names: names of the mesh's axes.
      axis_sizes: sizes of the axes. Default: all devices along the one axis; of several, those of the slice itself.

    Returns:
      A mesh whose axes are all `AxisType.Auto`, as `jit` with shardings wants them.

    Raises:
      ValueError: the axes do not hold the devices of the slice; and as `devices`.
      ImportError, RuntimeError: as `devices`.

    >>> import mpjax as mp
    >>> mp.aot.mesh("cpu", "1").shape
    OrderedDict(...'data'...1...)
    """
    found = devices(target, chips)
    names = (axis_names,) if isinstance(axis_names, str) else tuple(axis_names)
    default = (len(found),) if len(names) == 1 else tuple(map(int, chips.split("x")))
    sizes = default if axis_sizes is None else tuple(axis_sizes)
    if len(sizes) != len(names) or math.prod(sizes) != len(found):
        raise ValueError(
            problem(
                f"axis_names is {names!r} and axis_sizes {sizes!r}, for the {len(found)} devices of {chips!r}.",
                expected="a size for each name, and a product that is the number of devices",
                write=f'mesh("{target}", "{chips}", ("data", "model"), ({len(found)}, 1))',
            )
        )
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=found)
