"""One decoder for every family: pure functions of a parameter tree, implemented with Linen modules.

All differences between families (GPT-2, Llama, Gemma, ...) are fields of ``DecoderConfig``.

Shape suffixes: B batch, T tokens, P prompt columns, S cache slots, D width, H heads, G key-value
heads, R = H / G, K head width, F MLP width, V vocabulary, L layers.

The parameter tree, with block parameters stacked over a leading layer axis. Entries in brackets
exist only if the configuration asks for them:

    wte [V, D]    [wpe [positions, D]]    [head [V, D]]    ln_f/{scale, [bias]} [D]
    blocks/{ln_1, ln_2, [post_attention, post_mlp]}/{scale, [bias]} [L, D]
    blocks/attention/q/{kernel [L, D, H, K], [bias [L, H, K]]}    k, v: the same with G heads
    blocks/attention/out/{kernel [L, H, K, D], [bias [L, D]]}    [{q_norm, k_norm}/scale [L, K]]
    blocks/mlp/{up, [gate]}/{kernel [L, D, F], [bias [L, F]]}
    blocks/mlp/down/{kernel [L, F, D], [bias [L, D]]}

``blocks`` may also be a tuple of such trees, called segments, lower layers first: a trunk and the
layers on top of it (see ``trunk`` and ``top``). Beside any kernel there may be a low-rank adapter,
lora_a [L, in, r] and lora_b [L, r, out]; see ``models.trainable``.

Activations are in ``config.compute_dtype``; norms, the softmax of attention and logits are float32.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vbon_jax import sharding
from vbon_jax.models.blocks import Block, Norm, Shared, rows, views, written
from vbon_jax.models.config import REMAT, Params
from vbon_jax.models.config import DecoderConfig as DecoderConfig
from vbon_jax.models.config import Rotary as Rotary

if TYPE_CHECKING:
    from vbon_jax.models.cache import KVCache, Prefix


def init(config: DecoderConfig, key: jax.Array) -> Params:
    """Initializes the parameters of a decoder at random.

    Weights are normal with standard deviation ``initializer_range``, divided by sqrt(2 * layers)
    for the projections back into the residual stream. Biases are 0 and norms are the identity.

    Args:
      config: the decoder's configuration.
      key: random key.

    Returns:
      The tree of the module docstring, float32.
    """
    wte_key, wpe_key, blocks_key = jax.random.split(key, 3)
    x_1x1xD = jnp.zeros((1, 1, config.width))
    one = jnp.zeros((1, 1), jnp.int32)
    view, _ = views(config, jnp.ones((1, 1, 1), bool), one, one)

    def init_block(block_key: jax.Array) -> Params:
        return Block(config).init(block_key, x_1x1xD, view)["params"]

    normal = nn.initializers.normal(config.initializer_range)
    params = {
        "wte": normal(wte_key, (config.vocab_size, config.width)),
        "blocks": jax.vmap(init_block)(jax.random.split(blocks_key, config.layers)),
        "ln_f": Norm(config).init(key, x_1x1xD)["params"],
    }
    if config.rotary is None:
        params["wpe"] = normal(wpe_key, (config.positions, config.width))
    if not config.tied:
        head_key = jax.random.fold_in(wte_key, 1)
        params["head"] = normal(head_key, (config.vocab_size, config.width))
    return params


def _embed(
    params: Params, config: DecoderConfig, tokens_BxT: jax.Array, positions_BxT: jax.Array
) -> jax.Array:
    # jit cannot raise, so an id out of range becomes NaN instead of quietly the nearest row.
    x_BxTxD = _whole(params, config, "wte").at[tokens_BxT].get(mode="fill", fill_value=jnp.nan)
    if config.rotary is None:
        added = _whole(params, config, "wpe").at[positions_BxT].get(mode="fill", fill_value=jnp.nan)
        # In float32 whatever the weights' dtype, so that a policy of another dtype sums alike.
        x_BxTxD = x_BxTxD.astype(jnp.float32) + added.astype(jnp.float32)
    else:
        x_BxTxD = jnp.where(positions_BxT[..., None] < config.positions, x_BxTxD, jnp.nan)
    x_BxTxD = x_BxTxD.astype(config.compute_dtype)
    if config.embed_scale != 1.0:
        x_BxTxD *= jnp.asarray(config.embed_scale, config.compute_dtype)
    return sharding.held(x_BxTxD, sharding.BATCH)


def _whole(params: Params, config: DecoderConfig, name: str) -> jax.Array:
    """Embeddings or output matrix [V, D] as what reads them needs them, inside a loop as well."""
    whole = sharding.gathered(params[name], f"decoder/{name}", config.compute_dtype)
    return sharding.held(whole, None if name == "wpe" else "tensor", None)


def _gathered(config: DecoderConfig, layer: Params, stacked: bool = False) -> Params:
    """A layer's weights as its products read them. Heads that do not divide are on each device."""
    divides = sharding.parts("tensor", config.heads, config.key_heads) > 1
    whole = () if divides else ("attention",)
    return sharding.gathered(layer, "decoder/blocks", config.compute_dtype, not stacked, whole)


def _positions(mask_BxT: jax.Array) -> jax.Array:
    """Computes position ids that count real tokens only, so that padding has no effect."""
    return jnp.maximum(jnp.cumsum(mask_BxT, axis=1, dtype=jnp.int32) - 1, 0)


def _causal(mask_BxT: jax.Array) -> jax.Array:
    """Builds the causal mask [B, T, T]: query t sees key s if s <= t and s is a real token."""
    length = mask_BxT.shape[1]
    return jnp.tril(jnp.ones((length, length), bool)) & mask_BxT[:, None, :]


def _final_norm(params: Params, config: DecoderConfig, x: jax.Array) -> jax.Array:
    return Norm(config).apply({"params": params["ln_f"]}, x)


def _segments(params: Params) -> tuple[Params, ...]:
    blocks = params["blocks"]
    return blocks if isinstance(blocks, tuple) else (blocks,)


def _depth(blocks: Params) -> int:
    return jax.tree.leaves(blocks)[0].shape[0]


def _layer(params: Params, index: int) -> Params:
    for blocks in _segments(params):
        if index < _depth(blocks):
            return jax.tree.map(lambda leaf, i=index: leaf[i], blocks)
        index -= _depth(blocks)
    raise IndexError(f"layer {index} past the last")


class Adjacent(NamedTuple):
    """Which rows of a batch begin with the same prompt, so that it is run once for all of them.

    Attributes:
      rows: k; rows 0 to k - 1 share a prompt, the next k another one. It divides B.
      columns: P, of the prompt: the tokens and mask of the first P columns are the same in all k.
    """

    rows: int
    columns: int


def _run(
    config: DecoderConfig,
    blocks: Params,
    first: int,
    x_BxTxD: jax.Array,
    mask_BxT: jax.Array,
    same: Adjacent | None,
) -> jax.Array:
    """Applies a stack of blocks, of which the first is layer ``first``, by a scan over layers."""
    position_BxT = _positions(mask_BxT)
    mask_BxTxT = _causal(mask_BxT)
    k, P = same or Adjacent(1, 0)
    if k > 1:
        position, mask = position_BxT[::k, :P], mask_BxTxT[::k, :P, :P]
        parts = [x_BxTxD[::k, :P], x_BxTxD[:, P:]]
        seen = [
            views(config, mask, position, position),
            views(config, mask_BxTxT[:, P:], position_BxT[:, P:], position_BxT),
        ]
    else:
        parts, seen = [x_BxTxD], [views(config, mask_BxTxT, position_BxT, position_BxT)]
    block = Block(config)
    layers = range(first, first + _depth(blocks))
    in_window = [config.is_windowed(i) for i in layers]

    def apply_block(parts: list[jax.Array], layer: Any) -> tuple[list[jax.Array], None]:
        params, here = layer
        params = _gathered(config, params)
        out: list[jax.Array] = []
        before = None  # a response attends to its prompt's keys and to its own
        for x, (whole, windowed) in zip(parts, seen, strict=True):
            if len(set(in_window)) > 1:
                view = jax.tree.map(lambda a, b: jnp.where(here, a, b), windowed, whole)
            else:
                view = windowed if in_window[0] else whole
            with jax.named_scope("block"):
                x = sharding.held(x, sharding.BATCH)
                x, kv = block.apply({"params": params}, x, view, shared=before)
            before = Shared(kv[0], kv[1], None)
            out.append(x)
        return out, None

    if config.remat != "none" or sharding.parts("fsdp") > 1:
        # prevent_cse: scan already keeps the forward and the backward pass apart.
        apply_block = jax.checkpoint(apply_block, policy=REMAT[config.remat], prevent_cse=False)
    parts, _ = jax.lax.scan(apply_block, parts, (blocks, jnp.array(in_window)))
    if k == 1:
        return parts[0]
    return jnp.concatenate([jnp.repeat(parts[0], k, axis=0), parts[1]], axis=1)


def unstacked(params: Params) -> Params:
    """Splits the blocks into one segment per layer, for code that unrolls layers inside a loop.

    If layers were sliced out of a stack inside the loop, their weights would be copied in each
    iteration.

    Args:
      params: the decoder's tree, its blocks in any segments.

    Returns:
      The same tree with ``layers`` segments.
    """
    layers = []
    for blocks in _segments(params):
        layers += [jax.tree.map(lambda x, i=i: x[i : i + 1], blocks) for i in range(_depth(blocks))]
    return {**params, "blocks": tuple(layers)}


def trunk(
    params: Params,
    config: DecoderConfig,
    tokens_BxT: jax.Array,
    mask_BxT: jax.Array,
    same: Adjacent | None = None,
) -> jax.Array:
    """Runs the embeddings and all segments of ``blocks`` but the last.

    Args:
      params: the decoder's tree.
      config: its configuration.
      tokens_BxT: int32 token ids, as in ``hidden``.
      mask_BxT: bool, True at real tokens, as in ``hidden``.
      same: which rows share a prompt, as in ``hidden``.

    Returns:
      x_BxTxD in the compute dtype, the input of ``top``.
    """
    mask_BxT = mask_BxT.astype(bool)
    with jax.named_scope("trunk"):
        x_BxTxD = _embed(params, config, tokens_BxT, _positions(mask_BxT))
        first = 0
        for blocks in _segments(params)[:-1]:
            x_BxTxD = _run(config, blocks, first, x_BxTxD, mask_BxT, same)
            first += _depth(blocks)
    return x_BxTxD


def top(
    params: Params,
    config: DecoderConfig,
    x_BxTxD: jax.Array,
    mask_BxT: jax.Array,
    same: Adjacent | None = None,
) -> jax.Array:
    """Runs the last segment of ``blocks`` and the final norm on the output of ``trunk``.

    Args:
      params: the decoder's tree, of which only the last segment and ``ln_f`` are read.
      config: its configuration.
      x_BxTxD: output of ``trunk``.
      mask_BxT: bool, True at real tokens, as in ``hidden``.
      same: which rows share a prompt, as in ``hidden``.

    Returns:
      hidden_BxTxD, as ``hidden`` returns it.
    """
    with jax.named_scope("top"):
        blocks = _segments(params)[-1]
        first = config.layers - _depth(blocks)
        x_BxTxD = _run(config, blocks, first, x_BxTxD, mask_BxT.astype(bool), same)
        return _final_norm(params, config, x_BxTxD)


def hidden(
    params: Params,
    config: DecoderConfig,
    tokens_BxT: jax.Array,
    mask_BxT: jax.Array,
    same: Adjacent | None = None,
) -> jax.Array:
    """Runs the whole decoder on a padded batch, by a scan over layers.

    Args:
      params: the decoder's tree.
      config: its configuration.
      tokens_BxT: int32 token ids; the padding may hold any id of the vocabulary.
      mask_BxT: bool, True at real tokens. Padding may be on the left, the right, or both; position
        ids count real tokens only, and no query attends to padding.
      same: which rows share a prompt: their keys and values, and gradients, are computed once for
        all of them. None where none do.

    Returns:
      hidden_BxTxD after the final norm, in the compute dtype. At padding it is finite but
      meaningless. A token id outside the vocabulary, or a real token at a position of
      ``config.positions`` or more, gives NaN.
    """
    x_BxTxD = trunk(params, config, tokens_BxT, mask_BxT, same)
    return top(params, config, x_BxTxD, mask_BxT, same)


def for_decoding(params: Params, config: DecoderConfig) -> Params:
    """Lays weights out for a loop that decodes: one segment a layer, and nothing left to gather.

    Args:
      params: the decoder's tree.
      config: its configuration.

    Returns:
      The same model; what ``fsdp`` divides is whole on each device, in the compute dtype where
      products read it.
    """
    params = unstacked(params)
    ends: Params = {
        name: _whole(params, config, name) for name in ("wte", "wpe", "head") if name in params
    }
    blocks = tuple(_gathered(config, layer, stacked=True) for layer in params["blocks"])
    return {**params, **ends, "blocks": blocks}


def head(params: Params, config: DecoderConfig) -> jax.Array:
    """Returns the output matrix [V, D]: the model's own, or the embedding if it is tied.

    What ``fsdp`` divides is put together.
    """
    return _whole(params, config, "head" if "head" in params else "wte")


def project(head_VxD: jax.Array, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """Computes next-token logits from hidden states, by a given output matrix.

    Args:
      head_VxD: the output matrix.
      config: the decoder's configuration.
      hidden: hidden states [..., D].

    Returns:
      float32 logits [..., V].
    """
    with jax.named_scope("logits"):
        head_VxD = sharding.held(head_VxD, "tensor", None)  # or a loop gathers it in each trip
        logits_NxV = jnp.einsum(
            "ND,VD->NV",
            rows(hidden),
            head_VxD.astype(config.compute_dtype),
            preferred_element_type=jnp.float32,
        )
        if config.logit_cap is not None:
            logits_NxV = config.logit_cap * jnp.tanh(logits_NxV / config.logit_cap)
        return logits_NxV.reshape(*hidden.shape[:-1], -1)


def logits(params: Params, config: DecoderConfig, hidden: jax.Array) -> jax.Array:
    """Computes next-token logits from hidden states.

    Args:
      params: the decoder's tree.
      config: its configuration.
      hidden: hidden states [..., D].

    Returns:
      float32 logits [..., V].
    """
    return project(head(params, config), config, hidden)


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
      mask_BxP: bool, True at real tokens. Padding is on the left.
      cache: overwritten from slot 0 on, whatever it holds.

    Returns:
      (hidden_BxPxD as ``hidden`` returns it, the cache with ``index`` P).

    Raises:
      ValueError: if P exceeds the number of slots of the cache.
    """
    prompt_length = tokens_BxP.shape[1]
    if prompt_length > cache.length:
        raise ValueError(
            f"the prompts have {prompt_length} columns and the cache {cache.length} slots: make"
            " the cache as long as the prompt columns plus the new tokens"
        )
    mask_BxP = mask_BxP.astype(bool)
    position_BxP = _positions(mask_BxP)
    seen = views(config, _causal(mask_BxP), position_BxP, position_BxP)
    block = Block(config)
    k, v, trunk_BxSxD = list(cache.k), list(cache.v), cache.trunk_BxSxD
    with jax.named_scope("prefill"):
        x_BxPxD = _embed(params, config, tokens_BxP, position_BxP)
        for i in range(config.layers):
            if trunk_BxSxD is not None and i == cache.trunk_layers:
                trunk_BxSxD = jax.lax.dynamic_update_slice(trunk_BxSxD, x_BxPxD, (0, 0, 0))
            with jax.named_scope(f"block_{i}"):
                x_BxPxD, (k_BxGxPxK, v_BxGxPxK) = block.apply(
                    {"params": _layer(params, i)}, x_BxPxD, seen[config.is_windowed(i)]
                )
            k[i] = jax.lax.dynamic_update_slice(k[i], k_BxGxPxK, (0, 0, 0, 0))
            v[i] = jax.lax.dynamic_update_slice(v[i], v_BxGxPxK, (0, 0, 0, 0))
        hidden_BxPxD = _final_norm(params, config, x_BxPxD)
    return hidden_BxPxD, dataclasses.replace(
        cache,
        k=tuple(k),
        v=tuple(v),
        mask_BxS=jnp.zeros_like(cache.mask_BxS).at[:, :prompt_length].set(mask_BxP),
        position_BxS=jnp.zeros_like(cache.position_BxS).at[:, :prompt_length].set(position_BxP),
        index=jnp.full_like(cache.index, prompt_length),
        trunk_BxSxD=trunk_BxSxD,
    )


def step(
    params: Params,
    config: DecoderConfig,
    token_B: jax.Array,
    position_B: jax.Array,
    cache: KVCache,
    prefix: Prefix | None = None,
) -> tuple[jax.Array, KVCache]:
    """Runs one new token of every row, writing its keys and values at slots ``cache.index``.

    Layers are unrolled: a scan would carry the cache as xs and ys and copy it at each step.

    Args:
      params: the decoder's tree.
      config: its configuration.
      token_B: int32 token ids.
      position_B: int32 position ids: the number of real tokens before this one in its row.
      cache: from ``prefill`` or an earlier step.
      prefix: what the rows attend to beside their cache; None for nothing.

    Returns:
      (hidden_BxD in the compute dtype, the cache with ``index`` increased by 1). A position of
      ``config.positions`` or more, or a cache that is already full, gives NaN.
    """
    rows_B, index_B = jnp.arange(len(token_B)), jnp.broadcast_to(cache.index, token_B.shape)
    mask_BxS = cache.mask_BxS.at[rows_B, index_B].set(True)
    position_BxS = cache.position_BxS.at[rows_B, index_B].set(position_B)
    read_BxS, position_of_BxS = mask_BxS, position_BxS
    if prefix is not None:
        read_BxS = jnp.concatenate([prefix.mask_BxP, mask_BxS], axis=1)
        position_of_BxS = jnp.concatenate([prefix.position_BxP, position_BxS], axis=1)
    seen = views(config, read_BxS[:, None, :], position_B[:, None], position_of_BxS)
    block = Block(config)
    k, v, trunk_BxSxD = list(cache.k), list(cache.v), cache.trunk_BxSxD
    with jax.named_scope("step"):
        x_Bx1xD = _embed(params, config, token_B[:, None], position_B[:, None])
        for i in range(config.layers):
            if trunk_BxSxD is not None and i == cache.trunk_layers:
                trunk_BxSxD = written(trunk_BxSxD[:, None], x_Bx1xD[:, None], cache.index)[:, 0]
            with jax.named_scope(f"block_{i}"):
                x_Bx1xD, (k[i], v[i]) = block.apply(
                    {"params": _layer(params, i)},
                    x_Bx1xD,
                    seen[config.is_windowed(i)],
                    (k[i], v[i]),
                    cache.index,
                    None if prefix is None else Shared(prefix.k[i], prefix.v[i], prefix.slot_B),
                )
        hidden_BxD = _final_norm(params, config, x_Bx1xD)[:, 0]
    # A write past the end is clamped or dropped; say so in the only way jit has.
    hidden_BxD = jnp.where((index_B < cache.length)[:, None], hidden_BxD, jnp.nan)
    return hidden_BxD, dataclasses.replace(
        cache, k=tuple(k), v=tuple(v), mask_BxS=mask_BxS, position_BxS=position_BxS,
        index=cache.index + 1, trunk_BxSxD=trunk_BxSxD,
    )  # fmt: skip


def instead(
    params: Params, config: DecoderConfig, tokens_BxT: jax.Array, kept: KVCache
) -> jax.Array:
    """Runs another token in place of each of the last T of sequences, each after its own prefix.

    Token t attends to what stands before it in its sequence and to itself, to none of the others.

    Args:
      params: the decoder's tree.
      config: its configuration.
      tokens_BxT: int32 token ids.
      kept: of the sequences, from ``prefill``: S columns, and T free slots after them.

    Returns:
      hidden_BxTxD, as ``hidden`` returns it at the token's column of the sequence with it.
    """
    batch, T = tokens_BxT.shape
    S = kept.length - T
    mask_BxS = kept.mask_BxS[:, :S]
    position_BxS = _positions(mask_BxS)
    position_BxT = (jnp.cumsum(mask_BxS, axis=1, dtype=jnp.int32) - mask_BxS)[:, S - T :]
    before_TxS = jnp.arange(S) < jnp.arange(S - T, S)[:, None]
    own_BxTxT = jnp.broadcast_to(jnp.eye(T, dtype=bool), (batch, T, T))
    mask_BxTxS = jnp.concatenate([before_TxS & mask_BxS[:, None], own_BxTxT], axis=-1)
    seen = views(
        config, mask_BxTxS, position_BxT, jnp.concatenate([position_BxS, position_BxT], axis=1)
    )
    block = Block(config)
    x_BxTxD = _embed(params, config, tokens_BxT, position_BxT)
    for i in range(config.layers):
        x_BxTxD, _ = block.apply(
            {"params": _layer(params, i)},
            x_BxTxD,
            seen[config.is_windowed(i)],
            (kept.k[i], kept.v[i]),
            jnp.int32(S),
        )
    return _final_norm(params, config, x_BxTxD)
