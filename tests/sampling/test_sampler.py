import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.models import decoder, trainable
from vbon_jax.models.lm import LanguageModel
from vbon_jax.sampling import sampler as engine
from vbon_jax.sampling.requests import requests_for
from vbon_jax.sampling.responses import Sampling


class Vocabulary:
    """As much of a tokenizer as a sampler asks for."""

    def decode(self, row, skip_special_tokens):
        assert not skip_special_tokens
        return "".join(f"{token} " for token in row)

    def batch_decode(self, rows, skip_special_tokens):
        return [self.decode(row, skip_special_tokens) for row in rows]


@pytest.fixture(scope="module")
def drawing(params, config, mesh):
    model = LanguageModel(config, params, Vocabulary())
    settings = Sampling(temperature=0.7, max_new_tokens=6, end_ids=(3,), pad_id=0)
    return engine.Sampler(model, mesh, settings)


@pytest.fixture(scope="module")
def prompts():
    return [Prompt(10 + i, f"p{i}", (5 + i, 9)) for i in range(3)]


def lengths(prompts, prompt, prompt_mask, tokens, mask):
    return np.asarray(mask).sum(axis=1)  # of the rows that only fill a batch as well


def test_responses_are_scored_in_order_by_their_own_prompt(drawing, prompts):
    seen = []

    def reward(of, *rows):
        seen.append([p.id for p in of])
        return lengths(of, *rows)

    requests = requests_for(prompts, 3)
    key = jax.random.key(1)
    found = [r for group in drawing.responses(key, prompts, requests, 4, reward) for r in group]
    assert [(r.request.prompt_id, r.request.sample) for r in found] == [
        (p, s) for p in (10, 11, 12) for s in range(3)
    ]
    assert seen == [[10, 10, 10, 11], [11, 11, 12, 12], [12]]
    for r in found:
        assert r.reward == len(r.tokens) and r.finished == (r.tokens[-1] == 3)
        assert r.text == "".join(f"{t} " for t in r.tokens if t != 3)
        assert r.log_prob < 0


def test_a_second_score_is_measured_beside(drawing, prompts):
    def twice(*batch):
        return 2 * lengths(*batch)

    requests = requests_for(prompts, 2)
    also = drawing.measure(twice, prompts, "evaluator")
    groups = drawing.responses(jax.random.key(1), prompts, requests, 4, lengths, also)
    for r in (r for group in groups for r in group):
        assert r.extra == {"evaluator": 2 * r.reward}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["reward", "evaluator"])
def test_a_reward_that_is_not_finite_is_refused_with_its_response(drawing, prompts, value, name):
    def reward(of, *rows):
        values = lengths(of, *rows).astype(np.float32)
        values[1] = value
        return values

    requests = requests_for(prompts, 1)
    shown = "NaN" if np.isnan(value) else f"{value}"
    message = rf"the {name} gave {shown} for prompt='p1' response='\d.*1 of 3 .*; clip it"
    also = drawing.measure(reward, prompts, "evaluator") if name == "evaluator" else None
    first = reward if name == "reward" else lengths
    with pytest.raises(InputError, match=message):
        list(drawing.responses(jax.random.key(1), prompts, requests, 3, first, also))


def test_other_settings_and_parameters_leave_the_sampler_alone(drawing):
    hot = drawing.at(temperature=2.0, top_k=1)
    assert (hot.settings.temperature, hot.settings.top_k) == (2.0, 1)
    assert (drawing.settings.temperature, drawing.settings.top_k) == (0.7, 0)
    other = drawing.with_params({"x": 1})
    assert other.model.params == {"x": 1} and drawing.model.params != {"x": 1}
    assert other.settings == drawing.settings


def test_named_keys_differ_by_seed_and_name():
    keys = [engine.named_key(seed, name) for seed in (0, 1) for name in ("sample", "train")]
    assert len({tuple(np.asarray(jax.random.key_data(k))) for k in keys}) == 4
    again = jax.random.key_data(engine.named_key(0, "sample"))
    np.testing.assert_array_equal(jax.random.key_data(keys[0]), again)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_keeps_the_update_or_says_what_is_lost(drawing, dtype, capsys):
    """Under bfloat16 arithmetic too: float32 sums are computed with in float32."""
    model = drawing.model
    low = jax.tree.map(lambda x: x.astype("bfloat16"), model.params)
    what = trainable.Trainable(rank=2, targets=("q", "v"))
    own = trainable.start(low, what, jax.random.key(3), dtype)
    own = jax.tree.map(lambda x: x + 0.01, own)
    config = dataclasses.replace(model.config, compute_dtype="bfloat16", lora_alpha=0.5)
    adapted = dataclasses.replace(model, config=config, params=trainable.join(low, own))
    merged = dataclasses.replace(drawing, model=adapted).merged().model
    assert merged.params["blocks"]["attention"]["q"]["kernel"].dtype == dtype
    assert merged.config.compute_dtype == dtype
    said = capsys.readouterr()
    assert ("rounds away" in said.out + said.err) == (dtype == "bfloat16")
    tokens, mask = np.arange(3, 11)[None], np.ones((1, 8), bool)
    exact = dataclasses.replace(config, compute_dtype="float32")
    expected = decoder.hidden(adapted.params, exact, tokens, mask)
    got = decoder.hidden(merged.params, merged.config, tokens, mask)
    apart = np.abs(np.asarray(got, np.float32) - np.asarray(expected)).max()
    assert (apart < 1e-4) == (dtype == "float32")


@pytest.mark.parametrize("where", ["device", "host"])
def test_the_next_page_is_dispatched_before_the_host_works_on_the_last(drawing, monkeypatch, where):
    """A device's scores are behind the page it draws, so they are waited for after one more."""
    events = []
    pages = engine.pages.drawn

    def dispatched(*args):
        for number, page in enumerate(pages(*args)):
            events.append(f"draw {number}")
            yield page

    def reward(of, *rows):
        events.append("score")
        found = lengths(of, *rows)
        return jnp.asarray(found) if where == "device" else found

    monkeypatch.setattr(engine.pages, "drawn", dispatched)
    many = [Prompt(i, f"p{i}", (5 + i % 4, 9 + i // 4)) for i in range(24)]
    requests, key = requests_for(many, 1), jax.random.key(1)
    found = []
    for group in drawing.responses(key, many, requests, 2, reward):
        events.append("work")
        found += group
    assert [r.request for r in found] == requests
    draws = [i for i, event in enumerate(events) if event.startswith("draw")]
    each = (len(events) - len(draws)) // 2 // len(draws)  # batches of a page
    assert len(draws) == 3 and each == 4
    scores, works = ["score"] * each, ["work"] * each
    if where == "device":
        assert events == [
            "draw 0", "draw 1", *scores, "draw 2", *works, *scores, *works, *scores, *works
        ]  # fmt: skip
    else:
        assert events == ["draw 0", "draw 1", *["score", "work"] * 4, "draw 2",
                          *["score", "work"] * 8]  # fmt: skip


def test_a_clock_is_told_of_every_draw(drawing, prompts):
    watch = engine.Idle()
    told = dataclasses.replace(drawing, idle=watch)
    found = list(told.responses(jax.random.key(1), prompts, requests_for(prompts, 8), 2, lengths))
    assert sum(map(len, found)) == 24 and watch.draws == 3
    assert 0 <= watch.share() < 1


@pytest.mark.parametrize(("batch_size", "every"), [(1, 1), (2, 4), (9, 2)])
def test_what_is_streamed_joins_up_to_the_texts_of_all_responses(
    drawing, prompts, batch_size, every
):
    requests, key = requests_for(prompts, 8), jax.random.key(1)  # more than a page of few rows
    whole = [r.text for g in drawing.responses(key, prompts, requests, 4, lengths) for r in g]
    texts, looks = {r: [] for r in requests}, []
    for request, piece, ends in drawing.streamed(key, requests, batch_size, every):
        texts[request].append(piece)
        looks.append((request, ends))
    assert ["".join(pieces) for pieces in texts.values()] == whole
    told = [request for request, ends in looks if ends]
    assert told == requests  # each ends once, in order
    assert sorted(looks, key=lambda look: requests.index(look[0])) == looks
    if every == 1:  # as they are written: a look for each token, and text before the last
        assert any(len([p for p in pieces if p]) > 2 for pieces in texts.values())


class Halves(Vocabulary):
    """Two tokens make a character: a half of one decodes as a replacement character."""

    def decode(self, row, skip_special_tokens):
        text = "".join(chr(0x4E00 + 64 * a + b) for a, b in zip(row[::2], row[1::2], strict=False))
        return text + "\N{REPLACEMENT CHARACTER}" * (len(row) % 2)


def test_half_a_character_is_not_streamed(drawing, prompts):
    model = dataclasses.replace(drawing.model, tokenizer=Halves())
    halves = dataclasses.replace(drawing, model=model).at(end_ids=())
    requests = requests_for(prompts[:1], 3)
    for _, piece, _ in halves.streamed(jax.random.key(1), requests, 3, 1):
        assert "\N{REPLACEMENT CHARACTER}" not in piece


@pytest.mark.parametrize(("each", "rows"), [(1, 4), (3, 6), (1, 50)])
def test_responses_of_a_step_are_the_same_in_fewer_rows(drawing, each, rows):
    """More than one page of them, and rows that none divides."""
    many = [Prompt(i, f"p{i}", (5 + i % 4, 9 + i // 4)) for i in range(21)]
    requests, key = requests_for(many, each), jax.random.key(1)
    whole = drawing.draw(key, 3, requests, 8)
    turns = drawing.draw(key, 3, requests, 8, rows)
    assert whole.size == turns.size and whole.temperature == turns.temperature
    for a, b in zip(jax.tree.leaves(whole.prompts), jax.tree.leaves(turns.prompts), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(whole.rollout, turns.rollout, strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, atol=1e-5)
    other = drawing.draw(key, 4, requests, 8, rows)
    assert not np.array_equal(other.rollout.tokens_BxT, turns.rollout.tokens_BxT)
