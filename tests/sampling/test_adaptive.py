"""Adaptive samples are the first of a fixed m, and stop where the band is narrow enough."""

import jax
import numpy as np
import pytest

from tests.sampling.test_samples import PROMPTS, lengths
from tests.sampling.test_samples import sampler as sampler
from vbon_jax.bon import adaptive as band
from vbon_jax.data import samples as sample_files
from vbon_jax.sampling import adaptive, samples

N, TOLERANCE = 4.0, 0.55
RULE = adaptive.Rule(40, lambda rewards: band.half_width(rewards, N) <= TOLERANCE)


def known(prompts, prompt, prompt_mask, tokens, mask):
    """Of prompts 10 and 11 nearly all responses tie; of the others hardly any do."""
    few = np.array([p.id < 12 for p in prompts] + [False] * (len(tokens) - len(prompts)))
    return np.where(few, 1.0, np.asarray(tokens)[:, 0] + np.asarray(mask).sum(axis=1) / 7)


@pytest.fixture(scope="module")
def written(sampler, tmp_path_factory):
    path = tmp_path_factory.mktemp("adaptive") / "train.jsonl"
    adaptive.write(path, sampler, jax.random.key(1), PROMPTS, RULE, 8, known)
    return path


def test_rounds_double_up_to_m():
    assert [list(x)[:: len(x) - 1] for x in RULE.rounds] == [[0, 7], [8, 15], [16, 31], [32, 39]]
    assert adaptive.Rule(5, RULE.enough).rounds == [range(5)]
    assert adaptive.Rule(600, RULE.enough).rounds[0] == range(75)


def test_they_are_the_first_of_a_fixed_m_and_no_more_than_needed(sampler, written, tmp_path):
    samples.write(
        tmp_path / "all.jsonl", sampler, jax.random.key(1), PROMPTS, range(40), 8, (known, None), ""
    )
    fixed, found = sample_files.read(tmp_path / "all.jsonl"), sample_files.read(written)
    counts = [len(x.rewards) for x in found]
    assert counts[0] == counts[1] == 16 and counts[2] > 16
    for all_, part, count in zip(fixed, found, counts, strict=True):
        assert part.response_tokens == all_.response_tokens[:count]
        assert part.responses == all_.responses[:count] and part.rewards == all_.rewards[:count]
        np.testing.assert_allclose(part.log_probs, all_.log_probs[:count], atol=1e-5)
        assert part.finished == all_.finished[:count] and part.prompt_id == all_.prompt_id
        width = band.half_width([part.rewards], N)[0]
        before = band.half_width([part.rewards[: count // 2]], N)[0]
        assert before > TOLERANCE and (width <= TOLERANCE or count == RULE.m)
    assert not (written.parent / "rounds").exists()


def test_a_run_that_was_cut_goes_on_from_its_rounds(sampler, written, tmp_path):
    """Cut in the second round, and again before its rounds were taken away."""
    path, calls = tmp_path / "train.jsonl", []

    def cut(*rows):
        calls.append(len(rows[0]))
        if sum(calls) > 50:
            raise MemoryError("no more")
        return known(*rows)

    with pytest.raises(MemoryError):
        adaptive.write(path, sampler, jax.random.key(1), PROMPTS, RULE, 8, cut)
    assert (tmp_path / "rounds" / "1.jsonl").exists()
    again = []

    def counted(*rows):
        again.append(len(rows[0]))
        return known(*rows)

    adaptive.write(path, sampler, jax.random.key(1), PROMPTS, RULE, 8, counted)
    assert path.read_bytes() == written.read_bytes()
    whole = sum(len(x.rewards) for x in sample_files.read(path))
    assert sum(again) <= whole - 40  # the first round is not drawn again
    found = adaptive.write(path, sampler, jax.random.key(1), PROMPTS, RULE, 8, None)  # all is there
    wide = [x for x in sample_files.read(path) if not RULE.enough(np.array([x.rewards]))[0]]
    assert found == (whole, len(wide))


def test_all_of_m_are_drawn_where_the_band_stays_wide(sampler, tmp_path):
    rule = adaptive.Rule(9, lambda rewards: np.zeros(len(rewards), bool))
    path, key = tmp_path / "s.jsonl", jax.random.key(1)
    assert adaptive.write(path, sampler, key, PROMPTS, rule, 8, lengths) == (45, 5)
    assert [len(x.rewards) for x in sample_files.read(tmp_path / "s.jsonl")] == [9] * 5
