import numpy as np
import pytest

from vbon_jax.errors import InputError
from vbon_jax.sampling.requests import Request, adjacent, bucket_length, pad_left


def test_pad_left_puts_prompts_at_the_right_end():
    out = pad_left([[5], [6, 7, 8]], 4, 9)
    np.testing.assert_array_equal(out.tokens_BxP, [[9, 9, 9, 5], [9, 6, 7, 8]])
    np.testing.assert_array_equal(out.mask_BxP, [[0, 0, 0, 1], [0, 1, 1, 1]])


def test_pad_left_refuses_an_empty_prompt():
    with pytest.raises(InputError, match="prompt 1 of the batch has no tokens"):
        pad_left([[5], []], 4, 9)


@pytest.mark.parametrize(
    ("length", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (17, 24)]
)
def test_buckets(length, bucket):
    assert bucket_length(length) == bucket


@pytest.mark.parametrize(
    ("runs", "ways", "shared"),
    [
        ((3, 3, 3), 1, 3),
        ((4, 6), 1, 2),
        ((1, 4), 1, 1),
        ((8, 8), 2, 8),
        ((8, 8), 4, 4),
        ((5,), 2, 1),
    ],
)
def test_rows_next_to_each_other_that_share_a_prompt(runs, ways, shared):
    rows = [Request(i, k, (5, i)) for i, count in enumerate(runs) for k in range(count)]
    assert adjacent(rows, ways) == shared
