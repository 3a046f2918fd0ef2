"""Who makes and who reads each variable of a jaxpr: what a rule looks ahead and back with."""

import dataclasses
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from mpjax._autocast._marks import Value
from mpjax._autocast._rules import Rules
from mpjax._autocast._tables import Kind
from mpjax._compat import inner_jaxprs, is_literal
from mpjax._dtypes import FLOAT32


@dataclasses.dataclass(frozen=True)
class Reads:
    """Who makes and who reads each variable of a jaxpr.

    Attributes:
      readers: the equations that read it; None stands for the jaxpr's own outputs.
      producer: the equation that makes it.
      values: what has been evaluated so far.
      known: answers given already.
    """

    readers: Mapping[Any, list[Any]]
    producer: Mapping[Any, Any]
    values: Mapping[Any, Value]
    known: dict[Any, bool] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, jaxpr: Any, values: Mapping[Any, Value]) -> "Reads":
        """Reads a jaxpr once."""
        readers = defaultdict(list)
        for eqn in (*jaxpr.eqns, None):
            for atom in jaxpr.outvars if eqn is None else eqn.invars:
                if not is_literal(atom):
                    readers[atom].append(eqn)
        return cls(readers, {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}, values)

    def only_by(self, rules: Rules, eqn: Any, kinds: tuple[Kind, ...], through: tuple[str, ...] = ()) -> bool:
        """Whether all that an equation makes goes into equations of some kinds, possibly through others."""
        key = (id(eqn), kinds, through)
        if key not in self.known:
            readers = [reader for var in eqn.outvars for reader in self.readers.get(var, ())]
            self.known[key] = bool(readers) and all(
                r is not None
                and (
                    rules.of(r.primitive.name).kind in kinds
                    or (is_through(r, through) and self.only_by(rules, r, kinds, through))
                )
                for r in readers
            )
        return self.known[key]

    def made_by(self, atom: Any, primitive: str) -> Any:
        """The equation that makes a value, if it is of this primitive; else None."""
        eqn = None if is_literal(atom) else self.producer.get(atom)
        return eqn if eqn is not None and eqn.primitive.name == primitive else None

    def sources(self, atom: Any, through: Container[str]) -> Iterator[Any]:
        """The equations that a value comes from, looking back through some primitives."""
        stack, seen = [atom], set()
        while stack:
            atom = stack.pop()
            eqn = None if is_literal(atom) else self.producer.get(atom)
            if eqn is None or id(eqn) in seen:
                continue
            seen.add(id(eqn))
            if is_through(eqn, through):
                stack.extend(eqn.invars)
            else:
                yield eqn


def is_through(eqn: Any, names: Container[str]) -> bool:
    """Whether an equation is one of these primitives, or a jit of nothing else, as `jnp.where` is."""
    if eqn.primitive.name != "jit":
        return eqn.primitive.name in names
    return all(is_through(inner, names) for jaxpr in inner_jaxprs(eqn) for inner in jaxpr.eqns)


def is_never(eqn: Any) -> str | None:
    """Why the user decided already: other dtypes among the floats, or an accumulator of another dtype."""
    dtypes = {getattr(atom.aval, "dtype", None) for atom in (*eqn.invars, *eqn.outvars)}
    if FLOAT32 not in dtypes:
        return "no float32 in it"
    others = [d for d in dtypes if d is not None and d != FLOAT32 and jnp.issubdtype(d, jnp.floating)]
    if others:
        return f"written with {others[0]}"
    preferred = eqn.params.get("preferred_element_type")
    return None if preferred in (None, FLOAT32) else f"written to accumulate in {preferred}"
