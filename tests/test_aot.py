"""mpjax.aot: the reader of HLO against texts worked out by hand, and reports of programs compiled for this CPU."""

# ruff: noqa: E501 (a line of HLO is an instruction)

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import mpjax as mp
from mpjax import _compat
from mpjax.aot import _devices, _targets
from mpjax.aot._hlo import Module, arrays_of, dtype_name
from mpjax.aot._traffic import Collective, collectives, main_memory_bytes
from mpjax.aot._work import flops, uncounted

MEBI = 2**20

# As libtpu writes them: a gather in stages that have one channel, a prefetch into on-chip memory S(1), a loop.
TPU = """HloModule jit_step, is_scheduled=true, entry_computation_layout={()->f32[]}, num_partitions=16

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%start_stage (p: bf16[256,1024]) -> (bf16[256,1024], bf16[4096,1024]) {
  %p = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather-start = (bf16[256,1024]{1,0:T(8,128)(2,1)}, bf16[4096,1024]{1,0:T(8,128)(2,1)}) all-gather-start(%p), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}, use_global_device_ids=true
}

%next_stage (q: bf16[256,1024]) -> bf16[4096,1024] {
  %q = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather = bf16[4096,1024]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}, use_global_device_ids=true
}

%matmul (a: bf16[1024,1024], b: f32[1024,1024]) -> f32[1024,1024] {
  %a = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = f32[1024,1024]{1,0:T(8,128)} parameter(1)
  %narrow = bf16[1024,1024]{1,0:T(8,128)(2,1)} convert(%b)
  ROOT %product = f32[1024,1024]{1,0:T(8,128)} convolution(%a, %narrow), dim_labels=bf_io->bf
}

%body (t: (s32[], bf16[1024,1024], f32[1024,1024])) -> (s32[], bf16[1024,1024], f32[1024,1024]) {
  %t = (s32[]{:T(128)}, bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/f32[1024,1024]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %w = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%t), index=1
  %h = f32[1024,1024]{1,0:T(8,128)} get-tuple-element(%t), index=2
  %fused = f32[1024,1024]{1,0:T(8,128)} fusion(%w, %h), kind=kOutput, calls=%matmul, backend_config={"estimated_cycles":"100"}
  %all-reduce = f32[1024,1024]{1,0:T(8,128)} all-reduce(%fused), channel_id=3, replica_groups=mesh['data'=4,'model'=4] {'model'}, use_global_device_ids=true, to_apply=%add
  ROOT %next = (s32[]{:T(128)}, bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}, f32[1024,1024]{1,0:T(8,128)}) tuple(%i, %w, %all-reduce)
}

%condition (t.1: (s32[], bf16[1024,1024], f32[1024,1024])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}, f32[1024,1024]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (w0: bf16[1024,1024], x0: f32[1024,1024], s0: bf16[256,1024]) -> f32[1024,1024] {
  %w0 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %x0 = f32[1024,1024]{1,0:T(8,128)} parameter(1)
  %s0 = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(2)
  %copy-start = (bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w0)
  %copy-done = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}, f32[1024,1024]{1,0:T(8,128)}) tuple(%zero, %copy-done, %x0)
  %loop = (s32[]{:T(128)}, bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}, f32[1024,1024]{1,0:T(8,128)}) while(%init), condition=%condition, body=%body
  %alone = f32[] all-reduce(%zero), channel_id=9, replica_groups={}, to_apply=%add
  %unknown = f32[]{:T(128)} fusion(%alone), kind=kLoop, calls=%add, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %out = f32[1024,1024]{1,0:T(8,128)} get-tuple-element(%loop), index=2
}
"""
# The stages as a chain that the entry runs.
TPU = TPU.replace(
    "  %alone =",
    "  %one = (bf16[256,1024]{1,0}, bf16[4096,1024]{1,0}) fusion(%s0), kind=kCustom, calls=%start_stage\n"
    "  %two = bf16[4096,1024]{1,0} fusion(%s0), kind=kCustom, calls=%next_stage\n  %alone =",
)

# A stack of eight layers, of which a turn reads one and writes one back.
STACK = """HloModule jit_stack, is_scheduled=true

%update (s: f32[8,1024], i: s32[], v: f32[1024]) -> f32[8,1024] {
  %s = f32[8,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %v = f32[1024]{0} parameter(2)
  %row = f32[1,1024]{1,0} bitcast(%v)
  %zero = s32[] constant(0)
  ROOT %put = f32[8,1024]{1,0} dynamic-update-slice(%s, %row, %i, %zero)
}

%read (s.1: f32[8,1024], i.1: s32[]) -> f32[1024] {
  %s.1 = f32[8,1024]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %get = f32[1,1024]{1,0} dynamic-slice(%s.1, %i.1, %zero.1), dynamic_slice_sizes={1,1024}
  ROOT %flat = f32[1024]{0} bitcast(%get)
}

%cheap (c: f32[1024]) -> f32[1024] {
  %c = f32[1024]{0} parameter(0)
  ROOT %neg = f32[1024]{0} negate(%c)
}

%dear (d: f32[1024]) -> f32[1024] {
  %d = f32[1024]{0} parameter(0)
  %sin = f32[1024]{0} sine(%d)
  ROOT %cos = f32[1024]{0} cosine(%sin)
}

ENTRY %main (stack: f32[8,1024], at: s32[]) -> f32[8,1024] {
  %stack = f32[8,1024]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %layer = f32[1024]{0} fusion(%stack, %at), kind=kLoop, calls=%read
  %chosen = f32[1024]{0} conditional(%at, %layer, %layer), branch_computations={%cheap, %dear}
  ROOT %back = f32[8,1024]{1,0} fusion(%stack, %at, %chosen), kind=kLoop, calls=%update
}
"""

GROUPS = {
    "replica_groups={{0,1},{2,3},{4,5},{6,7}}": 2,
    "replica_groups=[2,4]<=[4,2]T(1,0)": 4,
    "replica_groups=mesh['x'=2,'y'=4] {'y'}": 4,
    "replica_groups=@mesh['x'=2,'my-axis'=4] {'x','my-axis'}": 8,
    "replica_groups=mesh['x'=8] {'x':(2)2}": 2,
    "replica_groups={}": 8,
}
# What a device sends for a result of 1 MiB, of four devices.
SENT = {
    "all-gather": 0.75,
    "all-to-all": 0.75,
    "all-reduce": 1.5,
    "reduce-scatter": 3.0,
    "collective-permute": 1.0,
}


def one_line(line, head="num_partitions=8"):
    operand = "  %p = f32[512,512]{1,0} parameter(0)\n  %q = f32[512,512]{1,0} parameter(1)\n"
    return Module(
        f"HloModule m, {head}\n\nENTRY %main (p: f32[512,512]) -> f32[] {{\n{operand}  ROOT %r = {line}\n}}\n"
    )


def test_bytes_through_main_memory_count_each_turn_and_nothing_on_the_chip():
    module = Module(TPU)
    prefetch = 2 * MEBI  # read; what is written is in S(1)
    turn = 4 * MEBI + 4 * MEBI + 2 * 4 * MEBI  # the product without its weights; the sum over devices
    gathers = (0.5 + (0.5 + 8) + 0.5 + 8) * MEBI
    scalars = 4 * 4
    assert main_memory_bytes(module) == prefetch + 5 * turn + gathers + scalars


def test_cycles_and_flops_are_counted_each_turn():
    module = Module(TPU)
    assert module.estimated_cycles() == 500
    assert flops(module) == {"bfloat16": 5 * 2 * 1024**3}
    assert uncounted(module) == ()
    assert module.devices == 16


def test_a_chain_of_one_channel_is_one_collective_and_single_numbers_are_none():
    assert collectives(Module(TPU)) == (
        Collective("all-gather", "bfloat16", 1, 8 * MEBI * 15 / 16),
        Collective("all-reduce", "float32", 5, 5 * 2 * 4 * MEBI * 3 / 4),
    )


def test_of_a_stack_one_layer_is_moved_and_of_a_conditional_the_dearest_branch():
    layer = 4096
    read, branch, write = 2 * layer, 4 * layer, 2 * layer
    # Beside them, the number of the layer.
    assert main_memory_bytes(Module(STACK)) == read + branch + write + 2 * 4


@pytest.mark.parametrize(("groups", "devices"), GROUPS.items(), ids=str)
def test_replica_groups_in_every_notation(groups, devices):
    module = one_line(f"f32[512,512]{{1,0}} all-gather(%p), channel_id=1, {groups}, dimensions={{0}}")
    assert collectives(module) == (Collective("all-gather", "float32", 1, MEBI * (devices - 1) / devices),)


@pytest.mark.parametrize(("kind", "times"), SENT.items())
def test_what_a_device_sends(kind, times):
    module = one_line(f"f32[512,512]{{1,0}} {kind}(%p), channel_id=1, replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}")
    assert collectives(module) == (Collective(kind, "float32", 1, MEBI * times),)


def test_several_arrays_of_one_collective():
    module = one_line(
        "(f32[512,512]{1,0}, bf16[1024]{0}, f32[]) all-reduce(%p, %q, %q), channel_id=1, replica_groups=[1,8]<=[8]"
    )
    assert collectives(module) == (
        Collective("all-reduce", "bfloat16", 1, 2048 * 2 * 7 / 8),
        Collective("all-reduce", "float32", 1, MEBI * 2 * 7 / 8),
    )


def test_a_loop_of_unknown_length_and_a_kernel_are_said_not_to_be_counted():
    loop = TPU.replace("constant(5)", "parameter(1)")
    assert uncounted(Module(loop)) == ("a loop of unknown length, counted as one turn",)
    assert flops(Module(loop)) == {"bfloat16": 2 * 1024**3}
    known = loop.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert flops(Module(known)) == {"bfloat16": 3 * 2 * 1024**3}
    kernel = one_line('f32[512,512]{1,0} custom-call(%p, %q), custom_call_target="tpu_custom_call"')
    assert uncounted(kernel) == ("tpu_custom_call: its work is not known",)
    assert uncounted(one_line('f32[512,512]{1,0} custom-call(%p, %q), custom_call_target="ConcatBitcast"')) == ()


def test_what_talks_to_the_host_is_named():
    call = one_line('f32[] custom-call(%p), custom_call_target="xla_ffi_python_cpu_callback"')
    assert call.host_transfers() == ("xla_ffi_python_cpu_callback",)
    assert uncounted(call) == ()
    assert one_line("(f32[], u32[], token[]) send(%p), channel_id=1").host_transfers() == ("send",)


def test_products_of_gpu_libraries():
    gemm = (
        '(f32[512,512]{1,0}, s8[64]{0}) custom-call(%p, %q), custom_call_target="__cublas$lt$matmul", backend_config='
        '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    )
    assert flops(one_line(gemm)) == {"float32": 2 * 512**3}
    assert main_memory_bytes(one_line(gemm)) == 3 * MEBI + 64
    # The gradient of a filter: of the same work as the convolution, and its result is the filter.
    text = """HloModule m
ENTRY %main (x: f16[8,16,16,32], g: f16[8,14,14,64]) -> f16[3,3,32,64] {
  %x = f16[8,16,16,32]{3,2,1,0} parameter(0)
  %g = f16[8,14,14,64]{3,2,1,0} parameter(1)
  %c = (f16[3,3,32,64]{3,2,1,0}, u8[0]{0}) custom-call(%x, %g), window={size=3x3}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardFilter"
  ROOT %r = f16[3,3,32,64]{3,2,1,0} get-tuple-element(%c), index=0
}
"""
    assert flops(Module(text)) == {"float16": 2 * 8 * 14 * 14 * 64 * 3 * 3 * 32}


def test_a_batched_product_that_a_tpu_writes_as_a_dilated_convolution():
    text = """HloModule m
ENTRY %main (a: bf16[16,64,128], b: bf16[16,128,32]) -> f32[16,64,32] {
  %a = bf16[16,64,128]{2,1,0} parameter(0)
  %b = bf16[16,128,32]{2,1,0} parameter(1)
  ROOT %c = f32[16,64,32]{2,1,0} convolution(%a, %b), window={size=16 stride=15 pad=0_0 lhs_dilate=16}, dim_labels=0bf_0io->0bf
}
"""
    assert flops(Module(text)) == {"bfloat16": 2 * 16 * 64 * 128 * 32}


def test_types_of_hlo():
    assert [
        a.bytes for a in arrays_of("(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, pred[3]{0}, s4[10], c64[], u32[]{:S(2)})")
    ] == [
        64,
        3,
        10,
        8,
        4,
    ]
    names = {"bf16": "bfloat16", "f8e4m3fn": "float8_e4m3fn", "s32": "int32", "u8": "uint8", "pred": "bool"}
    assert {hlo: dtype_name(hlo) for hlo in names} == names
    for hlo in ("bf16", "f8e4m3fn", "f8e5m2", "f4e2m1fn", "f32", "s4", "u2", "c64"):
        assert jnp.dtype(dtype_name(hlo)).name == dtype_name(hlo)


# Reports of what this CPU's compiler made.


def loss(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)


W, X = jax.ShapeDtypeStruct((256, 128), jnp.float32), jax.ShapeDtypeStruct((64, 256), jnp.float32)


@pytest.fixture(scope="module")
def report():
    return mp.aot.compile_for("cpu", jax.value_and_grad(loss), W, X)


def test_a_report_has_the_executables_own_figures(report):
    compiled = jax.jit(jax.value_and_grad(loss)).lower(W, X).compile()
    memory = compiled.memory_analysis()
    assert report.peak_bytes == memory.peak_memory_in_bytes
    assert report.temp_bytes == memory.temp_size_in_bytes
    assert report.argument_bytes == memory.argument_size_in_bytes == (256 * 128 + 64 * 256) * 4
    assert report.output_bytes == memory.output_size_in_bytes
    assert report.bytes_accessed == compiled.cost_analysis()["bytes accessed"]
    assert report.flops == {"float32": 2 * 2 * 64 * 256 * 128}
    assert report.fits is None
    assert report.estimated_cycles is None
    assert report.collectives == ()
    assert report.host_transfers == ()
    assert (report.target, report.devices) == ("cpu", 1)


def test_a_report_is_a_value_that_prints(report):
    assert json.loads(report.to_json()) == report.to_dict()
    assert "hlo" not in report.to_dict()
    assert "HloModule" in report.hlo
    with pytest.raises(AttributeError):
        report.target = "v5e"
    text = str(report)
    assert text.startswith(f"CPU, jaxlib {importlib.metadata.version('jaxlib')}\n")
    assert "FLOPs, float32" in text
    assert "8.39 M" in text
    assert "fits" not in text


@pytest.mark.parametrize(("limit", "fits", "said"), [(1000, False, "does not fit"), (10**9, True, "fits:")])
def test_whether_it_fits(report, limit, fits, said):
    of_chip = mp.aot.Report("v5e", "TPU v5e chip", 1, "libtpu", limit, report.peak_bytes, hlo=report.hlo)
    assert of_chip.fits is fits
    assert of_chip.spare_bytes == limit - of_chip.needed_bytes
    assert of_chip.needed_bytes == report.peak_bytes
    assert said in str(of_chip)
    assert of_chip.to_dict()["fits"] is fits


def test_memory_with_gaps_is_needed_whole():
    """Arguments, results and the block of temporaries; what takes an argument's place is counted once."""
    found = mp.aot.Report("v5e", "TPU v5e chip", 1, "libtpu", 100, 60, 70, 40, 30, alias_bytes=30)
    assert found.needed_bytes == 110
    assert found.fits is False
    assert found.spare_bytes == -10


def test_flops_of_convolutions_are_xlas():
    def layer(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (2, 1), "SAME", rhs_dilation=(1, 2), feature_group_count=2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    avals = jax.ShapeDtypeStruct((2, 9, 7, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 2, 6), jnp.float32)
    for fn in (layer, jax.grad(lambda x, k: layer(x, k).sum(), argnums=1)):
        text = jax.jit(fn).lower(*avals).compile()
        found = flops(Module(text.as_text()))
        assert sum(found.values()) > 0
        # XLA's sum has the additions of other operations too, fewer than the numbers that there are.
        assert 0 <= text.cost_analysis()["flops"] - found["float32"] <= 2 * (2 * 9 * 7 * 6 + 3 * 3 * 2 * 6)


def test_a_scan_counts_each_turn_and_donation_is_passed_on():
    def run(ws, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, ws)[0]

    ws, x = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32), jnp.ones((32, 64))
    found = mp.aot.compile_for("cpu", run, ws, x, donate_argnums=1)
    assert found.flops == {"float32": 6 * 2 * 32 * 64 * 64}
    assert found.alias_bytes == 32 * 64 * 4
    # A function that is jitted already keeps what it was given.
    assert mp.aot.compile_for("cpu", jax.jit(run, donate_argnums=1), ws, x).alias_bytes == found.alias_bytes
    assert mp.aot.compile_for("cpu", run, ws, x).alias_bytes == 0


def test_shardings_over_a_mesh():
    mesh = mp.aot.mesh("cpu", "8")
    specs = (PartitionSpec("data"), PartitionSpec("data"))
    step = jax.grad(loss)
    found = mp.aot.compile_for("cpu", step, W, X, mesh=mesh, shardings=specs, out_shardings=PartitionSpec("data"))
    assert found.devices == 8
    assert found.argument_bytes == (256 * 128 + 64 * 256) * 4 // 8
    assert found.output_bytes == 256 * 128 * 4 // 8
    gathered = [row for row in found.collectives if row.kind == "all-gather"]
    assert gathered == [Collective("all-gather", "float32", gathered[0].count, gathered[0].bytes_sent)]
    assert gathered[0].bytes_sent == gathered[0].count * 256 * 128 * 4 * 7 / 8
    assert "sent by each device" in str(found)
    assert found.to_dict()["collectives"][0]["kind"] == found.collectives[0].kind
    # The same, said by the arguments; and the compiled program is the same.
    placed = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, s))
        for a, s in zip((W, X), specs, strict=True)
    ]
    assert mp.aot.compile_for("cpu", step, *placed, out_shardings=PartitionSpec("data")).flops == found.flops
    # One spec for all arguments; a prefix of a tree.
    tree = {"w": W, "b": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    whole = mp.aot.compile_for("cpu", lambda t: t["w"].sum(), tree, mesh=mesh, shardings=PartitionSpec("data"))
    assert whole.argument_bytes == 256 * 128 * 4 // 8


def test_a_mesh_has_the_axes_that_it_is_given():
    assert dict(mp.aot.mesh("cpu", "4x2", ("data", "model")).shape) == {"data": 4, "model": 2}
    assert dict(mp.aot.mesh("cpu", "8", ("a", "b"), (2, 4)).shape) == {"a": 2, "b": 4}
    assert mp.aot.mesh("cpu", "2", "data").axis_names == ("data",)


def test_autocast_is_traced_for_the_target():
    """A TPU keeps gradients of weights in float32 as the product makes them; a CPU has no such product."""
    step = jax.jit(jax.grad(mp.autocast(loss, "mixed_bfloat16")))
    here = str(step.trace(W, X).jaxpr)
    with _compat.tracing_for("tpu"):
        assert _compat.target_platform() == "tpu"
        there = str(step.trace(W, X).jaxpr)
    assert _compat.target_platform() == "cpu"
    assert there != here, "traced again, not found in jit's cache"
    assert str(step.trace(W, X).jaxpr) == here
    seen = []

    def spy(w, x):
        seen.append(_compat.target_platform())
        return loss(w, x)

    mp.aot.compile_for("cpu", spy, W, X)
    assert seen == ["cpu"]


def test_a_comparison_is_side_by_side():
    smaller = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    found = mp.aot.compare(
        {"loss": loss, "gradient": jax.grad(loss), "half": (loss, (W, jax.ShapeDtypeStruct((32, 256), jnp.float32)))},
        "cpu",
        W,
        smaller,
    )
    assert list(found.reports) == ["loss", "gradient", "half"]
    assert found.factors["loss"]["peak memory"] == 1.0
    assert found.factors["gradient"]["FLOPs, float32"] == 2.0
    assert found.factors["half"]["FLOPs, float32"] == 0.5
    assert json.loads(found.to_json()) == found.to_dict()
    lines = str(found).splitlines()
    assert lines[2].split() == ["loss", "gradient", "half"]
    work = next(line for line in lines if line.startswith("FLOPs, float32"))
    assert work.split() == ["FLOPs,", "float32", "4.19", "M", "8.39", "M", "(2.000x)", "2.10", "M", "(0.500x)"]


def test_a_comparison_with_one_that_does_not_fit():
    fine = mp.aot.Report("v5e", "TPU v5e chip", 1, "libtpu", 100, 50, temp_bytes=10)
    over = mp.aot.Report("v5e", "TPU v5e chip", 1, "libtpu", 100, 400, refusal="Ran out of memory")
    found = mp.aot.Comparison({"a": fine, "b": over})
    assert over.fits is False
    assert [line.split() for line in str(found).splitlines()[3:]] == [
        ["fits", "yes", "no"],
        ["peak", "memory", "50", "B", "400", "B", "(8.000x)"],
        ["temporary", "10", "B", "-"],
    ]


@pytest.mark.parametrize(
    ("message", "gibibytes"),
    [
        ("the total memory required for HLO temporaries (300.00G) exceeds available HBM (15.75G).", 300),
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 20.5),
        ("Ran out of memory in memory space vmem. Used 20.50M of 16.00M vmem.", None),
    ],
)
def test_a_program_too_large_is_a_report_that_says_by_how_much(monkeypatch, message, gibibytes):
    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    if gibibytes is None:
        with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
            mp.aot.compile_for("cpu", loss, W, X)
        return
    found = mp.aot.compile_for("cpu", loss, W, X)
    assert found.peak_bytes == gibibytes * 2**30
    assert found.fits is False
    assert found.temp_bytes is None
    assert message in str(found)
    assert json.loads(found.to_json())["refusal"] == f"RESOURCE_EXHAUSTED: {message}"


# Errors.


def test_unknown_targets_are_answered_with_the_list():
    for call in (mp.aot.devices, mp.aot.compiler_version, lambda name: mp.aot.compile_for(name, loss, W, X)):
        with pytest.raises(ValueError, match=r"target is 'v99'.*(?s:.)*v5e, v5p, v6e, tpu7x, a100, h100, cpu"):
            call("v99")
    with pytest.raises(ValueError, match="target is <function"):
        mp.aot.compile_for(loss, "v5e", W)


@pytest.mark.parametrize(("target", "extra"), [("v5e", "aot-tpu"), ("h100", "aot-gpu")])
def test_a_missing_compiler_is_answered_with_the_line_to_install_it(monkeypatch, target, extra):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_targets.importlib.metadata, "version", absent)
    with pytest.raises(ImportError, match=rf'pip install "mpjax\[{extra}\]"'):
        mp.aot.compile_for(target, loss, W, X)


def test_slices_that_there_are_none_of():
    for chips in ("", "4x", "4 x 4", "-1", 4):
        with pytest.raises(ValueError, match="numbers of chips along each axis"):
            mp.aot.devices("cpu", chips)
    with pytest.raises(ValueError, match="this process has 8 CPU devices"):
        mp.aot.devices("cpu", "3x3")
    with pytest.raises(ValueError, match=r"axis_sizes \(3,\), for the 8 devices"):
        mp.aot.mesh("cpu", "8", ("data",), (3,))


@pytest.fixture
def answers(monkeypatch):
    """Pretends that a compiler is installed, and what it answers."""

    def pretend(answer, loaded=()):
        monkeypatch.setattr(_targets.importlib.metadata, "version", lambda name: "1.0")
        monkeypatch.setattr(_compat, "is_loaded", lambda plugin: plugin in loaded)
        monkeypatch.setattr(_devices.topologies, "get_topology_desc", answer)

    return pretend


def test_a_compiler_that_cannot_be_used_here_says_why(answers):
    def fail(error):
        def answer(**_):
            raise error

        return answer

    answers(None, loaded=("cuda",))
    with pytest.raises(RuntimeError, match="loaded the compiler for GPUs, and not that for 'v5e'"):
        mp.aot.devices("v5e")
    answers(None, loaded=("tpu",))
    with pytest.raises(RuntimeError, match="loaded the compiler for TPUs, and not that for 'h100'"):
        mp.aot.devices("h100")
    answers(fail(jax.errors.JaxRuntimeError("ABORTED: The TPU is already in use by process with pid 7.\nmore")))
    with pytest.raises(RuntimeError, match=r"in use by another process on this machine: ABORTED.*pid 7\.\n"):
        mp.aot.devices("v5e")
    answers(fail(jax.errors.JaxRuntimeError('INVALID_ARGUMENT: Topology layout "v5e:3x3" is not divisible')))
    with pytest.raises(ValueError, match="chips is '3x3', which 'v5e' has no slice of"):
        mp.aot.devices("v5e", "3x3")
    answers(fail(NotImplementedError("topology not implemented for cuda")))
    with pytest.raises(RuntimeError, match="JAX_PLATFORMS=cpu in the environment before Python starts"):
        mp.aot.devices("h100")


@pytest.mark.parametrize(("target", "chips"), [("v5e", 0), ("v5e", 4), ("h100", 0)])
def test_the_environment_is_as_it_was(answers, monkeypatch, target, chips):
    """Set while the compiler loads, and not even then where there is a TPU; a user's own value comes back."""
    monkeypatch.setattr(_compat, "tpu_chips", lambda: chips)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    before = dict(os.environ)
    seen = {}

    def answer(**_):
        seen.update(os.environ)
        raise NotImplementedError

    answers(answer)
    with pytest.raises(RuntimeError):
        mp.aot.devices(target)
    assert dict(os.environ) == before
    assert (seen.get("TPU_SKIP_MDS_QUERY") == "1") == (target == "v5e" and not chips)
    assert (seen["TPU_WORKER_HOSTNAMES"] == "localhost") == (target == "v5e" and not chips)


def test_arguments_and_shardings_that_cannot_be():
    mesh = mp.aot.mesh("cpu", "8")
    with pytest.raises(TypeError, match=r"argument 1/name is 'x', no array"):
        mp.aot.compile_for("cpu", loss, W, {"name": "x"})
    with pytest.raises(ValueError, match="has a PartitionSpec, and there is no mesh"):
        mp.aot.compile_for("cpu", loss, W, X, shardings=PartitionSpec("data"))
    with pytest.raises(ValueError, match=r"argument 0 has shape \(256, 128\).*model"):
        mp.aot.compile_for("cpu", loss, W, X, mesh=mesh, shardings=(PartitionSpec("model"), None))
    odd = jax.ShapeDtypeStruct((9, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"argument 0 has shape \(9, 3\)"):
        mp.aot.compile_for("cpu", jnp.sum, odd, mesh=mesh, shardings=PartitionSpec("data"))
    with pytest.raises(ValueError, match="shardings is no prefix of the arguments"):
        mp.aot.compile_for("cpu", loss, W, X, mesh=mesh, shardings=(None,))
    for functions in ({}, [loss]):
        with pytest.raises(ValueError, match="a mapping from names to functions"):
            mp.aot.compare(functions, "cpu", W, X)


def test_shardings_over_devices_of_another_kind(answers):
    here = mp.aot.mesh("cpu", "8")
    answers(None)
    with pytest.raises(ValueError, match="mesh is of cpu, and target is 'v5e'"):
        mp.aot.compile_for("v5e", loss, W, X, mesh=here)
    sharded = jax.ShapeDtypeStruct(W.shape, W.dtype, sharding=NamedSharding(here, PartitionSpec("data")))
    with pytest.raises(ValueError, match="argument 0 is sharded over 8 devices of cpu, and target is 'v5e'"):
        mp.aot.compile_for("v5e", loss, sharded, X)


def test_python_numbers_and_arrays_are_arguments():
    found = mp.aot.compile_for("cpu", lambda x, n: x * n, np.ones((16, 4), np.float32), 2.0)
    assert found.argument_bytes == 16 * 4 * 4 + 4


def test_import_mpjax_leaves_it_out():
    code = "import sys, mpjax; print('mpjax.aot' in sys.modules); mpjax.aot; print('mpjax.aot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


# With the compiler itself: `pip install "mpjax[aot-tpu]"`. One process for all, in which JAX starts first, as in a
# notebook.
LIBTPU = """
import jax, jax.numpy as jnp, json, os, mpjax as mp
from jax.sharding import PartitionSpec as P
before = dict(os.environ), str(jax.devices())
def loss(w, x): return jnp.mean(jnp.tanh(x @ w) ** 2)
w, x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32), jax.ShapeDtypeStruct((512, 1024), jnp.float32)
out = {}
for target in ("v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x"):
    mixed = mp.autocast(loss, mp.default_policy(mp.aot.devices(target)[0]))
    found = mp.aot.compile_for(target, jax.grad(mixed), w, x)
    assert found.fits and found.estimated_cycles > 0 and found.flops == {"bfloat16": 4 * 512 * 1024**2}, (target, found)
    large = mp.aot.compile_for(target, jnp.tanh, jax.ShapeDtypeStruct((256, 2**30), jnp.bfloat16))
    words = large.refusal.split("available HBM (")[1]
    assert abs(float(words.split("G")[0]) * 2**30 - large.memory_limit) < 2**24, (target, large)
mesh = mp.aot.mesh("v5e", "16x16")
found = mp.aot.compile_for("v5e", jax.grad(loss), w, x, mesh=mesh, shardings=P("data"), out_shardings=P("data"))
assert found.devices == 256 and found.bytes_sent > 0 and found.argument_bytes < 2**18, found
assert (dict(os.environ), str(jax.devices())) == before
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_every_tpu_compiles():
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    subprocess.run([sys.executable, "-c", LIBTPU], check=True, env=environment)
