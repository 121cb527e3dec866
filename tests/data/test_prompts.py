import collections

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vbon_jax.data import jsonl, prompts, tokenizer
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.sources import reviews
from vbon_jax.errors import InputError


@pytest.fixture(scope="module")
def letters():
    return tokenizer.build(["abcdefghijklmnopqrstuvwxyz "], "characters", 30)


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.build([e.text for e in reviews.examples(0, 300)], "bpe", 350)


def test_prefixes_are_cut_from_texts_without_replacement(bpe):
    texts = [example.text for example in reviews.examples(1, 400)]
    made = prompts.prefix_prompts(texts, bpe, count=400, min_tokens=2, max_tokens=8, seed=0)
    assert [prompt.id for prompt in made] == list(range(400))
    heads = collections.Counter(tuple(bpe.encode(text)[:2]) for text in texts)
    assert collections.Counter(prompt.tokens[:2] for prompt in made) == heads
    for prompt in made:
        assert any(text.startswith(prompt.text) and text != prompt.text for text in texts)
        assert bpe.decode(prompt.tokens) == prompt.text
        assert all(type(token) is int for token in prompt.tokens)
    counts = np.bincount([len(prompt.tokens) for prompt in made], minlength=9)
    assert counts[:2].sum() == 0 and len(counts) == 9
    assert np.all(np.abs(counts[2:] - 400 / 7) < 4 * np.sqrt(400 / 7))
    assert [p.tokens[:2] for p in made] != [tuple(bpe.encode(t)[:2]) for t in texts]  # shuffled


def test_seed_decides(bpe):
    texts = [example.text for example in reviews.examples(1, 60)]
    first = prompts.prefix_prompts(texts, bpe, 20, 2, 8, seed=0)
    assert first == prompts.prefix_prompts(texts, bpe, 20, 2, 8, seed=0)
    second = prompts.prefix_prompts(texts, bpe, 20, 2, 8, seed=1)
    assert [p.text for p in first] != [p.text for p in second]


def test_lengths_stay_uniform_when_short_texts_are_passed_over(letters):
    texts = ["abc", "abcdefghij"] * 600  # "abc" is too short for 3 tokens and more
    made = prompts.prefix_prompts(texts, letters, 500, 1, 6, seed=3)
    counts = np.bincount([len(prompt.tokens) for prompt in made], minlength=7)[1:]
    assert np.all(np.abs(counts - 500 / 6) < 4 * np.sqrt(500 / 6))


def test_a_text_must_be_longer_than_its_prompt(letters):
    made = prompts.prefix_prompts(["ab", "abc", "a"], letters, 1, 2, 2, seed=0)
    assert made == [Prompt(0, "ab", (1, 2))]  # space is 0
    with pytest.raises(
        InputError, match=r"asked for 2 prompts of 2 to 2 tokens, but only 1 .* 3 texts"
    ):
        prompts.prefix_prompts(["ab", "abc", "a"], letters, 2, 2, 2, seed=0)


def test_equal_texts_make_prompts_with_ids_of_their_own(letters):
    made = prompts.prefix_prompts(["abc", "abd"], letters, 2, 2, 2, seed=0)
    assert made == [Prompt(0, "ab", (1, 2)), Prompt(1, "ab", (1, 2))]


def test_a_cut_within_a_character_is_passed_over(bpe):
    assert len(bpe.encode("漢漢")) == 6  # bytes
    made = prompts.prefix_prompts(["漢漢", "ab cd"], bpe, 1, 2, 2, seed=0)
    assert made[0].text == bpe.decode(bpe.encode("ab cd")[:2])
    assert prompts.prefix_prompts(["漢漢"], bpe, 1, 3, 3, seed=0)[0].text == "漢"
    with pytest.raises(InputError, match="only 0"):
        prompts.prefix_prompts(["漢漢"], bpe, 1, 2, 2, seed=0)
    passed = 0  # of lengths 2 and 3, a 2 is passed over, not made a 3
    for seed in range(20):
        try:
            assert prompts.prefix_prompts(["漢漢"], bpe, 1, 2, 3, seed)[0].text == "漢"
        except InputError:
            passed += 1
    assert 3 < passed < 17


def test_prompts_must_contain_a_phrase_whole(letters):
    def cut(texts, low, high, *phrases, count=1):
        made = prompts.prefix_prompts(texts, letters, count, low, high, 0, must_contain=phrases)
        return [prompt.text for prompt in made]

    text = "so a war film plays"
    assert cut([text], 2, 13, "war film") == ["so a war film"]  # 13 tokens, as short as may be
    assert cut([text], 13, 13, "war film") == ["so a war film"]
    assert cut([text], 15, 15, "war film") == ["so a war film p"]  # longer where it was drawn so
    assert cut([text], 1, 4, "musical", "a", "war film") == ["so a"]  # any of them
    made = prompts.prefix_prompts([text] * 9, letters, 9, 1, 8, 0, must_contain=["war"])
    assert {prompt.tokens for prompt in made} == {tuple(letters.encode("so a war"))}
    assert [prompt.id for prompt in made] == list(range(9))

    for texts, low, high, phrase in (
        ([text], 2, 12, "war film"),  # it does not fit
        (["so a war film"], 2, 20, "war film"),  # no token would be left
        (["a musicality plays"], 2, 9, "musical"),  # a beginning of a word of the text
        (["unmusical plays"], 2, 14, "musical"),
        (["we warm films"], 2, 12, "war film"),
        (["a musical plays"], 2, 14, "m.sical"),  # no pattern
    ):
        with pytest.raises(
            InputError, match=rf"only 0 .*must contain one of '{phrase}'.*raise max"
        ):
            cut(texts, low, high, phrase)
    # Texts that will not do are passed over, and a later mention counts.
    assert cut(["we warm films"] * 5 + [text], 2, 13, "war film") == ["so a war film"]
    assert cut(["warm war film"], 1, 8, "war") == ["warm war"]


def test_prompts_of_held_out_genres_name_one(bpe):
    texts = [
        e.text
        for e in reviews.examples(2, 300, genres=reviews.HELD_OUT_GENRES, must_name_genre=True)
    ]
    made = prompts.prefix_prompts(texts, bpe, 60, 2, 12, 0, must_contain=reviews.HELD_OUT_GENRES)
    for prompt in made:
        assert set(prompt.text.split()) & set(reviews.HELD_OUT_GENRES)
        assert any(text.startswith(prompt.text) and text != prompt.text for text in texts)
        assert bpe.decode(prompt.tokens) == prompt.text
        assert 2 <= len(prompt.tokens) <= 12
    assert made == prompts.prefix_prompts(
        texts, bpe, 60, 2, 12, 0, must_contain=list(reviews.HELD_OUT_GENRES)
    )


@pytest.mark.parametrize(("count", "low", "high"), [(0, 2, 8), (1, 0, 8), (1, 5, 4)])
def test_ranges_are_checked(letters, count, low, high):
    with pytest.raises(
        InputError, match=f"count = {count}, min_tokens = {low}, max_tokens = {high}"
    ):
        prompts.prefix_prompts(["abcdefghijkl"], letters, count, low, high, seed=0)


def test_fits_context():
    fine, long = Prompt(4, "x", (1,) * 8), Prompt(7, "y" * 100, (1,) * 9)
    prompts.fits_context([fine], max_new_tokens=24, positions=32)
    with pytest.raises(InputError, match=r"prompt 7 .* has 9 tokens.*24 new.*33 positions.*has 32"):
        prompts.fits_context([fine, long, long], max_new_tokens=24, positions=32)


def test_from_texts(letters):
    made = prompts.from_texts(["b", "ab"], letters)
    assert made == [Prompt(0, "b", (2,)), Prompt(1, "ab", (1, 2))]
    with pytest.raises(InputError, match=r"prompt 1 .* has no token"):
        prompts.from_texts(["b", ""], letters)


def test_file_round_trip_and_atomic_write(tmp_path):
    made = [Prompt(3, 'a "\u2028\n漢\U0001f600', (5, 0)), Prompt(1, "", (7,))]
    path = tmp_path / "prompts.jsonl"
    prompts.write_jsonl(path, made)
    assert prompts.read_jsonl(path) == made
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(AttributeError):
        prompts.write_jsonl(path, [*made, None])
    assert prompts.read_jsonl(path) == made  # the half-written file did not replace it


def test_messages_are_an_optional_key(tmp_path):
    path = tmp_path / "prompts.jsonl"
    chat = Prompt(0, "u: x", (5,), (("system", ""), ("user", "x \u6f22")))
    plain = Prompt(1, "x", (7,))
    prompts.write_jsonl(path, [chat, plain])
    (_, first), (_, second) = jsonl.read(path)
    assert first == {
        "id": 0, "prompt": "u: x", "tokens": [5],
        "messages": [{"role": "system", "content": ""}, {"role": "user", "content": "x \u6f22"}],
    }  # fmt: skip
    assert second == {"id": 1, "prompt": "x", "tokens": [7]}  # as before there were messages
    assert prompts.read_jsonl(path) == [chat, plain] and plain.messages == ()


GOOD = '{"id": 0, "prompt": "x", "tokens": [1]}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a line of JSON"),
        ('{"prompt": "x", "tokens": [1]}', "'id' is missing"),
        ('{"id": 1, "tokens": [1]}', "'prompt' is missing"),
        ('{"id": 1, "prompt": "x"}', "'tokens' is missing"),
        (
            '{"id": 0, "prompt": "x", "tokens": [1]}',
            "'id' must be a whole number of its own, not 0",
        ),
        ('{"id": true, "prompt": "x", "tokens": [1]}', "not True"),
        ('{"id": -1, "prompt": "x", "tokens": [1]}', "not -1"),
        ('{"id": 1, "prompt": 5, "tokens": [1]}', "'prompt' must be a string, not 5"),
        ('{"id": 1, "prompt": "x", "tokens": []}', "'tokens' must be a list of token ids"),
        ('{"id": 1, "prompt": "x", "tokens": [1.5]}', "'tokens' must be a list of token ids"),
        ('{"id": 1, "prompt": "x", "tokens": "ab"}', "'tokens' must be a list of token ids"),
        (
            '{"id": 1, "prompt": "x", "tokens": [1], "messages": "u"}',
            "'messages' must be a list of messages, not 'u'",
        ),
        (
            '{"id": 1, "prompt": "x", "tokens": [1], "messages": [{"role": "user"}]}',
            "message 1: key 'content' is missing",
        ),
    ],
)
def test_faults_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text(GOOD + line + "\n")
    with pytest.raises(InputError, match=r"p\.jsonl:2: ") as error:
        prompts.read_jsonl(path)
    assert message in str(error.value)


def test_users_own_prompts(tmp_path, letters):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "ab", "id": 9}\n\n{"prompt": "c"}')
    assert prompts.read_texts(path, letters) == [Prompt(0, "ab", (1, 2)), Prompt(1, "c", (3,))]
    for line, message in (
        ('{"text": "ab"}', "'prompt' is missing"),
        ('{"prompt": ""}', "has no token"),
        ('{"prompt": "A!"}', "cannot be tokenized"),
        ('{"prompt": null}', "must be a string, not None"),
    ):
        path.write_text('{"prompt": "ab"}\n' + line)
        with pytest.raises(InputError, match=r"mine\.jsonl:2: ") as error:
            prompts.read_texts(path, letters)
        assert message in str(error.value)
    path.write_text("")
    for read in (prompts.read_jsonl, lambda p: prompts.read_texts(p, letters)):
        with pytest.raises(InputError, match=r"mine\.jsonl: the file is empty"):
            read(path)
        with pytest.raises(InputError, match="does not exist"):
            read(tmp_path / "gone")


def test_users_own_prompts_from_tables(tmp_path, letters):
    want = [Prompt(0, "ab", (1, 2)), Prompt(1, "c", (3,))]
    (tmp_path / "x.csv").write_text('n,prompt\n1,ab\n\n2,"c"\n')
    assert prompts.read_texts(tmp_path / "x.csv", letters) == want
    (tmp_path / "x.tsv").write_text("q\tprompt\nab\tz\nc\tz\n")
    assert prompts.read_texts(tmp_path / "x.tsv", letters, "q") == want
    pq.write_table(pa.table({"q": ["ab", "c"], "prompt": ["", ""]}), tmp_path / "x.parquet")
    assert prompts.read_texts(tmp_path / "x.parquet", letters, column="q") == want
    (tmp_path / "x.jsonl").write_text('{"q": "ab"}\n{"q": "c"}\n')
    assert prompts.read_texts(tmp_path / "x.jsonl", letters, column="q") == want


def test_faults_of_users_prompts_in_tables(tmp_path, letters):
    path = tmp_path / "x.csv"
    for content, message in (
        ("text\nab\n", r"x\.csv: there is no column 'prompt' .*'text'\); set prompts\.column to"),
        ('prompt\nab\n""\n', r"x\.csv:3: 'prompt' '' has no token"),
        ("prompt\nab\nA!\n", r"x\.csv:3: .*cannot be tokenized"),
        ("prompt\n", r"x\.csv: the file is empty; give it records with a prompt \('prompt'\)"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            prompts.read_texts(path, letters)
    pq.write_table(pa.table({"prompt": ["ab", None]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="row index 1: 'prompt' must be a string, not None"):
        prompts.read_texts(tmp_path / "x.parquet", letters)
    (tmp_path / "x.jsonl").write_text('{"text": "ab"}\n')
    with pytest.raises(InputError, match=r"x\.jsonl:1: .*'prompt' is missing.*set prompts\.column"):
        prompts.read_texts(tmp_path / "x.jsonl", letters)
