import pytest

from vbon_jax.models import cache, decoder

CONFIG = decoder.DecoderConfig(vocab_size=5, positions=9, layers=2, width=6, heads=3, mlp_width=8)


def test_an_empty_cache_shows_nothing():
    kv = cache.init(CONFIG, 4, 7)
    assert len(kv.k) == len(kv.v) == 2
    assert {array.shape for array in kv.k + kv.v} == {(4, 3, 7, 2)}
    # Distinct buffers: one shared by two layers could not be donated.
    assert len({array.unsafe_buffer_pointer() for array in kv.k + kv.v}) == 4
    assert not kv.mask_BxS.any()
    assert int(kv.index) == 0
    assert kv.length == 7


@pytest.mark.parametrize(("batch", "length", "name"), [(0, 7, "batch"), (4, 0, "length")])
def test_an_empty_shape_is_refused(batch, length, name):
    with pytest.raises(ValueError, match=f"cache {name} is 0"):
        cache.init(CONFIG, batch, length)
