import json

import pytest

from vbon_jax.models.hf import config_files
from vbon_jax.models.hf.config_files import TokenIds, read_config
from vbon_jax.models.hf.tensor_files import CheckpointError

GPT2 = {
    "model_type": "gpt2", "vocab_size": 13, "n_positions": 9, "n_layer": 2, "n_embd": 6,
    "n_head": 3, "n_inner": 10, "pad_token_id": 0,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 13, "hidden_size": 6, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 10,
    "max_position_embeddings": 9, "pad_token_id": 0,
}  # fmt: skip
BERT = {
    "model_type": "bert", "vocab_size": 13, "hidden_size": 6, "num_hidden_layers": 2,
    "num_attention_heads": 3, "intermediate_size": 10, "max_position_embeddings": 9,
}  # fmt: skip


def write(directory, value):
    (directory / "config.json").write_text(json.dumps(value))
    return directory


def test_the_file_comes_back_as_it_is(tmp_path):
    raw = GPT2 | {"a_key_of_theirs": {"x": [1]}, "architectures": None}
    family, config, back = read_config(write(tmp_path, raw))
    assert (family.causal, config.width, config.compute_dtype) == ("GPT2LMHeadModel", 6, "float32")
    assert back == raw
    with pytest.raises(CheckpointError, match=r"no file .*nowhere/config\.json: give a directory"):
        read_config(tmp_path / "nowhere")


def test_n_inner_defaults_to_four_widths(tmp_path):
    assert read_config(write(tmp_path, GPT2 | {"n_inner": None}))[1].mlp_width == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bloom"}, "model_type is 'bloom': supported are .*gpt2"),
        ({"model_type": None}, "model_type is None: supported are"),
        ({"model_type": ["gpt2"]}, r"model_type is \['gpt2'\]: supported are"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True: only False"),
        ({"add_cross_attention": True}, "add_cross_attention is True: only False"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False: only True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False: only True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}: quantized"),
        ({"n_embd": "6"}, "transformers does not accept it: .*'n_embd' expected int"),
    ],
)
def test_configs_of_other_models_are_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(write(tmp_path, GPT2 | changes))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (GPT2, {"n_embd": 7}, r"width \(here n_embd\) is 7: give a multiple of heads, 3"),
        (GPT2, {"n_inner": 0}, r"mlp_width \(here n_inner\) is 0: give an integer"),
        (
            GPT2,
            {"activation_function": "swish"},
            r"activation \(here activation_function\) is 'swish': give one of",
        ),
        (LLAMA, {"num_key_value_heads": 3}, r"kv_heads \(here num_key_value_heads\) is 3: give"),
        (LLAMA, {"rms_norm_eps": -1.0}, r"norm_eps \(here rms_norm_eps\) is -1.0: give a pos"),
        (BERT, {"hidden_size": 7}, r"width \(here hidden_size\) is 7: give a multiple of heads"),
        # Two keys with the value at fault: both.
        (GPT2, {"n_layer": 0, "n_head": 0}, r"layers \(here n_layer, n_head\) is 0: give"),
        (GPT2, {"vocab_size": 0}, "vocab_size is 0: give"),  # by the same name
    ],
)
def test_faults_name_the_keys_of_the_file(tmp_path, base, changes, message):
    with pytest.raises(CheckpointError, match=f"json: {message}"):
        read_config(write(tmp_path, base | changes))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, ("LABEL_0", "LABEL_1")),  # transformers' default
        ({"num_labels": 1}, ("LABEL_0",)),
        ({"num_labels": None, "id2label": {"1": "b", "0": "a"}}, ("a", "b")),
        ({"num_labels": 2, "id2label": {"0": "a", "1": "b"}}, ("a", "b")),
    ],
)
def test_labels(raw, expected):
    problem = "single_label_classification" if len(expected) > 1 else "regression"
    assert config_files.labels(raw, "here") == config_files.Labels(expected, problem)


@pytest.mark.parametrize("id2label", [{"0": "a", "2": "b"}, {"0": 1, "1": 2}, ["a", "b"], 2])
def test_labels_that_do_not_count_up_are_refused(id2label):
    with pytest.raises(CheckpointError, match=r"^here: id2label is"):
        config_files.labels({"id2label": id2label}, "here")


@pytest.mark.parametrize("problem", config_files.PROBLEMS)
def test_the_problem_is_that_of_the_file(problem):
    got = config_files.labels({"num_labels": 3, "problem_type": problem}, "here", 3)
    assert got.problem == problem
    assert got.independent == (problem == "multi_label_classification")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"num_labels": 0}, "num_labels is 0: give an integer of at least 1"),
        ({"num_labels": "2"}, "num_labels is '2': give an integer"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking': give one of single_label"),
        ({"id2label": {"0": "a"}}, "id2label says 1, but the weights have 2 rows of scores: set"),
    ],
)
def test_labels_that_do_not_describe_the_scores_are_refused(raw, message):
    with pytest.raises(CheckpointError, match=f"^here: {message}"):
        config_files.labels(raw, "here", 2)


def test_a_label_count_must_fit_the_names():
    with pytest.raises(CheckpointError, match="here: num_labels is 1, but id2label names 2"):
        config_files.labels({"id2label": {"0": "a", "1": "b"}, "num_labels": 1}, "here")


def test_what_is_written_must_describe_the_model(tmp_path):
    _, config, raw = read_config(write(tmp_path, LLAMA))
    family, written = config_files.describe(raw, config, {"dtype": "float32", "bos_token_id": 5})
    assert family.causal == "LlamaForCausalLM"
    assert written == raw | {"dtype": "float32", "bos_token_id": 5}
    for changes, message in (
        ({"vocab_size": 14}, r"like describes .*: vocab_size 14, not 13; give"),
        ({"rms_norm_eps": 0.5}, "norm_eps 0.5, not"),
        ({"rope_theta": 5.0}, "rotary .*5.0"),
    ):
        with pytest.raises(ValueError, match=message):
            config_files.describe(raw | changes, config, {})
    with pytest.raises(ValueError, match=r"a GPT-2 from scratch \(like is None\) .*norm 'layer'"):
        config_files.describe(None, config, {})
    with pytest.raises(ValueError, match="like is None, which is for a GPT-2 from scratch"):
        config_files.describe(None, read_config(write(tmp_path, BERT))[1], {})


def test_token_ids(tmp_path):
    config = read_config(write(tmp_path, GPT2))[1]
    expected = {"bos_token_id": None, "eos_token_id": 12, "pad_token_id": 0}
    assert config_files.token_ids(config, TokenIds(None, 12, 0)) == expected
    for bad in (13, -1):
        with pytest.raises(ValueError, match=f"pad_token_id is {bad}: give None or an id below"):
            config_files.token_ids(config, TokenIds(None, None, bad))
