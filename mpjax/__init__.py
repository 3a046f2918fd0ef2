"""Mixed precision for JAX: policies, loss scaling and optax transforms.

The names here are the public API; modules that start with an underscore are not.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

from mpjax import fp8 as fp8
from mpjax import transforms as transforms
from mpjax._accumulate import accumulate as accumulate
from mpjax._autocast import Rules as Rules
from mpjax._autocast import autocast as autocast
from mpjax._autocast import default_rules as default_rules
from mpjax._autocast import full_precision as full_precision
from mpjax._autocast import keep_precision as keep_precision
from mpjax._convert import scale_gradients as scale_gradients
from mpjax._dynamic_loss_scale import DynamicLossScale as DynamicLossScale
from mpjax._grad import grad as grad
from mpjax._grad import value_and_grad as value_and_grad
from mpjax._hardware import cast_to_full as cast_to_full
from mpjax._hardware import cast_to_half as cast_to_half
from mpjax._hardware import half_dtype as half_dtype
from mpjax._loss_scale import LossScale as LossScale
from mpjax._loss_scale import NoOpLossScale as NoOpLossScale
from mpjax._loss_scale import StaticLossScale as StaticLossScale
from mpjax._overrides import default_overrides as default_overrides
from mpjax._policy import Policy as Policy
from mpjax._policy import default_policy as default_policy
from mpjax._policy import get_policy as get_policy
from mpjax._read_loss_scale import read_loss_scale as read_loss_scale
from mpjax._tree import all_finite as all_finite
from mpjax._tree import select_tree as select_tree
from mpjax.transforms import get_loss_scale as get_loss_scale
from mpjax.transforms import loss_scaled as loss_scaled
from mpjax.transforms import skip_on_overflow as skip_on_overflow
from mpjax.transforms import unscale as unscale

__version__ = importlib.metadata.version("mpjax")

# Imported when they are first named. linen and nnx import flax, which `import mpjax` does not; the others take as long
# as all the rest, and a training step needs none of them.
_ROOMS = ("aot", "diagnostics", "linen", "nnx", "plots")

if TYPE_CHECKING:
    from mpjax import aot as aot
    from mpjax import diagnostics as diagnostics
    from mpjax import linen as linen
    from mpjax import nnx as nnx
    from mpjax import plots as plots
    from mpjax.diagnostics import explain as explain
else:  # A type checker would take every misspelt name for one that __getattr__ finds.

    def __getattr__(name: str) -> object:
        if name in _ROOMS:
            return importlib.import_module(f"mpjax.{name}")
        if name == "explain":
            return importlib.import_module("mpjax.diagnostics").explain
        raise AttributeError(f"module 'mpjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, "explain"})
