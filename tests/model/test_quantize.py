"""Quantization: errors are bounded by the scale, and the search over int4 scales never increases the error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.errors import InputError, UnknownNameError
from model.quantize import GROUP, make, quantize_int4, quantize_int8
from model.weights import plain

_WEIGHT = np.random.default_rng(1).standard_t(4, size=(16, 72)).astype(np.float32)  # a few entries stand out


def test_int8_moves_no_entry_by_more_than_half_a_step():
    stored = quantize_int8(jnp.asarray(_WEIGHT))
    moved = np.abs(np.asarray(plain(stored)).T - _WEIGHT)
    assert (moved <= np.asarray(stored.scale)[:, None] * (0.5 + 1e-4)).all()
    np.testing.assert_allclose(stored.scale, np.abs(_WEIGHT).max(axis=1) / 127, rtol=1e-6)


def test_int4_moves_no_entry_that_it_does_not_clip_by_more_than_half_a_step():
    stored = quantize_int4(jnp.asarray(_WEIGHT))
    back = np.asarray(plain(stored)).T
    scale = np.repeat(np.asarray(stored.scale), GROUP, axis=1)[:, : _WEIGHT.shape[1]]
    whole = np.round(back / scale)
    assert set(np.unique(whole)) <= set(range(-8, 8))
    clipped = (whole == -8) | (whole == 7)
    moved = np.abs(back - _WEIGHT)
    assert (moved[~clipped] <= np.abs(scale[~clipped]) * (0.5 + 1e-4)).all()
    assert (np.abs(back) <= np.abs(_WEIGHT) + np.abs(scale) * (0.5 + 1e-4)).all()


def test_int4_is_never_worse_than_the_largest_entrys_scale():
    whole = _WEIGHT[:, : 2 * GROUP]
    stored = quantize_int4(jnp.asarray(whole))
    groups = whole.reshape(16, 2, GROUP)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / 7
    simple = np.clip(np.round(groups / scale), -8, 7) * scale
    error = lambda back: ((back.reshape(groups.shape) - groups) ** 2).sum(axis=-1)
    assert (error(np.asarray(plain(stored)).T) <= error(simple) * (1 + 1e-4)).all()
    assert error(np.asarray(plain(stored)).T).sum() < 0.9 * error(simple).sum()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_whole_numbers_come_back_as_they_were(kind):
    """Zeros, and rows that are nothing else."""
    whole = np.random.default_rng(2).integers(-7, 8, (5, 32)).astype(np.float32)
    whole[:, 0], whole[2] = 7, 0
    back = np.asarray(plain(make(jnp.asarray(whole), kind))).T
    np.testing.assert_allclose(back, whole, atol=0.5 * 7 / 127 if kind == "int8" else 1e-5)
    assert (back[2] == 0).all()


def test_rounding_is_the_same_inside_of_jit():
    for kind in ("int8", "int4"):
        inside = jax.jit(lambda weight, kind=kind: make(weight, kind))(_WEIGHT)
        for one, other in zip(jax.tree.leaves(inside), jax.tree.leaves(make(jnp.asarray(_WEIGHT), kind)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(InputError, match="not finite"):
        quantize_int8(jnp.array([[1.0, jnp.inf]]))
    with pytest.raises(UnknownNameError, match="int8"):
        make(jnp.ones((2, 2)), "int7")
