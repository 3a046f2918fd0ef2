"""Ahead of time: what a program will take on a TPU or GPU, compiled for it on a machine that has none."""

from mpjax.aot._comparison import Comparison as Comparison
from mpjax.aot._compile import compare as compare
from mpjax.aot._compile import compile_for as compile_for
from mpjax.aot._devices import devices as devices
from mpjax.aot._devices import mesh as mesh
from mpjax.aot._report import Report as Report
from mpjax.aot._targets import TARGETS as TARGETS
from mpjax.aot._targets import Target as Target
from mpjax.aot._targets import compiler_version as compiler_version
from mpjax.aot._traffic import Collective as Collective
