"""VADER's sentiment as a reward function."""

import sys

import pytest

from vbon_jax.errors import InputError
from vbon_jax.rewards import function, vader


def test_prompt_and_response_are_scored_together():
    prompts = ["The film was", "The film was", "The film was", "The film was not"]
    responses = [" wonderful", " long", " terrible", " wonderful"]
    good, neutral, bad, negated = vader.compound(prompts, responses)
    # The lexicon's 2.7 of wonderful, as x / sqrt(x^2 + 15), in four digits; negation takes -0.74.
    assert good == pytest.approx(2.7 / (2.7**2 + 15) ** 0.5, abs=5e-5)
    assert neutral == 0.0
    assert negated == pytest.approx(-0.74 * 2.7 / ((0.74 * 2.7) ** 2 + 15) ** 0.5, abs=5e-5)
    assert bad < negated < neutral
    assert vader.compound([], []) == []


def test_it_is_a_reward_function_by_name():
    found = function.load("vbon_jax.rewards.vader:compound")
    values = function.call("vader", found, ["so", "so"], [" good", " and so"])
    assert values[0] > 0 and values[1] == 0


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    vader._analyzer.cache_clear()
    with pytest.raises(InputError, match=r"VADER is not installed: pip install 'vbon_jax\[vader]'"):
        function.call("vader", vader.compound, ["a"], ["b"])
