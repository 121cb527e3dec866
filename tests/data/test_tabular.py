import itertools
import subprocess
import sys

import numpy as np
import pytest

from vbon_jax.data import tabular


def test_strings_enumerate_the_world_in_order():
    strings = tabular.strings()
    assert len(strings) == len(set(strings)) == 6**4
    assert strings[:7] == ["aaaa", "aaab", "aaac", "aaad", "aaae", "aaaf", "aaba"]
    assert strings == sorted(strings)
    assert tabular.strings("xy", 2) == ["xx", "xy", "yx", "yy"]


def test_rewards_look_up_the_table_are_normal_and_injective_in_float32():
    table = tabular.reward_table()
    assert table.shape == (6, 1296) and table.dtype == np.float32
    for row in table:
        assert len(np.unique(row)) == 1296
    assert abs(table.mean()) < 4 / np.sqrt(table.size)
    assert abs(table.std() - 1) < 4 / np.sqrt(2 * table.size)
    pairs = list(itertools.product("abcdef", tabular.strings()))
    rewards = tabular.reward([p for p, _ in pairs], [r for _, r in pairs])
    assert np.array_equal(np.reshape(rewards, (6, 1296)).astype(np.float32), table)
    assert all(type(reward) is float for reward in rewards)


def test_rewards_are_the_same_in_another_process():
    code = (
        "from vbon_jax.data.tabular import reward, corpus\n"
        "print(reward(['a', 'f'], ['abcd', 'ffff']), [e.text for e in corpus(3, 8)])"
    )
    here = (
        f"{tabular.reward(['a', 'f'], ['abcd', 'ffff'])} {[e.text for e in tabular.corpus(3, 8)]}"
    )
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert there.stdout.strip() == here


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        ("a", "abc", "response 'abc' to 'a' is not 4 letters"),
        ("a", "abcde", "response 'abcde'"),
        ("a", "abcg", "response 'abcg'"),
        ("a", "", "response ''"),
        ("", "abcd", "prompt ''"),
        ("ab", "abcd", "prompt 'ab'"),
        ("z", "abcd", "prompt 'z'"),
    ],
)
def test_rewards_outside_the_world_are_refused(prompt, response, message):
    for reward in (tabular.reward, tabular.verifier):
        with pytest.raises(ValueError, match=message):
            reward(["a", prompt], ["abcd", response])


def test_unequal_numbers_are_refused():
    for reward in (tabular.reward, tabular.verifier):
        with pytest.raises(ValueError, match="2 prompts but 1 responses"):
            reward(["a", "b"], ["abcd"])


def test_verifier_by_hand():
    responses = ["abca", "abcb", "ffff", "aaab", "baab"]
    made = tabular.verifier(["a", "a", "c", "b", "f"], responses)
    assert made == [1.0, 0.0, 1.0, 0.0, 1.0] and all(type(value) is float for value in made)
    assert sum(tabular.verifier(["a"] * 1296, tabular.strings())) == 6**3


def test_verifier_passes_a_tenth_to_a_quarter_of_each_prompt():
    # P(x1 x2 x3 x4 | prompt) = P(x1 | prompt) P(x2 | x1) P(x3 | x1 x2) P(x4 | x2 x3), where x2
    # follows the pair (prompt, x1) and so on.
    t = tabular._transitions()
    mass = np.einsum("pa,pab,abc,bcd->pabcd", t[6], t[:6], t[:6], t[:6])
    np.testing.assert_allclose(mass.sum((1, 2, 3, 4)), 1)
    share = np.einsum("pabca->p", mass)
    assert np.all((share > 0.1) & (share < 0.25)), share
    texts = [example.text for example in tabular.corpus(seed=1, count=24_000)]
    passed = np.array(tabular.verifier([x[0] for x in texts], [x[1:] for x in texts]))
    found = passed.reshape(-1, 6).mean(axis=0)  # text i begins with letter i modulo 6
    np.testing.assert_allclose(found, share, atol=5 * np.sqrt(0.25 * 0.75 / 4000))


def test_corpus_has_equal_prompts_labels_by_median_and_the_process_of_the_world():
    examples = tabular.corpus(seed=0, count=60_000)
    letters = np.array([[tabular.ALPHABET.index(c) for c in e.text] for e in examples])
    assert letters.shape == (60_000, 5)
    assert np.array_equal(np.bincount(letters[:, 0]), [10_000] * 6)
    table = tabular.reward_table()
    for example in examples[:500]:
        row = table[tabular.ALPHABET.index(example.text[0])]
        (value,) = tabular.reward([example.text[0]], [example.text[1:]])
        assert example.label == (value > np.median(row))
    # Frequencies after (letter, letter) against the transitions, at 5 standard errors.
    transitions = tabular._transitions()
    np.testing.assert_allclose(transitions.sum(-1), 1)
    assert transitions.min() >= 0.1 / 6
    assert transitions.max() > 0.5  # far from uniform
    for a, b in itertools.product(range(6), range(6)):
        follow = letters[(letters[:, 1] == a) & (letters[:, 2] == b), 3]
        p = transitions[a, b]
        found = np.bincount(follow, minlength=6) / len(follow)
        assert np.all(np.abs(found - p) < 5 * np.sqrt(p * (1 - p) / len(follow)) + 1e-3)
    starts = letters[letters[:, 0] == 2, 1]
    np.testing.assert_allclose(
        np.bincount(starts, minlength=6) / 10_000, transitions[6, 2], atol=0.03
    )


def test_corpus_depends_on_its_seed_only():
    assert tabular.corpus(1, 50) == tabular.corpus(1, 50)
    assert tabular.corpus(1, 50) != tabular.corpus(2, 50)
    assert tabular.corpus(1, 0) == []
