import dataclasses

import jax
import jax.numpy as jnp
import pytest

import mpjax as mp
from mpjax import _hardware


@dataclasses.dataclass
class FakeDevice:
    platform: str
    device_kind: str = ""
    compute_capability: str | None = None


# Attributes as JAX reports them on the real thing.
DEVICES = {
    "TPU v2": (FakeDevice("tpu", "TPU v2"), "bfloat16", False),
    "TPU v3": (FakeDevice("tpu", "TPU v3"), "bfloat16", False),
    "TPU v5e": (FakeDevice("tpu", "TPU v5 lite"), "bfloat16", False),
    "TPU v6e": (FakeDevice("tpu", "TPU v6 lite"), "bfloat16", False),
    "TPU v7": (FakeDevice("tpu", "TPU7x"), "bfloat16", True),
    "A100": (FakeDevice("gpu", "NVIDIA A100-SXM4-40GB", "8.0"), "bfloat16", False),
    "RTX 3090": (FakeDevice("gpu", "NVIDIA GeForce RTX 3090", "8.6"), "bfloat16", False),
    "L4": (FakeDevice("gpu", "NVIDIA L4", "8.9"), "bfloat16", True),
    "H100": (FakeDevice("gpu", "NVIDIA H100 80GB HBM3", "9.0"), "bfloat16", True),
    "B200": (FakeDevice("gpu", "NVIDIA B200", "10.0"), "bfloat16", True),
    "RTX 5090": (FakeDevice("cuda", "NVIDIA GeForce RTX 5090", "12.0"), "bfloat16", True),
    "V100": (FakeDevice("gpu", "Tesla V100-SXM2-16GB", "7.0"), "float16", False),
    "T4": (FakeDevice("gpu", "Tesla T4", "7.5"), "float16", False),
    "P100": (FakeDevice("gpu", "Tesla P100-PCIE-16GB", "6.0"), "float32", False),
    "MI250X": (FakeDevice("gpu", "AMD Instinct MI250X", "gfx90a"), "bfloat16", False),
    "MI300X": (FakeDevice("gpu", "AMD Instinct MI300X", "gfx942"), "bfloat16", True),
    "MI300X with features": (FakeDevice("gpu", "AMD Instinct MI300X", "gfx942:sramecc+:xnack-"), "bfloat16", True),
    "MI100": (FakeDevice("gpu", "AMD Instinct MI100", "gfx908"), "float32", False),
    "Intel Max": (FakeDevice("xpu", "Intel(R) Data Center GPU Max 1550"), "bfloat16", False),
    "Gaudi 2": (FakeDevice("hpu", "Gaudi2"), "bfloat16", True),
    "Gaudi 1": (FakeDevice("hpu", "Gaudi"), "bfloat16", False),
    "M2": (FakeDevice("METAL", "Metal"), "float16", False),
    "CPU": (FakeDevice("cpu", "cpu"), "float32", False),
    "unheard of": (FakeDevice("quantum", "Q1"), "float32", False),
}


@pytest.mark.parametrize("name", DEVICES)
def test_default_policy_by_device(name):
    device, compute, fp8 = DEVICES[name]
    policy = mp.default_policy(device)
    assert policy == mp.get_policy(f"params=float32,compute={compute},output=float32")
    row = _hardware.hardware_of(device)
    assert row.has_fp8(device) == fp8
    assert row.needs_loss_scale == (compute == "float16")
    assert isinstance(policy.loss_scale(), mp.DynamicLossScale if compute == "float16" else mp.NoOpLossScale)


def test_every_row_of_the_table_is_reached():
    reached = {_hardware.hardware_of(device).name for device, _, _ in DEVICES.values()}
    assert reached == {row.name for row in _hardware.TABLE} | {_hardware.UNKNOWN.name}


def test_this_machine():
    assert mp.default_policy() == mp.default_policy(jax.local_devices()[0])
    assert mp.half_dtype() == mp.half_dtype(jax.local_devices()[0])


@pytest.mark.parametrize("name", DEVICES)
def test_half_dtype_is_sixteen_bits(name):
    device, compute, _ = DEVICES[name]
    half = jnp.dtype(mp.half_dtype(device))
    assert half.itemsize == 2
    if compute != "float32":
        assert half == compute


@pytest.mark.parametrize("device", ["tpu", 0, [FakeDevice("tpu", "TPU v4")]], ids=str)
def test_what_is_no_device(device):
    for fn in (mp.default_policy, mp.half_dtype):
        with pytest.raises(TypeError, match=r"one jax\.Device") as error:
            fn(device)
        assert repr(device) in str(error.value)


def test_half_dtype_makes_numbers():
    """jmp's README: jmp.half_dtype()(2 ** 15)."""
    assert mp.half_dtype()(2.0**15) == 2.0**15
