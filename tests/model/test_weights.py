"""Stored forms of a weight: each is the matrix that `plain` says it is, in products, as a table and in bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.quantize import KINDS, make
from model.weights import Int4, Int8Dynamic, bytes_of, is_weight, matmul, outputs_of, plain, take_rows

_OUT, _IN = 21, 50  # neither is a multiple of a block or a group
_RANDOM = np.random.default_rng(0)
_MATRIX = _RANDOM.normal(size=(_OUT, _IN)).astype(np.float32)


@pytest.fixture(scope="module", params=KINDS)
def stored(request):
    """The matrix in every form."""
    return make(jnp.asarray(_MATRIX), request.param)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 35)])
def test_a_product_is_that_with_the_plain_matrix(stored, shape):
    x = jnp.asarray(_RANDOM.normal(size=(*shape, _IN)), jnp.float32)
    expected = np.asarray(x) @ np.asarray(plain(stored), np.float32)
    if isinstance(stored, Int8Dynamic):  # what rounding its activations can change: half a step for each input
        step = np.abs(np.asarray(x)).max(axis=-1, keepdims=True) / 127
        bound = step / 2 * np.abs(np.asarray(plain(stored))).sum(axis=0) + 1e-5
        assert (np.abs(np.asarray(matmul(x, stored)) - expected) <= bound).all()
    else:
        np.testing.assert_allclose(matmul(x, stored), expected, atol=1e-5)


def test_many_outputs_go_block_by_block(monkeypatch):
    """Blocks that do not divide the outputs: the last one overlaps."""
    import model.weights

    monkeypatch.setattr(model.weights, "_BLOCK", 9 * _IN)
    x = jnp.asarray(_RANDOM.normal(size=(1, _IN)), jnp.float32)
    for kind in ("bfloat16", "int8", "int4"):
        form = make(jnp.asarray(_MATRIX), kind)
        np.testing.assert_allclose(matmul(x, form), x @ plain(form), atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(optimised):
    """To the bit: a request's text may not change with what is served beside it."""
    form = make(jnp.asarray(_MATRIX), "int8-dynamic")
    x = jnp.asarray(_RANDOM.normal(size=(4, _IN)) * [[1], [100], [0.01], [0]], jnp.float32)
    together = np.asarray(matmul(x, form))
    for row, expected in zip(x, together, strict=True):
        np.testing.assert_array_equal(matmul(row[None], form)[0], expected)


def test_what_is_not_a_number_stays_so(stored):
    """A full cache says so by NaN, which must survive every product."""
    x = jnp.zeros((2, _IN)).at[1, 3].set(jnp.nan)
    y = np.asarray(matmul(x, stored))
    assert (y[0] == 0).all()
    assert np.isnan(y[1]).all()


def test_rows_of_a_table_are_those_of_the_plain_matrix(stored):
    ids = jnp.array([[0, _OUT - 1, 7], [3, 3, _OUT]])
    rows = np.asarray(take_rows(stored, ids), np.float32)
    np.testing.assert_allclose(rows[0], np.asarray(plain(stored)).T[np.asarray(ids[0])], atol=1e-6)
    assert np.isnan(rows[1, 2]).all()
    assert np.isfinite(rows[1, :2]).all()


def test_forms_take_the_bytes_that_they_say():
    scales = 4 * _OUT
    groups, group = 2, 32
    expected = {
        "float32": 4 * _OUT * _IN,
        "bfloat16": 2 * _OUT * _IN,
        "int8": _OUT * _IN + scales,
        "int8-dynamic": _OUT * _IN + scales,
        "int4": _OUT * groups * group // 2 + groups * scales,
    }
    assert {kind: bytes_of(make(jnp.asarray(_MATRIX), kind)) for kind in KINDS} == expected


def test_forms_are_trees_that_jit_takes(stored):
    assert is_weight(stored)
    assert outputs_of(stored) == _OUT
    assert not is_weight(jnp.zeros((2, 2)))
    copy = jax.jit(lambda form: form)(stored)
    assert type(copy) is type(stored)
    shapes = jax.eval_shape(lambda form: form, stored)
    assert isinstance(shapes, type(stored))
    assert not isinstance(stored, Int4) or shapes.d_in == _IN
