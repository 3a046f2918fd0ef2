"""Where an equation stands in a program: modules, forward or backward, and the calls and loops around it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpjax._autocast._regions import modules_of
from mpjax._compat import inner_jaxprs, is_backward, name_scopes, source_line

# Calls whose body runs once, on the operands as they are: plain ones, and those with rules that the body knows not of.
CALLS = ("jit", "closed_call", "call", "eval_jaxpr")
RULED = ("custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "remat_opt")
# What jax.checkpoint calls the forward pass that the backward pass repeats.
REPEATED = "rematted_computation"


@dataclasses.dataclass(frozen=True)
class Frame:
    """A call, loop, branch or device that an operation is inside of.

    Attributes:
      kind: the primitive: `jit`, `scan`, `while`, `cond`, `remat`, `custom_jvp`, `shard_map` and so on.
      index: which iteration of a loop, which row of a scan, which branch (0 is false), which device; counted from 0.
      count: how many there are, if that is known.
      label: the name of a jitted function, or a device's place in the mesh.
    """

    kind: str
    index: int | None = None
    count: int | None = None
    label: str = ""

    def __str__(self) -> str:
        unit = {"cond": "branch ", "shard_map": "device "}.get(self.kind, "iteration ")
        which = "" if self.index is None else f" {unit}{self.index}"
        total = "" if self.count is None else f" of {self.count}"
        return f"{self.kind}{which}{total}{f' ({self.label})' if self.label else ''}"


class Place(NamedTuple):
    """What surrounds an equation."""

    path: tuple[str, ...] = ()
    backward: bool = False
    frames: tuple[Frame, ...] = ()
    line: str = ""

    def inside(self, eqn: Any) -> "Place":
        """The place of an equation of the jaxpr that stands here."""
        scopes = name_scopes(eqn)
        half = len(scopes) // 2
        # The backward pass of jax.checkpoint has its modules twice: from the primal and from its transposition.
        if eqn.primitive.name == "remat2" and is_backward(eqn) and scopes[:half] == scopes[half:]:
            scopes = scopes[:half]
        modules = tuple(name for name in modules_of(scopes) if name != REPEATED)
        backward = (self.backward or is_backward(eqn)) and REPEATED not in scopes
        # What JAX compiled for itself has no line in the user's code: then it is that of the call.
        return Place((*self.path, *modules), backward, self.frames, source_line(eqn) or self.line)

    def within(self, kind: str, index: int | None = None, count: int | None = None, label: str = "") -> "Place":
        """The same, one frame further in."""
        return self._replace(frames=(*self.frames, Frame(kind, index, count, label)))

    @property
    def module(self) -> str:
        """The modules as one path."""
        return "/".join(self.path)

    @property
    def direction(self) -> str:
        """`"forward"` or `"backward"`."""
        return "backward" if self.backward else "forward"


def called(eqn: Any) -> Any:
    """The jaxpr that a call runs."""
    return next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "call", "fwd_jaxpr") if eqn.params.get(name))


def is_float_array(x: Any) -> bool:
    """Whether a value is an array that may hold inf or NaN; a reference to one is not."""
    return jnp.issubdtype(x.dtype, jnp.inexact) and not is_reference(x)


def is_reference(x: Any) -> bool:
    """Whether a value is a mutable reference, as `jax.new_ref` makes one."""
    return hasattr(jax.typeof(x), "inner_aval")


def count_equations(jaxpr: Any) -> int:
    """How many equations a jaxpr has, inner ones included."""
    return sum(1 + sum(map(count_equations, inner_jaxprs(eqn))) for eqn in jaxpr.eqns)
