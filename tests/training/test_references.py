"""The table that log F is read off, from stored samples."""

import numpy as np
import pytest

from tests.training import tiny
from vbon_jax.bon import log_f as lf
from vbon_jax.data.samples import PromptSamples
from vbon_jax.models.lm import LanguageModel
from vbon_jax.sampling.responses import Sampling
from vbon_jax.sampling.sampler import Sampler
from vbon_jax.training import references

T, EOS = 3, 9


class Digits(tiny.Numbers):
    """A text's ids are its digits."""

    def __call__(self, text, **options):
        return {"input_ids": [int(c) for c in text]}

    chat_template = None

    def __len__(self):
        return 10

    def convert_ids_to_tokens(self, token):
        return str(token)

    eos_token_id = EOS

    def encode(self, text, **options):
        return [int(c) for c in text if c in "0123456789"]

    def decode(self, ids, *args, **options):
        return "".join(map(str, ids))


@pytest.fixture
def sampler(mesh):
    return Sampler(LanguageModel(None, None, Digits()), mesh, Sampling(1.0, T, (EOS,), 0))


def samples(prompt, responses, rewards, **optional):
    return PromptSamples(prompt, tuple(responses), tuple(rewards), **optional)


def places(*rows):
    """By the one definition of the order, of rows given as ids."""
    return np.array(
        [int(lf.response_order(np.array([r], np.int32), np.ones((1, len(r)), bool))[0])
         for r in rows]
    )  # fmt: skip


def test_the_first_m_count_and_are_sorted(sampler):
    stored = [samples("a", "1234", (4.0, 1.0, 3.0, -9.0)), samples("b", "123", (2.0, 2.0, 0.0))]
    table = references.references(stored, 3, "smoothed", "random", sampler)
    np.testing.assert_array_equal(table.rewards_PxM, [[1, 3, 4], [0, 2, 2]])
    assert table.order_PxM is None and table.fit is None and int(table.m) == 3


def test_the_order_is_that_of_the_ids_with_their_end(sampler):
    """Of texts, encoded and ended like a response, and cut like one."""
    of_ids = samples("a", ("?", "?"), (0.0, 0.0), response_tokens=((1, 2, EOS), (4, 5, 6)))
    of_texts = samples("a", ("12", "4567"), (0.0, 0.0))
    found = references.orders([of_ids, of_texts], 2, sampler)
    assert found.dtype == np.uint32 and found.shape == (2, 2)
    np.testing.assert_array_equal(found, [places((1, 2, EOS), (4, 5, 6))] * 2)
    endless = sampler.at(end_ids=())
    np.testing.assert_array_equal(
        references.orders([of_texts], 2, endless), [places((1, 2), (4, 5, 6))]
    )


def test_ties_by_order_follow_their_rewards(sampler):
    stored = [samples("a", ("12", "34", "5"), (1.0, 1.0, 0.0))]
    table = references.references(stored, 3, "smoothed", "order", sampler)
    first, second, third = references.orders(stored, 3, sampler)[0]
    np.testing.assert_array_equal(table.order_PxM, [[third, *sorted((first, second))]])


def test_prompts_without_a_fitting_curve_are_counted(sampler, capsys):
    rng = np.random.default_rng(0)
    stored = [
        samples("a", ["1"] * 32, rng.normal(size=32)),
        samples("b", ["1"] * 32, np.zeros(32)),  # one value: no curve
    ]
    table = references.references(stored, 32, "exponential", "random", sampler)
    np.testing.assert_array_equal(table.fit.converged_P, [True, False])
    assert "1 of 2 prompts have no curve that fits their 32 rewards" in capsys.readouterr().err


def test_prompts_may_have_fewer_samples(sampler):
    """As adaptive sampling leaves them: rows are padded, and each counts its own."""
    stored = [samples("a", ("1", "2", "3"), (4.0, 1.0, 3.0)), samples("b", ("4",), (2.0,))]
    table = references.references(stored, 3, "smoothed", "order", sampler)
    np.testing.assert_array_equal(table.rewards_PxM, [[1, 3, 4], [2, np.inf, np.inf]])
    assert table.m.tolist() == [3, 1]
    np.testing.assert_array_equal(table.order_PxM[0], places([2, EOS], [3, EOS], [1, EOS]))
    assert table.order_PxM[1].tolist() == [*places([4, EOS]), 0, 0]
