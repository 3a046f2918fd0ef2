"""Mixed precision for code that takes Flax NNX modules: `mpjax.nnx`.

`nnx.Optimizer(model, tx, wrt=nnx.Param)`, `nnx.jit`, `nnx.scan` and `nnx.remat` take mpjax's transforms and functions
as they are; what is here is what needs to know about modules.

`nnx.Optimizer.update` adds float32 updates to half-precision parameters by JAX's implicit promotion. Where that is
strict, write `with jax.numpy_dtype_promotion("standard"): optimizer.update(model, grads)`.
"""

from mpjax.nnx._autocast import autocast as autocast
from mpjax.nnx._grad import grad as grad
from mpjax.nnx._grad import value_and_grad as value_and_grad
