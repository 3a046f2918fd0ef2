"""The operations of a rewritten program as the places in the user's code that they come from."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from mpjax._autocast._decide import Action, Decision
from mpjax._autocast._interpreter import NOTE
from mpjax._compat import inner_jaxprs, name_scopes
from mpjax.diagnostics._flops import flops, operand_bytes
from mpjax.diagnostics._pairs import is_float
from mpjax.diagnostics._place import CALLS, RULED, Place

# Primitives that are entered, and have no arithmetic of their own.
ENTERED = (*CALLS, *RULED, "remat2", "scan", "while", "cond", "shard_map")


class Site(NamedTuple):
    """An operation of the user's function, wherever it stands in the rewritten program.

    Attributes:
      path: the modules that it is in.
      source: file, line and function.
      primitive: its name in the original jaxpr; what a transformation made has its own.
    """

    path: str
    source: str
    primitive: str


class Standing(NamedTuple):
    """Where an evaluation stands in the rewritten program.

    Attributes:
      place: the modules, the direction and the source line.
      note: the original equation and what was decided for it, if it comes from one.
    """

    place: Place = Place()
    note: tuple[Any, Decision] | None = None

    def inside(self, eqn: Any, notes: list[Any]) -> "Standing":
        """The same for an equation of the jaxpr that stands here."""
        numbers = [int(name.removeprefix(NOTE)) for name in name_scopes(eqn) if name.startswith(NOTE)]
        return Standing(self.place.inside(eqn), notes[numbers[-1]] if numbers else self.note)

    def originals(self, eqn: Any) -> list[Any]:
        """The operands of the original equation that this one is in other dtypes; None for each if there is none."""
        if self.note and self.note[0].primitive is eqn.primitive and len(self.note[0].invars) == len(eqn.invars):
            return list(self.note[0].invars)
        return [None] * len(eqn.invars)

    def site(self, eqn: Any) -> Site:
        """The operation that an equation which stands here belongs to."""
        # "model.py:41:8 (forward)" has the column too, which tells more than one wants to know.
        source = re.sub(r"(:\d+):\d+( \(|$)", r"\1\2", self.place.line)
        return Site(self.place.module, source, (self.note[0] if self.note else eqn).primitive.name)


class Known(NamedTuple):
    """What is known of a site before anything is evaluated.

    Attributes:
      reason: why it computes in the dtype that it does.
      narrow: whether anything in it is in another dtype than the reference.
      ruled: whether rules decide over what is.
      cost: floating-point operations and bytes of what is narrow, added up.
    """

    reason: str
    narrow: bool
    ruled: bool
    cost: int


def known_sites(jaxpr: Any, notes: list[Any], dtype: Any) -> dict[Site, Known]:
    """The sites of a rewritten program, in its order.

    Args:
      jaxpr: the program.
      notes: each original equation with its decision, by number.
      dtype: of the reference.
    """
    found: dict[Site, Known] = {}
    for eqn, here, times in _walk(jaxpr, notes, Standing(), 1):
        if here.note is None and is_widening(eqn):
            continue  # autocast's results in the dtypes that the function's have
        site = here.site(eqn)
        reason, narrow, ruled, cost = found.get(site, Known("", False, False, 0))
        others = (is_float(atom.aval) and atom.aval.dtype != dtype for atom in (*eqn.invars, *eqn.outvars))
        if not is_widening(eqn) and any(others):
            decision = here.note[1] if here.note else None
            narrow, ruled = True, ruled or (decision is not None and decision.action is not Action.WIDE)
            cost += times * (flops(eqn) + sum(operand_bytes(eqn).values()))
        found[site] = Known(reason or (here.note[1].reason if here.note else ""), narrow, ruled, cost)
    return found


def is_widening(eqn: Any) -> bool:
    """Whether an equation casts floats to a dtype that holds all of their numbers."""
    if eqn.primitive.name != "convert_element_type" or not (
        is_float(eqn.invars[0].aval) and is_float(eqn.outvars[0].aval)
    ):
        return False
    before, after = jnp.finfo(eqn.invars[0].aval.dtype), jnp.finfo(eqn.outvars[0].aval.dtype)
    return after.nexp >= before.nexp and after.nmant >= before.nmant


def _walk(jaxpr: Any, notes: list[Any], outer: Standing, times: int) -> Iterator[tuple[Any, Standing, int]]:
    for eqn in jaxpr.eqns:
        here = outer.inside(eqn, notes)
        if eqn.primitive.name not in ENTERED:
            yield eqn, here, times
            continue
        repeats = times * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else times
        for inner in inner_jaxprs(eqn):
            yield from _walk(inner, notes, here, repeats)
