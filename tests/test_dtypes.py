import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpjax import _dtypes


@pytest.mark.parametrize("name", list(_dtypes._SPELLINGS))
def test_every_spelling_is_one_dtype(name):
    expected = jnp.dtype(name)
    scalar = getattr(jnp, name)
    for spelling in (name, *_dtypes._SPELLINGS[name], name.upper(), f"  {name} ", scalar, expected, scalar.dtype):
        found = _dtypes.canonical_dtype(spelling)
        assert found == expected
        assert hash(found) == hash(expected)
        assert str(found) == name


@pytest.mark.parametrize("bad", ["float12", "", "bf61", "e4m4", "float", "d", ">f4", None, float, object()])
def test_unknown_names_list_the_known_ones(bad):
    with pytest.raises(ValueError, match="unknown compute_dtype") as error:
        _dtypes.canonical_dtype(bad, "compute_dtype")
    message = str(error.value)
    assert repr(bad) in message
    for name in _dtypes._SPELLINGS:
        assert name in message
    assert "write:" in message


@pytest.mark.parametrize(
    "bad", [jnp.int32, "int8", bool, np.complex64, "complex128", ml_dtypes.float8_e8m0fnu, "uint4"]
)
def test_dtypes_that_are_not_cast_to(bad):
    with pytest.raises(TypeError, match="is not a floating dtype"):
        _dtypes.canonical_dtype(bad)


def test_is_castable():
    for yes in (np.float16, jnp.bfloat16, np.float32, np.float64):
        assert _dtypes.is_castable(jnp.dtype(yes))
    key = jax.random.key(0)
    for no in (np.int32, np.bool_, np.complex64, jnp.float8_e4m3fn, jnp.float8_e5m2):
        assert not _dtypes.is_castable(jnp.dtype(no))
    assert not _dtypes.is_castable(key.dtype)
    assert not _dtypes.is_castable(jax.dtypes.float0)


def test_float8():
    names = [n for n in _dtypes._SPELLINGS if _dtypes.is_float8(jnp.dtype(n))]
    assert names == ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
