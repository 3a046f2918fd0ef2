"""Mixed precision for code that takes Flax NNX modules: `mpjax.nnx`.

`nnx.Optimizer(model, tx, wrt=nnx.Param)`, `nnx.jit`, `nnx.scan` and `nnx.remat` take mpjax's transforms and functions as
they are; what is here is what needs to know about modules.
"""

from mpjax.nnx._autocast import autocast as autocast
from mpjax.nnx._grad import grad as grad
from mpjax.nnx._grad import value_and_grad as value_and_grad
