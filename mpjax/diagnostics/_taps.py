"""Evaluates a program again, and returns the largest magnitude of its values beside its results."""

import dataclasses
import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mpjax._compat import abstract, bind, equation_context, is_literal, open_jaxpr, scan_split
from mpjax._dtypes import FLOAT32
from mpjax.diagnostics._place import CALLS, RULED, Place, called, is_float_array

# What is found, by a name: of `Taps.wanted` the largest magnitude by module path, direction and dtype. None is below 0,
# and the largest of all is kept. In the order of the program, which dict does not keep through a transformation.
Found = OrderedDict[Any, Any]


@dataclasses.dataclass(frozen=True)
class Taps:
    """What is recorded.

    Attributes:
      wanted: whether an equation's results are, given its module path.
      enter_ruled: whether functions with rules of their own are entered, which loses the rules.
      replace: what is evaluated in place of an equation, and found there; None for it to be evaluated as it is.
    """

    wanted: Callable[[Any, str], bool]
    enter_ruled: bool = False
    replace: Callable[[Any, list[Any], Place], tuple[list[Any], Found] | None] = lambda eqn, ins, here: None


def tapped(
    taps: Taps, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], place: Place | None = None
) -> tuple[list[Any], Found]:
    """The results of a jaxpr, and the largest magnitude by module, direction and dtype: float32, or inf or NaN."""
    place = place or Place()
    env: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if is_literal(atom) else env[atom]

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    found: Found = OrderedDict()
    for eqn in jaxpr.eqns:
        here = place.inside(eqn)
        with equation_context(eqn):
            outs, inner = tapped_equation(taps, eqn, [read(atom) for atom in eqn.invars], here)
        env.update(zip(eqn.outvars, outs, strict=True))
        _merge(found, inner)
    return [read(atom) for atom in jaxpr.outvars], found


def tapped_equation(taps: Taps, eqn: Any, ins: list[Any], here: Place) -> tuple[list[Any], Found]:
    """As `tapped`, for one equation in its own context."""
    name = eqn.primitive.name
    if replaced := taps.replace(eqn, ins, here):
        return replaced
    if name in CALLS or (name in RULED and taps.enter_ruled):
        return _call(taps, eqn, ins, here)
    if enter := _ENTERED.get(name):
        return enter(taps, eqn, ins, here)
    outs = bind(eqn, ins)
    found: Found = OrderedDict()
    if taps.wanted(eqn, here.module):
        for x in outs:
            if is_float_array(x):
                _merge(found, {(here.module, here.direction, str(x.dtype)): _amax(x)})
    return outs, found


def _merge(found: Found, more: dict[Any, Any]) -> None:
    for key, x in more.items():
        found[key] = jnp.maximum(found[key], x) if key in found else x


def _amax(x: Any) -> jax.Array:
    size = jnp.abs(jax.lax.stop_gradient(x)).astype(FLOAT32)
    if x.dtype in (jnp.float16, jnp.bfloat16):
        # XLA may compute in float32 and drop the rounding; what is asked for is whether the narrow number overflows.
        info = jnp.finfo(x.dtype)
        size = jax.lax.reduce_precision(size, info.nexp, info.nmant)
    return _largest(size)


def _largest(sizes: jax.Array) -> jax.Array:
    """The largest of float32 numbers that are not negative, which is NaN where one is.

    As their bits, in which NaN comes after inf: between devices, XLA's maximum of floats passes over NaN.
    """
    bits = jax.lax.bitcast_convert_type(sizes, jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.max(bits, initial=0), FLOAT32)


def _call(taps: Taps, eqn: Any, ins: list[Any], here: Place) -> tuple[list[Any], Found]:
    """A call is written out; the shardings of a jitted one are kept."""
    inner, consts = open_jaxpr(called(eqn))
    outs, found = tapped(taps, inner, consts, _sharded(ins, eqn.params.get("in_shardings")), here)
    return _sharded(outs, eqn.params.get("out_shardings")), found


def _sharded(arrays: list[Any], shardings: Sequence[Any] | None) -> list[Any]:
    return [
        jax.lax.with_sharding_constraint(x, sharding) if isinstance(sharding, jax.sharding.Sharding) else x
        for x, sharding in zip(arrays, shardings or [None] * len(arrays), strict=True)
    ]


def _remat(taps: Taps, eqn: Any, ins: list[Any], here: Place) -> tuple[list[Any], Found]:
    inner, consts = open_jaxpr(eqn.params["jaxpr"])
    keys: list[Any] = []

    def run(*arrays: Any) -> list[Any]:
        outs, found = tapped(taps, inner, consts, arrays, here)
        keys[:] = found
        return [*outs, *found.values()]

    new, closed_over = open_jaxpr(jax.make_jaxpr(run)(*map(abstract, ins)))
    if closed_over:  # by what replaces equations: operands too, for the body has no constants of its own
        ins, n, body = [*closed_over, *ins], len(closed_over), new
        again = jax.make_jaxpr(lambda *xs: tapped(Taps(lambda eqn, path: False), body, xs[:n], xs[n:])[0])
        new, _ = open_jaxpr(again(*map(abstract, ins)))
    outs = bind(eqn, ins, jaxpr=new)
    results = len(inner.outvars)
    return outs[:results], OrderedDict(zip(keys, outs[results:], strict=True))


def _scan(taps: Taps, eqn: Any, ins: list[Any], here: Place) -> tuple[list[Any], Found]:
    inner, consts = open_jaxpr(eqn.params["jaxpr"])
    n_consts, n_carry = scan_split(eqn)
    constants, carry, xs = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]

    def body(carry: list[Any], row: list[Any]) -> tuple[list[Any], tuple[list[Any], Found]]:
        outs, found = tapped(taps, inner, consts, [*constants, *carry, *row], here)
        return outs[:n_carry], (outs[n_carry:], found)

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, found) = jax.lax.scan(body, carry, xs, **options)
    return [*carry, *ys], OrderedDict((key, _largest(x)) for key, x in found.items())


def _while(taps: Taps, eqn: Any, ins: list[Any], here: Place) -> tuple[list[Any], Found]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts, carry = ins[:n_cond], ins[n_cond : n_cond + n_body], ins[n_cond + n_body :]
    (test, test_consts), (inner, consts) = (open_jaxpr(eqn.params[name]) for name in ("cond_jaxpr", "body_jaxpr"))

    def goes_on(state: tuple[list[Any], Found]) -> Any:
        return jnp.any(going(state[0]))

    def going(carry: list[Any]) -> Any:
        return tapped(taps, test, test_consts, [*cond_consts, *carry], here)[0][0]

    def run(carry: list[Any]) -> tuple[list[Any], Found]:
        new, found = tapped(taps, inner, consts, [*body_consts, *carry], here)
        if test.outvars[0].aval.shape:  # under vmap each row ends when it ends
            new = [jnp.where(expanded(going(carry), x), x, old) for x, old in zip(new, carry, strict=True)]
        return new, found

    def body(state: tuple[list[Any], Found]) -> tuple[list[Any], Found]:
        carry, new = run(state[0])
        found = OrderedDict(state[1])
        _merge(found, new)
        return carry, found

    zero = _zero(ins)
    keys = jax.eval_shape(lambda carry: run(carry)[1], carry)
    outs, found = jax.lax.while_loop(goes_on, body, (carry, OrderedDict((key, zero) for key in keys)))
    return outs, found


def expanded(rows: Any, array: Any) -> Any:
    """One boolean for each row of an array, with the array's number of dimensions."""
    return jnp.reshape(rows, rows.shape + (1,) * (array.ndim - rows.ndim))


def _cond(taps: Taps, eqn: Any, ins: list[Any], here: Place) -> tuple[list[Any], Found]:
    index, *operands = ins
    branches = [open_jaxpr(branch) for branch in eqn.params["branches"]]
    runs = [functools.partial(_branch, taps, here, *branch) for branch in branches]
    keys = dict.fromkeys(key for run in runs for key in jax.eval_shape(lambda *xs, run=run: run(xs)[1], *operands))
    zero = _zero(ins)

    def filled(run: Callable[..., Any], *arrays: Any) -> tuple[list[Any], Found]:
        outs, new = run(arrays)
        return outs, OrderedDict((key, jnp.maximum(zero, new.get(key, zero))) for key in keys)

    return jax.lax.switch(index, [functools.partial(filled, run) for run in runs], *operands)


def _branch(taps: Taps, here: Place, inner: Any, consts: list[Any], arrays: Sequence[Any]) -> tuple[list[Any], Found]:
    return tapped(taps, inner, consts, arrays, here)


def _zero(arrays: Iterable[Any]) -> jax.Array:
    """A zero that, under shard_map, varies over the devices as these arrays do together."""
    flags = [jnp.any(x != x) for x in map(jnp.asarray, arrays) if jnp.issubdtype(x.dtype, jnp.number)]
    return (functools.reduce(operator.or_, flags, jnp.asarray(False)) & False).astype(FLOAT32)


def _shard_map(taps: Taps, eqn: Any, ins: list[Any], here: Place) -> tuple[list[Any], Found]:
    inner, consts = open_jaxpr(eqn.params["jaxpr"])
    axes = eqn.params["newly_manual_axes"]

    def body(*arrays: Any) -> tuple[list[Any], Found]:
        outs, found = tapped(taps, inner, consts, arrays, here)
        return outs, OrderedDict((key, x[None]) for key, x in found.items())

    mapped = jax.shard_map(
        body,
        mesh=eqn.params["mesh"],
        in_specs=tuple(eqn.params["in_specs"]),
        # A number from each device.
        out_specs=(list(eqn.params["out_specs"]), PartitionSpec(tuple(axes))),
        axis_names=axes,
        check_vma=eqn.params["check_vma"],
    )
    outs, found = mapped(*ins)
    return outs, OrderedDict((key, _largest(x)) for key, x in found.items())


_ENTERED: dict[str, Callable[[Taps, Any, list[Any], Place], tuple[list[Any], Found]]] = {
    "remat2": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
