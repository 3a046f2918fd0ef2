"""Diagnostics: which operation runs in which precision, and why."""

from mpjax.diagnostics._explain import explain as explain
from mpjax.diagnostics._explanation import Cast as Cast
from mpjax.diagnostics._explanation import Difference as Difference
from mpjax.diagnostics._explanation import Explanation as Explanation
from mpjax.diagnostics._explanation import NotEntered as NotEntered
from mpjax.diagnostics._explanation import Operation as Operation
