"""`mpjax.diagnostics.memory_table`: what weights, gradients and optimizer state take, before anything is allocated."""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mpjax._compat import is_float0
from mpjax._errors import problem
from mpjax._policy import get_policy
from mpjax._tree import is_inexact_leaf
from mpjax._typing import Tree
from mpjax.diagnostics._explanation import line
from mpjax.diagnostics._state_kinds import parts_of_state

# In the order in which they are shown; the last two are not kept from one step to the next.
_KINDS = ("weights", "masters", "compensation", "moments", "EMA", "accumulator", "other", "counters")
_IN_A_STEP = ("gradients", "compute copy")


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """Arrays of one kind under one choice of optimizer and policy.

    Attributes:
      choice: its name; empty where there is only one.
      kind: `"weights"`, `"masters"` (float32, or the 16 bits that a 16-bit weight lacks), `"compensation"` (Kahan's),
        `"moments"`, `"EMA"`, `"accumulator"` (of gradients), `"other"`, `"counters"` (what has shape (), integers and
        keys); `"gradients"` and `"compute copy"`, which live within a step.
      name: the field of the optimizer's state, such as `"mu"`; empty where the kind says it all.
      dtypes: theirs.
      bytes: of all of them.
    """

    choice: str
    kind: str
    name: str
    dtypes: tuple[str, ...]
    bytes: int


@dataclasses.dataclass(frozen=True)
class MemoryTable:
    """What parameters and what belongs to them take, under each choice.

    Attributes:
      parameters: how many numbers are trained.
      rows: what is kept, and what a step needs beside it.
    """

    parameters: int
    rows: tuple[MemoryRow, ...]

    @property
    def kept(self) -> dict[str, int]:
        """Bytes kept from step to step, by choice."""
        return self._sums(_KINDS)

    @property
    def in_a_step(self) -> dict[str, int]:
        """Bytes kept, and those of gradients and compute copies, by choice."""
        return self._sums((*_KINDS, *_IN_A_STEP))

    def to_json(self) -> str:
        """Everything, as JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        sums = {"kept": self.kept, "in_a_step": self.in_a_step}
        return json.dumps({"parameters": self.parameters, "rows": rows, **sums}, indent=2)

    def __str__(self) -> str:
        cells = [self._header, *self._cells]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join([self._title, "", *(line(row, widths) for row in cells), "", _FOOTER])

    def __rich__(self) -> Any:
        import rich.console
        import rich.table

        table = rich.table.Table(*self._header, title=self._title)
        for row in self._cells:
            table.add_row(*row)
        return rich.console.Group(table, _FOOTER)

    def _sums(self, kinds: Iterable[str]) -> dict[str, int]:
        sums: dict[str, int] = defaultdict(int)
        for row in self.rows:
            sums[row.choice] += row.bytes * (row.kind in kinds)
        return dict(sums)

    @property
    def _title(self) -> str:
        return f"{self.parameters:,} parameters"

    @property
    def _header(self) -> tuple[str, ...]:
        return ("bytes a parameter", *self.kept)

    @property
    def _cells(self) -> list[tuple[str, ...]]:
        found = {(row.kind, row.name, row.choice): row for row in self.rows}
        names = dict.fromkeys((row.kind, row.name) for row in self.rows)

        def each(bytes: int, dtypes: Iterable[str] = ()) -> str:
            return f"{bytes / (self.parameters or 1):6.2f} {'+'.join(dtypes)}".rstrip()

        def rows(kinds: Iterable[str]) -> list[tuple[str, ...]]:
            chosen = [(kind, name) for kind in kinds for k, name in names if k == kind]
            cells = []
            for kind, name in chosen:
                row = [found.get((kind, name, choice)) for choice in self.kept]
                label = f"{kind}: {name}" if name else kind
                cells.append((label, *(each(x.bytes, x.dtypes) if x else "" for x in row)))
            return cells

        kept = ("kept between steps", *map(each, self.kept.values()))
        in_a_step = ("in a step", *map(each, self.in_a_step.values()))
        in_all = ("", *(f"{_size(bytes):>9}" for bytes in self.in_a_step.values()))
        return [*rows(_KINDS), kept, *rows(_IN_A_STEP), in_a_step, in_all]


_FOOTER = "Not counted: activations. They are what a 16-bit compute dtype halves."


def memory_table(params: Tree, tx: Any = None, policy: Any = None) -> MemoryTable:
    """Counts the bytes a parameter of weights, optimizer state, gradients and copies, under one choice or several.

    Mixed precision by itself does not make them less. With AdamW, parameters kept in float32 are 4 bytes, their
    moments 8 and their gradients 4; computing in 16 bits adds a copy of 2. What it halves is activations, which are
    not in this table. What makes weights and state smaller is to store them so: compare the choices.

    Nothing is allocated: `tx.init` is traced by `jax.eval_shape`. The figures are those of all devices together,
    with the arguments of the step donated. A float32 step of AdamW, compiled by XLA for a CPU, takes these bytes to
    within its activations.

    Args:
      params: any pytree of arrays or `jax.ShapeDtypeStruct`s.
      tx: an optax transform; or a mapping from names of choices to transforms or pairs of a transform and its policy.
        `None` counts no state.
      policy: a policy or its name, for all choices that have none of their own. Parameters are cast to its parameter
        dtype first; those that its compute dtype differs for have a compute copy, which XLA may shorten or fuse away.
        (The 8-bit operands of `mixed_float8` are made inside of the layers: the copy is that of `cast_to_compute`.)
        Default: parameters as they are, and no copy.

    Returns:
      A `MemoryTable`: rows, sums, `to_json()`. It prints as a table with a column for each choice. Gradients have their
      parameters' dtypes, as `jax.grad` makes them; a float32 accumulator of microbatches is 4 bytes more.

    Raises:
      TypeError: `tx` is neither a transform nor such a mapping; and as `mpjax.get_policy`.
      ValueError: as `mpjax.get_policy`.

    >>> import jax, jax.numpy as jnp, mpjax as mp, optax
    >>> params = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}
    >>> adamw = optax.adamw(1e-3)
    >>> choices = {"float32": (adamw, "float32"), "mixed": (adamw, "mixed_bfloat16"), "pure": (adamw, "bfloat16")}
    >>> print(mp.diagnostics.memory_table(params, choices))
    1,000,000 parameters
    <BLANKLINE>
      bytes a parameter   float32         mixed            pure
      weights               4.00 float32    4.00 float32     2.00 bfloat16
      moments: mu           4.00 float32    4.00 float32     2.00 bfloat16
      moments: nu           4.00 float32    4.00 float32     2.00 bfloat16
      counters              0.00 int32      0.00 int32       0.00 int32
      kept between steps   12.00           12.00             6.00
      gradients             4.00 float32    4.00 float32     2.00 bfloat16
      compute copy                          2.00 bfloat16
      in a step            16.00           18.00             8.00
                           16 MB           18 MB             8 MB
    <BLANKLINE>
    Not counted: activations. They are what a 16-bit compute dtype halves.
    """
    # Structs before any cast, which would allocate.
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_array(x) else x, params)
    choices = tx if isinstance(tx, Mapping) else {"": tx}
    rows = []
    for name, choice in choices.items():
        # A transform is a pair itself, by name.
        is_pair = isinstance(choice, tuple | list) and len(choice) == 2 and not hasattr(choice, "init")
        rows += _rows(str(name), params, *(choice if is_pair else (choice, policy)))
    return MemoryTable(sum(math.prod(x.shape) for x in _arrays(params) if is_inexact_leaf(x)), tuple(rows))


def _rows(choice: str, params: Tree, tx: Any, policy: Any) -> list[MemoryRow]:
    if tx is not None and not hasattr(tx, "init"):
        raise TypeError(
            problem(
                f"tx is {tx!r}{f' under {choice!r}' if choice else ''}.",
                expected="an optax transform, or a mapping from names to transforms or (transform, policy)",
                write='memory_table(params, {"mixed": (optax.adamw(3e-4), "mixed_bfloat16")})',
            )
        )
    copies: list[Any] = []
    if policy is not None:
        policy = get_policy(policy)
        params = policy.cast_to_param(params)
        pairs = zip(_arrays(params), _arrays(policy.cast_to_compute(params)), strict=True)
        copies = [copy for weight, copy in pairs if weight.dtype != copy.dtype]
    weights = _arrays(params)
    found: dict[tuple[str, str], list[Any]] = {("weights", ""): weights}
    for kind, name, leaf in parts_of_state(_state(tx, params)):
        found.setdefault((kind, name), []).append(leaf)
    found["gradients", ""] = [x for x in weights if is_inexact_leaf(x)]
    found["compute copy", ""] = copies
    return [
        MemoryRow(choice, kind, name, tuple(dict.fromkeys(str(x.dtype) for x in leaves)), sum(map(_bytes, leaves)))
        for (kind, name), leaves in found.items()
        if leaves
    ]


def _state(tx: Any, params: Tree) -> Tree:
    """The shapes and dtypes of `tx.init(params)`; what is no array in `params` is handed on as it is."""
    if tx is None:
        return None
    leaves, structure = jax.tree.flatten(params)
    moving = [_is_array(x) for x in leaves]

    def init(arrays: Any) -> Tree:
        given = iter(arrays)
        merged = [next(given) if m else x for x, m in zip(leaves, moving, strict=True)]
        return tx.init(jax.tree.unflatten(structure, merged))

    return jax.eval_shape(init, _arrays(params))


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _arrays(tree: Tree) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if _is_array(x)]


def _bytes(x: Any) -> int:
    if is_float0(x):
        return 0
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.eval_shape(jax.random.key_data, x)
    return math.prod(x.shape) * x.dtype.itemsize


def _size(bytes: int) -> str:
    for unit, amount in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes >= amount:
            return f"{bytes / amount:.3g} {unit}"
    return f"{bytes} B"
