"""Adapters we write against the package peft on transformers' torch models, in odd shapes."""

import dataclasses
import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft as torch_peft
import pytest
import safetensors.numpy
import torch
import transformers

from vbon_jax.errors import InputError
from vbon_jax.models import decoder, hf, trainable
from vbon_jax.models.hf import peft

SIZES = {
    "vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 18, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
GQA = {"num_key_value_heads": 2, "head_dim": 6}
TWO_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
MODELS = {
    "gpt2": {
        "vocab_size": 31, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": 20, "n_positions": 16,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
    },
    "gpt_neox": SIZES | {"rotary_pct": 0.5},
    "llama": SIZES | GQA,
    "gemma3_text": SIZES | GQA | {
        "sliding_window": 3, "query_pre_attn_scalar": 7, "rope_parameters": TWO_BASES,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip
GATED = ("q", "k", "v", "out", "gate", "up", "down")
PLAIN = ("q", "k", "v", "out", "up", "down")
CASES = [
    ("gpt2", ("q", "k", "v")),
    ("gpt2", ("q", "v")),
    ("gpt2", ("k",)),
    ("gpt2", ("out", "up", "down")),
    ("gpt2", PLAIN),
    ("gpt_neox", ("q", "k", "v")),
    ("gpt_neox", ("k", "v")),
    ("gpt_neox", PLAIN),
    ("llama", GATED),
    ("llama", ("q", "v")),
    ("gemma3_text", GATED),
]
RANK, ALPHA = 3, 5.5  # alpha is no multiple of the rank, and no integer
TOKENS = np.random.default_rng(3).integers(3, 31, (3, 9)).astype(np.int32)
MASK = np.ones(TOKENS.shape, bool)


@functools.cache
def torch_model(model_type):
    config = transformers.AutoConfig.for_model(model_type, **MODELS[model_type])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """base_of(model_type): (directory, our config with ALPHA, our parameters)."""

    @functools.cache
    def make(model_type):
        directory = tmp_path_factory.mktemp(model_type)
        torch_model(model_type).save_pretrained(directory)
        config, params = hf.load_decoder(directory)
        return directory, dataclasses.replace(config, lora_alpha=ALPHA), params

    return make


def adapters(params, targets, rank=RANK, dtype="float32"):
    """Adapters with every value random, as after training."""
    what = trainable.Trainable(rank=rank, targets=targets)
    own = trainable.start(params, what, jax.random.key(1), dtype)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), own)


hidden = jax.jit(decoder.hidden, static_argnums=1)


def our_logits(params, config):
    return np.asarray(decoder.logits(params, config, hidden(params, config, TOKENS, MASK)))


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def assert_trees_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture
def written(base_of, tmp_path):
    """(a directory of GPT-2's q and v and out, its adapters, config)."""
    base, config, params = base_of("gpt2")
    own = adapters(params, ("q", "v", "out"))
    peft.save(tmp_path, own, ALPHA, base=base, config=config)
    return tmp_path, own, config


@pytest.mark.parametrize(("model_type", "targets"), CASES)
def test_peft_gives_our_logits_and_it_comes_back_exactly(model_type, targets, base_of, tmp_path):
    base, config, params = base_of(model_type)
    own = adapters(params, targets)
    peft.save(tmp_path, own, ALPHA, base=base, config=config)
    assert sorted(os.listdir(tmp_path)) == [peft.CONFIG, peft.WEIGHTS]

    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    without = torch_logits(model)
    model = torch_peft.PeftModel.from_pretrained(model, str(tmp_path))
    loaded = torch_peft.get_peft_model_state_dict(model)
    assert loaded.keys() == safetensors.numpy.load_file(tmp_path / peft.WEIGHTS).keys()
    expected = torch_logits(model)
    got = our_logits(trainable.join(params, own), config)
    assert np.abs(expected - without).mean() > 0.1  # the adapters do something
    difference = np.abs(got - expected).max()
    print(f"| {model_type} | {' '.join(targets)} | {difference:.1e} |")
    assert difference < 1e-4

    back, alpha = peft.load(tmp_path, config)
    assert alpha == ALPHA
    assert_trees_equal(back, own)


def test_transformers_finds_the_base_by_the_adapters_alone(written, base_of):
    directory, own, config = written
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    got = our_logits(trainable.join(base_of("gpt2")[2], own), config)
    np.testing.assert_allclose(got, torch_logits(model), rtol=0, atol=1e-4)


def test_a_base_of_the_hub_is_named_as_there_and_found_again(base_of, tmp_path, monkeypatch):
    """A hub cache made by hand: peft, transformers and we find the base by name and commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--some--tiny" / "snapshots" / commit
    directory, config, params = base_of("gpt2")
    shutil.copytree(directory, snapshot)
    refs = tmp_path / "hub" / "models--some--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    own = adapters(params, ("q", "v"))
    peft.save(tmp_path / "out", own, ALPHA, base="some/tiny", config=config)
    raw = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
    assert (raw["base_model_name_or_path"], raw["revision"]) == ("some/tiny", commit)
    assert_trees_equal(peft.load(tmp_path / "out", config)[0], own)
    model = torch_peft.AutoPeftModelForCausalLM.from_pretrained(
        str(tmp_path / "out"), cache_dir=str(tmp_path / "hub"), local_files_only=True
    )
    got = our_logits(trainable.join(params, own), config)
    np.testing.assert_allclose(got, torch_logits(model), rtol=0, atol=1e-4)


def test_a_base_in_a_directory_is_named_by_its_absolute_path(base_of, tmp_path, monkeypatch):
    directory, config, params = base_of("gpt2")
    monkeypatch.chdir(directory.parent)
    own = adapters(params, ("q",))
    peft.save(tmp_path / "out", own, ALPHA, base=directory.name, config=config)
    monkeypatch.chdir(tmp_path)
    raw = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
    assert (raw["base_model_name_or_path"], raw["revision"]) == (str(directory), None)
    assert_trees_equal(peft.load(tmp_path / "out", config)[0], own)


def test_the_adapter_config_of_gpt2(written, base_of):
    raw = json.loads((written[0] / peft.CONFIG).read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 5.5,
        "target_modules": ["attn.c_proj", "c_attn"],  # the MLP has a c_proj of its own
        "rank_pattern": {"c_attn": 6},
        "alpha_pattern": {"c_attn": 11},
        "fan_in_fan_out": True,
        "bias": "none",
        "base_model_name_or_path": str(base_of("gpt2")[0]),
    }
    assert {key: raw[key] for key in expected} == expected


def test_the_stack_of_gpt2_by_hand(written):
    directory, own, _ = written
    tensors = safetensors.numpy.load_file(directory / peft.WEIGHTS)
    name = "base_model.model.transformer.h.1.attn.c_attn"
    a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    q, v = (own["blocks"]["attention"][x] for x in "qv")
    np.testing.assert_array_equal(a[:3], q["lora_a"][1].T)
    np.testing.assert_array_equal(a[3:], v["lora_a"][1].T)
    expected = np.zeros((36, 6), np.float32)
    expected[:12, :3] = q["lora_b"][1].T
    expected[24:, 3:] = v["lora_b"][1].T
    np.testing.assert_array_equal(b, expected)


def test_a_module_for_each_projection_needs_no_pattern(base_of, tmp_path):
    base, config, params = base_of("llama")
    peft.save(tmp_path, adapters(params, ("q", "down")), 4.0, base=base, config=config)
    raw = json.loads((tmp_path / peft.CONFIG).read_text())
    assert raw["target_modules"] == ["down_proj", "q_proj"]
    assert raw["rank_pattern"] == raw["alpha_pattern"] == {}
    assert raw["fan_in_fan_out"] is False
    assert raw["lora_alpha"] == 4 and type(raw["lora_alpha"]) is int


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_untrained_adapters_keep_targets_and_dtype(dtype, base_of, tmp_path):
    """B is 0, so nothing but the file's own word says whose a stack is."""
    base, config, params = base_of("gpt_neox")
    what = trainable.Trainable(rank=2, targets=("k", "v"))
    own = trainable.start(params, what, jax.random.key(1), dtype)
    peft.save(tmp_path, own, ALPHA, base=base, config=config)
    back, _ = peft.load(tmp_path, config)
    assert_trees_equal(back, own)
    assert {x.dtype.name for x in jax.tree.leaves(back)} == {dtype}


def test_host_arrays_are_written_alike_and_another_base_is_read_by_name(written, base_of, tmp_path):
    directory, own, config = written
    base = base_of("gpt2")[0]
    peft.save(tmp_path / "b", jax.tree.map(np.asarray, own), ALPHA, base=base, config=config)
    assert_trees_equal(
        *(safetensors.numpy.load_file(path / peft.WEIGHTS) for path in (tmp_path / "b", directory))
    )
    edit(directory, base_model_name_or_path="/moved")
    with pytest.raises(hf.CheckpointError, match="/moved"):
        peft.load(directory, config)
    assert_trees_equal(peft.load(directory, config, base=base)[0], own)


def test_a_failure_to_write_leaves_the_old_files_and_no_others(written, base_of, monkeypatch):
    directory, own, config = written
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    refused = pytest.raises(InputError, match=r"adapter_model.*disk full")
    with monkeypatch.context() as patched, refused:
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        other = jax.tree.map(jnp.zeros_like, own)
        peft.save(directory, other, ALPHA, base=base_of("gpt2")[0], config=config)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


# Refusals


def change(path, value):
    """A change to one leaf of attention's q."""

    def apply(own):
        own["blocks"]["attention"]["q"][path] = value(own["blocks"]["attention"]["q"][path])

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda own: own["blocks"]["attention"]["q"].pop("lora_b"), "attention/q/lora_b missing"),
        (change("lora_b", lambda x: x[:, :, 1:]),
         r"attention/q/lora_b has shape \(2, 3, 11\), expected \(2, 3, 12\)"),
        (change("lora_a", lambda x: x[:, :, :2]), r"not of ranks \[2, 3\]"),
        (change("lora_a", lambda x: x.astype(jnp.bfloat16)),
         r"dtypes are \['bfloat16', 'float32'\]"),
        (change("lora_a", lambda x: x.astype(jnp.float16)), r"dtypes are \['float16', 'float32'\]"),
        (lambda own: own["blocks"].update(ln_1={"scale": jnp.ones((2, 12))}),
         "blocks/ln_1/scale unexpected"),
        (lambda own: own.clear(), r"not of ranks \[\]"),
    ],
)  # fmt: skip
def test_what_are_no_adapters_of_the_model_is_not_written(spoil, message, base_of, tmp_path):
    base, config, params = base_of("gpt2")
    own = jax.tree.map(jnp.array, adapters(params, ("q", "v")))
    spoil(own)
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path / "out", own, ALPHA, base=base, config=config)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused(written, base_of, tmp_path):
    directory, own, config = written
    base = base_of("gpt2")[0]
    for alpha in (0.0, float("nan")):
        with pytest.raises(ValueError, match="alpha is "):
            peft.save(tmp_path / "out", own, alpha, base=base, config=config)
    for other in (dataclasses.replace(config, layers=3), base_of("llama")[1]):
        with pytest.raises(
            ValueError, match=r"describes another model than config: .*layers 2|norm"
        ):
            peft.save(tmp_path / "out", own, ALPHA, base=base, config=other)
        with pytest.raises(ValueError, match="describes another model than config"):
            peft.load(directory, other)
    # How to compute is no part of the model.
    arithmetic = dataclasses.replace(config, compute_dtype="bfloat16", remat="full", lora_alpha=2.0)
    peft.save(tmp_path / "out", own, ALPHA, base=base, config=arithmetic)
    with pytest.raises(hf.CheckpointError, match="holds a whole model"):
        peft.save(base, own, ALPHA, base=base, config=config)


def edit(directory, **changes):
    path = directory / peft.CONFIG
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 2}, r"rank_pattern is \{'c_attn': 6\}, expected \{'c_attn': 4\}"),
        ({"r": 0}, "r is 0: an integer of at least 1"),
        ({"r": ...}, "r is None"),
        ({"lora_alpha": "8"}, "lora_alpha is '8': a positive number"),
        ({"lora_alpha": 4}, r"alpha_pattern is \{'c_attn': 11\}, expected \{'c_attn': 8\}"),
        ({"target_modules": ["c_attn"]}, r"target_modules is \['c_attn'\], expected"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"use_rslora": True}, "use_rslora is True, expected False"),
        ({"bias": ...}, "bias is None, expected 'none'"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
    ],
)
def test_a_config_that_save_does_not_write_is_refused(written, changes, message):
    directory, _, config = written
    edit(directory, **changes)
    with pytest.raises(hf.CheckpointError, match=f"{peft.CONFIG}: .*{message}"):
        peft.load(directory, config)


Q = "base_model.model.transformer.h.0.attn.c_attn"
OUT = "base_model.model.transformer.h.1.attn.c_proj"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(f"{OUT}.lora_A.weight"), "c_proj.lora_A.weight missing"),
        (lambda t: t.update(x=np.zeros(1, np.float32)), "x unexpected"),
        (lambda t: t.update({f"{OUT}.lora_A.weight": t[f"{OUT}.lora_A.weight"][:2]}),
         r"has shape \(2, 12\), expected \(3, 12\)"),
        (lambda t: t.update({f"{OUT}.lora_A.weight": np.zeros((3, 12))}),
         r"dtypes are \['float32', 'float64'\]"),
        (lambda t: t[f"{Q}.lora_B.weight"].__setitem__((13, 0), 1.0),  # k has no adapter
         "is not a stack of adapters on q, v, out"),
        (lambda t: t[f"{Q}.lora_B.weight"].__setitem__((0, 4), 1.0),  # v's rank, q's output
         "is not a stack of adapters on q, v, out"),
    ],
)  # fmt: skip
def test_tensors_that_save_does_not_write_are_refused(written, spoil, message):
    directory, _, config = written
    file = directory / peft.WEIGHTS
    tensors = safetensors.numpy.load_file(file)
    spoil(tensors)
    safetensors.numpy.save_file(tensors, file, {"targets": "q,v,out"})
    with pytest.raises(hf.CheckpointError, match=f"{peft.WEIGHTS}: .*{message}"):
        peft.load(directory, config)


def test_files_that_are_no_adapters_are_refused(written):
    directory, _, config = written
    file = directory / peft.WEIGHTS
    tensors = safetensors.numpy.load_file(file)
    for metadata, message in (
        ({"format": "pt"}, "names no targets"),
        ({"targets": "q,gate"}, "LoRA target 'gate': the model has"),
    ):
        safetensors.numpy.save_file(tensors, file, metadata)
        with pytest.raises(hf.CheckpointError, match=message):
            peft.load(directory, config)
    file.write_bytes(b"no")
    with pytest.raises(hf.CheckpointError, match="cannot be read as safetensors"):
        peft.load(directory, config)
    file.unlink()
    with pytest.raises(hf.CheckpointError, match="cannot be read as safetensors"):
        peft.load(directory, config)
    (directory / peft.CONFIG).write_text("[]")
    with pytest.raises(hf.CheckpointError, match="holds a list"):
        peft.load(directory, config)
    (directory / peft.CONFIG).unlink()
    with pytest.raises(hf.CheckpointError, match=r"no file .*adapter_config.json"):
        peft.load(directory, config)
