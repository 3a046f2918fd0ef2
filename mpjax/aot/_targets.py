"""The kinds of devices that can be compiled for, and the compilers that know them."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mpjax._errors import problem, shortened

# What XLA asks a GPU for when there is one; of the SXM boards with 80 GB.
_GPU = """
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2_cache} clock_rate_ghz: {clock}
  device_memory_size: {memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: 0 }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device to compile for.

    Attributes:
      title: as a table names it.
      platform: `"tpu"`, `"cuda"` or `"cpu"`.
      device_kind: what JAX calls such a device.
      memory: bytes of main memory that a program may use on one of its devices, as the compiler has it; `None` where
        it is that of this machine.
      chips: the smallest slice, as `mesh` takes it.
      options: what describes it to the compiler.
    """

    title: str
    platform: str
    device_kind: str
    memory: int | None
    chips: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def compiler(self) -> str:
        """The package that brings the compiler."""
        return {"tpu": "libtpu", "cuda": "jax-cuda12-plugin", "cpu": "jaxlib"}[self.platform]

    @property
    def traced_as(self) -> str:
        """What `jax.default_backend()` is where there is such a device."""
        return "gpu" if self.platform == "cuda" else self.platform


def _tpu(title: str, kind: str, gibibytes: float, chips: str, **options: Any) -> Target:
    return Target(title, "tpu", kind, int(gibibytes * 2**30), chips, MappingProxyType(options))


def _gpu(title: str, name: str, memory: int, **device: Any) -> Target:
    config = _GPU.format(name=name, memory=memory, **device)
    return Target(title, "cuda", name, memory, "1", MappingProxyType({"target_config": config}))


# Memory of TPUs: what libtpu says that it exceeds, of a program that is too large. Before v4, and on TPU7x, a chip is
# two devices; v4 is one with "megacore", as its machines have it.
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "v2": _tpu("TPU v2 core", "TPU v2", 7.48, "2x2"),
        "v3": _tpu("TPU v3 core", "TPU v3", 15.48, "2x2"),
        "v4": _tpu("TPU v4 chip", "TPU v4", 30.75, "2x2x1", chip_config_name="megacore"),
        "v5e": _tpu("TPU v5e chip", "TPU v5 lite", 15.75, "2x2"),
        "v5p": _tpu("TPU v5p chip", "TPU v5", 95.74, "2x2x1"),
        "v6e": _tpu("TPU v6e chip", "TPU v6 lite", 31.25, "2x2"),
        "tpu7x": _tpu("TPU7x core", "TPU7x", 94.75, "2x2x1"),
        "a100": _gpu(
            "A100 80 GB",
            "NVIDIA A100-SXM4-80GB",
            85100068864,
            shared_memory=167936,
            cores=108,
            fpus=64,
            bandwidth=2039040000000,
            l2_cache=41943040,
            clock=1.41,
            optin=166912,
            major=8,
        ),
        "h100": _gpu(
            "H100 80 GB",
            "NVIDIA H100 80GB HBM3",
            84942979072,
            shared_memory=233472,
            cores=132,
            fpus=128,
            bandwidth=3352320000000,
            l2_cache=52428800,
            clock=1.98,
            optin=232448,
            major=9,
        ),
        "cpu": Target("CPU", "cpu", "cpu", None, "1"),
    }
)


def target_named(name: object) -> Target:
    """The target of a name, or an error that lists them."""
    if isinstance(name, str) and name in TARGETS:
        return TARGETS[name]
    raise ValueError(
        problem(
            f"target is {shortened(name)}.", expected=f"one of {', '.join(TARGETS)}", write='compile_for("v5e", ...)'
        )
    )


def compiler_version(target: str) -> str:
    """The compiler of a target and its version, as `"libtpu 0.0.42"`.

    Args:
      target: the name of a target, one of `TARGETS`.

    Raises:
      ValueError: there is no such target.
      ImportError: its compiler is not installed; the message has the line to install it.

    >>> import mpjax as mp
    >>> mp.aot.compiler_version("cpu")
    'jaxlib ...'
    """
    found = target_named(target)
    try:
        return f"{found.compiler} {importlib.metadata.version(found.compiler)}"
    except importlib.metadata.PackageNotFoundError:
        pass
    extra = f"aot-{'tpu' if found.platform == 'tpu' else 'gpu'}"
    raise ImportError(
        problem(
            f"{found.compiler} is not installed, the compiler for {target!r}.",
            expected="the compiler, which needs no such device; those for TPUs and for GPUs each in its environment",
            write=f'pip install "mpjax[{extra}]"',
        )
    )
