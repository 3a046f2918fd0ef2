"""optax transforms for half precision: loss scaling, skipping, and norms that do not overflow."""

from mpjax.transforms._blockwise import BlockScaled as BlockScaled
from mpjax.transforms._kahan import KahanState as KahanState
from mpjax.transforms._kahan import kahan as kahan
from mpjax.transforms._loss_scaled import LossScaledState as LossScaledState
from mpjax.transforms._loss_scaled import get_loss_scale as get_loss_scale
from mpjax.transforms._loss_scaled import loss_scaled as loss_scaled
from mpjax.transforms._loss_scaled import unscale as unscale
from mpjax.transforms._master_weights import MasterWeightsState as MasterWeightsState
from mpjax.transforms._master_weights import master_weights as master_weights
from mpjax.transforms._norm import clip_by_global_norm as clip_by_global_norm
from mpjax.transforms._norm import global_norm as global_norm
from mpjax.transforms._params_ema import ParamsEmaState as ParamsEmaState
from mpjax.transforms._params_ema import ema_params as ema_params
from mpjax.transforms._params_ema import params_ema as params_ema
from mpjax.transforms._skip_on_overflow import SkipOnOverflowState as SkipOnOverflowState
from mpjax.transforms._skip_on_overflow import skip_on_overflow as skip_on_overflow
from mpjax.transforms._state_dtypes import StateDtypesState as StateDtypesState
from mpjax.transforms._state_dtypes import state_dtypes as state_dtypes
from mpjax.transforms._stochastic_rounding import StochasticRoundingState as StochasticRoundingState
from mpjax.transforms._stochastic_rounding import stochastic_rounding as stochastic_rounding
from mpjax.transforms._stored import apply_updates as apply_updates
