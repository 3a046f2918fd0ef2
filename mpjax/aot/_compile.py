"""`mpjax.aot.compile_for` and `mpjax.aot.compare`: compiles for a device that is not there."""

import contextlib
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpjax._compat import tracing_for
from mpjax._errors import problem, shortened
from mpjax._hardware import hardware_of
from mpjax.aot._arguments import is_place, placed
from mpjax.aot._comparison import Comparison
from mpjax.aot._report import Report
from mpjax.aot._targets import compiler_version, target_named

# There is no GPU here to try kernels out on.
_OPTIONS: dict[str, dict[str, Any]] = {"cuda": {"xla_gpu_autotune_level": 0}}
# "... (300.00G) exceeds available HBM (15.75G)", "Used 20.00G of 15.75G hbm"
_REFUSED = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM|Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
_POWERS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def compile_for(
    target: str,
    fn: Callable[..., Any],
    *avals: Any,
    mesh: Mesh | None = None,
    shardings: Any = None,
    out_shardings: Any = None,
    donate_argnums: int | tuple[int, ...] = (),
    compiler_options: Mapping[str, Any] | None = None,
) -> Report:
    """Compiles a function for a TPU or GPU on a machine that has none, and reports what the compiler says.

    Nothing is allocated or run, and this process goes on as it was: JAX's own backend and the environment stay as
    they are. `mpjax.autocast` is traced for the target; give it a policy, or that of the target by
    `mpjax.default_policy(mpjax.aot.devices("v5e")[0])`, for without one it is this machine's.

    The compiler for TPUs is in `pip install "mpjax[aot-tpu]"`, that for GPUs in `pip install "mpjax[aot-gpu]"`: each
    in an environment of its own. `"cpu"` needs neither.

    Args:
      target: `"v5e"`, `"v6e"`, `"h100"` ...: one of `TARGETS`.
      fn: a function of pytrees of arrays. One that `jax.jit` made keeps its options, if none are given here. Of an NNX
        module, pass what `nnx.split` makes of it.
      *avals: its arguments: arrays, of which only shape and dtype are read, or `jax.ShapeDtypeStruct`s, whose
        `sharding` is kept. Python numbers are traced as such.
      mesh: of `mpjax.aot.mesh`; `fn` is traced with it set, so that a `PartitionSpec` in it needs no mesh. Default:
        that of the arguments' shardings, or one device.
      shardings: where arguments lie: a `PartitionSpec` over the mesh or a `jax.sharding.Sharding`, one for all or a
        tree of them that is a prefix of the tuple of arguments; `None` in it is as the argument says, or on every
        device.
      out_shardings: the same for the results, as `jax.jit` takes it. Default: the compiler's choice.
      donate_argnums: the arguments that are given up, as `jax.jit` takes it: of a training step, parameters and
        optimizer state.
      compiler_options: as `jax.stages.Lowered.compile` takes them.

    Returns:
      A `Report`, for one device of those that run it. It prints as a table. A program that is too large for its TPU is
      no error: its report says by how much.

    Raises:
      ValueError: there is no such target; a sharding fits neither mesh nor argument.
      TypeError: an argument is no array.
      ImportError: the compiler is not installed; the message has the line to install it.
      RuntimeError: the compiler cannot be used in this process; the message says why.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> def loss(w, x):
    ...     return jnp.mean(jnp.tanh(x @ w) ** 2)
    >>> w, x = jax.ShapeDtypeStruct((256, 256), jnp.float32), jax.ShapeDtypeStruct((64, 256), jnp.float32)
    >>> report = mp.aot.compile_for("cpu", jax.grad(loss), w, x)
    >>> report.flops == {"float32": 2 * 2 * 64 * 256 * 256}
    True
    """
    found = target_named(target)
    compiler = compiler_version(target)
    structs, whole = placed(target, avals, mesh, shardings)
    options: dict[str, Any] = {} if donate_argnums == () else {"donate_argnums": donate_argnums}
    if out_shardings is not None:
        options["out_shardings"] = jax.tree.map(
            lambda s: NamedSharding(whole, s) if isinstance(s, PartitionSpec) else s, out_shardings, is_leaf=is_place
        )
    jitted: Any = fn if hasattr(fn, "trace") and not options else jax.jit(fn, **options)
    device = whole.devices.flat[0]
    float8 = bool(hardware_of(device).has_fp8(device))
    with tracing_for(found.traced_as, float8), contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        lowered = jitted.trace(*structs).lower(lowering_platforms=(found.platform,))
    about: dict[str, Any] = {"target": target, "title": found.title, "devices": whole.size, "compiler": compiler}
    try:
        compiled = lowered.compile(compiler_options={**_OPTIONS.get(found.platform, {}), **(compiler_options or {})})
    except jax.errors.JaxRuntimeError as error:
        refused = _REFUSED.search(str(error))
        if not refused:
            raise
        size, unit = (group for group in refused.groups() if group is not None)
        needed = int(float(size) * 2 ** _POWERS[unit])
        return Report(**about, memory_limit=found.memory, peak_bytes=needed, refusal=str(error).splitlines()[0])
    memory = compiled.memory_analysis()
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed")
    return Report(
        **about,
        memory_limit=found.memory,
        peak_bytes=memory.peak_memory_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        bytes_accessed=None if accessed is None else int(accessed),
        hlo=compiled.as_text(),
    )


def compare(
    functions: Mapping[str, Callable[..., Any] | tuple[Callable[..., Any], tuple[Any, ...]]],
    target: str,
    *avals: Any,
    **options: Any,
) -> Comparison:
    """Compiles several functions for one target, such as a model in several precisions, and sets them side by side.

    Args:
      functions: by name, each a function of `avals`, or a pair of a function and the tuple of its own arguments. The
        others are measured by the first.
      target: as in `compile_for`.
      *avals: the arguments of the functions that have none of their own.
      **options: as in `compile_for`, the same for all.

    Returns:
      A `Comparison`, whose `reports` are by name. It prints as a table with a column for each.

    Raises:
      ValueError: there is nothing to compare; and as `compile_for`.
      TypeError, ImportError, RuntimeError: as `compile_for`.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> def loss(w, x):
    ...     return jnp.mean(jnp.tanh(x @ w) ** 2)
    >>> w, x = jax.ShapeDtypeStruct((256, 256), jnp.float32), jax.ShapeDtypeStruct((64, 256), jnp.float32)
    >>> found = mp.aot.compare({"loss": loss, "with gradients": jax.grad(loss)}, "cpu", w, x)
    >>> found.factors["with gradients"]["FLOPs, float32"]
    2.0
    """
    if not isinstance(functions, Mapping) or not functions:
        raise ValueError(
            problem(
                f"functions is {shortened(functions)}.",
                expected="a mapping from names to functions, or to pairs of a function and its arguments",
                write='compare({"float32": loss, "mixed": mp.autocast(loss, "mixed_bfloat16")}, target, *avals)',
            )
        )
    reports = {}
    for name, choice in functions.items():
        fn, of_it = choice if isinstance(choice, tuple) else (choice, avals)
        reports[name] = compile_for(target, fn, *of_it, **options)
    return Comparison(MappingProxyType(reports))
