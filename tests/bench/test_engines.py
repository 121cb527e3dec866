"""Other engines get the same weights and work; vLLM with the recorded shape of its answers."""

import sys
import types
from typing import ClassVar

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from vbon_jax.bench import engines, models
from vbon_jax.models import decoder
from vbon_jax.models.config import DecoderConfig
from vbon_jax.models.hf import config_files
from vbon_jax.models.lm import LanguageModel

TINY = DecoderConfig(vocab_size=64, positions=64, layers=1, width=16, heads=2, mlp_width=32)


@pytest.fixture(scope="module")
def path():
    model = LanguageModel(TINY, decoder.init(TINY, jax.random.key(0)), tokenizer=None)
    with engines.directory(model) as found:
        ids = np.arange(10).reshape(2, 5)
        theirs = AutoModelForCausalLM.from_pretrained(found)(torch.tensor(ids)).logits
        hidden = decoder.hidden(model.params, TINY, ids, np.ones_like(ids, bool))
        ours = decoder.logits(model.params, TINY, hidden)
        np.testing.assert_allclose(theirs.detach().numpy(), ours, atol=1e-5)
        yield found


def test_transformers_draws_whole_responses(path):
    assert engines.transformers(path)(np.arange(12).reshape(3, 4), 6) == 3 * 6
    assert engines.installed() == ["transformers"]


class LLM:
    """vLLM's, as far as it is asked."""

    asked: ClassVar = {}

    def __init__(self, path, **settings):
        self.asked.update(settings, path=path)

    def generate(self, prompts, params):
        self.asked.update(vars(params), prompts=prompts)
        answer = types.SimpleNamespace(token_ids=tuple(range(params.max_tokens)))
        return [types.SimpleNamespace(outputs=[answer]) for _ in prompts]


def test_vllm_draws_from_the_whole_distribution(monkeypatch, path):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    assert engines.vllm(path)(np.arange(8).reshape(2, 4), 6) == 2 * 6
    asked = LLM.asked
    assert asked["path"] == path and asked["dtype"] == "float32" and asked["skip_tokenizer_init"]
    assert asked["prompts"][1] == {"prompt_token_ids": [4, 5, 6, 7]}
    assert (asked["temperature"], asked["top_k"], asked["top_p"]) == (1.0, 0, 1.0)
    assert asked["max_tokens"] == 6 and asked["ignore_eos"]


@pytest.mark.parametrize("name", models.MODELS)
def test_a_named_model_is_what_its_config_says(name):
    """`describe` refuses a config.json of another model."""
    config_files.describe(models.source(name), models.MODELS[name], {})
