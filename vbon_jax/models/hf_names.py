"""What GPT-2 is called in Hugging Face files: tensor names and config.json keys, both ways.

GPT-2's Conv1D stores [in, out], as we do, so each tensor is ours after a reshape; only
`score.weight`, a torch Linear, is transposed.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict

from vbon_jax.models import decoder, heads
from vbon_jax.models.decoder import DecoderConfig, Params

PREFIX = "transformer."  # absent from OpenAI's own gpt2 file

# Hugging Face name, path in our tree, Hugging Face shape; {i} is the layer, our leading axis.
_DECODER_TENSORS = (
    ("wte.weight", "decoder/wte", ("V", "D")),
    ("wpe.weight", "decoder/wpe", ("P", "D")),
    ("h.{i}.ln_1.weight", "decoder/blocks/ln_1/scale", ("D",)),
    ("h.{i}.ln_1.bias", "decoder/blocks/ln_1/bias", ("D",)),
    ("h.{i}.attn.c_attn.weight", "decoder/blocks/attention/qkv/kernel", ("D", "3D")),
    ("h.{i}.attn.c_attn.bias", "decoder/blocks/attention/qkv/bias", ("3D",)),
    ("h.{i}.attn.c_proj.weight", "decoder/blocks/attention/out/kernel", ("D", "D")),
    ("h.{i}.attn.c_proj.bias", "decoder/blocks/attention/out/bias", ("D",)),
    ("h.{i}.ln_2.weight", "decoder/blocks/ln_2/scale", ("D",)),
    ("h.{i}.ln_2.bias", "decoder/blocks/ln_2/bias", ("D",)),
    ("h.{i}.mlp.c_fc.weight", "decoder/blocks/mlp/up/kernel", ("D", "F")),
    ("h.{i}.mlp.c_fc.bias", "decoder/blocks/mlp/up/bias", ("F",)),
    ("h.{i}.mlp.c_proj.weight", "decoder/blocks/mlp/down/kernel", ("F", "D")),
    ("h.{i}.mlp.c_proj.bias", "decoder/blocks/mlp/down/bias", ("D",)),
    ("ln_f.weight", "decoder/ln_f/scale", ("D",)),
    ("ln_f.bias", "decoder/ln_f/bias", ("D",)),
)
_SCORE_TENSOR = ("score.weight", "score/kernel", ("C", "D"))

# Causal masks that old files carry along.
BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

_CONFIG_FIELDS = {
    "vocab_size": "vocab_size",
    "n_positions": "positions",
    "n_layer": "layers",
    "n_embd": "width",
    "n_head": "heads",
}
_CONFIG_DEFAULTS = {  # GPT2Config's own, for keys that a file may leave out
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "activation_function": ("activation", "gelu_new"),
    "initializer_range": ("initializer_range", 0.02),
}
_ONLY_SUPPORTED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "quantization_config": None,
}


class Tensor(NamedTuple):
    """One tensor of a file: its name without prefix, its place in our tree, its shape there."""

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]


def tensors(config: DecoderConfig, num_labels: int | None) -> list[Tensor]:
    """Every tensor of a model; num_labels is None for a language model."""
    sizes = {
        "V": config.vocab_size,
        "P": config.positions,
        "D": config.width,
        "3D": 3 * config.width,
        "F": config.mlp_width,
        "C": num_labels or 0,
    }
    rows = _DECODER_TENSORS + (() if num_labels is None else (_SCORE_TENSOR,))
    return [
        Tensor(name.format(i=i), path, i, tuple(sizes[axis] for axis in shape))
        for name, path, shape in rows
        for i in (range(config.layers) if "{i}" in name else (None,))
    ]


def leaf_shapes(config: DecoderConfig, num_labels: int | None) -> dict[str, tuple[int, ...]]:
    """Shapes of our tree, by path, without making any array."""

    def init(key: jax.Array) -> Params:
        tree = {"decoder": decoder.init(config, key)}
        if num_labels is not None:
            tree["score"] = heads.init_score(config, num_labels, key)
        return tree

    tree = jax.eval_shape(init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def config_from_json(raw: dict[str, Any]) -> DecoderConfig:
    """Returns the configuration that a config.json describes.

    Raises:
      ValueError: naming the key and its value, if the model is not one that we implement.
    """
    if raw.get("model_type") != "gpt2":
        raise ValueError(f"model_type is {raw.get('model_type')!r}: only 'gpt2' is supported")
    for key, supported in _ONLY_SUPPORTED.items():
        if raw.get(key, supported) != supported:
            raise ValueError(f"{key} is {raw[key]!r}: only {supported} is supported")
    if missing := [key for key in _CONFIG_FIELDS if key not in raw]:
        raise ValueError(f"missing keys: {', '.join(missing)}")
    fields = {ours: raw[key] for key, ours in _CONFIG_FIELDS.items()}
    fields |= {ours: raw.get(key, value) for key, (ours, value) in _CONFIG_DEFAULTS.items()}
    fields["mlp_width"] = raw.get("n_inner")
    if fields["mlp_width"] is None and isinstance(raw["n_embd"], int):
        fields["mlp_width"] = 4 * raw["n_embd"]
    try:
        return DecoderConfig(**fields)
    except ValueError as error:
        ours, rest = str(error).split(" ", 1)  # "width is ...": say it by the file's own name
        keys = {ours: key for key, ours in _CONFIG_FIELDS.items()}
        keys |= {ours: key for key, (ours, _) in _CONFIG_DEFAULTS.items()}
        raise ValueError(f"{keys.get(ours, 'n_inner')} {rest}") from None


def config_to_json(config: DecoderConfig, token_ids: dict[str, int | None]) -> dict[str, Any]:
    """Returns the config.json of a configuration, its token ids included.

    Raises:
      ValueError: if an id is outside the vocabulary.
    """
    for name, token_id in token_ids.items():
        if token_id is not None and not 0 <= token_id < config.vocab_size:
            raise ValueError(
                f"{name} is {token_id}: give None or an id below vocab_size, {config.vocab_size}"
            )
    return {
        "model_type": "gpt2",
        "dtype": "float32",
        **{key: getattr(config, ours) for key, ours in _CONFIG_FIELDS.items()},
        **{key: getattr(config, ours) for key, (ours, _) in _CONFIG_DEFAULTS.items()},
        "n_inner": config.mlp_width,
        **{key: value for key, value in _ONLY_SUPPORTED.items() if value is not None},
        # The models are trained without dropout.
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        # null too is written: where the key is absent transformers assumes 50256.
        **token_ids,
    }
