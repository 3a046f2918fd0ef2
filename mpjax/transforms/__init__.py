"""optax transforms for half precision: loss scaling, skipping, and norms that do not overflow."""

from mpjax.transforms._loss_scaled import LossScaledState as LossScaledState
from mpjax.transforms._loss_scaled import get_loss_scale as get_loss_scale
from mpjax.transforms._loss_scaled import loss_scaled as loss_scaled
from mpjax.transforms._loss_scaled import unscale as unscale
from mpjax.transforms._norm import clip_by_global_norm as clip_by_global_norm
from mpjax.transforms._norm import global_norm as global_norm
from mpjax.transforms._skip_on_overflow import SkipOnOverflowState as SkipOnOverflowState
from mpjax.transforms._skip_on_overflow import skip_on_overflow as skip_on_overflow
from mpjax.transforms._stored import apply_updates as apply_updates
