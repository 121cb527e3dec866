"""Torch models with every parameter random: zero biases and unit scales would hide mistakes."""

import numpy as np
import pytest
import torch
import transformers

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()

# Odd sizes, and an epsilon and an MLP width that are not the defaults.
GPT2_SIZES = {
    "vocab_size": 37,
    "n_positions": 19,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 3,
    "n_inner": 40,
    "layer_norm_epsilon": 3e-3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _randomise(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="session")
def torch_lm():
    """torch_lm(**changes): a GPT2LMHeadModel of the sizes above, with changes to its config."""

    def make(**changes):
        config = transformers.GPT2Config(**GPT2_SIZES | changes)
        return _randomise(transformers.GPT2LMHeadModel(config))

    return make


@pytest.fixture(scope="session")
def torch_classifier():
    """torch_classifier(**changes): a GPT2ForSequenceClassification of the sizes above."""

    def make(**changes):
        config = transformers.GPT2Config(**GPT2_SIZES | changes)
        return _randomise(transformers.GPT2ForSequenceClassification(config))

    return make


@pytest.fixture(scope="session")
def padded_batch():
    """(tokens_BxT, mask_BxT): no padding, left, right, both sides, and a single token."""
    tokens_BxT = np.random.default_rng(3).integers(3, 37, (5, 11)).astype(np.int32)
    mask_BxT = np.ones((5, 11), bool)
    mask_BxT[1, :4] = False
    mask_BxT[2, 6:] = False
    mask_BxT[3, :2] = mask_BxT[3, 9:] = False
    mask_BxT[4, :10] = False
    return np.where(mask_BxT, tokens_BxT, 0), mask_BxT
