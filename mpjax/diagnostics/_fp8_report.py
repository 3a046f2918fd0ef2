"""`fp8_report`: what 8 bits lose at each place that they are used, and what other formats and scales would."""

import dataclasses
import functools
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._compat import bind, is_tracer
from mpjax._dtypes import FLOAT32
from mpjax._errors import problem
from mpjax.diagnostics._explanation import line
from mpjax.diagnostics._place import Place
from mpjax.diagnostics._taps import Found, Taps, tapped
from mpjax.diagnostics._traced import trace
from mpjax.fp8._delayed import DelayedScaling, largest_seen
from mpjax.fp8._formats import format_of
from mpjax.fp8._markers import as_bits, as_floats, is_marker
from mpjax.fp8._places import site_key, site_names
from mpjax.fp8._scaling import Quantized, dequantize, power_of_two_scale, quantize

# Scales that are tried at each place: blocks along the last axes, and the dtype of their scales.
_OTHERS: dict[str, tuple[tuple[int, ...] | None, Any]] = {
    "tensor": (None, FLOAT32),
    "row": ((1, -1), FLOAT32),
    "1x128": ((1, 128), FLOAT32),
    "128x128": ((128, 128), FLOAT32),
    "mx 1x32": ((1, 32), jnp.float8_e8m0fnu),
}


@dataclasses.dataclass(frozen=True)
class Fp8Loss:
    """What a way of bringing an array into 8 bits loses: the worst of loop iterations and of repeated uses.

    Attributes:
      sqnr: signal to quantization noise, in dB: 10 log10 of the sum of squares of the finite numbers over that of their
        errors; infinite where nothing is lost.
      underflow: share of the numbers above zero that become 0.
      saturated: share of the numbers that are past the largest of the format.
    """

    sqnr: float
    underflow: float
    saturated: float


@dataclasses.dataclass(frozen=True)
class Fp8Site:
    """A place that brings arrays into 8 bits.

    Attributes:
      name: module path, which product in it, and role: `lhs`, `rhs` or `gradient`.
      dtype: the format.
      amax: the largest magnitude that was seen; infinite or NaN if one was.
      scale: what numbers are divided by; the largest if there are several.
      loss: what is lost as the function does it.
      scales: with a state, the scales of the steps before, the last one first.
      what_if: what other formats and scales would lose of the same numbers, by name.
    """

    name: str
    dtype: str
    amax: float
    scale: float
    loss: Fp8Loss
    scales: tuple[float, ...]
    what_if: dict[str, Fp8Loss]


@dataclasses.dataclass(frozen=True)
class Fp8Report:
    """What `fp8_report` found.

    Attributes:
      sites: in the order of the program.
    """

    sites: tuple[Fp8Site, ...]

    def to_json(self) -> str:
        """Everything, as JSON; infinities and NaN as strings."""

        def readable(x: Any) -> Any:
            if isinstance(x, dict):
                return {key: readable(value) for key, value in x.items()}
            if isinstance(x, list | tuple):
                return list(map(readable, x))
            return str(x) if isinstance(x, float) and not math.isfinite(x) else x

        return json.dumps(readable(dataclasses.asdict(self)), indent=2, allow_nan=False)

    def __str__(self) -> str:
        rows = [_HEADER, *self._cells]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(line(row, widths) for row in rows)

    def __rich__(self) -> Any:
        import rich.table

        table = rich.table.Table(*_HEADER)
        for row in self._cells:
            table.add_row(*row)
        return table

    @property
    def _cells(self) -> list[tuple[str, ...]]:
        def better(site: Fp8Site) -> str:
            name, best = max(site.what_if.items(), key=lambda row: row[1].sqnr)
            return f"{name}: {best.sqnr:.1f}" if best.sqnr > site.loss.sqnr + 0.05 else ""

        return [
            (
                site.name,
                site.dtype,
                f"{site.amax:.3g}",
                f"{site.scale:.3g}",
                f"{site.loss.sqnr:.1f}",
                f"{site.loss.underflow:.2%}",
                f"{site.loss.saturated:.2%}",
                better(site),
            )
            for site in self.sites
        ]


_HEADER = ("place", "format", "amax", "scale", "SQNR (dB)", "to 0", "saturated", "better")


def fp8_report(fn: Callable[..., Any], state: DelayedScaling | None = None) -> Callable[..., Fp8Report]:
    """Says what each array that a function brings into 8 bits loses there, and what it would lose in other ways.

    The function is evaluated once, compiled; each place has its numbers measured where they are, forward and backward,
    inside loops and branches too. Tried are both formats of the OCP, with a scale for the whole array, for each row,
    for 1 by 128 and 128 by 128 numbers, and MX's for 32. For a look now and then, not for every step.

    Args:
      fn: any function with `mp.autocast(..., "mixed_float8")` or `mp.fp8.dot_general` in it, such as
        `mp.value_and_grad(loss_fn, loss_scale)`.
      state: with delayed scaling, its state: what is lost is then with its scales.

    Returns:
      A function of the same arguments that returns an `Fp8Report`; it prints as a table.

    Raises:
      ValueError: the function brings nothing into 8 bits; the state is of other places; it is called under `jit`.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> rules = mp.default_rules().with_fp8(mp.fp8.Recipe(min_reuse=0, emulate=True))
    >>> grad_fn = jax.grad(mp.autocast(lambda w, x: jnp.mean(x @ w), "mixed_float8", rules))
    >>> w, x = jnp.linspace(0.5, 1.5, 256).reshape(16, 16), jnp.ones((32, 16))
    >>> site = mp.diagnostics.fp8_report(grad_fn)(w, x).sites[1]
    >>> site.name, site.dtype, round(site.loss.sqnr, 1)
    ('main:0/rhs', 'float8_e4m3fn', 31.3)
    """

    @functools.wraps(fn)
    def reported(*args: Any, **kwargs: Any) -> Fp8Report:
        if any(map(is_tracer, jax.tree.leaves((args, kwargs)))):
            raise ValueError(
                problem(
                    "fp8_report was called under jit or another transformation, where values are not known.",
                    expected="a call outside, with the transformation inside",
                    write="fp8_report(jax.jit(fn))(*args)",
                )
            )
        traced = trace(fn, args, kwargs)
        names = site_names(traced.jaxpr)
        if not names:
            raise ValueError(
                problem(
                    "the function brings nothing into 8 bits.",
                    expected='mp.autocast(fn, "mixed_float8") in it, and products that are large enough',
                    write='mp.explain(fn, "mixed_float8")(*args), which says why a product is not in fp8',
                )
            )
        given = {} if state is None else largest_seen(state, traced.jaxpr)
        dtypes: dict[str, str] = {}

        def replace(eqn: Any, ins: list[Any], here: Place) -> tuple[list[Any], Found] | None:
            if not is_marker(eqn):
                return None
            name = names[site_key(eqn, here)]
            dtypes[name] = str(eqn.params["dtype"])
            return _measured(eqn, ins[0], name, given.get(name))

        def run(arrays: list[Any], consts: list[Any]) -> Found:
            taps = Taps(lambda eqn, path: False, enter_ruled=True, replace=replace)
            return tapped(taps, traced.jaxpr, consts, arrays)[1]

        found = jax.device_get(jax.jit(run)(traced.arrays, traced.consts))
        # Not those in the condition of a loop, which is not evaluated again.
        evaluated = [name for name in dict.fromkeys(names.values()) if (name, "amax") in found]
        return Fp8Report(tuple(_site(name, dtypes[name], found, state) for name in evaluated))

    return reported


def _measured(eqn: Any, x: Any, name: str, largest: Any) -> tuple[list[Any], Found]:
    block, mapped, dtype = (eqn.params[key] for key in ("block", "mapped", "dtype"))
    block = (-1,) * (x.ndim - mapped) if block is None else block
    past = jnp.zeros((), FLOAT32)
    if largest is None:
        bits, scale = bind(eqn, [x])
    else:
        # As delayed scaling has it: a scale of the moment where there was nothing before.
        now = power_of_two_scale(jnp.where(largest > 0, largest, jnp.max(jnp.abs(x.astype(FLOAT32)), initial=0)), dtype)
        scale = jnp.broadcast_to(now, eqn.outvars[1].aval.shape)
        bits = as_bits(quantize(x, dtype, scale=jnp.reshape(now, (1,) * x.ndim)).values)
        past = jnp.sum(jnp.abs(x.astype(FLOAT32)) > format_of(dtype).max * now, dtype=FLOAT32)
    found: Found = OrderedDict()
    found[name, "amax"] = jnp.max(jnp.abs(x.astype(FLOAT32)), initial=0)
    found[name, "scale"] = jnp.max(scale)
    wide = dequantize(Quantized(as_floats(bits, dtype), scale, block))
    found.update({(name, *k): v for k, v in _losses("", x, wide).items()})
    found[name, "", "saturated"] = past / max(x.size, 1)
    for format_ in ("float8_e4m3fn", "float8_e5m2"):
        for way, (lengths, scale_dtype) in _OTHERS.items():
            shaped = x.reshape(1, -1) if x.ndim < 2 else x
            whole = None if lengths is None else (1,) * (shaped.ndim - 2) + lengths
            made = quantize(shaped, format_, whole, scale_dtype=scale_dtype)
            label = f"{format_.removeprefix('float8_').removesuffix('fn')} {way}"
            found.update({(name, *k): v for k, v in _losses(label, shaped, dequantize(made)).items()})
    return [bits, scale], found


def _losses(label: str, x: Any, wide: Any) -> Found:
    x = x.astype(FLOAT32)
    numbers = jnp.where(jnp.isfinite(x), x, 0)
    # Squares of numbers up to one neither overflow nor vanish.
    unit = jnp.max(jnp.abs(numbers), initial=0)
    unit = jnp.where(unit > 0, unit, 1)
    errors = jnp.where(jnp.isfinite(x), wide - x, 0) / unit
    signal = jnp.sum(jnp.square(numbers / unit))
    nonzero = jnp.sum(numbers != 0, dtype=FLOAT32)
    found: Found = OrderedDict()
    found[label, "noise"] = jnp.sum(jnp.square(errors)) / jnp.where(signal > 0, signal, 1)
    found[label, "underflow"] = jnp.sum((wide == 0) & (numbers != 0), dtype=FLOAT32) / jnp.maximum(nonzero, 1)
    found[label, "saturated"] = jnp.zeros((), FLOAT32)  # by scales of the moment, nothing is
    return found


def _site(name: str, dtype: str, found: Any, state: DelayedScaling | None) -> Fp8Site:
    def loss(label: str) -> Fp8Loss:
        noise = float(found[name, label, "noise"])
        sqnr = -10 * math.log10(noise) if noise else math.inf
        return Fp8Loss(sqnr, float(found[name, label, "underflow"]), float(found[name, label, "saturated"]))

    labels = dict.fromkeys(key[1] for key in found if key[0] == name and len(key) == 3 and key[1])
    scales: tuple[float, ...] = ()
    if state is not None and name in state.names:
        history = np.asarray(state.history)[state.names.index(name)]
        scales = tuple(np.asarray(power_of_two_scale(history[history > 0] * 2.0**state.margin, dtype)).tolist())
    return Fp8Site(
        name,
        dtype,
        float(found[name, "amax"]),
        float(found[name, "scale"]),
        loss(""),
        scales,
        {label: loss(label) for label in labels},
    )
