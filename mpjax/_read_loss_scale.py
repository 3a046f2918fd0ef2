"""Loss scales out of checkpoints, whichever library made them, as states of mpjax; or an error that says why not."""

import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jmp
import numpy as np

from mpjax._compat import is_tracer
from mpjax._convert import as_loss_scale
from mpjax._dynamic_loss_scale import DynamicLossScale
from mpjax._errors import listing, problem
from mpjax._loss_scale import SMALLEST_SCALE, LossScale, bad_value
from mpjax._tree import path_name

_OPTIONS = ("period", "factor", "backoff_factor", "min_loss_scale", "max_loss_scale", "hysteresis", "hysteresis_refill")
_NEW = "mp.DynamicLossScale(), which starts again"
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_REPAIR = "mp.read_loss_scale(saved, repair=True)"


class _Format(NamedTuple):
    """How a library calls the fields of a dynamic loss scale.

    Attributes:
      marks: names by which it is known, one of them being enough.
      arrays: its name for each of our fields that it has to have.
      options: its name for each of our options that it may have.
      late: by how many steps its periods are longer than it says.
    """

    marks: tuple[str, ...]
    arrays: dict[str, str]
    options: dict[str, str]
    late: int = 0


_TORCH_OPTIONS = {"period": "growth_interval", "factor": "growth_factor", "backoff_factor": "backoff_factor"}
_FORMATS = (
    _Format(
        ("hysteresis_left", "at_floor"),
        {name: name for name in ("loss_scale", "counter", "hysteresis_left", "at_floor")},
        {name: name for name in _OPTIONS},
    ),
    # flax's DynamicScale compares its count before it adds the step to it.
    _Format(
        ("fin_steps",),
        {"loss_scale": "scale", "counter": "fin_steps"},
        {**_TORCH_OPTIONS, "min_loss_scale": "minimum_scale"},
        late=1,
    ),
    _Format(("_growth_tracker",), {"loss_scale": "scale", "counter": "_growth_tracker"}, _TORCH_OPTIONS),
    # jmp, whose names are ours.
    _Format((), {name: name for name in ("loss_scale", "counter")}, {name: name for name in _OPTIONS}),
)


def read_loss_scale(saved: Any, like: DynamicLossScale | None = None, *, repair: bool = False) -> LossScale:
    """Reads the loss scale that a checkpoint holds, mpjax's or another library's, to go on where it stopped.

    For a run that starts from a checkpoint of other code: `mp.loss_scaled(tx, mp.read_loss_scale(saved))`. The
    checkpoints of `mp.loss_scaled` itself are restored into `tx.init(params)`, by Orbax or flax, and need no reading;
    given a restored optimizer state, this says whether its loss scale is sound.

    Args:
      saved: what a checkpoint gave back without a target (dicts, lists and arrays, by Orbax or msgpack), or live
        objects: the loss scale itself, or a tree that holds one. mpjax's, jmp's, flax's `DynamicScale`, or the
        `state_dict()` of torch's `GradScaler`.
      like: the options that were not saved. The checkpoints of mpjax, jmp and flax hold none, torch's all but bounds.
        Those that were saved come first. `mp.DynamicLossScale()` by default; its scale and counters are not used.
      repair: mends numbers as `DynamicLossScale` does at their first use: a scale of zero, below zero, inf or NaN
        becomes 2**16 within the bounds, any other the power of two below it within the bounds, and a counter the
        nearest possible one. What is missing or is not one number is an error all the same.

    Returns:
      A `DynamicLossScale` that moves at the same steps to the same scales as the saved one would have, except that it
      keeps to the bounds of `like` (torch has no floor), never grows past 2**127 (flax does, to a scale that is no
      power of two), and grows with a counter past the period (the others then never do). flax's period is
      `growth_interval + 1`: give `like` that one for its checkpoints; of a live object it is known.
      A live `NoOpLossScale` or `StaticLossScale`, of mpjax or jmp, is returned as mpjax's; a checkpoint has no trace of
      them.

    Raises:
      ValueError: `saved` has no loss scale, or several; one lacks a field; its scale is not a power of two within the
        bounds; a counter or an option is out of range.
      TypeError: a field is not a number, or `like` not a `DynamicLossScale`.

    >>> import mpjax as mp
    >>> saved = {"params": {}, "dynamic_scale": {"fin_steps": 7, "scale": 32768.0}}  # flax's, restored by Orbax
    >>> scale = mp.read_loss_scale(saved, like=mp.DynamicLossScale(period=2001))
    >>> float(scale.loss_scale), int(scale.counter), scale.period
    (32768.0, 7, 2001)

    References:
      flax.training.dynamic_scale.DynamicScale; jmp.DynamicLossScale; torch.amp.GradScaler.state_dict.
    """
    like = DynamicLossScale() if like is None else like
    if not isinstance(like, DynamicLossScale):
        raise TypeError(
            problem(
                f"like is a {type(like).__name__}.",
                expected="a DynamicLossScale; nothing is saved of any other",
                write="mp.read_loss_scale(saved, like=mp.DynamicLossScale(period=2000))",
            )
        )
    path, found = _find(_without_variables(saved))
    fields, layout = _fields(found), _format(found)
    if layout is None:  # of the kinds that never change
        return as_loss_scale(found)
    place = f"{path}/" if path else ""

    missing = [place + name for name in layout.arrays.values() if fields.get(name) is None]
    if missing:
        raise ValueError(
            problem(
                f"the saved loss scale has no {', '.join(missing)}; it has {', '.join(sorted(fields))}.",
                expected=f"all of {', '.join(layout.arrays.values())}",
                write=_NEW,
            )
        )
    options: dict[str, Any] = {name: getattr(like, name) for name in _OPTIONS}
    saved_options = {name: theirs for name, theirs in layout.options.items() if theirs in fields}
    if "factor" in saved_options:
        options["backoff_factor"] = None  # that of `like` belongs to its own factor
    options |= {name: _option(name, fields[theirs], place + theirs) for name, theirs in saved_options.items()}
    options["period"] += layout.late if "period" in saved_options else 0

    scale, *counts = layout.arrays.items()
    floor, ceiling = options["min_loss_scale"], options["max_loss_scale"]
    values: dict[str, Any] = {name: _count(fields[theirs], place + theirs, repair=repair) for name, theirs in counts}
    return DynamicLossScale(_scale(fields[scale[1]], place + scale[1], floor, ceiling, repair), **values, **options)


def _without_variables(saved: Any) -> Any:
    """The tree with arrays in the place of NNX's variables, which an `nnx.Optimizer` holds; untouched without any."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return saved
    leaves = jax.tree.leaves(saved, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.as_pure(saved) if any(isinstance(x, nnx.Variable) for x in leaves) else saved


def _find(saved: Any) -> tuple[str, Any]:
    """The one loss scale in a tree, and its path."""
    leaves = jax.tree_util.tree_leaves_with_path(saved, is_leaf=_is_loss_scale)
    found = [(path_name(path), leaf) for path, leaf in leaves if _is_loss_scale(leaf)]
    if len(found) != 1:
        paths = [path or "<root>" for path, _ in found] or [path_name(path) for path, _ in leaves]
        what = f"what was saved has {len(found)} loss scales{':' if found else ', but'}\n{listing(paths)}"
        raise ValueError(
            problem(
                what if paths else "what was saved is empty.",
                expected="one loss scale of mpjax, jmp, flax (fin_steps, scale) or torch (scale, _growth_tracker)",
                write=f"mp.read_loss_scale(saved[...]), with the part that is one; or {_NEW}",
            )
        )
    return found[0]


def _is_loss_scale(x: Any) -> bool:
    return isinstance(x, LossScale | jmp.NoOpLossScale | jmp.StaticLossScale) or _format(x) is not None


def _fields(x: Any) -> Mapping[str, Any]:
    """The fields of a dynamic loss scale, live or saved; of anything else, nothing."""
    flax = sys.modules.get("flax.training.dynamic_scale")
    if isinstance(x, DynamicLossScale | jmp.DynamicLossScale) or (flax and isinstance(x, flax.DynamicScale)):
        return vars(x)
    return x if isinstance(x, Mapping) else {}


def _format(x: Any) -> _Format | None:
    fields = _fields(x)
    for layout in _FORMATS:
        if any(name in fields for name in layout.marks):
            return layout
    if not {"loss_scale", "counter"} <= fields.keys():
        return None
    # A training state may have these two names as well; its loss scale is a state and no number.
    scale = fields["loss_scale"]
    return None if isinstance(scale, Mapping | list | tuple) or _is_loss_scale(scale) else _FORMATS[-1]


def _number(value: Any, where: str) -> int | float:
    """One real number as Python's, of whatever type it was saved. Of objects of other types nothing is called."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if is_tracer(value) or not isinstance(value, np.number | np.ndarray | jax.Array):
        kind = "tracer" if is_tracer(value) else type(value).__name__
        raise TypeError(problem(f"{where} is a {kind}.", expected="one number, outside jit", write=_NEW))
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(problem(f"{where} has dtype {value.dtype}.", expected="one real number", write=_NEW))
    if value.shape != ():
        raise bad_value(
            f"{where} has shape {value.shape}.",
            "one number; an ensemble has one loss scale a member",
            "mp.read_loss_scale(jax.tree.map(lambda x: x[0], saved)), for the first member",
        )
    number: int | float = value.item()
    return number


def _scale(value: Any, where: str, floor: float, ceiling: float, repair: bool) -> float:
    number = _number(value, where)
    # As float32 holds it: Python's numbers go further.
    scale = float(number) if not abs(number) > _FLOAT32_MAX else math.inf if number > 0 else -math.inf
    if repair:
        state = DynamicLossScale(floor, min_loss_scale=floor, max_loss_scale=ceiling)
        return float(state._replace(loss_scale=jnp.float32(scale))._factor())
    if not (math.isfinite(scale) and scale > 0):
        raise bad_value(
            f"{where} is {scale}.", "a positive, finite power of two", f"{_REPAIR}, which takes 2.0**16; or {_NEW}"
        )
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5:
        raise bad_value(
            f"{where} is {scale}, not a power of two.",
            f"one, such as 2.0**{exponent - 1} or 2.0**{exponent}: multiplying and dividing by it is exact",
            f"{_REPAIR}, which takes 2.0**{exponent - 1}",
        )
    if not floor <= scale <= ceiling:
        bound = "min_loss_scale" if scale < floor else "max_loss_scale"
        raise bad_value(
            f"{where} is {scale}, outside [{floor}, {ceiling}].",
            "min_loss_scale <= scale <= max_loss_scale",
            f"mp.read_loss_scale(saved, like=mp.DynamicLossScale({bound}=2.0**{exponent - 1})), or repair=True",
        )
    return scale


def _count(value: Any, where: str, least: int = 0, repair: bool = False) -> int:
    number = _number(value, where)
    if not isinstance(number, int):
        raise TypeError(problem(f"{where} is {number}.", expected="a whole number", write=_NEW))
    if repair:
        return min(max(number, least), 2**31 - 1)
    if not least <= number < 2**31:
        raise bad_value(f"{where} is {number}.", f"a whole number from {least} to 2**31 - 1", f"{_REPAIR}; or {_NEW}")
    return number


def _option(name: str, value: Any, where: str) -> Any:
    if value is None and name in ("backoff_factor", "min_loss_scale"):
        return SMALLEST_SCALE if name == "min_loss_scale" else None
    if name == "hysteresis_refill":
        return value if isinstance(value, str) else ""
    if name in ("period", "hysteresis"):
        return _count(value, where, least=1)
    number = _number(value, where)
    if not (0 < number <= _FLOAT32_MAX and math.frexp(number)[0] == 0.5):
        raise bad_value(
            f"{where} is {number}.",
            "a power of two, by which multiplying and dividing is exact",
            f"mp.read_loss_scale(saved, like=mp.DynamicLossScale({name}=...)), with this one removed from saved",
        )
    return float(number)
