import dataclasses
import functools
import json

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as rust
import transformers

from vbon_jax import sharding
from vbon_jax.errors import InputError
from vbon_jax.models import decoder, hf, lm
from vbon_jax.models.hf import tokenizers

CONFIG = decoder.DecoderConfig(
    vocab_size=8, positions=9, layers=2, width=6, heads=3, mlp_width=10, norm_eps=1e-4
)
LETTERS = "abcde"


def word_tokenizer(letters=LETTERS, **special):
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<pad>", *letters])}
    model = rust.Tokenizer(rust.models.WordLevel(vocabulary))
    model.pre_tokenizer = rust.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)


ENDED = {"eos_token": "<eos>", "bos_token": "<eos>", "pad_token": "<pad>"}


@functools.cache
def model():
    params = jax.jit(decoder.init, static_argnums=0)(CONFIG, jax.random.key(5))
    return lm.LanguageModel(CONFIG, params, word_tokenizer(**ENDED))


@pytest.fixture
def saved(tmp_path):
    lm.save(model(), tmp_path / "saved", temperature=0.7, end_ids=(0,))
    return tmp_path / "saved"


def assert_trees_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_is_saved_is_loaded_bit_for_bit(saved):
    loaded = lm.load(saved)
    assert loaded.config == CONFIG
    assert_trees_equal(loaded.params, model().params)
    assert tokenizers.same(loaded.tokenizer, model().tokenizer)
    assert loaded.source == json.loads((saved / "config.json").read_text())


def test_a_loaded_model_is_saved_as_the_same_files(saved, tmp_path):
    lm.save(lm.load(saved), tmp_path / "again", temperature=0.7, end_ids=(0,))
    first, again = contents(saved), contents(tmp_path / "again")
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= (
        first.keys()
    )
    for files in (first, again):  # of which transformers says there where the files came from
        files.pop("tokenizer_config.json")
    assert again == first


def test_generation_follows_the_distribution_that_was_trained(saved):
    written = transformers.GenerationConfig.from_pretrained(saved)
    assert (written.do_sample, written.temperature) == (True, 0.7)
    assert (written.top_k, written.top_p) == (0, 1.0)
    assert (written.bos_token_id, written.eos_token_id, written.pad_token_id) == (0, 0, 1)


def test_settings_of_the_source_are_written_back(saved, tmp_path):
    raw = json.loads((saved / "config.json").read_text()) | {"resid_pdrop": 0.25, "note": "mine"}
    (saved / "config.json").write_text(json.dumps(raw))
    lm.save(lm.load(saved), tmp_path / "again", temperature=1.0, end_ids=(0,))
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (again["resid_pdrop"], again["note"]) == (0.25, "mine")


def test_parameters_of_a_policy_are_written_in_place_of_the_models(saved, tmp_path):
    loaded = lm.load(saved)
    trained = jax.tree.map(lambda x: x + 1, loaded.params)
    lm.save(loaded, tmp_path / "policy", temperature=1.0, end_ids=(), params=trained)
    policy = lm.load(tmp_path / "policy")
    assert_trees_equal(policy.params, trained)
    assert policy.source["eos_token_id"] is None
    assert_trees_equal(loaded.params, model().params)


def test_arithmetic_changes_the_configuration_alone(saved):
    changes = {"compute_dtype": "bfloat16", "remat": "full", "lora_alpha": 16.0}
    loaded = lm.load(saved, **changes)
    assert loaded.config == dataclasses.replace(CONFIG, **changes)
    assert_trees_equal(loaded.params, model().params)
    with pytest.raises(TypeError, match="load got layers: give compute_dtype, remat, lora_alpha"):
        lm.load(saved, layers=1)
    with pytest.raises(ValueError, match="remat is 'some'"):
        lm.load(saved, remat="some")


def test_dtype_and_place_are_those_of_load_decoder(saved):
    mesh = sharding.make_mesh(fsdp=2)
    place = functools.partial(sharding.sharding_of, mesh)
    loaded = lm.load(saved, place=place, dtype="bfloat16")
    expected = hf.load_decoder(saved, place=place, dtype="bfloat16")[1]
    assert_trees_equal(loaded.params, expected)
    for leaf, other in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(expected), strict=True):
        assert (leaf.dtype, leaf.sharding) == (other.dtype, other.sharding)
    assert loaded.params["wte"].dtype == "bfloat16"
    assert len(loaded.params["wte"].sharding.device_set) == 2


def test_a_name_on_the_hub_is_resolved(saved, monkeypatch):
    asked = []

    def download(repository, **_):
        asked.append(repository)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_trees_equal(lm.load("someone/their-model").params, model().params)
    assert asked == ["someone/their-model"]


def test_a_tokenizer_can_be_given(saved):
    (saved / "tokenizer.json").unlink()
    (saved / "tokenizer_config.json").unlink()
    given = word_tokenizer("edcba", **ENDED)
    assert lm.load(saved, tokenizer=given).tokenizer is given
    with pytest.raises(InputError, match="no tokenizer could be loaded from"):
        lm.load(saved)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(saved):
    six = word_tokenizer("abcdef", **ENDED)
    assert len(six) == CONFIG.vocab_size
    lm.load(saved, tokenizer=six)
    tokenizers.save(word_tokenizer("abcdefg", **ENDED), saved)
    with pytest.raises(
        InputError,
        match=r"saved' has 8 embeddings, its tokenizer 9 tokens: the directory does not fit togeth",
    ):
        lm.load(saved)


def test_what_is_no_language_model_is_refused(saved, tmp_path):
    with pytest.raises(hf.CheckpointError, match="is no directory"):
        lm.load(tmp_path / "nothing here")
    raw = json.loads((saved / "config.json").read_text())
    architectures = ["GPT2ForSequenceClassification"]
    (saved / "config.json").write_text(json.dumps(raw | {"architectures": architectures}))
    with pytest.raises(hf.CheckpointError, match="a GPT2LMHeadModel is needed here"):
        lm.load(saved)


def test_the_id_that_ends_a_response():
    """Of NumPy arrays on the host as of JAX arrays inside jit."""
    tokens = np.array([[5, 2], [0, 7]])
    for array in (tokens, jnp.asarray(tokens)):
        np.testing.assert_array_equal(lm.is_end(array, (2, 0)), [[False, True], [True, False]])
        np.testing.assert_array_equal(lm.is_end(array, ()), np.zeros((2, 2), bool))


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"eos_token": "b", "pad_token": "c"}, 4),
        ({"eos_token": "b"}, 3),
        ({}, 0),
    ],
)
def test_the_id_that_fills_padding(special, expected):
    assert lm.pad_id(word_tokenizer(**special)) == expected


def test_a_model_prints_its_configuration_but_not_its_arrays():
    assert "layers=2" in repr(model()) and "wte" not in repr(model())
