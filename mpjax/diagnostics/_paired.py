"""One evaluation of a rewritten program with every value twice: exact, and in the precision that is switched on."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mpjax._autocast import Rules
from mpjax._autocast._decide import Action
from mpjax._autocast._tables import MOVES, Kind
from mpjax._compat import bind, equation_context, is_literal, open_jaxpr, scan_split
from mpjax.diagnostics._pairs import Pair, is_float, packed, relative_error, settled
from mpjax.diagnostics._place import CALLS, RULED, called, is_reference
from mpjax.diagnostics._sites import Site, Standing, is_widening
from mpjax.diagnostics._taps import expanded
from mpjax.diagnostics._widened import widened_params

# The largest relative error by site and direction, in the order of the program.
Errors = OrderedDict[tuple[Site, bool], Any]
_CASTS_OF_OPERANDS = (Action.LOW, Action.WIDE)
_MATRIX = ("dot_general", "conv_general_dilated")


class Paired:
    """An evaluation.

    Floats are held in the reference's dtype throughout, and an equation of a site that is switched on is evaluated on
    its operands cast to the dtypes that the program has there. Rounding belongs to what decides for it: a cast of
    operands rounds nothing itself, so that each reader of a value rounds it or not by its own switch. What follows its
    inputs rounds its results alone, for it would be in float32 if they were, and what only moves values nothing.

    Args:
      dtype: of the reference.
      rules: those that the program was made by.
      notes: each original equation with its decision, by number.
      switches: which switch each site has.
      on: bool of shape (switches,).
    """

    def __init__(self, dtype: Any, rules: Rules, notes: list[Any], switches: dict[Site, int], on: Any) -> None:
        self._dtype, self._rules, self._notes, self._switches, self._on = dtype, rules, notes, switches, on

    def run(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Pair], outer: Standing | None = None
    ) -> tuple[list[Pair], Errors]:
        """The results of a jaxpr and the error of each site in it."""
        outer = outer or Standing()
        env: dict[Any, Pair] = {}

        def read(atom: Any, original: Any = None) -> Pair:
            if not is_literal(atom):
                return env[atom]
            if original is not None and is_literal(original) and original.aval.dtype != atom.aval.dtype:
                # Autocast rounded a constant: whether it is, is up to what reads it.
                exact = self.given(jnp.asarray(original.val, original.aval.dtype))
                return dataclasses.replace(exact, pending=True)
            return self.given(jnp.asarray(atom.val, atom.aval.dtype))

        env.update(zip(jaxpr.constvars, map(self.given, consts), strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        errors: Errors = OrderedDict()
        for eqn in jaxpr.eqns:
            here = outer.inside(eqn, self._notes)
            ins = [read(atom, before) for atom, before in zip(eqn.invars, here.originals(eqn), strict=True)]
            with equation_context(eqn):
                outs, inner = self._equation(eqn, ins, here)
            env.update(zip(eqn.outvars, outs, strict=True))
            _merge(errors, inner)
        return [read(atom) for atom in jaxpr.outvars], errors

    def given(self, array: Any) -> Pair:
        """A value from outside, the same in both."""
        held = array.astype(self._dtype) if is_float(jax.typeof(array)) else array
        return Pair(held, held)

    def _equation(self, eqn: Any, ins: list[Pair], here: Standing) -> tuple[list[Pair], Errors]:
        name = eqn.primitive.name
        if name in CALLS or name in RULED or name == "remat2":
            inner, consts = open_jaxpr(called(eqn))
            return self.run(inner, consts, ins, here)
        enter = {"scan": self._scan, "while": self._while, "cond": self._cond, "shard_map": self._shard_map}.get(name)
        if enter:
            return enter(eqn, ins, here)
        if name == "convert_element_type" and is_float(eqn.invars[0].aval) and is_float(eqn.outvars[0].aval):
            return self._cast(eqn, ins[0], here)
        if name == "reduce_precision" and here.note and here.note[1].action is Action.ROUNDED:
            return ins, OrderedDict()  # what is rounded already, where XLA might drop that
        return self._operation(eqn, ins, here)

    def _switch(self, here: Standing, eqn: Any) -> Any:
        return self._on[self._switches[here.site(eqn)]]

    def _cast(self, eqn: Any, value: Pair, here: Standing) -> tuple[list[Pair], Errors]:
        own = here.note and here.note[0].primitive.name != "convert_element_type"
        if is_widening(eqn):
            return [value], OrderedDict()
        if here.place.backward or (own and here.note and here.note[1].action in _CASTS_OF_OPERANDS):
            return [dataclasses.replace(value, pending=True)], OrderedDict()
        rounded = value.low.astype(eqn.outvars[0].aval.dtype).astype(self._dtype)
        pair = Pair(value.exact, jnp.where(self._switch(here, eqn), rounded, value.low))
        return [pair], self._errors(here, eqn, [pair])

    def _operation(self, eqn: Any, ins: list[Pair], here: Standing) -> tuple[list[Pair], Errors]:
        exact = self._exact(eqn, [x.exact for x in ins])
        agree, lows = all(x.agrees for x in ins), [x.low for x in ins]
        if exact is None:
            exact = self._written(eqn, [x.exact for x in ins])
            low = exact if agree else self._written(eqn, lows)
        elif not any(is_float(atom.aval) and atom.aval.dtype != self._dtype for atom in (*eqn.invars, *eqn.outvars)):
            low = exact if agree else self._exact(eqn, lows) or exact
        elif self._follows(here):
            low = self._followed(eqn, ins, self._switch(here, eqn), exact)
        else:
            free = exact if agree else self._exact(eqn, lows) or exact
            low = self._switched(self._switch(here, eqn), self._written(eqn, lows), free)
        pairs = [Pair(*both) for both in zip(exact, low, strict=True)]
        return pairs, self._errors(here, eqn, pairs)

    def _follows(self, here: Standing) -> bool:
        """Whether an equation is in low precision because its operands are."""
        if here.note is None:
            return True
        eqn, decision = here.note
        return decision.action is Action.LOW and self._rules.of(eqn.primitive.name).kind is Kind.FOLLOW

    def _followed(self, eqn: Any, ins: Sequence[Pair], on: Any, exact: list[Any]) -> list[Any]:
        """An equation that follows its operands: computed exactly, then rounded; one that moves values as it is."""

        def rounded(array: Any, aval: Any) -> Any:
            narrow = array.astype(aval.dtype).astype(self._dtype) if is_float(aval) else array
            return self._switched(on, [narrow], [array])[0]

        pending = any(x.pending for x in ins)
        arrays = [rounded(x.low, a.aval) if x.pending else x.low for x, a in zip(ins, eqn.invars, strict=True)]
        outs = exact if not pending and all(x.agrees for x in ins) else self._exact(eqn, arrays) or exact
        if eqn.primitive.name in MOVES:
            return outs
        return [rounded(x, var.aval) for x, var in zip(outs, eqn.outvars, strict=True)]

    @staticmethod
    def _switched(on: Any, narrow: Sequence[Any], wide: Sequence[Any]) -> list[Any]:
        return [a if a is b or is_reference(a) else jnp.where(on, a, b) for a, b in zip(narrow, wide, strict=True)]

    def _written(self, eqn: Any, arrays: Sequence[Any]) -> list[Any]:
        """Evaluates an equation in its own dtypes."""
        operands = [
            x.astype(atom.aval.dtype) if is_float(atom.aval) else x for x, atom in zip(arrays, eqn.invars, strict=True)
        ]
        outs = bind(eqn, operands)
        return [x.astype(self._dtype) if is_float(a.aval) else x for x, a in zip(outs, eqn.outvars, strict=True)]

    def _exact(self, eqn: Any, arrays: Sequence[Any]) -> list[Any] | None:
        """Evaluates an equation in the reference's dtype; None if it cannot be."""
        avals = [atom.aval for atom in (*eqn.invars, *eqn.outvars)]
        if not any(map(is_float, avals)):
            return bind(eqn, list(arrays))
        changes = widened_params(eqn, self._dtype, lambda dtype: jnp.issubdtype(dtype, jnp.floating))
        # Keys give other numbers in another dtype, and bits are those of one dtype.
        if changes is None or eqn.primitive.name.startswith(("random_", "bitcast")):
            return None
        if eqn.primitive.name in _MATRIX and eqn.params.get("precision") is None:
            changes["precision"] = (jax.lax.Precision.HIGHEST,) * 2
        try:
            outs = bind(eqn, list(arrays), **changes)
        except (TypeError, ValueError, NotImplementedError):
            return None  # a primitive with a dtype of its own, which only it knows of
        wanted = [(v.aval.shape, self._dtype if is_float(v.aval) else v.aval.dtype) for v in eqn.outvars]
        return outs if [(x.shape, x.dtype) for x in outs] == wanted else None

    def _errors(self, here: Standing, eqn: Any, pairs: Sequence[Pair]) -> Errors:
        sizes = [relative_error(x.low, x.exact) for x in pairs if not x.agrees and is_float(jax.typeof(x.exact))]
        key = here.site(eqn), here.place.backward
        return OrderedDict([(key, jnp.max(jnp.stack(sizes)))] if sizes else [])

    def _scan(self, eqn: Any, ins: list[Pair], here: Standing) -> tuple[list[Pair], Errors]:
        inner, consts = open_jaxpr(eqn.params["jaxpr"])
        n_consts, n_carry = scan_split(eqn)
        constants, carry, xs = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]
        arrays, unpack = packed(xs)

        def body(carry: list[Pair], row: list[Any]) -> tuple[list[Pair], tuple[list[Pair], Errors]]:
            outs, errors = self.run(inner, consts, [*constants, *carry, *unpack(row)], here)
            return settled(outs[:n_carry]), (settled(outs[n_carry:]), errors)

        # Tuples of one array for both would be two afterwards.
        options = {name: eqn.params[name] for name in ("length", "reverse")}
        carry, (ys, errors) = jax.lax.scan(body, settled(carry), arrays, **options)
        return [*carry, *ys], OrderedDict((key, jnp.max(x, initial=0)) for key, x in errors.items())

    def _while(self, eqn: Any, ins: list[Pair], here: Standing) -> tuple[list[Pair], Errors]:
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond_consts, body_consts, carry = ins[:n_cond], ins[n_cond : n_cond + n_body], ins[n_cond + n_body :]
        (test, test_consts), (inner, consts) = (open_jaxpr(eqn.params[name]) for name in ("cond_jaxpr", "body_jaxpr"))

        def going(carry: list[Pair]) -> Pair:
            return self.run(test, test_consts, [*cond_consts, *carry], here)[0][0]

        def step(carry: list[Pair]) -> tuple[list[Pair], Errors]:
            new, errors = self.run(inner, consts, [*body_consts, *carry], here)
            # Each of the two ends when it ends, and under vmap each row.
            on = going(carry)
            carry = [
                Pair(
                    jnp.where(expanded(on.exact, x.exact), x.exact, old.exact),
                    jnp.where(expanded(on.low, x.low), x.low, old.low),
                )
                for x, old in zip(new, carry, strict=True)
            ]
            both = jnp.all(on.exact == on.low)
            return carry, OrderedDict((key, jnp.where(both, x, jnp.zeros_like(x))) for key, x in errors.items())

        def body(state: tuple[list[Pair], Errors]) -> tuple[list[Pair], Errors]:
            carry, new = step(state[0])
            return carry, OrderedDict((key, jnp.maximum(x, new[key])) for key, x in state[1].items())

        keys = jax.eval_shape(lambda carry: step(carry)[1], settled(carry))
        zeros = OrderedDict((key, jnp.zeros(x.shape, x.dtype)) for key, x in keys.items())

        def test_any(state: tuple[list[Pair], Errors]) -> Any:
            on = going(state[0])
            return jnp.any(on.exact | on.low)

        outs, errors = jax.lax.while_loop(test_any, body, (settled(carry), zeros))
        return outs, errors

    def _cond(self, eqn: Any, ins: list[Pair], here: Standing) -> tuple[list[Pair], Errors]:
        index, *operands = ins
        branches = [open_jaxpr(branch) for branch in eqn.params["branches"]]
        arrays, unpack = packed(operands)

        def both(branch: tuple[Any, list[Any]], arrays: Sequence[Any]) -> tuple[list[Pair], Errors]:
            outs, errors = self.run(*branch, unpack(arrays), here)
            return settled(outs), errors

        def alone(branch: tuple[Any, list[Any]], arrays: Sequence[Any]) -> list[Any]:
            outs, _ = self.run(*branch, [Pair(x, x) for x in arrays], here)
            return [x.low for x in outs]

        keys: OrderedDict[Any, Any] = OrderedDict()
        for branch in branches:
            keys.update(jax.eval_shape(lambda xs, branch=branch: both(branch, xs)[1], arrays))

        def filled(branch: tuple[Any, list[Any]]) -> Callable[[list[Any]], tuple[list[Pair], Errors]]:
            def run(arrays: list[Any]) -> tuple[list[Pair], Errors]:
                outs, new = both(branch, arrays)
                return outs, OrderedDict((k, new.get(k, jnp.zeros(x.shape, x.dtype))) for k, x in keys.items())

            return run

        outs, errors = jax.lax.switch(index.exact, [filled(branch) for branch in branches], arrays)
        if index.agrees:
            return outs, errors
        # The two may take different branches.
        low = jax.lax.cond(
            index.exact == index.low,
            lambda: [x.low for x in outs],
            lambda: jax.lax.switch(
                index.low,
                [lambda xs, branch=branch: alone(branch, xs) for branch in branches],
                [x.low for x in operands],
            ),
        )
        return [Pair(x.exact, y) for x, y in zip(outs, low, strict=True)], errors

    def _shard_map(self, eqn: Any, ins: list[Pair], here: Standing) -> tuple[list[Pair], Errors]:
        inner, consts = open_jaxpr(eqn.params["jaxpr"])
        axes = eqn.params["newly_manual_axes"]

        def body(on: Any, exact: list[Any], low: list[Any]) -> Any:
            inside = Paired(self._dtype, self._rules, self._notes, self._switches, on)
            outs, errors = inside.run(inner, consts, list(map(Pair, exact, low)), here)
            errors = OrderedDict((key, x[None]) for key, x in errors.items())
            return [x.exact for x in outs], [x.low for x in outs], errors

        in_specs, out_specs = list(eqn.params["in_specs"]), list(eqn.params["out_specs"])
        mapped = jax.shard_map(
            body,
            mesh=eqn.params["mesh"],
            in_specs=(PartitionSpec(), in_specs, in_specs),
            # A number from each device.
            out_specs=(out_specs, out_specs, PartitionSpec(tuple(axes))),
            axis_names=axes,
            check_vma=eqn.params["check_vma"],
        )
        exact, low, errors = mapped(self._on, [x.exact for x in ins], [x.low for x in ins])
        return list(map(Pair, exact, low)), OrderedDict((key, jnp.max(x)) for key, x in errors.items())


def _merge(errors: Errors, more: Errors) -> None:
    for key, x in more.items():
        errors[key] = jnp.maximum(errors[key], x) if key in errors else x
