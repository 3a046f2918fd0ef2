"""Errors of a function in low precision: of each operation, and of the results with some operations switched off."""

import contextlib
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._autocast import Rules, default_rules, noted
from mpjax._compat import tracing_for
from mpjax._dtypes import FLOAT32
from mpjax._errors import problem
from mpjax._policy import Policy
from mpjax.diagnostics._paired import Paired
from mpjax.diagnostics._pairs import is_float, squares
from mpjax.diagnostics._sites import Known, Site, known_sites
from mpjax.diagnostics._traced import Traced, trace
from mpjax.diagnostics._worlds import World

_FLOAT64 = np.dtype(np.float64)


class Reference:
    """The results of a function in float32 or float64 throughout.

    Args:
      fn: the function, in float32.
      dtype: of the reference.
      args, kwargs: its arguments.
    """

    def __init__(self, fn: Callable[..., Any], dtype: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.dtype, self.call = dtype, (args, kwargs)
        traced = trace(fn, args, kwargs)
        self.groups = _groups(traced)
        self.names = traced.outputs

        def run(arrays: list[Any], consts: list[Any]) -> list[Any]:
            # No site is known, and none is switched: every equation in the reference's dtype.
            nothing: dict[Site, int] = dict.fromkeys(known_sites(traced.jaxpr, [], dtype), 0)
            paired = Paired(dtype, default_rules(), [], nothing, jnp.zeros(1, bool))
            outs, _ = paired.run(traced.jaxpr, consts, [paired.given(x) for x in arrays])
            return [x.exact for x in outs]

        with self.context():
            self.results = World().compiled(run)(traced.arrays, traced.consts)

    @property
    def floats(self) -> list[str]:
        """The names of the results that have errors."""
        return [name for name, _ in self._floats]

    @property
    def not_finite(self) -> tuple[str, ...]:
        """The names of those that hold NaN or infinity."""
        return tuple(name for name, y in self._floats if not np.isfinite(y).all())

    @property
    def _floats(self) -> list[tuple[str, Any]]:
        return [(n, y) for n, y in zip(self.names, self.results, strict=True) if is_float(jax.typeof(y))]

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """What holds while the reference's dtype is used."""
        return jax.enable_x64(True) if self.dtype == _FLOAT64 else contextlib.nullcontext()


class Found(NamedTuple):
    """The errors of one evaluation.

    Attributes:
      outputs: of each result, by its tree path.
      entries: of each entry of a tuple that is returned, else of all results together.
      operations: of each site, by direction.
    """

    outputs: dict[str, float]
    entries: list[float]
    operations: dict[tuple[Site, bool], float]

    @property
    def total(self) -> float:
        """The largest of the entries' errors."""
        return max(self.entries, default=0.0)


class Measured:
    """A function under autocast, ready to be measured with any of its operations in low precision.

    Args:
      fn: the function, in float32.
      policy, rules: as for autocast.
      through: a transformation of the function.
      reference: its results in float32 or float64.
    """

    def __init__(
        self, fn: Callable[..., Any], policy: Policy, rules: Rules, through: Any, reference: Reference
    ) -> None:
        self.reference = reference
        args, kwargs = reference.call
        cast, notes = noted(fn, policy, rules)
        # On a CPU all of the program's operations are plain ones, with nothing kept in float32 behind their backs.
        with tracing_for("cpu"):
            traced = trace(through(cast) if through else cast, args, kwargs)
        self.sites: dict[Site, Known] = known_sites(traced.jaxpr, notes, reference.dtype)
        self.narrow: list[Site] = [site for site, known in self.sites.items() if known.narrow]
        switches = {site: i for i, site in enumerate(self.narrow)}
        arrays, consts = traced.arrays, traced.consts

        def run(on: Any, arrays: list[Any], consts: list[Any], results: list[Any]) -> Any:
            paired = Paired(reference.dtype, rules, notes, switches, on)
            outs, errors = paired.run(traced.jaxpr, consts, [paired.given(x) for x in arrays])
            return errors, [squares(x.low, y) for x, y in zip(outs, results, strict=True) if is_float(jax.typeof(y))]

        compiled = World().compiled(run)

        def call(on: np.ndarray) -> Any:
            with reference.context():
                return compiled(on, arrays, consts, reference.results)

        self._call = call

    def run(self, on: Collection[Site]) -> Found:
        """Evaluates with these sites in low precision."""
        # One more, so that the program is the same where nothing is narrow.
        flags = np.zeros(len(self.narrow) + 1, bool)
        flags[[i for i, site in enumerate(self.narrow) if site in on]] = True
        errors, sums = self._call(flags)
        names = self.reference.floats
        found = dict(zip(names, [tuple(map(float, x)) for x in sums], strict=True))
        outputs = {name: _error([found[name]]) for name in names}
        entries = [_error([found[name] for name in group if name in found]) for group in self.reference.groups]
        return Found(outputs, entries, {key: float(x) for key, x in jax.device_get(errors).items()})

    def total(self, on: Collection[Site]) -> float:
        """The error of the results with these sites in low precision."""
        return self.run(on).total


def reference_dtype(reference: Any) -> Any:
    """The dtype of a reference by its name.

    Raises:
      ValueError: it is neither float32 nor float64.
    """
    known = {"float32": FLOAT32, "float64": _FLOAT64}
    if reference not in known:
        raise ValueError(
            problem(
                f"reference is {reference!r}.",
                expected='"float32" or "float64"',
                write='compare(fn, policy, reference="float64")(*args)',
            )
        )
    return known[reference]


def _groups(traced: Traced) -> list[list[str]]:
    """The names of the results: of a tuple's entries one by one, else together."""
    tree = traced.result(traced.outputs)
    entries = tree if type(tree) is tuple else (tree,)
    known = set(traced.outputs)
    return [[x for x in jax.tree.leaves(entry) if isinstance(x, str) and x in known] for entry in entries]


def _error(sums: list[tuple[float, ...]]) -> float:
    """The relative error of several arrays together."""
    # A sum of squares would leave the range of floats.
    distance = math.hypot(*(scale * math.sqrt(d) for scale, d, _ in sums))
    norm = math.hypot(*(scale * math.sqrt(n) for scale, _, n in sums))
    if math.isinf(distance):
        return distance
    return distance / norm if norm else float(distance > 0)
