import pytest
import transformers

from vbon_jax.models.config import Rotary
from vbon_jax.models.hf import family

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.5,
    "high_freq_factor": 3.0, "original_max_position_embeddings": 16,
}  # fmt: skip


def test_settings_we_do_not_compute_are_refused():
    config = transformers.LlamaConfig(attention_bias=True)
    family.only(config, attention_bias=(False, True), absent_key=None)
    with pytest.raises(ValueError, match="attention_bias is True: only False is supported"):
        family.only(config, attention_bias=False)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 5.0}, Rotary(theta=5.0)),
        (
            {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.25},
            Rotary(theta=5.0, fraction=0.25),
        ),
        (
            {"rope_type": "linear", "rope_theta": 5.0, "factor": 8.0},
            Rotary(theta=5.0, scaling="linear", factor=8.0),
        ),
        (
            LLAMA3,
            Rotary(theta=500.0, scaling="llama3", factor=4.0, low=1.5, high=3.0, original=16),
        ),
    ],
)
def test_rotary_settings(rope, expected):
    assert family.rotary(rope) == expected


def test_other_rotary_kinds_are_refused():
    with pytest.raises(ValueError, match="rope_type is 'yarn': supported are default, linear"):
        family.rotary({"rope_type": "yarn", "rope_theta": 5.0, "factor": 2.0})
