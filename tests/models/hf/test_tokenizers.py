import json

import pytest
import tokenizers as rust
import transformers

from vbon_jax.errors import InputError
from vbon_jax.models.hf import tokenizers


def letters(text, **special):
    vocabulary = {letter: i for i, letter in enumerate(text)}
    model = rust.Tokenizer(rust.models.WordLevel(vocabulary))
    model.pre_tokenizer = rust.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)


def test_a_tokenizer_comes_back_from_its_directory(tmp_path):
    tokenizer = letters("ab .?", eos_token="?")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizers.save(tokenizer, tmp_path / "new")
    loaded = tokenizers.load(tmp_path / "new")
    assert tokenizers.same(loaded, tokenizer) and tokenizers.end_ids(loaded) == (4,)
    assert loaded.encode("a .b") == [0, 2, 3, 1]
    assert loaded.chat_template == "{{ messages[0].content }}"


def test_spaces_are_not_cleaned_up(tmp_path):
    tokenizer = letters("ab .", clean_up_tokenization_spaces=True)
    tokenizer.backend_tokenizer.decoder = rust.decoders.Fuse()
    tokenizers.save(tokenizer, tmp_path)
    assert tokenizers.load(tmp_path).decode([0, 2, 3]) == "a ."


def test_tokenizers_are_the_same_by_their_ids():
    assert tokenizers.same(letters("abc"), letters("abc", eos_token="c"))
    assert not tokenizers.same(letters("abc"), letters("acb"))
    assert not tokenizers.same(letters("abc"), letters("ab"))


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer directory .*none does not exist"):
        tokenizers.load(tmp_path / "none")
    with pytest.raises(InputError, match=r"no tokenizer could be loaded from .*needs tokenizer.js"):
        tokenizers.load(tmp_path)
    with pytest.raises(InputError, match="tokenizer without EOS: the one built here sets no"):
        tokenizers.end_ids(letters("ab"))


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "gpt_neox", "bert"])
def test_a_directory_without_a_vocabulary_has_no_tokenizer(tmp_path, model_type):
    """transformers makes one of it, with no tokens but the special ones of the model's type."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(InputError, match=r"there are no tokens but the special ones.*needs token"):
        tokenizers.load(tmp_path)
