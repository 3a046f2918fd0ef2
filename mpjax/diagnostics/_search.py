"""The evaluation behind `locate_nonfinite`: each non-finite value knows which operations it comes from."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._autocast._tables import MOVES
from mpjax._compat import equation_context, is_literal, open_jaxpr, scan_split, source_line
from mpjax._dtypes import FLOAT32
from mpjax.diagnostics._located import BadOperation, ValueRange
from mpjax.diagnostics._origins import NONE, Origin, Value, inherited, is_check, nan_and_inf, selected
from mpjax.diagnostics._place import CALLS, RULED, Place, called, count_equations, is_reference
from mpjax.diagnostics._reasons import reason
from mpjax.diagnostics._taps import Taps, expanded, tapped, tapped_equation
from mpjax.diagnostics._widened import STATEFUL, widened_params
from mpjax.diagnostics._worlds import Devices, World

# A body of fewer equations is evaluated one by one at once: that is faster than to compile it.
_SMALL = 30
_LOW = (jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16))


class Search:
    """One evaluation.

    Args:
      loss_scale: if it is known.
    """

    def __init__(self, loss_scale: float | None) -> None:
        self.origins: list[Origin] = []
        self._scale = loss_scale
        self._world = World()
        # References with the origins of their NaNs and infinities, by their id.
        self._references: dict[int, tuple[Any, frozenset[int], frozenset[int]]] = {}
        # Compiled bodies by what they are of, which is kept beside them so that its id stays its own.
        self._kept: dict[Any, tuple[Any, Callable[..., Any]]] = {}

    def source(self, kind: str, name: str, array: Any) -> Value:
        """A value that comes from outside."""
        nan, inf = nan_and_inf(array)
        if not nan and not inf:
            return Value(array)
        origin = self._add(Origin(kind, ValueRange.of(name, array)))
        return Value(array, origin if nan else NONE, origin if inf else NONE)

    def constant(self, array: Any, jaxpr: Any, var: Any) -> Value:
        """A constant of a jaxpr, named by the line that reads it first."""
        readers = [eqn for eqn in jaxpr.eqns if any(atom is var for atom in eqn.invars)]
        return self.source("constant", f"at {_line(readers[0])}" if readers else "unused", jnp.asarray(array))

    def run(
        self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value], place: Place | None = None
    ) -> list[Value]:
        """Evaluates a jaxpr, equation by equation."""
        place = place or Place()
        env: dict[Any, Value] = {}
        kept = {atom: i for i, eqn in enumerate(jaxpr.eqns) for atom in eqn.invars if not is_literal(atom)}
        kept.update((atom, len(jaxpr.eqns)) for atom in jaxpr.outvars if not is_literal(atom))

        def read(atom: Any, eqn: Any = None) -> Value:
            if not is_literal(atom):
                return env[atom]
            array = jnp.asarray(atom.val, atom.aval.dtype)
            value = self.source("constant", f"at {_line(eqn)}" if eqn else "a result", array)
            return value._replace(array=self._world.given(array))

        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for i, eqn in enumerate(jaxpr.eqns):
            ins = [read(atom, eqn) for atom in eqn.invars]
            outs = self._equation(eqn, ins, place.inside(eqn))
            env.update(zip(eqn.outvars, outs, strict=True))
            for atom in (*eqn.invars, *eqn.outvars):
                if not is_literal(atom) and kept.get(atom, -1) <= i:
                    env.pop(atom, None)  # read for the last time, or never: its memory is free
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, ins: list[Value], here: Place) -> list[Value]:
        name = eqn.primitive.name
        if name in CALLS or name in RULED or name == "remat2":
            inner, consts = open_jaxpr(called(eqn))
            label = str(eqn.params.get("name", "")) if name == "jit" else ""
            here = here.within(name.removesuffix("_call").replace("remat2", "remat"), label=label)
            return self._body(inner, consts, ins, here)
        enter = {"scan": self._scan, "while": self._while, "cond": self._cond, "shard_map": self._shard_map}.get(name)
        if enter is None:
            return self._operation(eqn, ins, here)
        outs = self._whole(eqn, ins)
        outs = enter(eqn, ins, here) if outs is None else outs
        return self._operation(eqn, ins, here) if outs is None else outs

    def _body(self, jaxpr: Any, consts: Sequence[Any], ins: Sequence[Value], here: Place) -> list[Value]:
        """A body that runs once: as a whole if that is finite throughout."""
        outs = self._whole(jaxpr, ins, consts) if count_equations(jaxpr) > _SMALL else None
        if outs is not None:
            return outs
        given = [self.constant(x, jaxpr, v) for v, x in zip(jaxpr.constvars, consts, strict=True)]
        given = [v._replace(array=self._world.given(v.array)) for v in given]
        return self.run(jaxpr, given, ins, here)

    def _whole(self, what: Any, ins: Sequence[Value], consts: Sequence[Any] = ()) -> list[Value] | None:
        """The results of a jaxpr or an equation, compiled; None if anything in it is not finite."""
        # A reference would be written to twice where the body is entered afterwards.
        if any(v.bad or is_reference(v.array) for v in ins):
            return None
        key = id(what), id(self._world)
        if key not in self._kept:
            taps = Taps(lambda eqn, path: True, enter_ruled=True)

            def run(*arrays: Any) -> Any:
                if hasattr(what, "primitive"):
                    with equation_context(what):
                        outs, found = tapped_equation(taps, what, list(arrays), Place())
                else:
                    outs, found = tapped(taps, what, consts, arrays)
                return outs, jnp.stack([jnp.asarray(True), *(jnp.isfinite(x) for x in found.values())]).all()

            self._kept[key] = (what, self._world), self._world.compiled(run)
        outs, finite = self._kept[key][1](*(v.array for v in ins))
        if not np.asarray(finite).all():
            return None
        flag = NONE.union(*(v.flag for v in ins))
        return [Value(x, flag=NONE if jnp.issubdtype(x.dtype, jnp.inexact) else flag) for x in outs]

    def _scan(self, eqn: Any, ins: list[Value], here: Place) -> list[Value]:
        inner, consts = open_jaxpr(eqn.params["jaxpr"])
        n_consts, n_carry = scan_split(eqn)
        constants, carry, xs = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]
        length = eqn.params["length"]
        rows = []
        for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
            row = [inherited([x], self._world.row(x.array, i)) for x in xs]
            outs = self._body(inner, consts, [*constants, *carry, *row], here.within("scan", i, length))
            carry = outs[:n_carry]
            rows.append(outs[n_carry:])
        if eqn.params["reverse"]:
            rows.reverse()
        ys = [inherited(column, self._world.stack([v.array for v in column])) for column in zip(*rows, strict=True)]
        return [*carry, *ys] if rows else self._operation(eqn, ins, here)

    def _while(self, eqn: Any, ins: list[Value], here: Place) -> list[Value] | None:
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        test, test_consts = open_jaxpr(eqn.params["cond_jaxpr"])
        body, body_consts = open_jaxpr(eqn.params["body_jaxpr"])
        carry, i = ins[n_cond + n_body :], 0
        while True:
            goes_on = self._body(test, test_consts, [*ins[:n_cond], *carry], here.within("while", i))[0]
            answer = self._world.scalar(goes_on.array)
            if answer is None:
                return None
            if not answer:
                return carry
            new = self._body(body, body_consts, [*ins[n_cond : n_cond + n_body], *carry], here.within("while", i))
            if test.outvars[0].aval.shape:  # under vmap each row ends when it ends
                new = [
                    inherited([x, old], jnp.where(expanded(goes_on.array, x.array), x.array, old.array))
                    for x, old in zip(new, carry, strict=True)
                ]
            carry, i = new, i + 1

    def _cond(self, eqn: Any, ins: list[Value], here: Place) -> list[Value] | None:
        branches = eqn.params["branches"]
        index = self._world.scalar(ins[0].array)
        if index is None:
            return None
        index = min(max(int(index), 0), len(branches) - 1)
        outs = self._body(*open_jaxpr(branches[index]), ins[1:], here.within("cond", index, len(branches)))
        return [
            v if jnp.issubdtype(v.array.dtype, jnp.inexact) else v._replace(flag=v.flag | ins[0].flag) for v in outs
        ]

    def _shard_map(self, eqn: Any, ins: list[Value], here: Place) -> list[Value] | None:
        if isinstance(self._world, Devices):
            return None
        results = self._world.bind(eqn, [v.array for v in ins])
        inner, consts = open_jaxpr(eqn.params["jaxpr"])
        outer, devices = self._world, Devices(eqn)
        self._world = devices
        try:
            split = [v._replace(array=x) for v, x in zip(ins, devices.split([v.array for v in ins]), strict=True)]
            outs = self._body(inner, consts, split, here.within("shard_map", count=devices.count))
        finally:
            self._world = outer
        return [v._replace(array=x) for v, x in zip(outs, results, strict=True)]

    def _operation(self, eqn: Any, ins: list[Value], here: Place) -> list[Value]:
        arrays = self._world.bind(eqn, [v.array for v in ins])
        if eqn.primitive.name in STATEFUL:
            ins = self._remembered(ins)
        found = [nan_and_inf(x) for x in arrays]
        if eqn.primitive.name == "select_n":
            ins = [ins[0], *(selected(ins[0], i, v) for i, v in enumerate(ins[1:]))]
        nan, inf = NONE.union(*(v.nan for v in ins)), NONE.union(*(v.inf for v in ins))
        if not any(map(any, found)):
            flag = NONE.union(*(v.flag for v in ins), nan | inf if is_check(eqn) else NONE)
            return [Value(x, flag=NONE if jnp.issubdtype(x.dtype, jnp.inexact) else flag) for x in arrays]
        by_nan, by_inf = self._of_finite(eqn, ins) if nan or inf else (True, True)
        new = self._blame(eqn, ins, arrays, here, NONE) if by_nan or by_inf else NONE
        nan |= new if by_nan else NONE
        if not nan and any(has_nan for has_nan, _ in found):
            nan = self._blame(eqn, ins, arrays, here, inf)
        inf |= new if by_inf else NONE
        return [
            Value(x, nan if has_nan else NONE, (inf or nan) if has_inf else NONE)
            for x, (has_nan, has_inf) in zip(arrays, found, strict=True)
        ]

    def _remembered(self, ins: list[Value]) -> list[Value]:
        """The operands of a read or write; the reference has the origins of all that was written to it."""
        reference = ins[0]
        key = id(reference.array)
        _, nan, inf = self._references.get(key, (None, NONE, NONE))
        nan, inf = nan.union(*(v.nan for v in ins)), inf.union(*(v.inf for v in ins))
        self._references[key] = reference.array, nan, inf
        return [reference._replace(nan=nan, inf=inf), *ins[1:]]

    def _of_finite(self, eqn: Any, ins: list[Value]) -> tuple[bool, bool]:
        """Whether an operation makes NaN, and infinities, of its finite numbers too, next to those that are not."""
        if eqn.primitive.name in (*MOVES, *STATEFUL):
            return False, False
        cleaned = [jnp.where(jnp.isfinite(v.array), v.array, jnp.ones_like(v.array)) if v.bad else v.array for v in ins]
        found = [nan_and_inf(x) for x in self._world.bind(eqn, cleaned)]
        return any(nan for nan, _ in found), any(inf for _, inf in found)

    def _blame(
        self, eqn: Any, ins: list[Value], arrays: list[Any], here: Place, causes: frozenset[int]
    ) -> frozenset[int]:
        """Notes an operation as the origin of what it made."""
        bad = next(x for x in arrays if any(nan_and_inf(x)))
        world = self._world
        device = world.device([x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)])
        if isinstance(world, Devices) and device is not None:
            frames = [
                dataclasses.replace(f, index=device, label=world.name(device)) if f.kind == "shard_map" else f
                for f in here.frames
            ]
            here = here._replace(frames=tuple(frames))
        operands = [ValueRange.of(f"operand {i}", world.on_device(v.array, device)) for i, v in enumerate(ins)]
        results = [ValueRange.of(f"result {i}", world.on_device(x, device)) for i, x in enumerate(arrays)]
        largest = None if causes or not all(r.finite for r in operands) else self._in_float32(eqn, ins, arrays)
        words = reason(eqn, operands, largest, bad.dtype, bool(causes))
        operation = BadOperation(
            eqn.primitive.name,
            here.direction,
            here.module,
            here.line or _NO_LINE,
            here.frames,
            tuple(operands),
            tuple(results),
            words,
            largest,
            self._is_expected(here, largest, bad.dtype),
            bool(causes),
        )
        return self._add(Origin("operation", None, causes, operation))

    def _in_float32(self, eqn: Any, ins: list[Value], arrays: list[Any]) -> float | None:
        """The largest magnitude in float32 of what is not finite in 16 bits; None if it is not finite there either."""
        if not any(x.dtype in _LOW for x in arrays):
            return None
        changes = widened_params(eqn, FLOAT32, lambda dtype: dtype in _LOW)
        if changes is None:
            return None
        wide = [v.array.astype(FLOAT32) if v.array.dtype in _LOW else v.array for v in ins]
        try:
            exact = self._world.bind(eqn, wide, **changes)
        except (TypeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
            return None  # a primitive with a dtype of its own, which only it knows of
        pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in zip(arrays, exact, strict=True)]
        made = np.concatenate([np.abs(y[~np.isfinite(x)]) for x, y in pairs])
        return float(made.max()) if np.isfinite(made).all() else None

    def _is_expected(self, here: Place, largest: float | None, dtype: Any) -> bool | None:
        if not here.backward or largest is None:
            return False
        if self._scale is None:
            return None
        return self._scale > 1 and largest / self._scale <= float(jnp.finfo(dtype).max)

    def _add(self, origin: Origin) -> frozenset[int]:
        self.origins.append(origin)
        return frozenset([len(self.origins) - 1])


_NO_LINE = "an unknown line"


def _line(eqn: Any) -> str:
    return source_line(eqn) or _NO_LINE
