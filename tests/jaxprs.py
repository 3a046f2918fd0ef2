"""What a jaxpr holds: its equations, those of the bodies in it too, and their dtypes."""

import collections

import jax

from mpjax._compat import inner_jaxprs, open_jaxpr

MATRIX = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def equations(jaxpr):
    """The equations of a jaxpr and of the bodies in it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from equations(inner)


def trace(fn, *args, **kwargs):
    """The equations of a function."""
    return list(equations(open_jaxpr(jax.make_jaxpr(fn)(*args, **kwargs))[0]))


def dtypes(atoms):
    return tuple(str(getattr(atom.aval, "dtype", "")) for atom in atoms)


def census(fn, *args):
    """How often each primitive that holds no body occurs with each dtype of its first operand."""
    simple = (e for e in trace(fn, *args) if e.invars and not inner_jaxprs(e))
    return collections.Counter((e.primitive.name, dtypes(e.invars[:1])[0]) for e in simple)


def dtypes_of(primitive, fn, *args):
    """The dtypes in which a primitive occurs."""
    return {dtype for name, dtype in census(fn, *args) if name == primitive}


def matrix_dtypes(fn, *args):
    """The dtypes of all operands of matrix work."""
    return {dtype for e in trace(fn, *args) if e.primitive.name in MATRIX for dtype in dtypes(e.invars[:2])}


def matrix_dtypes_by_axis(size, fn, *args):
    """The dtypes of all operands of matrix work that has an axis of this size somewhere ("inside"), and that has not.

    Where a region's weights alone have such an axis, so do all its derivatives and nothing else.
    """
    found = {"inside": set(), "outside": set()}
    for e in trace(fn, *args):
        if e.primitive.name in MATRIX:
            shapes = [a.aval.shape for a in (*e.invars, *e.outvars)]
            found["inside" if any(size in s for s in shapes) else "outside"] |= set(dtypes(e.invars[:2]))
    return found
