"""What an optimizer's state says as numbers for a logger, and where to write them."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpjax._errors import problem
from mpjax.diagnostics._summary import summary


def scalars(opt_state: Any) -> dict[str, int | float]:
    """The numbers that are worth a curve, by name, for any logger.

    For the host, between steps, every so many of them: it waits for the state and copies a few small arrays, once.

    Args:
      opt_state: as in `mpjax.diagnostics.summary`.

    Returns:
      Python numbers: `loss_scale`, `skips_total`, `skips_in_a_row`, with a dynamic scale `clean_steps` and `at_floor`.
      With `gradient_monitor`, `steps`, and of the gradients that it measured last, at their loss scale:
      `gradients/step`, `gradients/loss_scale`, `gradients/non_finite`, `gradients/zeros`, `gradients/min_exponent`,
      `gradients/max_exponent`, and for each format `gradients/float16/overflow`, `subnormal` and `zero`, as in
      `FormatLoss`.

    Raises:
      ValueError: as `mpjax.diagnostics.summary`.

    >>> import jax.numpy as jnp, mpjax as mp, optax
    >>> mp.diagnostics.scalars(mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale(8.0)).init({"w": jnp.ones(2)}))
    {'loss_scale': 8.0, 'skips_total': 0, 'skips_in_a_row': 0, 'clean_steps': 0, 'at_floor': 0}
    """
    found = summary(opt_state)
    names = ("loss_scale", "skips_total", "skips_in_a_row", "clean_steps", "at_floor", "steps")
    values = {name: getattr(found, name) for name in names}
    if (measured := found.measured) is not None:
        names = ("step", "loss_scale", "non_finite", "zeros", "min_exponent", "max_exponent")
        values |= {f"gradients/{name}": getattr(measured, name) for name in names}
        for row in measured.formats:
            shares = {"overflow": row.overflow, "subnormal": row.subnormal, "zero": row.zero}
            values |= {f"gradients/{row.dtype}/{kind}": share for kind, share in shares.items()}
    return {name: value for name, value in values.items() if value is not None}


def write_scalars(writer: Any, step: int, values: Mapping[str, int | float]) -> None:
    """Writes numbers of one step with whatever writer there is.

    Args:
      writer: an object with `write_scalars(step, values)` (clu, `JsonLines`), `add_scalar(name, value, step)`
        (tensorboardX, torch) or `scalar(name, value, step)` (flax.metrics.tensorboard). The first of these is used.
      step: the step.
      values: as `scalars` gives them, with a loss or others beside them.

    Raises:
      TypeError: the writer has none of the three.

    >>> import mpjax as mp
    >>> class Writer:
    ...     def add_scalar(self, name, value, step):
    ...         print(step, name, value)
    >>> mp.diagnostics.write_scalars(Writer(), 7, {"loss": 0.5})
    7 loss 0.5
    """
    if hasattr(writer, "write_scalars"):
        writer.write_scalars(step, values)
        return
    one = getattr(writer, "add_scalar", None) or getattr(writer, "scalar", None)
    if one is None:
        raise TypeError(
            problem(
                f"writer is a {type(writer).__name__}.",
                expected="an object with write_scalars, add_scalar or scalar",
                write='mp.diagnostics.write_scalars(mp.diagnostics.JsonLines("metrics.jsonl"), step, values)',
            )
        )
    for name, value in values.items():
        one(name, value, step)


class JsonLines:
    """Appends numbers to a file, one JSON object a line, that a crash leaves readable.

    A line is on the disk when `write_scalars` returns. One that a crash has cut short is removed when the file is
    opened again; all others are complete.

    Args:
      path: the file. It is made where there is none, and its folder too.

    >>> import mpjax as mp, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
    >>> with mp.diagnostics.JsonLines(path) as log:
    ...     log.write_scalars(0, {"loss": 0.5, "norm": float("inf")})
    >>> print(path.read_text().strip())
    {"step": 0, "loss": 0.5, "norm": "inf"}
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+")  # noqa: SIM115  # closed by close
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)

    def write_scalars(self, step: int, values: Mapping[str, int | float]) -> None:
        """Appends one line: the step and the values.

        inf and NaN, which JSON has no numbers for, are written as text, which `float` reads.

        Args:
          step: the step.
          values: numbers, Python's or arrays of one number.
        """
        line = json.dumps({"step": int(step), **{name: _number(value) for name, value in values.items()}})
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _number(value: Any) -> int | float | str:
    number: int | float = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else str(float(number))
