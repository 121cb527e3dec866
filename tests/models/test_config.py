import dataclasses

import jax
import pytest

from vbon_jax.models import cache, decoder
from vbon_jax.models.config import DecoderConfig, Rotary

CONFIG = DecoderConfig(vocab_size=5, positions=9, layers=2, width=12, heads=3, mlp_width=8)


def sizes(config):
    """(H, K) of the queries, (G, K) of the keys: of the parameters, and of the cache."""
    tree = jax.eval_shape(lambda key: decoder.init(config, key), jax.random.key(0))
    attention = tree["blocks"]["attention"]
    keys = attention["k"]["kernel"].shape[2:]
    assert keys == (config.key_heads, config.key_width)
    assert cache.init(config, 1, 4).k[0].shape == (1, keys[0], 4, keys[1])
    return attention["q"]["kernel"].shape[2:], keys


@pytest.mark.parametrize(
    ("given", "changes", "expected"),
    [
        ({}, {}, ((3, 4), (3, 4))),
        # What is not given follows what is changed.
        ({}, {"heads": 6}, ((6, 2), (6, 2))),
        ({}, {"width": 24}, ((3, 8), (3, 8))),
        ({"kv_heads": 1}, {"heads": 6}, ((6, 2), (1, 2))),
        ({"head_width": 5}, {"heads": 7, "width": 10}, ((7, 5), (7, 5))),
        # What is given stays, and can be taken back.
        ({"kv_heads": 3, "head_width": 4}, {"heads": 6}, ((6, 4), (3, 4))),
        ({"kv_heads": 3, "head_width": 4}, {"kv_heads": None}, ((3, 4), (3, 4))),
    ],
)
def test_replaced_sizes_of_heads(given, changes, expected):
    config = dataclasses.replace(CONFIG, **given)
    assert sizes(dataclasses.replace(config, **changes)) == expected


def test_replaced_sizes_are_checked():
    with pytest.raises(ValueError, match="width is 12: give a multiple of heads, 5"):
        dataclasses.replace(CONFIG, heads=5)
    grouped = dataclasses.replace(CONFIG, kv_heads=3)
    with pytest.raises(ValueError, match="kv_heads is 3: give a divisor of heads, 4"):
        dataclasses.replace(grouped, heads=4)
    for name in ("kv_heads", "head_width"):
        with pytest.raises(ValueError, match=f"{name} is 0: give an integer of at least 1"):
            dataclasses.replace(CONFIG, **{name: 0})


def test_an_odd_number_of_rotated_dimensions_is_refused():
    with pytest.raises(ValueError, match="head_width is 5, and all of it is to be rotated"):
        dataclasses.replace(CONFIG, head_width=5, rotary=Rotary())
