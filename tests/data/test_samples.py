import json
import math

import numpy as np
import pytest

from vbon_jax.data import samples as reference
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples, SampleWriter
from vbon_jax.errors import InputError

FULL = PromptSamples(
    prompt='the "film"\n',
    responses=(" is fine .", "", "漢\U0001f600"),
    rewards=(0.10000000149011612, -2.0, 3.0),
    prompt_id=4,
    prompt_tokens=(7, 8),
    response_tokens=((1, 2, 0), (0,), (5, 6, 7)),
    log_probs=(-150.25, -0.5, -7.0),
    finished=(True, True, False),
    evaluator_rewards=(1.5, -0.25, 0.0),
)
BARE = PromptSamples("p", ("x", "y"), (1.0, 2.0))


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(**changes):
    record = reference.to_record(FULL) | changes
    return {key: value for key, value in record.items() if value is not ...}


def test_our_keys_survive_the_disk(tmp_path):
    with SampleWriter(tmp_path / "new" / "samples.jsonl") as writer:
        writer.append(FULL)
    assert reference.read(tmp_path / "new" / "samples.jsonl") == [FULL]


def test_the_line_is_the_papers_layout_with_extra_keys(tmp_path):
    path = tmp_path / "s.jsonl"
    with SampleWriter(path) as writer:
        writer.append(PromptSamples("p", ("x", "y"), (1.0, 2.5), prompt_id=0))
    assert path.read_bytes() == (
        b'{"prompt": "p", "responses": ["x", "y"], "rewards": [1.0, 2.5], "prompt_id": 0, '
        b'"vbon_crc32": "23bbf8ea"}\n'
    )


def test_every_float32_reward_survives_exactly(tmp_path):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 4000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    limits = np.finfo(np.float32)
    rewards = np.append(bits[np.isfinite(bits)], [limits.max, limits.tiny, 1e-45, -0.0, 0.1])
    rewards = rewards.astype(np.float32)
    count = len(rewards)
    path = tmp_path / "s.jsonl"
    with SampleWriter(path) as writer:  # numpy values are taken as they come from the device
        writer.append(PromptSamples("p", ("x",) * count, tuple(rewards), prompt_id=np.int64(3)))
        assert writer.done == [3]
    (sample,) = reference.read(path)
    found = np.asarray(sample.rewards, np.float32)
    assert np.array_equal(found.view(np.uint32), rewards.view(np.uint32))


def test_reads_the_papers_layout_without_our_keys(tmp_path):
    path = write(
        tmp_path / "s.jsonl",
        {"prompt": "p", "responses": ["x", "y"], "rewards": [1, 2.0], "model": "gpt2"},
        {"prompt": "p", "responses": ["x", "y"], "rewards": [1, 2]},
    )
    assert reference.read(path) == [BARE, BARE]  # equal prompts stay two prompts


def test_reads_one_response_a_line_and_groups_by_prompt(tmp_path):
    path = write(
        tmp_path / "s.jsonl",
        {"prompt": "b", "text": "b one", "reward": 1},
        {"prompt": "a", "text": "a two", "reward": -2.5},
        {"prompt": "b", "text": "bb", "reward": 3.0, "other": None},
        {"prompt": "a", "text": "a", "reward": 0},
    )
    assert reference.read(path) == [
        PromptSamples("b", (" one", "b"), (1.0, 3.0)),
        PromptSamples("a", (" two", ""), (-2.5, 0.0)),
    ]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"prompt": "b", "text": "a b", "reward": 1}, "'text' must start with its prompt 'b'"),
        ({"prompt": "b", "reward": 1}, "'text' is missing"),
        ({"text": "a b", "reward": 1}, "'prompt' is missing"),
        ({"prompt": "b", "text": "b"}, "'reward' is missing"),
        ({"prompt": "b", "text": "b", "reward": math.nan}, "1 of 1 'reward' are not finite"),
        ({"prompt": "b", "text": "b", "reward": "1"}, "the first is '1'"),
        ({"prompt": "b", "text": "b", "reward": None}, "the first is None"),
        ({"prompt": "b", "responses": ["b"], "rewards": [1]}, "'text' is missing"),
    ],
)
def test_faults_of_the_one_response_layout(tmp_path, second, message):
    path = write(tmp_path / "s.jsonl", {"prompt": "b", "text": "b x", "reward": 1}, second)
    with pytest.raises(InputError, match=r"s\.jsonl:2: ") as error:
        reference.read(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ...}, "'prompt' is missing"),
        ({"prompt": 1}, "'prompt' must be a string"),
        ({"responses": ...}, "'responses' is missing"),
        ({"rewards": ...}, "'rewards' is missing"),
        ({"responses": "abc"}, "'responses' must be a list"),
        ({"responses": ["a", 1, "b"]}, "strings only"),
        ({"responses": ["a", "b"]}, "2 responses but 3 rewards"),
        ({"rewards": [1.0]}, "3 responses but 1 rewards"),
        ({"responses": [], "rewards": []}, "'responses' is empty"),
        ({"rewards": [math.nan, 1, math.nan]}, "2 of 3 'rewards' are not finite numbers"),
        ({"rewards": [1, math.inf, 1]}, "1 of 3 'rewards'"),
        ({"rewards": [1, 1e39, 1]}, "1 of 3 'rewards'"),  # infinite in float32
        ({"rewards": [1, 10**400, 1]}, "1 of 3 'rewards'"),
        (
            {"rewards": [1, True, "2"]},
            "2 of 3 'rewards' are not finite numbers (the first is True)",
        ),
        ({"prompt_id": "4"}, "'prompt_id' must be an id, not '4'"),
        ({"prompt_id": -1}, "'prompt_id' must be an id, not -1"),
        ({"prompt_tokens": [1, -1]}, "'prompt_tokens' must be a list of token ids"),
        ({"response_tokens": [[1], [2]]}, "3 responses but 2 'response_tokens'"),
        ({"response_tokens": [[1], [2], 3]}, "must hold lists of token ids"),
        ({"log_probs": [-1.0]}, "3 responses but 1 'log_probs'"),
        ({"log_probs": [-1.0, math.nan, -1.0]}, "1 of 3 'log_probs'"),
        ({"evaluator_rewards": [1.0]}, "3 responses but 1 'evaluator_rewards'"),
        ({"evaluator_rewards": [1.0, math.inf, 0]}, "1 of 3 'evaluator_rewards' are not finite"),
        ({"finished": [True]}, "3 responses but 1 'finished'"),
        ({"finished": [True, 1, False]}, "true and false only"),
        ({"prompt_id": 1}, "prompt_id 1 is at"),
    ],
)
def test_faults_of_the_one_prompt_layout(tmp_path, changes, message):
    path = write(tmp_path / "s.jsonl", line(prompt_id=1), line(**({"prompt_id": 2} | changes)))
    with pytest.raises(InputError, match=r"s\.jsonl:2: ") as error:
        reference.read(path)
    assert message in str(error.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(InputError, match=r"s\.jsonl does not exist"):
        reference.read(tmp_path / "s.jsonl")
    (tmp_path / "s.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"s\.jsonl: the file is empty"):
        reference.read(tmp_path / "s.jsonl")


def samples_of(*rows):
    return [
        PromptSamples(f"p{i}", ("r",) * len(row), tuple(map(float, row)))
        for i, row in enumerate(rows)
    ]


def test_sorted_rewards():
    rewards = reference.sorted_rewards(samples_of([3, 1, 2, 2], [0, -1, 5, 4]))
    assert rewards.dtype == np.float32
    np.testing.assert_array_equal(rewards, [[1, 2, 2, 3], [-1, 0, 4, 5]])
    # The first m, not the m lowest.
    rewards = reference.sorted_rewards(samples_of([3, 1, 2], [0, -1, 5, 4]), m=2)
    np.testing.assert_array_equal(rewards, [[1, 3], [-1, 0]])


def test_rewards_stay_in_the_order_drawn():
    rewards = reference.rewards(samples_of([3, 1, 2, 2], [0, -1, 5, 4]))
    assert rewards.dtype == np.float32
    np.testing.assert_array_equal(rewards, [[3, 1, 2, 2], [0, -1, 5, 4]])
    np.testing.assert_array_equal(
        reference.rewards(samples_of([3, 1, 2], [0, -1, 5]), 1), [[3], [0]]
    )


def test_samples_of_prompts_are_found_by_id(tmp_path):
    path = write(tmp_path / "s.jsonl", line(prompt_id=7), line(prompt_id=2, prompt="other"))
    seven, two = Prompt(7, FULL.prompt, (7, 8)), Prompt(2, "other", (1,))
    found = reference.samples_of(path, [two, seven], 3)
    assert [(s.prompt_id, s.prompt) for s in found] == [(2, "other"), (7, FULL.prompt)]
    assert found[1].response_tokens == FULL.response_tokens
    assert len(reference.samples_of(path, [seven], 2)) == 1  # of more samples than m, all come
    for prompts, m, message in (
        (
            [seven, Prompt(3, "new", (1,))],
            3,
            "prompt 3 is 'new', the file has nothing under its id",
        ),
        ([Prompt(2, "new", (1,))], 3, "prompt 2 is 'new', the file has samples of 'other'"),
        ([seven], 4, "prompt 7 .* has 3 rewards, m = 4 are needed"),
    ):
        with pytest.raises(InputError, match=message):
            reference.samples_of(path, prompts, m)


def test_sorted_rewards_refuses():
    unequal = samples_of([1, 2], [1, 2], [1, 2, 3])
    with pytest.raises(
        InputError, match=r"prompt 2 \('p2'\) has 3 rewards, the first prompt has 2"
    ):
        reference.sorted_rewards(unequal)
    with pytest.raises(InputError, match=r"prompt 0 \('p0'\) has 2 rewards, m = 3 are needed"):
        reference.sorted_rewards(unequal, m=3)
    with pytest.raises(InputError, match="m = 0"):
        reference.sorted_rewards(unequal, m=0)
    with pytest.raises(InputError, match="0 prompts"):
        reference.sorted_rewards([])
    with pytest.raises(
        InputError, match=r"prompt 0 \('p0'\) has rewards that are not finite in float32"
    ):
        reference.sorted_rewards(samples_of([1, math.nan]))
    by_id = [PromptSamples("p", ("r",), (1.0,)), PromptSamples("q", ("r",) * 2, (1.0, 2.0), 17)]
    with pytest.raises(InputError, match="prompt 17 "):
        reference.sorted_rewards(by_id)


def test_rewards_of_prompts_with_fewer_samples_are_padded():
    stored = [sample_of((3.0, 1.0, 2.0)), sample_of((5.0,))]
    rewards, counts = reference.padded_rewards(stored, 2)
    np.testing.assert_array_equal(rewards, np.array([[3, 1], [5, np.inf]], np.float32))
    assert rewards.dtype == np.float32 and counts.tolist() == [2, 1]
    assert reference.fewest(stored, 2) == 1 and reference.fewest(stored[:1], 2) == 2
    with pytest.raises(InputError, match="has 0 rewards"):
        reference.padded_rewards([sample_of(())], 2)
    rewards, counts = reference.padded_rewards([sample_of(()), sample_of((5.0,))], 2, least=0)
    np.testing.assert_array_equal(rewards, np.array([[np.inf] * 2, [5, np.inf]], np.float32))
    assert counts.tolist() == [0, 1]


def test_parts_of_a_prompt_are_joined():
    a, b = (
        PromptSamples(
            "p", responses=(x, x), rewards=(1.0, 2.0), prompt_id=3, response_tokens=((1,), (2,)),
            log_probs=(-1.0, -2.0), finished=(True, False),
        )
        for x in "xy"
    )  # fmt: skip
    found = reference.joined([a, b])
    assert found.responses == ("x", "x", "y", "y") and found.rewards == (1.0, 2.0) * 2
    assert found.response_tokens == ((1,), (2,)) * 2 and found.log_probs == (-1.0, -2.0) * 2
    assert found.finished == (True, False) * 2 and (found.prompt, found.prompt_id) == ("p", 3)


def sample_of(rewards):
    return PromptSamples("p", tuple("r" for _ in rewards), rewards)
