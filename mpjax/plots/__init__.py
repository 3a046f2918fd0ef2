"""Plots: the loss scale, what formats lose of gradients, errors by operation, memory. Of the extra `viz`.

Each function returns a matplotlib `Figure` and leaves pyplot alone: `figure.savefig("loss_scale.png")` writes it
without a display, and a notebook shows it after `%matplotlib inline`.
"""

from mpjax.plots._error_bars import error_bars as error_bars
from mpjax.plots._exponent_histogram import exponent_histogram as exponent_histogram
from mpjax.plots._loss_scale import loss_scale_history as loss_scale_history
from mpjax.plots._memory_bars import memory_bars as memory_bars
from mpjax.plots._underflow_heatmap import underflow_heatmap as underflow_heatmap
