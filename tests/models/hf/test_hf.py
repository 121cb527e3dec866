import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft as torch_peft
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from vbon_jax import sharding
from vbon_jax.models import decoder, heads, hf
from vbon_jax.models.hf import tensor_files

CONFIG = decoder.DecoderConfig(
    vocab_size=13, positions=9, layers=2, width=6, heads=3, mlp_width=10, norm_eps=1e-4
)
IDS = hf.TokenIds(None, 2, 0)
WTE = "transformer.wte.weight"
C_ATTN = "transformer.h.1.attn.c_attn.weight"


@functools.cache
def params():
    return jax.jit(functools.partial(decoder.init, CONFIG))(jax.random.key(5))


@pytest.fixture
def saved(tmp_path):
    """A language model directory of ours."""
    hf.save_decoder(tmp_path, CONFIG, params(), ids=IDS)
    return tmp_path


LLAMA = {
    "vocab_size": 13, "hidden_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 10, "max_position_embeddings": 9,
    "pad_token_id": 0,
}  # fmt: skip
ENCODER = {
    "vocab_size": 13, "dim": 6, "n_layers": 2, "n_heads": 3, "hidden_dim": 10,
    "max_position_embeddings": 9,
}  # fmt: skip
BERT = {
    "vocab_size": 13, "hidden_size": 6, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 10, "max_position_embeddings": 9,
}  # fmt: skip


GPT2 = {
    "vocab_size": 13, "n_embd": 6, "n_layer": 2, "n_head": 3, "n_positions": 9, "pad_token_id": 0,
}  # fmt: skip


def theirs(model_type, sizes, classifier=None, **changes):
    """A torch model of transformers with every parameter random."""
    classifier = "dim" in sizes if classifier is None else classifier
    auto = transformers.AutoModelForSequenceClassification if classifier else (
        transformers.AutoModelForCausalLM
    )  # fmt: skip
    model = auto.from_config(transformers.AutoConfig.for_model(model_type, **sizes, **changes))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def edit_json(path, **changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


def edit_tensors(directory, change):
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def assert_files_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def assert_trees_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


# Round trips


@pytest.mark.parametrize("shard_bytes", [10**9, 500])
def test_our_directory_loads_in_transformers(saved, shard_bytes):
    hf.save_decoder(saved, CONFIG, params(), ids=IDS, shard_bytes=shard_bytes)
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
    for leaf in jax.tree.leaves(loaded):
        assert isinstance(leaf, jax.Array)
        assert (leaf.dtype, leaf.weak_type, leaf.committed) == (np.float32, False, False)
    assert_trees_equal(loaded, params())


def test_a_transformers_directory_comes_back_exactly(torch_lm, tmp_path):
    torch_lm().save_pretrained(tmp_path / "theirs")
    config, loaded = hf.load_decoder(tmp_path / "theirs")
    hf.save_decoder(tmp_path / "ours", config, loaded, ids=hf.TokenIds(1, 2, 0))
    theirs, ours = (
        safetensors.numpy.load_file(tmp_path / side / "model.safetensors")
        for side in ("theirs", "ours")
    )
    assert_files_equal(theirs, ours)
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
        tmp_path / "ours", config, loaded, labels.names, ids=hf.TokenIds(None, None, 0)
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


def rewritten(directory, **changes):
    """Changes keys of a config.json; ... removes one."""
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


@pytest.mark.parametrize("sizes", ["gpt2", "bert"])
def test_rows_of_scores_that_config_json_does_not_name_are_refused(sizes, tmp_path):
    """A score row each, of a decoder's head and of an encoder's: transformers would assume two."""
    changes = {"id2label": ..., "label2id": ..., "num_labels": ...}
    model = {
        "gpt2": lambda n: theirs("gpt2", GPT2, True, num_labels=n),
        "bert": lambda n: theirs("bert", BERT, True, num_labels=n),
    }[sizes]
    for rows in (1, 3):
        model(rows).save_pretrained(tmp_path)
        rewritten(tmp_path, **changes)
        message = rf"config\.json: id2label and num_labels are missing.* says 2, .*have {rows} rows"
        with pytest.raises(hf.CheckpointError, match=message):
            hf.load_classifier(tmp_path)
        rewritten(tmp_path, num_labels=rows + 1)
        with pytest.raises(hf.CheckpointError, match=rf"num_labels says {rows + 1}, .*{rows} rows"):
            hf.load_classifier(tmp_path)
        rewritten(tmp_path, num_labels=rows)  # the remedy
        assert len(hf.load_classifier(tmp_path)[2].names) == rows


def test_problem_type_is_read_and_written_back(tmp_path):
    problem = "multi_label_classification"
    model = theirs("bert", BERT, True, num_labels=3, problem_type=problem)
    model.save_pretrained(tmp_path / "theirs")
    config, loaded, labels = hf.load_classifier(tmp_path / "theirs")
    assert labels.independent and labels.names == ("LABEL_0", "LABEL_1", "LABEL_2")
    *_, raw = hf.read_config(tmp_path / "theirs")
    ids = hf.TokenIds(None, None, 0)
    hf.save_classifier(tmp_path / "ours", config, loaded, labels.names, ids=ids, like=raw)
    assert hf.load_classifier(tmp_path / "ours")[2] == labels
    back = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert back.problem_type == problem


@pytest.mark.parametrize("kind", ["decoder", "classifier"])
def test_an_adapter_beside_the_weights_is_refused_until_it_is_removed(kind, tmp_path):
    """transformers reads base and adapter from such a directory, so ours alone would be another."""
    load = {"decoder": hf.load_decoder, "classifier": hf.load_classifier}[kind]
    model = theirs("gpt2", GPT2, kind == "classifier")
    adapter = torch_peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    torch_peft.get_peft_model(model, adapter).save_pretrained(tmp_path)
    names = ("adapter_config.json", "adapter_model.safetensors")
    message = r"holds an adapter alone \(adapter_config\.json and adapter_model.*merge_and_unload"
    with pytest.raises(hf.CheckpointError, match=message):
        load(tmp_path)
    theirs("gpt2", GPT2, kind == "classifier").save_pretrained(tmp_path)
    message = "holds a whole model and an adapter .*merge_and_unload.* or remove the adapter's"
    with pytest.raises(hf.CheckpointError, match=message):
        load(tmp_path)
    (tmp_path / names[0]).unlink()
    with pytest.raises(hf.CheckpointError, match=r"an adapter \(adapter_model\.safetensors\)"):
        load(tmp_path)
    (tmp_path / names[1]).unlink()
    load(tmp_path)


def test_a_merged_adapter_is_read_as_peft_merged_it(tmp_path):
    """The remedy that the refusal names."""
    tokens = np.array([[3, 4, 5, 6]])
    model = theirs("gpt2", GPT2)
    adapter = torch_peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    with torch.no_grad():
        before = model(torch.tensor(tokens)).logits.numpy()
        merged = torch_peft.get_peft_model(model, adapter).merge_and_unload()
        expected = merged(torch.tensor(tokens)).logits.numpy()
    merged.save_pretrained(tmp_path)
    config, loaded = hf.load_decoder(tmp_path)
    hidden = decoder.hidden(loaded, config, tokens, np.ones(tokens.shape, bool))
    got = np.asarray(decoder.logits(loaded, config, hidden))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    assert np.abs(expected - before).max() > 0.01


def test_a_classifier_without_id2label_has_two_labels(torch_classifier, tmp_path):
    torch_classifier(num_labels=2).save_pretrained(tmp_path)
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    _, loaded, labels = hf.load_classifier(tmp_path)
    assert labels == hf.Labels(("LABEL_0", "LABEL_1"))
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
        (
            lambda t: t.update({"lm_head.weight": t[WTE] + 1}),
            r"lm_head\.weight differs from wte\.weight, .* untied",
        ),
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


def test_models_of_another_kind_are_refused(saved, torch_classifier, tmp_path):
    message = (
        r"config\.json: architectures is \['GPT2LMHeadModel'\]: a GPT2ForSequence\w+ is needed"
    )
    with pytest.raises(hf.CheckpointError, match=message):
        hf.load_classifier(saved)
    edit_json(saved / "config.json", architectures=...)
    with pytest.raises(hf.CheckpointError, match=r"missing: score\.weight"):
        hf.load_classifier(saved)
    torch_classifier().save_pretrained(tmp_path / "classifier")
    with pytest.raises(hf.CheckpointError, match="a GPT2LMHeadModel is needed here"):
        hf.load_decoder(tmp_path / "classifier")
    theirs("distilbert", ENCODER).save_pretrained(tmp_path / "encoder")
    with pytest.raises(hf.CheckpointError, match="model_type is 'distilbert', an encoder"):
        hf.load_decoder(tmp_path / "encoder")


# Writing


def test_params_that_do_not_fit_the_config_are_not_written(tmp_path):
    wrong = dict(params(), wte=params()["wte"][:-1], extra=params()["wpe"])
    del wrong["wpe"]
    message = (
        r"decoder/extra unexpected, decoder/wpe missing,"
        r" decoder/wte has shape \(12, 6\), expected \(13, 6\)"
    )
    with pytest.raises(ValueError, match=message):
        hf.save_decoder(tmp_path, CONFIG, wrong, ids=IDS)
    with pytest.raises(ValueError, match="eos_token_id is 13: give None or an id below"):
        hf.save_decoder(tmp_path, CONFIG, params(), ids=hf.TokenIds(None, 13, None))
    head = heads.init_score(CONFIG, 2, jax.random.key(0))
    tree = {"decoder": params(), "score": head}
    with pytest.raises(ValueError, match=r"labels are .*: give a distinct name"):
        hf.save_classifier(tmp_path, CONFIG, tree, ("a", "a"), ids=IDS)
    with pytest.raises(ValueError, match=r"score/kernel has shape \(6, 2\), expected \(6, 3\)"):
        hf.save_classifier(tmp_path, CONFIG, tree, ("a", "b", "c"), ids=IDS)
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_written_as_it_is(tmp_path):
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())
    hf.save_decoder(tmp_path, CONFIG, halved, ids=IDS)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert_trees_equal(hf.load_decoder(tmp_path, dtype="bfloat16")[1], halved)


def test_sharded_parameters_are_written(tmp_path):
    """The same bytes as unsharded ones, a piece at a time."""
    hf.save_decoder(tmp_path / "whole", EVEN, even(), ids=IDS)
    placed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(
            leaf, place("decoder/" + sharding.path_of(path), leaf.shape)
        ),
        even(),
    )
    assert len(placed["wte"].sharding.device_set) == 8
    hf.save_decoder(tmp_path / "sharded", EVEN, placed, ids=IDS)
    first, second = (
        (tmp_path / side / "model.safetensors").read_bytes() for side in ("whole", "sharded")
    )
    assert first == second


# `like`: the config.json a model came with


def test_like_keeps_its_own_settings(tmp_path):
    theirs("llama", LLAMA).save_pretrained(tmp_path / "theirs")
    own = {"pretraining_tp": 2, "a_key_of_theirs": {"x": [1]}, "torch_dtype": "float16"}
    edit_json(tmp_path / "theirs" / "config.json", **own, dtype=..., eos_token_id=[7, 8])
    _, _, raw = hf.read_config(tmp_path / "theirs")
    before = json.dumps(raw)
    config, loaded = hf.load_decoder(tmp_path / "theirs")
    changed = dataclasses.replace(config, compute_dtype="bfloat16", remat="full")
    hf.save_decoder(tmp_path / "ours", changed, loaded, ids=hf.TokenIds(1, 2, 0), like=raw)
    assert json.dumps(raw) == before
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "torch_dtype" not in written
    assert written == {
        **{key: value for key, value in raw.items() if key != "torch_dtype"},
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    assert_trees_equal(hf.load_decoder(tmp_path / "ours")[1], loaded)


def test_an_untied_head_comes_back(tmp_path):
    model = theirs("llama", LLAMA)
    model.save_pretrained(tmp_path)
    config, loaded = hf.load_decoder(tmp_path)
    assert not config.tied
    np.testing.assert_array_equal(loaded["head"], model.lm_head.weight.detach())
    _, _, raw = hf.read_config(tmp_path)
    hf.save_decoder(tmp_path / "ours", config, loaded, ids=IDS, like=raw)
    assert_files_equal(
        safetensors.numpy.load_file(tmp_path / "model.safetensors"),
        safetensors.numpy.load_file(tmp_path / "ours" / "model.safetensors"),
    )
    edit_tensors(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(hf.CheckpointError, match=r"missing: lm_head\.weight"):
        hf.load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("llama", "LLAMA"), ("distilbert", "ENCODER"), ("bert", "BERT"), ("roberta", "BERT")],
)
def test_classifiers_of_families_come_back(model_type, sizes, tmp_path):
    """One label, a scalar reward; names with and without prefix as the family has it."""
    model = theirs(model_type, globals()[sizes] | {"num_labels": 1}, classifier=True)
    model.save_pretrained(tmp_path / "theirs")
    config, loaded, labels = hf.load_classifier(tmp_path / "theirs")
    assert labels == hf.Labels(("LABEL_0",), "regression")
    assert "head" not in loaded.get("decoder", {})
    _, _, raw = hf.read_config(tmp_path / "theirs")
    ids = hf.TokenIds(None, None, 1 if model_type == "roberta" else 0)
    hf.save_classifier(tmp_path / "ours", config, loaded, ("reward",), ids=ids, like=raw)
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(model)
    assert again.config.id2label == {0: "reward"}
    files = (
        safetensors.numpy.load_file(tmp_path / side / "model.safetensors")
        for side in ("theirs", "ours")
    )
    assert_files_equal(*files)


# Streaming


EVEN = decoder.DecoderConfig(vocab_size=16, positions=9, layers=2, width=8, heads=2, mlp_width=16)


@functools.cache
def even():
    return jax.jit(functools.partial(decoder.init, EVEN))(jax.random.key(6))


@functools.cache
def mesh():
    return sharding.make_mesh(fsdp=4, tensor=2)


def place(path, shape):
    return jax.sharding.NamedSharding(mesh(), sharding.spec_for(path, shape, mesh()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_leaves_arrive_on_their_devices(tmp_path, monkeypatch, dtype):
    hf.save_decoder(tmp_path, EVEN, even(), ids=IDS, shard_bytes=1000)
    monkeypatch.setattr(tensor_files, "PIECE", 48)  # some rows
    _, loaded = hf.load_decoder(tmp_path, place=place, dtype=dtype)
    assert_trees_equal(loaded, jax.tree.map(lambda leaf: leaf.astype(dtype), even()))
    for path, leaf in jax.tree_util.tree_leaves_with_path(loaded):
        assert leaf.sharding == place("decoder/" + sharding.path_of(path), leaf.shape)
        assert leaf.dtype == dtype
    assert {s.data.shape for s in loaded["wte"].addressable_shards} == {(8, 2)}
    assert_trees_equal(hf.load_decoder(tmp_path, dtype=dtype)[1], loaded)


def test_a_large_table_is_read_by_rows(saved, monkeypatch):
    """The embedding, its tied head beside it: never the whole of either."""
    edit_tensors(saved, lambda t: t.update({"lm_head.weight": t[WTE].copy()}))
    read, real = [], tensor_files.read_rows

    def counted(found, start, stop):
        read.append((found.shape, stop - start))
        return real(found, start, stop)

    monkeypatch.setattr(tensor_files, "read_rows", counted)
    monkeypatch.setattr(tensor_files, "PIECE", 3 * 6 * 4)
    assert_trees_equal(hf.load_decoder(saved)[1], params())
    assert {rows for shape, rows in read if shape == (13, 6)} <= {1, 2, 3}


def test_one_device_of_many(saved):
    device = jax.devices()[3]
    _, loaded = hf.load_decoder(
        saved, place=lambda path, shape: jax.sharding.SingleDeviceSharding(device)
    )
    assert {leaf.device for leaf in jax.tree.leaves(loaded)} == {device}
    assert_trees_equal(loaded, params())


def test_placements_and_dtypes_we_cannot_do_are_refused(saved):
    spec = jax.sharding.PartitionSpec("tensor")
    by_layer = jax.sharding.NamedSharding(mesh(), spec)

    def place(path, shape):
        return (
            by_layer if "blocks" in path else jax.sharding.NamedSharding(mesh(), spec.__class__())
        )

    with pytest.raises(ValueError, match="for layers: their axis must not be sharded"):
        hf.load_decoder(saved, place=place)
    with pytest.raises(ValueError, match="dtype is 'float16': give one of"):
        hf.load_decoder(saved, dtype="float16")


def test_a_whole_model_takes_the_place_of_an_adapter(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    hf.save_decoder(tmp_path, CONFIG, params(), ids=IDS)
    assert not list(tmp_path.glob("adapter*"))
