import dataclasses
import functools
import json
import os

import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from vbon_jax.models import decoder, heads, hf

CONFIG = decoder.DecoderConfig(
    vocab_size=13, positions=9, layers=2, width=6, heads=3, mlp_width=10, norm_eps=1e-4
)
IDS = {"bos_id": None, "eos_id": 2, "pad_id": 0}
WTE = "transformer.wte.weight"
C_ATTN = "transformer.h.1.attn.c_attn.weight"


@functools.cache
def params():
    return jax.jit(functools.partial(decoder.init, CONFIG))(jax.random.key(5))


@pytest.fixture
def saved(tmp_path):
    """A language model directory of ours."""
    hf.save_decoder(tmp_path, CONFIG, params(), **IDS)
    return tmp_path


def edit_json(path, **changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def edit_tensors(directory, change):
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def assert_trees_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


# Round trips


def test_our_directory_loads_in_transformers(saved):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert type(model) is transformers.GPT2LMHeadModel
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.transformer.wte.weight
    ids = (None, 2, 0)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == ids

    tokens_BxT = np.random.default_rng(0).integers(0, 13, (3, 7))
    hidden_BxTxD = decoder.hidden(params(), CONFIG, tokens_BxT, np.ones_like(tokens_BxT, bool))
    got = jax.nn.log_softmax(decoder.logits(params(), CONFIG, hidden_BxTxD))
    expected = torch.log_softmax(model(torch.tensor(tokens_BxT)).logits, -1).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_our_directory_comes_back_exactly(saved):
    config, loaded = hf.load_decoder(saved)
    assert config == CONFIG
    assert all(
        type(leaf) is np.ndarray and leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded)
    )
    assert_trees_equal(loaded, params())


def test_a_transformers_directory_comes_back_exactly(torch_lm, tmp_path):
    torch_lm().save_pretrained(tmp_path / "theirs")
    config, loaded = hf.load_decoder(tmp_path / "theirs")
    hf.save_decoder(tmp_path / "ours", config, loaded, bos_id=1, eos_id=2, pad_id=0)
    theirs, ours = (
        safetensors.numpy.load_file(tmp_path / side / "model.safetensors")
        for side in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_array_equal(theirs[name], ours[name], err_msg=name)
    # Every setting that we do write, other than dropout, says what theirs said.
    theirs, ours = (
        json.loads((tmp_path / side / "config.json").read_text()) for side in ("theirs", "ours")
    )
    assert {k: theirs[k] for k in ours if "pdrop" not in k} == {
        k: v for k, v in ours.items() if "pdrop" not in k
    }


def test_a_classifier_comes_back_exactly_both_ways(torch_classifier, tmp_path):
    model = torch_classifier(id2label={0: "bad", 1: "good", 2: "neither"})
    model.save_pretrained(tmp_path / "theirs")
    config, loaded, labels = hf.load_classifier(tmp_path / "theirs")
    hf.save_classifier(
        tmp_path / "ours", config, loaded, labels, bos_id=None, eos_id=None, pad_id=0
    )
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is transformers.GPT2ForSequenceClassification
    assert again.config.id2label == {0: "bad", 1: "good", 2: "neither"}
    assert again.config.pad_token_id == 0
    expected = model.state_dict()
    for name, tensor in again.state_dict().items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
    config_again, loaded_again, labels_again = hf.load_classifier(tmp_path / "ours")
    assert (config_again, labels_again) == (config, labels)
    assert_trees_equal(loaded_again, loaded)


def test_a_classifier_without_id2label_has_two_labels(torch_classifier, tmp_path):
    torch_classifier(num_labels=2).save_pretrained(tmp_path)
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    _, loaded, labels = hf.load_classifier(tmp_path)
    assert labels == ("LABEL_0", "LABEL_1")
    assert loaded["score"]["kernel"].shape == (24, 2)


# Other layouts of the same weights


def test_shards_load(torch_lm, tmp_path):
    model = torch_lm()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert_trees_equal(hf.load_decoder(tmp_path / "many"), hf.load_decoder(tmp_path / "one"))


def test_the_original_layout_loads(saved):
    """No prefix, buffers in the file, the head written out, few keys in the config."""

    def original(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = np.ones((1, 1, 9, 9), np.uint8)
            tensors[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)

    edit_tensors(saved, original)
    defaults = ("activation_function", "initializer_range", "scale_attn_weights")
    edit_json(saved / "config.json", **dict.fromkeys(defaults, ...))
    config, loaded = hf.load_decoder(saved)
    assert config == CONFIG
    assert_trees_equal(loaded, params())


def test_n_inner_defaults_to_four_widths(tmp_path):
    config = dataclasses.replace(CONFIG, mlp_width=24)
    shapes = jax.eval_shape(functools.partial(decoder.init, config), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes)
    hf.save_decoder(tmp_path, config, zeros, **IDS)
    edit_json(tmp_path / "config.json", n_inner=None)
    assert hf.load_decoder(tmp_path)[0] == config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_cast_to_float32(saved, dtype):
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    halved = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    safetensors.torch.save_file(halved, saved / "model.safetensors", {"format": "pt"})
    _, loaded = hf.load_decoder(saved)
    assert loaded["wte"].dtype == np.float32
    np.testing.assert_array_equal(loaded["wte"], halved[WTE].float())
    assert not np.array_equal(loaded["wte"], params()["wte"])


# Strictness


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(WTE), r"tensors missing: wte\.weight"),
        (lambda t: t.update({"h.2.ln_1.bias": t[WTE]}), r"unexpected: h\.2\.ln_1\.bias"),
        (lambda t: t.update({"wte.weight": t[WTE].copy()}), r"duplicate: wte\.weight"),
        # As many numbers in another order: only the shape tells.
        (
            lambda t: t.update({C_ATTN: np.ascontiguousarray(t[C_ATTN].T)}),
            r"misshapen: h\.1\.attn\.c_attn\.weight \(18, 6\), expected \(6, 18\)",
        ),
        (lambda t: t.update({WTE: t[WTE].astype(np.int32)}), r"other than .*: wte\.weight I32"),
        (lambda t: t.update({"lm_head.weight": t[WTE] + 1}), r"lm_head\.weight differs .* untied"),
        (
            lambda t: t.update({"lm_head.weight": t[WTE][:5]}),
            r"misshapen: lm_head\.weight \(5, 6\)",
        ),
        (lambda t: t.update({"score.weight": t[WTE][:2]}), r"unexpected: score\.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved, change, message):
    edit_tensors(saved, change)
    with pytest.raises(hf.CheckpointError, match=message) as caught:
        hf.load_decoder(saved)
    assert str(saved) in str(caught.value)


def test_several_faults_are_listed_at_once(saved):
    def change(tensors):
        tensors["extra"] = tensors.pop(WTE)
        del tensors[C_ATTN]

    edit_tensors(saved, change)
    message = r"missing: h\.1\.attn\.c_attn\.weight, wte\.weight; unexpected: extra"
    with pytest.raises(hf.CheckpointError, match=message):
        hf.load_decoder(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama': only 'gpt2'"),
        ({"model_type": ...}, "model_type is None: only 'gpt2'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True: only False"),
        ({"add_cross_attention": True}, "add_cross_attention is True: only False"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False: only True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False: only True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"activation_function": "swish"}, "activation_function is 'swish': give one of"),
        ({"n_embd": 7}, "n_embd is 7: give a multiple"),
        ({"n_embd": "6", "n_inner": None}, "n_embd is '6': give an integer"),
        ({"n_inner": 0}, "n_inner is 0: give an integer"),
        ({"n_layer": ..., "n_head": ...}, "missing keys: n_layer, n_head"),
    ],
)
def test_configs_of_other_models_are_refused(saved, changes, message):
    edit_json(saved / "config.json", **changes)
    with pytest.raises(hf.CheckpointError, match=message) as caught:
        hf.load_decoder(saved)
    assert str(saved / "config.json") in str(caught.value)


def test_absent_and_broken_files_are_named(saved, tmp_path):
    with pytest.raises(hf.CheckpointError, match=r"no file .*nowhere/config\.json"):
        hf.load_decoder(tmp_path / "nowhere")
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(hf.CheckpointError, match=r"model\.safetensors cannot be read"):
        hf.load_decoder(saved)
    weights.unlink()
    with pytest.raises(hf.CheckpointError, match=r"no model\.safetensors and no "):
        hf.load_decoder(saved)
    (saved / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(hf.CheckpointError, match=r"only pytorch_model\.bin.*save_pretrained"):
        hf.load_decoder(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(hf.CheckpointError, match=r"config\.json cannot be read as JSON"):
        hf.load_decoder(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(hf.CheckpointError, match="holds a list"):
        hf.load_decoder(saved)


@pytest.fixture
def shards(torch_lm, tmp_path):
    torch_lm().save_pretrained(tmp_path, max_shard_size="10KB")
    return tmp_path, tmp_path / "model.safetensors.index.json"


def test_a_shard_that_is_gone_is_named(shards):
    directory, _ = shards
    first = min(directory.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(hf.CheckpointError, match=f"not there: {first}"):
        hf.load_decoder(directory)


def test_a_tensor_in_two_shards_is_refused(shards):
    directory, _ = shards
    first, *_, last = sorted(directory.glob("*.safetensors"))
    both = safetensors.numpy.load_file(last)
    both[WTE] = safetensors.numpy.load_file(first)[WTE]
    safetensors.numpy.save_file(both, last)
    with pytest.raises(hf.CheckpointError, match=r"duplicate: wte\.weight"):
        hf.load_decoder(directory)


def test_an_index_and_its_shards_must_agree(shards):
    directory, index = shards
    weight_map = json.loads(index.read_text())["weight_map"]
    file = weight_map.pop(WTE)
    edit_json(index, weight_map=weight_map | {"transformer.ghost": file})
    message = r"index names them: transformer\.ghost; unexpected, .*: transformer\.wte\.weight"
    with pytest.raises(hf.CheckpointError, match=message):
        hf.load_decoder(directory)
    edit_json(index, weight_map=[file])
    with pytest.raises(hf.CheckpointError, match="weight_map must map"):
        hf.load_decoder(directory)


@pytest.mark.parametrize("id2label", [{"0": "a", "2": "b"}, {"0": 1, "1": 2}, ["a", "b"], 2])
def test_labels_that_do_not_count_up_are_refused(torch_classifier, tmp_path, id2label):
    torch_classifier().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", id2label=id2label)
    with pytest.raises(hf.CheckpointError, match="id2label is"):
        hf.load_classifier(tmp_path)


def test_a_language_model_is_no_classifier(saved):
    with pytest.raises(hf.CheckpointError, match=r"missing: score\.weight"):
        hf.load_classifier(saved)


# Writing


def test_params_that_do_not_fit_the_config_are_not_written(tmp_path):
    wrong = dict(params(), wte=params()["wte"][:-1], extra=params()["wpe"])
    del wrong["wpe"]
    message = (
        r"decoder/extra unexpected, decoder/wpe missing,"
        r" decoder/wte has shape \(12, 6\), expected \(13, 6\)"
    )
    with pytest.raises(ValueError, match=message):
        hf.save_decoder(tmp_path, CONFIG, wrong, **IDS)
    with pytest.raises(ValueError, match="eos_token_id is 13: give None or an id below"):
        hf.save_decoder(tmp_path, CONFIG, params(), bos_id=None, eos_id=13, pad_id=None)
    head = heads.init_score(CONFIG, 2, jax.random.key(0))
    tree = {"decoder": params(), "score": head}
    with pytest.raises(ValueError, match=r"labels are .*: give a distinct name"):
        hf.save_classifier(tmp_path, CONFIG, tree, ("a", "a"), **IDS)
    with pytest.raises(ValueError, match=r"score/kernel has shape \(6, 2\), expected \(6, 3\)"):
        hf.save_classifier(tmp_path, CONFIG, tree, ("a", "b", "c"), **IDS)
    assert not list(tmp_path.iterdir())


def test_a_crash_leaves_the_old_files_whole(saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    real = safetensors.numpy.save_file

    def torn(tensors, path, metadata):
        real(tensors, path, metadata)
        os.truncate(path, 100)
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", torn)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params())
    with pytest.raises(OSError, match="disk full"):
        hf.save_decoder(saved, CONFIG, doubled, **IDS)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    monkeypatch.undo()
    hf.save_decoder(saved, CONFIG, doubled, **IDS)
    assert_trees_equal(hf.load_decoder(saved)[1], doubled)
    assert {file.name for file in saved.iterdir()} == before.keys()
