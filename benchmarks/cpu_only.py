"""Imported before jax: there is only the CPU, and no other device is looked for."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
