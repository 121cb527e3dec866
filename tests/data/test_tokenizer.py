import json
import random
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from vbon_jax.data import tokenizer
from vbon_jax.data.sources import reviews
from vbon_jax.errors import InputError


@pytest.fixture(scope="module")
def texts():
    return [example.text for example in reviews.examples(0, 500)]


@pytest.fixture(scope="module")
def bpe(texts):
    return tokenizer.build(texts, "bpe", 400)


def unicode_texts():
    """Random text from all planes: controls, combining marks, CJK, emoji, runs of spaces."""
    rng = random.Random(0)
    ranges = ((0, 0x80), (0x80, 0x600), (0x600, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))
    for _ in range(300):
        chosen = [rng.choice(ranges) for _ in range(rng.randrange(1, 30))]
        yield "".join(chr(rng.randrange(*r)) + " " * rng.randrange(3) for r in chosen)
    yield from (" ", "\n\n\t", "it is n't , ok ? ' s", "  the film .  ", "e\u0301 \u00e9 \ufb01")


def test_bpe_round_trips_any_text_also_from_its_directory(bpe, tmp_path):
    tokenizer.save(bpe, tmp_path)
    ours, theirs = tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in unicode_texts():
        tokens = bpe.encode(text)
        assert bpe.decode(tokens) == text
        for loaded in (ours, theirs):
            assert loaded.encode(text) == tokens
            assert loaded.decode(tokens) == text


def test_bpe_vocabulary_and_special_tokens(bpe, texts):
    assert len(bpe) == 400 == len(bpe.get_vocab())
    assert bpe.eos_token_id == bpe.bos_token_id == 0 and tokenizer.end_ids(bpe) == (0,)
    assert bpe.convert_ids_to_tokens(0) == "<|endoftext|>"
    assert bpe.pad_token_id == 1 and bpe.convert_ids_to_tokens(1) == "<|pad|>"
    assert set(tokenizer.encode(bpe, " ".join(texts))).isdisjoint({0, 1})
    # "aab" four times: a+a, aa+b and nothing more, however large a vocabulary is asked for.
    small = tokenizer.build(["aab"] * 4, "bpe", 5000)
    assert len(small) == 2 + 256 + 2
    assert small.convert_ids_to_tokens(small.encode("aab")) == ["aab"]


def test_bpe_is_the_same_in_another_process(bpe, texts, tmp_path):
    code = (
        "import sys\n"
        "from vbon_jax.data import tokenizer\n"
        "from vbon_jax.data.sources import reviews\n"
        "texts = [e.text for e in reviews.examples(0, 500)]\n"
        "print(tokenizer.build(texts, 'bpe', 400).backend_tokenizer.to_str())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout) == json.loads(bpe.backend_tokenizer.to_str())


def test_a_model_config_beside_it_changes_nothing(bpe, tmp_path):
    tokenizer.save(bpe, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 400}')
    loaded = tokenizer.load(tmp_path)
    text = " the film , is n't it ? \n é漢"
    assert loaded.encode(text) == bpe.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert len(loaded) == 400 and tokenizer.end_ids(loaded) == (0,)


def test_characters_have_sorted_ids_and_no_special_token(tmp_path):
    built = tokenizer.build(["fed", "cab", "a"], "characters", 6)
    tokenizer.save(built, tmp_path)
    for tok in (built, tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert tok.get_vocab() == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5}
        assert len(tok) == 6 and tok.special_tokens_map == {}
        assert tok.encode("fabba") == [5, 0, 1, 1, 0]
        assert tok.decode([5, 0, 1, 1, 0]) == "fabba"
        with pytest.raises(InputError, match="tokenizer without EOS"):
            tokenizer.end_ids(tok)
        with pytest.raises(InputError, match="text 'abz' cannot be tokenized"):
            tokenizer.encode(tok, "abz")


def test_characters_keep_spaces_newlines_and_wide_characters():
    text = "a b\n\u6f22\U0001f600  a"
    tok = tokenizer.build([text], "characters", 10)
    assert len(tok) == 6
    assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize(
    ("texts", "kind", "size", "message"),
    [
        (["abc"], "bpe", 257, "vocab_size = 257 is too small.*at least 258"),
        (["abc"], "characters", 2, "vocab_size = 2 is too small: the texts hold 3"),
        (["abc"], "words", 300, "tokenizer kind 'words' is unknown; choose one of bpe, characters"),
        ([], "bpe", 300, "0 texts"),
        (["", ""], "characters", 300, "2 texts, all empty"),
    ],
)
def test_what_cannot_be_built(texts, kind, size, message):
    with pytest.raises(InputError, match=message):
        tokenizer.build(texts, kind, size)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(InputError, match="gone does not exist"):
        tokenizer.load(tmp_path / "gone")
    with pytest.raises(InputError, match=f"no tokenizer could be loaded from {tmp_path}"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=f"no tokenizer could be loaded from {tmp_path}"):
        tokenizer.load(tmp_path)
