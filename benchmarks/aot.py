"""Compiles a function for a TPU or an H100 on a machine that has neither, and reads the compiler's own figures.

Needs `pip install "mpjax[aot-tpu]"` (libtpu), or `pip install "mpjax[aot-gpu]"` in an environment of its own: the two
are never to be in one process. The figures do not vary from run to run; they are not seconds.
"""

import importlib.metadata
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# Read by libtpu as it loads: a topology without a machine behind it, and no search for one.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # the lock guards a chip
)
# There is no GPU here to try kernels out on.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")

import jax
import numpy as np
from hlo import Module
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

H100 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    """A device to compile for.

    Attributes:
      title: as a table names it.
      platform: JAX's name of its kind.
      compiler: the package that brings the compiler.
    """

    title: str
    platform: str
    compiler: str


TARGETS = {
    "v5e": Target("one TPU v5e chip", "tpu", "libtpu"),
    "h100": Target("one H100 80 GB", "cuda", "jax-cuda12-plugin"),
}


def compiler_version(target: str) -> str:
    """The compiler and its version; exits where it is not installed."""
    package = TARGETS[target].compiler
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        extra = {"tpu": "aot-tpu", "cuda": "aot-gpu"}[TARGETS[target].platform]
        raise SystemExit(f'{package} is not installed here: pip install "mpjax[{extra}]"') from None


def devices(target: str, chips: str = "2x2") -> list[Any]:
    """The devices of a slice of a TPU, or one H100; nothing is behind them."""
    if TARGETS[target].platform == "cuda":
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=H100
        )
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{target}:{chips}")
    return list(topology.devices)


class Cost(NamedTuple):
    """What the compiler says of one executable."""

    bytes_accessed: float
    temp_bytes: int
    peak_bytes: int
    trace_seconds: float
    compile_seconds: float
    hlo: str

    @property
    def hbm_bytes(self) -> int:
        """Bytes that a run reads from and writes to main memory."""
        return Module(self.hlo).hbm_bytes()

    @property
    def estimated_cycles(self) -> int:
        """The TPU compiler's own estimate; 0 elsewhere."""
        return Module(self.hlo).estimated_cycles()

    @property
    def leaves_the_device(self) -> list[str]:
        """Instructions that would talk to the host: callbacks, transfers, infeeds."""
        return sorted(set(re.findall(r"\b(infeed|outfeed|send|recv|custom-call-callback|xla_\w*callback)\b", self.hlo)))


def compile_sharded(
    target: str, fn: Callable[..., Any], *avals: Any, compiler_options: Any = None, **jit_options: Any
) -> Cost:
    """Compiles `fn`; `avals` are trees of `jax.ShapeDtypeStruct` that say where each array lies."""
    start = time.perf_counter()
    traced = jax.jit(fn, **jit_options).trace(*avals)
    trace_seconds = time.perf_counter() - start
    lowered = traced.lower(lowering_platforms=(TARGETS[target].platform,))
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=compiler_options)
    compile_seconds = time.perf_counter() - start
    return Cost(
        (compiled.cost_analysis() or {}).get("bytes accessed", 0),
        compiled.memory_analysis().temp_size_in_bytes,
        compiled.memory_analysis().peak_memory_in_bytes,
        trace_seconds,
        compile_seconds,
        compiled.as_text(),
    )


def compile_for(target: str, fn: Callable[..., Any], *avals: Any, **options: Any) -> Cost:
    """Compiles `fn` for one device of a target."""
    one = NamedSharding(Mesh(np.array(devices(target)[:1]), ("x",)), PartitionSpec())
    avals = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one), avals)
    return compile_sharded(target, fn, *avals, **options)


def compile_for_v5e(fn: Callable[..., Any], *avals: Any, donate: tuple[int, ...] = ()) -> Cost:
    """Compiles `fn` for one v5e chip; the arguments named in `donate` are given up."""
    return compile_for("v5e", fn, *avals, donate_argnums=donate)
