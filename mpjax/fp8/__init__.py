"""fp8: formats, scales, casts, and products of 8-bit operands; what the policy `mixed_float8` is made of."""

import importlib
from typing import Any

from mpjax.fp8._dot import dot_general as dot_general
from mpjax.fp8._formats import FORMATS as FORMATS
from mpjax.fp8._formats import Format as Format
from mpjax.fp8._formats import cast as cast
from mpjax.fp8._formats import format_of as format_of
from mpjax.fp8._recipe import Recipe as Recipe
from mpjax.fp8._scaling import Quantized as Quantized
from mpjax.fp8._scaling import amax as amax
from mpjax.fp8._scaling import dequantize as dequantize
from mpjax.fp8._scaling import fake_quantize as fake_quantize
from mpjax.fp8._scaling import power_of_two_scale as power_of_two_scale
from mpjax.fp8._scaling import quantize as quantize

# Delayed scaling evaluates traced programs, as diagnostics do: it stands above autocast, which imports this here.
_DELAYED = ("DelayedScaling", "delayed", "init")


def __getattr__(name: str) -> Any:
    if name in _DELAYED:
        importlib.import_module("mpjax.diagnostics")  # whose report on fp8 imports it in turn
        return getattr(importlib.import_module("mpjax.fp8._delayed"), name)
    raise AttributeError(f"module 'mpjax.fp8' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_DELAYED})
