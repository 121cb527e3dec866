"""Samples in memory and in a file are the same ones."""

import jax
import numpy as np
import pytest

from tests.sampling.test_sampler import Vocabulary, lengths
from vbon_jax.data import samples as sample_files
from vbon_jax.data.prompts import Prompt
from vbon_jax.models.lm import LanguageModel
from vbon_jax.sampling import samples
from vbon_jax.sampling.responses import Sampling
from vbon_jax.sampling.sampler import Sampler

PROMPTS = [Prompt(10 + i, f"p{i}", (5 + i, 9)) for i in range(5)]


@pytest.fixture(scope="module")
def sampler(params, config, mesh):
    settings = Sampling(temperature=0.7, max_new_tokens=6, end_ids=(3,), pad_id=0)
    return Sampler(LanguageModel(config, params, Vocabulary()), mesh, settings)


def test_a_file_that_was_cut_is_continued_to_the_same_bytes(sampler, tmp_path):
    key = jax.random.key(1)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    samples.write(whole, sampler, key, PROMPTS, range(3), 4, (lengths, None), "whole")
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    cut.write_bytes(b"".join(lines[:2]) + lines[2][:20])
    samples.write(cut, sampler, key, PROMPTS, range(3), 4, (lengths, None), "cut")
    assert cut.read_bytes() == whole.read_bytes()


def test_in_memory_they_are_those_of_the_file(sampler, tmp_path):
    key, path = jax.random.key(1), tmp_path / "s.jsonl"
    drawn = samples.draw(sampler, key, PROMPTS, 3, 7, lengths)
    samples.write(path, sampler, key, PROMPTS, range(3), 4, (lengths, lengths), "file")
    stored = sample_files.read(path)
    assert [s.response_tokens for s in stored] == [s.response_tokens for s in drawn]
    np.testing.assert_allclose(
        [s.log_probs for s in stored], [s.log_probs for s in drawn], atol=1e-5
    )
    assert all(s.evaluator_rewards is None for s in drawn)
    assert all(s.evaluator_rewards == s.rewards for s in stored)
