"""Means over real tokens."""

import jax
import numpy as np

from vbon_jax.rl.masking import masked, masked_mean


def test_masked_mean_counts_tokens_not_rows():
    x = np.float32([[1, 2, 3], [10, np.nan, np.inf]])
    mask = np.array([[1, 1, 1], [1, 0, 0]])
    np.testing.assert_allclose(jax.jit(masked_mean)(x, mask), 4.0)
    np.testing.assert_allclose(masked(x, mask), [[1, 2, 3], [10, 0, 0]])
    assert masked_mean(x, np.zeros((2, 3), bool)) == 0


def test_the_gradient_at_padding_is_zero_whatever_is_there():
    x, mask = np.float32([2, np.nan, 0]), np.array([1, 0, 0])
    got = jax.grad(lambda x: masked_mean(jax.numpy.log(masked(x, mask) + 1), mask))(x)
    np.testing.assert_allclose(got, [1 / 3, 0, 0], rtol=1e-6)


def test_parts_with_the_count_of_the_whole_add_up_to_its_mean():
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    mask = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])
    parts = [masked_mean(x[i : i + 1], mask[i : i + 1], np.float32(mask.sum())) for i in range(4)]
    np.testing.assert_allclose(sum(parts), masked_mean(x, mask), rtol=1e-6)
    assert masked_mean(x, mask, np.float32(mask.sum())) == masked_mean(x, mask)
