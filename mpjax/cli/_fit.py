"""`mpjax fit`: whether a function fits a TPU or GPU that is not there, and what it takes, in several precisions."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

import mpjax as mp
from mpjax import aot
from mpjax._errors import problem
from mpjax.aot._report import in_bytes
from mpjax.cli._checks import CommandError
from mpjax.cli._show import policy_named, try_to, write_results
from mpjax.cli._target_function import TargetFunction, called, checked, differentiated, load

EXAMPLE_SHARDINGS = "example_shardings"


def run(
    function: str,
    args_name: str | None,
    *,
    target: str,
    chips: str | None,
    axes: str,
    policies: str,
    with_gradients: bool,
    json: Path | None,
    png: Path | None,
) -> None:
    """Compiles and prints.

    Args:
      function: `module:function`, or `path/to/file.py:function`.
      args_name: where the arguments are, if not in `example_args`.
      target: one of `mpjax.aot.TARGETS`.
      chips: a slice such as `"4x4"`; `None` for one device.
      axes: names of the mesh's axes, with commas between them.
      policies: with commas between them, or semicolons where they have commas themselves.
      with_gradients: whether to compile the loss with its gradients.
      json: a file to write everything to, or `None`.
      png: a file to draw to, or `None`.

    Raises:
      CommandError: there is no such policy, target, slice, function or argument, its compiler is not installed, or the
        function cannot be traced.
    """
    chosen = {text.strip(): policy_named(text) for text in policies.split(";" if set(";=") & set(policies) else ",")}
    # Before the module, which may start JAX: the compiler for GPUs is to be there first.
    try_to(aot.devices, target)
    mesh = None if chips is None else try_to(aot.mesh, target, chips, [name.strip() for name in axes.split(",")])
    found = load(function, args_name)
    shardings, placed = (None, "") if mesh is None else _shardings(found, mesh)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        through = differentiated(found) if with_gradients else None
        checked(found, through)
    variants = {name: _variant(found, policy, through) for name, policy in chosen.items()}
    comparison = try_to(aot.compare, variants, target, *found.args, mesh=mesh, shardings=shardings)
    print(comparison, end="\n\n")
    for name, report in comparison.reports.items():
        print(f"{name} {_verdict(report)}.")
    if placed:
        print(placed)

    def draw() -> Any:
        import mpjax.plots

        return mpjax.plots.memory_bars(comparison)

    write_results(comparison.to_json(), draw, json, png)


def _variant(
    target: TargetFunction, policy: mp.Policy, through: Callable[[Callable[..., Any]], Callable[..., Any]] | None
) -> Callable[..., Any]:
    # As written where there is nothing to cast: what the user's own jit says of donated arguments stays.
    as_written = policy.compute_dtype == jnp.float32
    fn = target.fn if as_written else try_to(mp.autocast, target.fn, policy)
    return through(fn) if through else fn


def _verdict(report: aot.Report) -> str:
    _, _, verdict = report.heading.partition("\n")
    return verdict or f"needs {in_bytes(report.needed_bytes)}; what a {report.title} has is not known"


def _shardings(target: TargetFunction, mesh: Mesh) -> tuple[Any, str]:
    """Where the arguments lie, and that in words."""
    own = getattr(target.module, EXAMPLE_SHARDINGS, None)
    if own is not None:
        where = f"{target.module.__name__}:{EXAMPLE_SHARDINGS}"
        return (called(own, where, mesh) if callable(own) else own), f"Arguments lie as {where} says."
    placed = [getattr(x, "sharding", None) for x in jax.tree.leaves(target.args)]
    if any(s is not None and s.num_devices > 1 for s in placed):
        return None, "Arguments lie as their own shardings say."
    batch = target.args[-1:]
    for x in jax.tree.leaves(batch):
        if x.shape and x.shape[0] % mesh.size:
            raise CommandError(
                problem(
                    f"the last argument has an array of shape {tuple(x.shape)}, to be split over {mesh.size} devices.",
                    expected=f"a batch of a multiple of {mesh.size}, or shardings in the module",
                    write=f"{EXAMPLE_SHARDINGS} = (PartitionSpec(), PartitionSpec({mesh.axis_names[0]!r}))",
                )
            )
    over = PartitionSpec(mesh.axis_names)
    split = jax.tree.map(lambda x: over if x.shape else PartitionSpec(), batch)
    whole = (PartitionSpec(),) * (len(target.args) - 1)
    text = f"Data parallel: the last argument is split over {mesh.size} devices, the others are whole on each."
    return (*whole, *split), text
