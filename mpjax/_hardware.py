"""What each device does well: the table behind `mpjax.default_policy` and `mpjax info`."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._dtypes import BFLOAT16, FLOAT16, FLOAT32
from mpjax._errors import problem
from mpjax._tree import cast_floats
from mpjax._typing import T


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One row of the table: a family of devices and the precision to train in there.

    Attributes:
      name: the family, as people call it.
      compute: the compute dtype that training uses by default.
      half: the 16-bit dtype to use when one is asked for (`mpjax.half_dtype`).
      fp8: which members of the family have float8 matmuls, in words.
      has_fp8: whether a given device has them.
      note: the fact behind the choice.
      matches: whether a device belongs to this row.
    """

    name: str
    compute: np.dtype[Any]
    half: np.dtype[Any]
    fp8: str
    has_fp8: Callable[[Any], bool]
    note: str
    matches: Callable[[Any], bool]

    @property
    def needs_loss_scale(self) -> bool:
        """Whether the compute dtype has too few exponent bits for gradients: only float16 does."""
        return self.compute == FLOAT16


def _platform(device: Any) -> str:
    return str(getattr(device, "platform", "")).lower()


def _kind(device: Any) -> str:
    return str(getattr(device, "device_kind", ""))


def _number(pattern: str, text: str) -> float:
    """The first number that `pattern` captures in `text`, or 0."""
    found = re.search(pattern, text, re.IGNORECASE)
    return float(found.group(1)) if found else 0.0


def _capability(device: Any) -> float:
    """CUDA compute capability as a number (8.0 on an A100), 0 where the device is not NVIDIA's."""
    # Plain "8.0" on CUDA, "gfx90a" on ROCm.
    return _number(r"^(\d+\.\d+)$", str(getattr(device, "compute_capability", "")))


def _gfx(device: Any) -> str:
    """AMD's architecture name ("gfx942"), empty on other devices."""
    found = re.match(r"gfx[0-9a-f]+", str(getattr(device, "compute_capability", "")))
    return found.group(0) if found else ""


def _is_nvidia(device: Any) -> bool:
    return _platform(device) in ("gpu", "cuda") and _capability(device) > 0


def _tpu_generation(device: Any) -> float:
    """7 for "TPU7x", 5 for "TPU v5 lite"."""
    return _number(r"TPU\s*v?(\d+)", _kind(device))


def _gaudi_generation(device: Any) -> float:
    return _number(r"gaudi\s*(\d+)", _kind(device)) or 1.0


def _never(device: Any) -> bool:
    del device
    return False


TABLE: tuple[Hardware, ...] = (
    Hardware(
        name="TPU v2 and later",
        compute=BFLOAT16,
        half=BFLOAT16,
        fp8="v7 on",
        has_fp8=lambda d: _tpu_generation(d) >= 7,
        note="a float32 matmul is already one bfloat16 pass by default",
        matches=lambda d: _platform(d) == "tpu",
    ),
    Hardware(
        name="NVIDIA sm_80+ (A100, L4, H100, H200, B200)",
        compute=BFLOAT16,
        half=BFLOAT16,
        fp8="sm_89+",
        has_fp8=lambda d: _capability(d) >= 8.9,
        note="float32 matmuls are TF32 unless precision='highest'",
        matches=lambda d: _is_nvidia(d) and _capability(d) >= 8.0,
    ),
    Hardware(
        name="NVIDIA sm_70/75 (V100, T4)",
        compute=FLOAT16,
        half=FLOAT16,
        fp8="no",
        has_fp8=_never,
        note="the tensor cores know float16 only, so the loss is scaled",
        matches=lambda d: _is_nvidia(d) and _capability(d) >= 7.0,
    ),
    Hardware(
        name="older NVIDIA",
        compute=FLOAT32,
        half=FLOAT16,
        fp8="no",
        has_fp8=_never,
        note="no tensor cores: half precision saves memory but not time",
        matches=_is_nvidia,
    ),
    Hardware(
        name="AMD MI200 and later",
        compute=BFLOAT16,
        half=BFLOAT16,
        fp8="MI300 on",
        # gfx90a is the MI200 family, gfx940 to gfx942 MI300, gfx950 MI350.
        has_fp8=lambda d: _gfx(d)[:5] in ("gfx94", "gfx95"),
        note="matrix cores for bfloat16",
        matches=lambda d: _gfx(d) == "gfx90a" or _gfx(d)[:5] in ("gfx94", "gfx95"),
    ),
    Hardware(
        name="Intel GPU",
        compute=BFLOAT16,
        half=BFLOAT16,
        fp8="no",
        has_fp8=_never,
        note="XMX engines for bfloat16",
        matches=lambda d: _platform(d) in ("xpu", "sycl") or "intel" in _kind(d).lower(),
    ),
    Hardware(
        name="Intel Gaudi",
        compute=BFLOAT16,
        half=BFLOAT16,
        fp8="Gaudi 2 on",
        has_fp8=lambda d: _gaudi_generation(d) >= 2,
        note="matrix engines for bfloat16",
        matches=lambda d: _platform(d) == "hpu" or "gaudi" in _kind(d).lower(),
    ),
    Hardware(
        name="Apple GPU (Metal)",
        compute=FLOAT16,
        half=FLOAT16,
        fp8="no",
        has_fp8=_never,
        note="float16 is the plugin's half precision, so the loss is scaled",
        matches=lambda d: _platform(d) == "metal",
    ),
    Hardware(
        name="CPU",
        compute=FLOAT32,
        half=FLOAT16,
        fp8="no",
        has_fp8=_never,
        note="half precision can be tried here; its speed and memory say nothing",
        matches=lambda d: _platform(d) == "cpu",
    ),
)

UNKNOWN = Hardware(
    name="unknown device",
    compute=FLOAT32,
    half=BFLOAT16,
    fp8="no",
    has_fp8=_never,
    note="not in the table: float32 is the only safe choice",
    matches=lambda d: True,
)


def hardware_of(device: Any = None) -> Hardware:
    """Finds the row for a device: `device.platform`, `.device_kind` and `.compute_capability` decide.

    Args:
      device: a `jax.Device`, or anything with those attributes. Default: the first local device.

    Raises:
      TypeError: `device` has no platform.
    """
    found = jax.local_devices()[0] if device is None else device
    if not hasattr(found, "platform"):
        raise TypeError(
            problem(
                f"device is {device!r}, a {type(device).__name__}.",
                expected="one jax.Device, or an object with its platform, device_kind and compute_capability",
                write='mp.default_policy(jax.devices("gpu")[0])',
            )
        )
    return next((row for row in TABLE if row.matches(found)), UNKNOWN)


def half_dtype(device: Any = None) -> Any:
    """The 16-bit dtype for a device: bfloat16 wherever the hardware has it, float16 on the CPU and older GPUs.

    It is `jmp.half_dtype` but for GPUs with bfloat16 tensor cores (A100 and later, MI200 and later), where
    jmp says float16 and this says bfloat16, which needs no loss scaling.

    Args:
      device: a `jax.Device`. Default: the first local device.

    Returns:
      `jnp.bfloat16` or `jnp.float16`: a scalar type, as in jmp, so that `half_dtype()(2.0)` is a number.

    Raises:
      TypeError: `device` has no platform.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> mp.half_dtype(jax.devices("cpu")[0]) == jnp.float16
    True
    """
    return jnp.bfloat16 if hardware_of(device).half == BFLOAT16 else jnp.float16


def cast_to_half(tree: T) -> T:
    """Casts the float leaves of a tree to this machine's `half_dtype`; other leaves stay as they are.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> mp.cast_to_half({"w": jnp.ones(2), "step": 3})["w"].dtype == mp.half_dtype()
    True
    """
    return cast_floats(tree, half_dtype())


def cast_to_full(tree: T) -> T:
    """Casts the float leaves of a tree to float32; other leaves stay as they are.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> mp.cast_to_full({"w": jnp.ones(2, jnp.bfloat16), "step": 3})
    {'step': 3, 'w': Array([1., 1.], dtype=float32)}
    """
    return cast_floats(tree, FLOAT32)
