"""Encoder classifiers against transformers' torch models, every parameter random, in odd shapes."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import AutoConfig, AutoModelForSequenceClassification

from vbon_jax.models import encoder, hf
from vbon_jax.models.hf import families

# The epsilon is far from the default, so that it shows; DistilBERT's cannot be set.
SIZES = {
    "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
    "intermediate_size": 40, "max_position_embeddings": 19, "pad_token_id": 2,
    "layer_norm_eps": 3e-2, "initializer_range": 0.2,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": 41, "dim": 20, "n_layers": 2, "n_heads": 5, "hidden_dim": 28,
    "max_position_embeddings": 17, "pad_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip

# (model_type, what differs from transformers' defaults)
CASES = {
    "distilbert": ("distilbert", DISTILBERT),
    "distilbert relu, sinusoidal": (
        "distilbert", DISTILBERT | {"activation": "relu", "sinusoidal_pos_embds": True}
    ),
    "bert": ("bert", SIZES | {"type_vocab_size": 3}),
    "bert gelu_new": (
        "bert",
        SIZES | {"hidden_act": "gelu_new", "num_hidden_layers": 1, "num_attention_heads": 1},
    ),
    "roberta": ("roberta", SIZES | {"type_vocab_size": 1}),
    "roberta padding 0": ("roberta", SIZES | {"pad_token_id": 0, "hidden_size": 30}),
}  # fmt: skip
PAD = 2


def torch_model(case, labels):
    model_type, sizes = CASES[case]
    config = AutoConfig.for_model(model_type, **sizes, num_labels=labels)
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # zero biases, unit scales and a zero padding row would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def from_torch(model):
    """(our config, our parameters) by the family's table, which must name each tensor once."""
    family = families.family(model.config.model_type)
    config = family.config(model.config)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    shapes = jax.eval_shape(
        lambda key: encoder.init(config, model.config.num_labels, key), jax.random.key(0)
    )
    params = {
        path: np.full(leaf.shape, np.nan, leaf.dtype)
        for path, leaf in flatten_dict(shapes, sep="/").items()
    }
    for name, layout, leaves in file_rows(family, config, params):
        assert layout.shape([leaf.shape for leaf in leaves]) == state[name].shape, name
        values = layout.read(state.pop(name), [leaf.shape for leaf in leaves])
        for leaf, value in zip(leaves, values, strict=True):
            leaf[...] = value
    assert not state, f"not in the table: {list(state)}"
    for path, leaf in params.items():
        assert not np.isnan(leaf).any(), f"{path} is not filled by the table"
    return config, unflatten_dict(params, sep="/")


def file_rows(family, config, params):
    """(name in the file, layout, views of the leaves of `params`) for every tensor."""
    body = [("encoder/", family.prefix, row) for row in family.tensors(config)]
    for root, prefix, row in body + [("", "", row) for row in family.classifier]:
        for i in range(config.layers) if "{i}" in row.name else [...]:
            name = prefix + row.name.format(i=i)
            yield name, row.layout, [params[root + path][i] for path in row.paths]


def padded_rows(config, length):
    """Rows of one token to `length`, padded on the right, [4, length]."""
    tokens = np.random.default_rng(3).integers(3, config.vocab_size, (4, length))
    mask = np.arange(length) < np.array([[length], [1], [length - 1], [length // 2]])
    return np.where(mask, tokens, PAD).astype(np.int32), mask


def torch_logits(model, tokens, mask, types=None):
    # RoBERTa finds its positions by the padding id.
    tokens = np.where(mask, tokens, model.config.pad_token_id)
    types = np.zeros_like(tokens) if types is None else types
    ids = [torch.tensor(x, dtype=torch.long) for x in (tokens, mask, types)]
    with torch.no_grad():
        if model.config.model_type == "distilbert":
            return model(*ids[:2]).logits.numpy()
        return model(ids[0], attention_mask=ids[1], token_type_ids=ids[2]).logits.numpy()


score = jax.jit(encoder.score, static_argnums=1)


MODELS = ("distilbert", "bert", "roberta")


@pytest.fixture(
    scope="module",
    params=[(case, 3) for case in CASES] + [(case, 1) for case in MODELS],
    ids=lambda p: f"{p[0]}, {p[1]} labels",
)
def loaded(request):
    """(case, torch model, our config, our parameters)."""
    model = torch_model(*request.param)
    return request.param[0], model, *from_torch(model)


def test_logits_equal_those_of_transformers(loaded):
    case, model, config, params = loaded
    tokens, mask = padded_rows(config, config.positions)
    got = score(params, config, tokens, mask)
    expected = torch_logits(model, tokens, mask)
    assert got.dtype == np.float32 and got.shape == (4, model.config.num_labels)
    difference = np.abs(got - expected).max()
    print(f"| {case} | {model.config.num_labels} | {difference:.1e} | {expected.std():.2f} |")
    assert difference < 1e-4


def test_bfloat16_stays_near(loaded):
    """Within 0.1, where the weights are ten times as wide as usual: bfloat16 has 8 bits."""
    case, model, config, params = loaded
    tokens, mask = padded_rows(config, config.positions)
    got = score(params, dataclasses.replace(config, compute_dtype="bfloat16"), tokens, mask)
    assert got.dtype == np.float32
    difference = np.abs(got - torch_logits(model, tokens, mask))
    print(f"| {case} | {model.config.num_labels} | {difference.max():.1e} |")
    assert 1e-5 < difference.max() < 0.1


def test_every_tensor_is_written_back(loaded):
    _, model, config, params = loaded
    family = families.family(model.config.model_type)
    state = model.state_dict()
    for name, layout, leaves in file_rows(family, config, flatten_dict(params, sep="/")):
        np.testing.assert_array_equal(layout.write(leaves), state[name].numpy())


def test_a_directory_is_read_and_written_back(loaded, tmp_path):
    _, model, config, params = loaded
    model.save_pretrained(tmp_path / "theirs")
    config_read, params_read, labels = hf.load_classifier(tmp_path / "theirs")
    assert config_read == config and len(labels.names) == model.config.num_labels
    jax.tree.map(np.testing.assert_array_equal, params_read, params)
    *_, raw = hf.read_config(tmp_path / "theirs")
    ids = hf.TokenIds(*(raw.get(f"{name}_token_id") for name in ("bos", "eos", "pad")))
    hf.save_classifier(tmp_path / "ours", config, params_read, labels.names, ids=ids, like=raw)
    back, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, mask = padded_rows(config, 7)
    np.testing.assert_array_equal(
        torch_logits(back.eval(), tokens, mask), torch_logits(model, tokens, mask)
    )


@pytest.mark.parametrize("case", ["bert", "roberta padding 0"])
def test_token_types_tell_the_texts_of_a_pair_apart(case):
    model = torch_model(case, 3)
    config, params = from_torch(model)
    tokens, mask = padded_rows(config, 9)
    types = np.random.default_rng(5).integers(0, config.token_types, tokens.shape)
    got = score(params, config, tokens, mask, types)
    np.testing.assert_allclose(got, torch_logits(model, tokens, mask, types), rtol=0, atol=1e-4)
    assert np.abs(got - score(params, config, tokens, mask)).max() > 0.01
    zeros = np.zeros_like(types)
    np.testing.assert_array_equal(
        score(params, config, tokens, mask, zeros), score(params, config, tokens, mask)
    )


@pytest.fixture(scope="module", params=MODELS)
def small(request):
    """(config, parameters) of a family, three labels."""
    return from_torch(torch_model(request.param, 3))


def test_padding_changes_nothing(small):
    config, params = small
    tokens = np.random.default_rng(4).integers(3, config.vocab_size, (1, 5))
    alone = score(params, config, tokens, np.ones((1, 5), bool))
    padded = np.full((3, config.positions + 4), 7)  # any id, and wider than the positions
    mask = np.zeros(padded.shape, bool)
    for row, start in enumerate((0, 3, 3)):
        padded[row, start : start + 5] = tokens
        mask[row, start : start + 5] = True
    padded[2, 9:] = 11
    got = score(params, config, padded, mask)
    np.testing.assert_allclose(got, np.repeat(alone, 3, axis=0), rtol=0, atol=2e-5)
    assert np.isfinite(score(params, config, padded, np.zeros_like(mask))).all()


@pytest.mark.parametrize("bad", [-1, "vocab_size"])
def test_a_token_out_of_range_makes_its_row_nan(small, bad):
    config, params = small
    tokens, mask = padded_rows(config, 6)
    tokens[0, 2] = config.vocab_size if bad == "vocab_size" else bad
    got = score(params, config, tokens, mask)
    assert np.isnan(got[0]).all() and np.isfinite(got[1:]).all()


def test_a_text_past_the_positions_is_nan(small):
    config, params = small
    length = config.positions + 1
    tokens = np.full((2, length), 5)
    mask = np.arange(length) < np.array([[length], [config.positions]])
    got = score(params, config, tokens, mask)
    assert np.isnan(got[0]).all() and np.isfinite(got[1]).all()


def test_token_types_out_of_range_are_nan_and_refused_where_there_are_none():
    config, params = from_torch(torch_model("bert", 1))
    tokens, mask = padded_rows(config, 6)
    types = np.zeros_like(tokens)
    types[0, 1], types[2, 1] = config.token_types, -1
    got = np.isnan(score(params, config, tokens, mask, types))[:, 0]
    assert got.tolist() == [True, False, True, False]
    config, params = from_torch(torch_model("distilbert", 1))
    with pytest.raises(ValueError, match="token_types is 0"):
        encoder.score(params, config, tokens, mask, types)


def test_init_draws_every_weight(small):
    config, params = small
    drawn = jax.jit(encoder.init, static_argnums=(0, 1))(config, 3, jax.random.key(0))
    assert jax.tree.map(np.shape, drawn) == jax.tree.map(np.shape, params)
    flat = flatten_dict(drawn, sep="/")
    for path, leaf in flat.items():
        assert leaf.dtype == np.float32
        if path.endswith("bias"):
            assert not leaf.any(), path
        elif path.endswith("scale"):
            assert (leaf == 1).all(), path
        else:
            assert leaf.std() == pytest.approx(0.2, rel=0.3), path
    draws = [leaf.ravel()[:20].tolist() for path, leaf in flat.items() if leaf.std() > 0]
    assert len({tuple(draw) for draw in draws}) == len(draws)  # no key is used twice
    q = flat["encoder/blocks/attention/q/kernel"]
    assert not np.array_equal(q[0], q[1])
    with pytest.raises(ValueError, match="num_labels is 0"):
        encoder.init(config, 0, jax.random.key(0))


FIELDS = {"vocab_size": 37, "positions": 9, "layers": 1, "width": 8, "heads": 2, "mlp_width": 5,
          "head": "bert"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers is 0: give an integer of at least 1"),
        ({"width": 8.0}, "width is 8.0"),
        ({"heads": 3}, "width is 8: give a multiple of heads, 3"),
        ({"token_types": -1}, "token_types is -1: give an integer of at least 0"),
        ({"position_offset": True}, "position_offset is True"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0: give a positive number"),
        ({"initializer_range": float("nan")}, "initializer_range is nan"),
        ({"activation": "swish"}, "activation is 'swish': give one of"),
        ({"head": "gpt2"}, "head is 'gpt2': give one of ['bert', 'roberta', 'distilbert']"),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16': give one of"),
    ],
)
def test_a_config_is_validated(change, message):
    encoder.EncoderConfig(**FIELDS)
    with pytest.raises(ValueError, match=re.escape(message)):
        encoder.EncoderConfig(**FIELDS | change)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("bert", {"position_embedding_type": "relative_key"},
         "position_embedding_type is 'relative_key': only 'absolute'"),
        ("roberta", {"position_embedding_type": "relative_key_query"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder is True: only False"),
        ("roberta", {"is_decoder": True}, "is_decoder is True: only False"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("bert", {"hidden_act": "quick_gelu"}, "activation is 'quick_gelu': give one of"),
        ("distilbert", {"activation": "mish"}, "activation is 'mish': give one of"),
        ("roberta", {"pad_token_id": None}, "pad_token_id is None"),
        ("roberta", {"max_position_embeddings": 3}, "max_position_embeddings is 3"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(case, change, message):
    model_type, sizes = CASES[case]
    with pytest.raises(ValueError, match=message):
        families.family(model_type).config(AutoConfig.for_model(model_type, **sizes | change))


@pytest.mark.parametrize(
    ("model_type", "carried"),
    [
        ("bert", ["embeddings.position_ids"]),
        ("distilbert", ["embeddings.position_ids"]),
        ("roberta", ["embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"]),
    ],
)
def test_what_old_files_carry_along_is_known(model_type, carried):
    family = families.family(model_type)
    assert all(re.fullmatch(family.buffers, name) for name in carried)
    model = torch_model(model_type, 1)
    names = [name.removeprefix(family.prefix) for name in model.state_dict()]
    assert not any(re.fullmatch(family.buffers, name) for name in names)
    assert type(model).__name__ == family.sequence
