"""A GPT-2 decoder: pure functions of a parameter tree, with the Linen modules behind them.

Shape suffixes: B batch, T tokens, P prompt columns, S cache slots, D width, H heads, K head width,
F MLP width, V vocabulary, L layers.

The parameter tree, all float32, block parameters stacked over a leading layer axis:

    wte [V, D]    wpe [positions, D]    ln_f/{scale, bias} [D]
    blocks/ln_1/{scale, bias} [L, D]    blocks/ln_2/{scale, bias} [L, D]
    blocks/attention/qkv/{kernel [L, D, 3, H, K], bias [L, 3, H, K]}
    blocks/attention/out/{kernel [L, H, K, D], bias [L, D]}
    blocks/mlp/up/{kernel [L, D, F], bias [L, F]}
    blocks/mlp/down/{kernel [L, F, D], bias [L, D]}

Activations are in `config.compute_dtype`; layer-norm statistics, softmax and logits are float32.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from vbon_jax.models.cache import KVCache

Params = dict[str, Any]

_gelu_tanh: Callable[[jax.Array], jax.Array] = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}

COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape and the arithmetic of a GPT-2 decoder.

    Attributes:
      vocab_size: V, rows of the tied embedding.
      positions: the longest context, in tokens.
      layers: L.
      width: D, a multiple of heads.
      heads: H.
      mlp_width: F; 4 * width in GPT-2.
      norm_eps: epsilon of every layer norm.
      activation: a key of ACTIVATIONS, under its Hugging Face name.
      compute_dtype: dtype of activations, float32 or bfloat16. Parameters stay float32.
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
    norm_eps: float = 1e-5
    activation: str = "gelu_new"
    compute_dtype: str = "float32"
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "positions", "layers", "width", "heads", "mlp_width"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}: give an integer of at least 1")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}: give a multiple of heads, {self.heads}")
        for name in ("norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}: give a positive number")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}: give one of {list(ACTIVATIONS)}")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"compute_dtype is {self.compute_dtype!r}: give one of {list(COMPUTE_DTYPES)}"
            )

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.width // self.heads


def _layer_norm(config: DecoderConfig, name: str | None = None) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, cancels badly where a mean is large.
    return nn.LayerNorm(
        epsilon=config.norm_eps, dtype=config.compute_dtype, use_fast_variance=False, name=name
    )


def _rows(x_BxTxD: jax.Array) -> jax.Array:
    # Matrix products take [B * T, D]: with two batch axes the gradient of a weight contracts over
    # both, for which XLA on CPU first copies the whole activation into transposed order.
    return x_BxTxD.reshape(-1, x_BxTxD.shape[-1])


def _attend(
    q_BxHxTxK: jax.Array, k_BxHxSxK: jax.Array, v_BxHxSxK: jax.Array, mask_BxTxS: jax.Array
) -> jax.Array:
    """Softmax attention; a query that may see no key averages all of them, so it stays finite."""
    scores_BxHxTxS = jnp.einsum(
        "BHTK,BHSK->BHTS", q_BxHxTxK, k_BxHxSxK, preferred_element_type=jnp.float32
    )
    scores_BxHxTxS *= q_BxHxTxK.shape[-1] ** -0.5
    lowest = jnp.finfo(jnp.float32).min  # finite: -inf would make a fully masked row NaN
    scores_BxHxTxS = jnp.where(mask_BxTxS[:, None], scores_BxHxTxS, lowest)
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1).astype(v_BxHxSxK.dtype)
    return jnp.einsum("BHTS,BHSK->BHTK", weights_BxHxTxS, v_BxHxSxK)


class _Attention(nn.Module):
    """Multi-head self-attention, over its own keys or over those of a cache it first extends."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD, mask_BxTxS, kv=None, index=None):
        c = self.config
        batch, length, _ = x_BxTxD.shape
        dense = functools.partial(nn.DenseGeneral, dtype=c.compute_dtype)
        qkv_Nx3xHxK = dense(
            (3, c.heads, c.head_width),
            kernel_init=nn.initializers.normal(c.initializer_range),
            name="qkv",
        )(_rows(x_BxTxD))
        q_BxHxTxK, k_BxHxSxK, v_BxHxSxK = (
            qkv_Nx3xHxK[:, i].reshape(batch, length, c.heads, c.head_width).swapaxes(1, 2)
            for i in range(3)
        )
        if kv is not None:
            k_BxHxSxK = jax.lax.dynamic_update_slice(kv[0], k_BxHxSxK, (0, 0, index, 0))
            v_BxHxSxK = jax.lax.dynamic_update_slice(kv[1], v_BxHxSxK, (0, 0, index, 0))
        attended_BxTxHxK = _attend(q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, mask_BxTxS).swapaxes(1, 2)
        out_NxD = dense(c.width, axis=(-2, -1), kernel_init=_residual_initializer(c), name="out")(
            attended_BxTxHxK.reshape(batch * length, c.heads, c.head_width)
        )
        return out_NxD.reshape(x_BxTxD.shape), (k_BxHxSxK, v_BxHxSxK)


class _MLP(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD):
        c = self.config
        dense = functools.partial(nn.Dense, dtype=c.compute_dtype)
        up_init = nn.initializers.normal(c.initializer_range)
        x_NxF = dense(c.mlp_width, kernel_init=up_init, name="up")(_rows(x_BxTxD))
        x_NxF = ACTIVATIONS[c.activation](x_NxF)
        x_NxD = dense(c.width, kernel_init=_residual_initializer(c), name="down")(x_NxF)
        return x_NxD.reshape(x_BxTxD.shape)


class _Block(nn.Module):
    """One pre-norm transformer block: x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD, mask_BxTxS, kv=None, index=None):
        """Returns the new x_BxTxD and the (k, v), [B, H, S, K] each, that were attended to."""
        with jax.named_scope("attention"):
            normed_BxTxD = _layer_norm(self.config, "ln_1")(x_BxTxD)
            out_BxTxD, kv = _Attention(self.config, name="attention")(
                normed_BxTxD, mask_BxTxS, kv, index
            )
            x_BxTxD += out_BxTxD
        with jax.named_scope("mlp"):
            normed_BxTxD = _layer_norm(self.config, "ln_2")(x_BxTxD)
            x_BxTxD += _MLP(self.config, name="mlp")(normed_BxTxD)
        return x_BxTxD, kv


def _residual_initializer(config: DecoderConfig):
    # GPT-2: two residual additions a block, so their variances sum to that of one weight matrix.
    return nn.initializers.normal(config.initializer_range / math.sqrt(2 * config.layers))


def init(config: DecoderConfig, key: jax.Array) -> Params:
    """Draws the parameters of a GPT-2 decoder.

    Weights are normal with standard deviation `initializer_range`, divided by sqrt(2 * layers) for
    the projections back into the residual stream; biases are 0 and layer-norm scales 1.

    Returns:
      The tree of the module docstring, float32.
    """
    wte_key, wpe_key, blocks_key = jax.random.split(key, 3)
    x_BxTxD = jnp.zeros((1, 1, config.width))
    mask_BxTxS = jnp.ones((1, 1, 1), bool)

    def init_block(block_key: jax.Array) -> Params:
        return _Block(config).init(block_key, x_BxTxD, mask_BxTxS)["params"]

    normal = nn.initializers.normal(config.initializer_range)
    return {
        "wte": normal(wte_key, (config.vocab_size, config.width)),
        "wpe": normal(wpe_key, (config.positions, config.width)),
        "blocks": jax.vmap(init_block)(jax.random.split(blocks_key, config.layers)),
        "ln_f": {"scale": jnp.ones(config.width), "bias": jnp.zeros(config.width)},
    }


def _embed(
    params: Params, config: DecoderConfig, tokens_BxT: jax.Array, positions_BxT: jax.Array
) -> jax.Array:
    # jit cannot raise, so an id out of range becomes NaN instead of quietly the nearest row.
    token_BxTxD = params["wte"].at[tokens_BxT].get(mode="fill", fill_value=jnp.nan)
    position_BxTxD = params["wpe"].at[positions_BxT].get(mode="fill", fill_value=jnp.nan)
    return (token_BxTxD + position_BxTxD).astype(config.compute_dtype)


def _positions(mask_BxT: jax.Array) -> jax.Array:
    """Position ids that count real tokens only, so padding on either side moves nothing."""
    return jnp.maximum(jnp.cumsum(mask_BxT, axis=1, dtype=jnp.int32) - 1, 0)


def _causal(mask_BxT: jax.Array) -> jax.Array:
    """[B, T, T]: query t sees key s when s <= t and s is a real token."""
    length = mask_BxT.shape[1]
    return jnp.tril(jnp.ones((length, length), bool)) & mask_BxT[:, None, :]


def _final_norm(params: Params, config: DecoderConfig, x: jax.Array) -> jax.Array:
    return _layer_norm(config).apply({"params": params["ln_f"]}, x)


def _layer(params: Params, index: int) -> Params:
    return jax.tree.map(lambda leaf: leaf[index], params["blocks"])


def hidden(
    params: Params, config: DecoderConfig, tokens_BxT: jax.Array, mask_BxT: jax.Array
) -> jax.Array:
    """Runs the whole decoder over a padded batch, scanning over layers.

    Args:
      params: the decoder's tree.
      config: its configuration.
      tokens_BxT: int32 token ids; any id of the vocabulary may fill the padding.
      mask_BxT: bool, True at real tokens. Padding may stand on the left, the right, or both;
        position ids count real tokens only, and no query attends to padding.

    Returns:
      hidden_BxTxD after the final layer norm, in the compute dtype. At padding it is finite and
      means nothing. A token id past the vocabulary, or a real token at or past
      `config.positions`, gives NaN.
    """
    mask_BxT = mask_BxT.astype(bool)
    mask_BxTxS = _causal(mask_BxT)
    block = _Block(config)

    # Keep only the weight products for the backward pass and redo the rest: saving every
    # elementwise result took 3 times the memory and 1.4 times the time on CPU.
    @functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        prevent_cse=False,  # scan already keeps the forward and the backward pass apart
    )
    def apply_block(x_BxTxD: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        with jax.named_scope("block"):
            x_BxTxD, _ = block.apply({"params": layer}, x_BxTxD, mask_BxTxS)
        return x_BxTxD, None

    with jax.named_scope("decoder"):
        x_BxTxD = _embed(params, config, tokens_BxT, _positions(mask_BxT))
        x_BxTxD, _ = jax.lax.scan(apply_block, x_BxTxD, params["blocks"])
        return _final_norm(params, config, x_BxTxD)


def logits(params: Params, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """Next-token logits [..., V], float32, of hidden states [..., D], by the tied embedding."""
    with jax.named_scope("logits"):
        wte_VxD = params["wte"].astype(config.compute_dtype)
        logits_NxV = jnp.einsum(
            "ND,VD->NV", _rows(hidden), wte_VxD, preferred_element_type=jnp.float32
        )
        return logits_NxV.reshape(*hidden.shape[:-1], config.vocab_size)


def prefill(
    params: Params,
    config: DecoderConfig,
    tokens_BxP: jax.Array,
    mask_BxP: jax.Array,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    """Runs left-padded prompts through the decoder and stores their keys and values.

    Args:
      params: the decoder's tree.
      config: its configuration.
      tokens_BxP: int32 token ids.
      mask_BxP: bool, True at real tokens; padding on the left, so that the next token of every
        row belongs in slot P.
      cache: what this call overwrites from slot 0, whatever it held.

    Returns:
      (hidden_BxPxD as `hidden` gives it, the cache with `index` P).

    Raises:
      ValueError: if P is more than the cache's slots.
    """
    prompt_length = tokens_BxP.shape[1]
    if prompt_length > cache.length:
        raise ValueError(
            f"the prompts have {prompt_length} columns and the cache {cache.length} slots: make"
            " the cache as long as the prompt columns plus the new tokens"
        )
    mask_BxP = mask_BxP.astype(bool)
    mask_BxPxP = _causal(mask_BxP)
    block = _Block(config)
    k, v = list(cache.k), list(cache.v)
    with jax.named_scope("prefill"):
        x_BxPxD = _embed(params, config, tokens_BxP, _positions(mask_BxP))
        for i in range(config.layers):
            with jax.named_scope(f"block_{i}"):
                x_BxPxD, (k_BxHxPxK, v_BxHxPxK) = block.apply(
                    {"params": _layer(params, i)}, x_BxPxD, mask_BxPxP
                )
            k[i] = jax.lax.dynamic_update_slice(k[i], k_BxHxPxK, (0, 0, 0, 0))
            v[i] = jax.lax.dynamic_update_slice(v[i], v_BxHxPxK, (0, 0, 0, 0))
        hidden_BxPxD = _final_norm(params, config, x_BxPxD)
    mask_BxS = jnp.zeros_like(cache.mask_BxS).at[:, :prompt_length].set(mask_BxP)
    index = jnp.full_like(cache.index, prompt_length)
    return hidden_BxPxD, dataclasses.replace(
        cache, k=tuple(k), v=tuple(v), mask_BxS=mask_BxS, index=index
    )


def step(
    params: Params,
    config: DecoderConfig,
    token_B: jax.Array,
    position_B: jax.Array,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    """Runs one new token of every row, writing its keys and values at slot `cache.index`.

    Layers are unrolled: a scan would carry the cache as xs and ys and copy it at each step.

    Args:
      params: the decoder's tree.
      config: its configuration.
      token_B: int32 token ids.
      position_B: int32 position ids: the number of real tokens before this one in its row.
      cache: from `prefill` or an earlier step.

    Returns:
      (hidden_BxD in the compute dtype, the cache with `index` one further). A position at or past
      `config.positions`, or a cache that is already full, gives NaN.
    """
    seen_Bx1 = jnp.ones((token_B.shape[0], 1), bool)
    mask_BxS = jax.lax.dynamic_update_slice(cache.mask_BxS, seen_Bx1, (0, cache.index))
    block = _Block(config)
    k, v = list(cache.k), list(cache.v)
    with jax.named_scope("step"):
        x_Bx1xD = _embed(params, config, token_B[:, None], position_B[:, None])
        for i in range(config.layers):
            with jax.named_scope(f"block_{i}"):
                x_Bx1xD, (k[i], v[i]) = block.apply(
                    {"params": _layer(params, i)},
                    x_Bx1xD,
                    mask_BxS[:, None, :],
                    (k[i], v[i]),
                    cache.index,
                )
        hidden_BxD = _final_norm(params, config, x_Bx1xD)[:, 0]
    # A write past the end is clamped onto the last slot; say so in the only way jit has.
    hidden_BxD = jnp.where(cache.index < cache.length, hidden_BxD, jnp.nan)
    return hidden_BxD, dataclasses.replace(
        cache, k=tuple(k), v=tuple(v), mask_BxS=mask_BxS, index=cache.index + 1
    )
