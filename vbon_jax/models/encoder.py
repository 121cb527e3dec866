"""Sequence classifiers with a bidirectional encoder: BERT, RoBERTa and DistilBERT.

Shape suffixes: B batch, T tokens, S keys, D width, H heads, K head width, F MLP width, V vocabulary
size, L layers, C labels.

The parameter tree, with block parameters stacked over a leading layer axis:

    encoder/wte [V, D]    encoder/wpe [position_offset + positions, D]
    encoder/wtt [token_types, D] (BERT and RoBERTa)    encoder/ln_embed/{scale, bias} [D]
    encoder/blocks/attention/{q, k, v}/{kernel [L, D, H, K], bias [L, H, K]}
    encoder/blocks/attention/out/{kernel [L, H, K, D], bias [L, D]}
    encoder/blocks/ln_1/{scale, bias} [L, D]    encoder/blocks/ln_2/{scale, bias} [L, D]
    encoder/blocks/mlp/up/{kernel [L, D, F], bias [L, F]}
    encoder/blocks/mlp/down/{kernel [L, F, D], bias [L, D]}
    score/dense/{kernel [D, D], bias [D]} (in BERT encoder/pooler, which its files count as body)
    score/out/{kernel [D, C], bias [C]}

Activations are in ``config.compute_dtype``; layer-norm statistics, softmax and the head are
float32.

Devlin et al., "BERT", 2019; Liu et al., "RoBERTa", 2019; Sanh et al., "DistilBERT", 2019.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vbon_jax import sharding
from vbon_jax.models.config import ACTIVATIONS, DTYPES, Params

# What stands between the head's two linear maps of the first token's hidden state.
HEADS = {"bert": jnp.tanh, "roberta": jnp.tanh, "distilbert": jax.nn.relu}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The architecture of an encoder classifier, without its labels, and how it is computed.

    Attributes:
      vocab_size: V, rows of the token embedding.
      positions: the longest text, in tokens.
      layers: L, the number of blocks.
      width: D, a multiple of heads.
      heads: H, the number of attention heads.
      mlp_width: F, the width of the MLP's hidden layer.
      head: a key of ``HEADS``, the kind of the classifier's head.
      token_types: rows of the token type embedding; 0 for none, as in DistilBERT.
      position_offset: rows of the position embedding before that of the first token; in RoBERTa the
        padding id + 1.
      norm_eps: epsilon of the layer norms.
      activation: a key of ``config.ACTIVATIONS``, its Hugging Face name.
      compute_dtype: dtype of activations, "float32" or "bfloat16".
      initializer_range: standard deviation of the random initial weights.

    Raises:
      ValueError: on construction, naming the field, its value and what is allowed.
    """

    vocab_size: int
    positions: int
    layers: int
    width: int
    heads: int
    mlp_width: int
    head: str
    token_types: int = 0
    position_offset: int = 0
    norm_eps: float = 1e-12
    activation: str = "gelu"
    compute_dtype: str = "float32"
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        least = dict.fromkeys(
            ("vocab_size", "positions", "layers", "width", "heads", "mlp_width"), 1
        )
        for name, low in (least | {"token_types": 0, "position_offset": 0}).items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(f"{name} is {value!r}: give an integer of at least {low}")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}: give a multiple of heads, {self.heads}")
        for name in ("norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}: give a positive number")
        for name, allowed in (
            ("head", list(HEADS)),
            ("activation", list(ACTIVATIONS)),
            ("compute_dtype", list(DTYPES)),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}: give one of {allowed}")

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.width // self.heads


def _layer_norm(config: EncoderConfig, name: str | None = None) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, cancels badly where a mean is large.
    return nn.LayerNorm(
        epsilon=config.norm_eps, dtype=config.compute_dtype, use_fast_variance=False, name=name
    )


def _dense(config: EncoderConfig, features, name: str, axis=-1) -> nn.DenseGeneral:
    return nn.DenseGeneral(
        features,
        axis=axis,
        dtype=config.compute_dtype,
        kernel_init=nn.initializers.normal(config.initializer_range),
        name=name,
    )


class _Attention(nn.Module):
    """Multi-head self-attention of every token to every real token."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BxTxD, mask_BxT):
        c = self.config
        heads = (c.heads, c.head_width)
        q_BxTxHxK, k_BxSxHxK, v_BxSxHxK = (_dense(c, heads, name)(x_BxTxD) for name in "qkv")
        scores_BxHxTxS = jnp.einsum(
            "BTHK,BSHK->BHTS", q_BxTxHxK, k_BxSxHxK, preferred_element_type=jnp.float32
        )
        scores_BxHxTxS *= c.head_width**-0.5
        lowest = jnp.finfo(jnp.float32).min  # finite: -inf would make a row of padding only NaN
        scores_BxHxTxS = jnp.where(mask_BxT[:, None, None], scores_BxHxTxS, lowest)
        weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1).astype(v_BxSxHxK.dtype)
        attended_BxTxHxK = jnp.einsum("BHTS,BSHK->BTHK", weights_BxHxTxS, v_BxSxHxK)
        return _dense(c, c.width, "out", axis=(-2, -1))(attended_BxTxHxK)


class _MLP(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BxTxD):
        c = self.config
        x_BxTxF = ACTIVATIONS[c.activation](_dense(c, c.mlp_width, "up")(x_BxTxD))
        return _dense(c, c.width, "down")(x_BxTxF)


class _Block(nn.Module):
    """One post-norm transformer block: ln_1(x + attention(x)), then ln_2(x + mlp(x))."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BxTxD, mask_BxT):
        with jax.named_scope("attention"):
            out_BxTxD = _Attention(self.config, name="attention")(x_BxTxD, mask_BxT)
            x_BxTxD = _layer_norm(self.config, "ln_1")(x_BxTxD + out_BxTxD)
        with jax.named_scope("mlp"):
            out_BxTxD = _MLP(self.config, name="mlp")(x_BxTxD)
            return _layer_norm(self.config, "ln_2")(x_BxTxD + out_BxTxD)


def init(config: EncoderConfig, num_labels: int, key: jax.Array) -> Params:
    """Initializes the parameters of a classifier at random.

    Weights are normal with standard deviation ``initializer_range``, biases are 0 and layer-norm
    scales are 1.

    Args:
      config: the encoder's configuration.
      num_labels: C, the number of labels.
      key: random key.

    Returns:
      The tree of the module docstring, float32.

    Raises:
      ValueError: if num_labels is less than 1.
    """
    if num_labels < 1:
        raise ValueError(f"num_labels is {num_labels}: give at least 1")
    wte_key, wpe_key, wtt_key, dense_key, out_key, blocks_key = jax.random.split(key, 6)
    normal = nn.initializers.normal(config.initializer_range)
    width = config.width
    x_BxTxD = jnp.zeros((1, 1, width))

    def init_block(block_key: jax.Array) -> Params:
        return _Block(config).init(block_key, x_BxTxD, jnp.ones((1, 1), bool))["params"]

    def linear(key: jax.Array, features: int) -> Params:
        return {"kernel": normal(key, (width, features)), "bias": jnp.zeros(features)}

    encoder = {
        "wte": normal(wte_key, (config.vocab_size, width)),
        "wpe": normal(wpe_key, (config.position_offset + config.positions, width)),
        "ln_embed": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
        "blocks": jax.vmap(init_block)(jax.random.split(blocks_key, config.layers)),
    }
    if config.token_types:
        encoder["wtt"] = normal(wtt_key, (config.token_types, width))
    score = {"out": linear(out_key, num_labels)}
    (encoder if config.head == "bert" else score)[_dense_name(config)] = linear(dense_key, width)
    return {"encoder": encoder, "score": score}


def _dense_name(config: EncoderConfig) -> str:
    return "pooler" if config.head == "bert" else "dense"


def _embed(
    params: Params,
    config: EncoderConfig,
    tokens_BxT: jax.Array,
    mask_BxT: jax.Array,
    types_BxT: jax.Array | None,
) -> jax.Array:
    def rows(table_NxD: jax.Array, ids_BxT: jax.Array) -> jax.Array:
        # jit cannot raise, so an id out of range becomes NaN instead of quietly another row.
        rows_BxTxD = table_NxD.at[ids_BxT].get(
            mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
        )
        return rows_BxTxD.astype(jnp.float32)

    # Count real tokens only, so that no padding is out of range.
    positions_BxT = jnp.maximum(jnp.cumsum(mask_BxT, axis=1, dtype=jnp.int32) - 1, 0)
    wte, wpe = (sharding.gathered(params[name], f"encoder/{name}") for name in ("wte", "wpe"))
    x_BxTxD = sharding.held(rows(wte, tokens_BxT), sharding.BATCH)
    x_BxTxD += rows(wpe, positions_BxT + config.position_offset)
    if types_BxT is not None:
        x_BxTxD += rows(params["wtt"], types_BxT)
    elif config.token_types:
        x_BxTxD += params["wtt"][0]
    return _layer_norm(config).apply({"params": params["ln_embed"]}, x_BxTxD)


def score(
    params: Params,
    config: EncoderConfig,
    tokens_BxT: jax.Array,
    mask_BxT: jax.Array,
    types_BxT: jax.Array | None = None,
) -> jax.Array:
    """Scores each text by the hidden state of its first real token, by a scan over layers.

    Args:
      params: {"encoder", "score"}, the tree of the module docstring.
      config: its configuration.
      tokens_BxT: int32 token ids of each text with its special tokens, [CLS] or <s> first; the
        padding may hold any id of the vocabulary.
      mask_BxT: bool, True at real tokens. Padding, usually on the right, has no effect: positions
        count real tokens only, and nothing attends to padding. A row of padding only gives finite
        but meaningless scores.
      types_BxT: int32 token types, which distinguish the two texts of a pair; None for all 0.

    Returns:
      float32 logits [B, C] over the labels. A row with a token or type id out of range, or with
      more real tokens than ``config.positions``, is NaN.

    Raises:
      ValueError: if types are given to an encoder that has none.
    """
    if types_BxT is not None and not config.token_types:
        raise ValueError("types_BxT is given, but token_types is 0: this encoder takes none")
    mask_BxT = mask_BxT.astype(bool)
    block = _Block(config)
    whole = () if sharding.parts("tensor", config.heads) > 1 else ("attention",)

    def apply_block(x_BxTxD: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        layer = sharding.gathered(layer, "encoder/blocks", config.compute_dtype, True, whole)
        with jax.named_scope("block"):
            x_BxTxD = block.apply({"params": layer}, x_BxTxD, mask_BxT)
            return sharding.held(x_BxTxD, sharding.BATCH), None

    with jax.named_scope("encoder"):
        x_BxTxD = _embed(params["encoder"], config, tokens_BxT, mask_BxT, types_BxT)
        x_BxTxD, _ = jax.lax.scan(apply_block, x_BxTxD, params["encoder"]["blocks"])
    with jax.named_scope("score"):
        first_B = jnp.argmax(mask_BxT, axis=1)
        x_BxD = jnp.take_along_axis(x_BxTxD, first_B[:, None, None], axis=1)[:, 0]
        dense = params["encoder" if config.head == "bert" else "score"][_dense_name(config)]
        x_BxD = x_BxD.astype(jnp.float32) @ dense["kernel"] + dense["bias"]
        out = params["score"]["out"]
        return HEADS[config.head](x_BxD) @ out["kernel"] + out["bias"]
