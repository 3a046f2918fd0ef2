"""Diagnostics: which operation runs in which precision, and why; what weights and optimizer state take."""

from mpjax.diagnostics._explain import explain as explain
from mpjax.diagnostics._explanation import Cast as Cast
from mpjax.diagnostics._explanation import Difference as Difference
from mpjax.diagnostics._explanation import Explanation as Explanation
from mpjax.diagnostics._explanation import NotEntered as NotEntered
from mpjax.diagnostics._explanation import Operation as Operation
from mpjax.diagnostics._memory import MemoryRow as MemoryRow
from mpjax.diagnostics._memory import MemoryTable as MemoryTable
from mpjax.diagnostics._memory import memory_table as memory_table
