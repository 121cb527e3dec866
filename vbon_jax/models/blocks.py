"""The transformer block of a decoder as Linen modules: norms, projections, attention and MLP.

Shape suffixes and the parameter tree are those of ``models.decoder``.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vbon_jax import sharding
from vbon_jax.models.config import ACTIVATIONS, DecoderConfig


class Norm(nn.Module):
    """Layer norm or RMS norm over the last axis, computed in float32.

    Attributes:
      config: the decoder's configuration, which says which norm.
      rms: whether to use an RMS norm whatever the configuration says.
    """

    config: DecoderConfig
    rms: bool = False

    @nn.compact
    def __call__(self, x):
        """Normalizes x [..., D] and returns it in the compute dtype."""
        c = self.config
        x = x.astype(jnp.float32)
        rms = self.rms or c.norm == "rms"
        if not rms:
            # The fast variance, E[x^2] - E[x]^2, cancels badly where a mean is large.
            x -= jnp.mean(x, axis=-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + c.norm_eps)
        start = nn.initializers.zeros if c.norm_offset else nn.initializers.ones
        scale = self.param("scale", start, x.shape[-1:]).astype(jnp.float32)
        if c.norm_offset:
            scale += 1.0
        if self.has_variable("params", "gain"):  # see ``models.family``
            gain = self.get_variable("params", "gain").astype(jnp.float32)
            groups = gain.size // x.shape[-1]
            scale = scale + gain.reshape(groups, 1, -1)
            x = (x.reshape(groups, -1, x.shape[-1]) * scale).reshape(x.shape)
        else:
            x *= scale
        if not rms:
            x += self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(jnp.float32)
        return x.astype(c.compute_dtype)


class Dense(nn.Module):
    """Linear projection of rows, [N, *in] to [N, *out], plus a low-rank adapter where there is one.

    Rows are N = B * T: with two batch axes the gradient of a weight contracts over both, for which
    XLA on CPU first copies the whole activation into transposed order.

    Attributes:
      config: the decoder's configuration.
      features: shape *out of the output features.
      bias: whether to add a bias.
      stddev: standard deviation of the random initial kernel.
    """

    config: DecoderConfig
    features: tuple[int, ...]
    bias: bool
    stddev: float

    @nn.compact
    def __call__(self, x):
        """Projects x [N, *in] and returns [N, *out] in the compute dtype."""
        c, dtype = self.config, self.config.compute_dtype
        shape_in = x.shape[1:]
        init = nn.initializers.normal(self.stddev)
        kernel = self.param("kernel", init, (*shape_in, *self.features))
        x = x.reshape(x.shape[0], -1).astype(dtype)
        y = x @ kernel.reshape(x.shape[1], -1).astype(dtype)
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name).astype(dtype) for name in _LORA)
            inner_NxR = x @ a
            if self.has_variable("params", "lora_open"):  # see ``models.family``
                open_GxR = self.get_variable("params", "lora_open").astype(dtype)
                inner = inner_NxR.reshape(len(open_GxR), -1, a.shape[-1]) * open_GxR[:, None]
                inner_NxR = inner.reshape(inner_NxR.shape)
            y += (c.lora_alpha / a.shape[-1]) * (inner_NxR @ b)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.features)
            y += bias.reshape(-1).astype(dtype)
        return y.reshape(x.shape[0], *self.features)


_LORA = ("lora_a", "lora_b")


class View(NamedTuple):
    """What the queries of a layer attend to, and their rotary angles.

    Attributes:
      mask_BxTxS: bool, True where query t may attend to key s, those of a `Shared` first.
      cos_BxTxN: cosines of the rotary angles at the positions of this call's tokens, N being half
        of the rotated dimensions; None with learned positions. Keys are rotated before they are
        cached.
      sin_BxTxN: sines of the same angles; None with learned positions.
    """

    mask_BxTxS: jax.Array
    cos_BxTxN: jax.Array | None
    sin_BxTxN: jax.Array | None


def views(
    config: DecoderConfig, mask_BxTxS: jax.Array, position_BxT: jax.Array, position_BxS: jax.Array
) -> tuple[View, View]:
    """Builds the views of the two kinds of layers.

    Args:
      config: the decoder's configuration.
      mask_BxTxS: bool, True where query t may attend to key s, whatever the window.
      position_BxT: int32 position ids of the queries.
      position_BxS: int32 position ids of the keys.

    Returns:
      The view of layers with full attention, and that of layers with a sliding window.
    """
    mask = mask_BxTxS
    if config.window is not None:
        near = position_BxT[:, :, None] - position_BxS[:, None, :] < config.window
        mask = mask & near
    out = []
    for visible, rotary in (
        (mask_BxTxS, config.rotary),
        (mask, config.rotary_window or config.rotary),
    ):
        if rotary is None:
            out.append(View(visible, None, None))
            continue
        frequency = jnp.asarray(rotary.frequencies(config.key_width), jnp.float32)
        angle_BxTxN = position_BxT[..., None].astype(jnp.float32) * frequency
        out.append(View(visible, jnp.cos(angle_BxTxN), jnp.sin(angle_BxTxN)))
    return out[0], out[1]


def _rotate(x_BxHxTxK: jax.Array, view: View) -> jax.Array:
    """Applies rotary position embedding to the first 2N dimensions of each head, in two halves."""
    if view.cos_BxTxN is None or view.sin_BxTxN is None:
        return x_BxHxTxK
    half = view.cos_BxTxN.shape[-1]
    cos, sin = view.cos_BxTxN[:, None], view.sin_BxTxN[:, None]
    x = x_BxHxTxK.astype(jnp.float32)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)
    return turned.astype(x_BxHxTxK.dtype)


class Shared(NamedTuple):
    """Keys and values of prompts, which several adjacent rows go on from.

    k_NxGxSxK: of prompt b // (B / N) for row b, or of J prompts side by side, S = J * P.
    v_NxGxSxK: likewise.
    slot_B: int32, which of the J each row goes on from; None where J is 1.
    """

    k_NxGxSxK: jax.Array
    v_NxGxSxK: jax.Array
    slot_B: jax.Array | None


def _together(x_BxHxTxY: jax.Array, prompts: int, groups: int) -> jax.Array:
    """Brings the queries of all heads and rows that share keys together, as rows of one product."""
    width = x_BxHxTxY.shape[-1]
    x = x_BxHxTxY.reshape(prompts, x_BxHxTxY.shape[0] // prompts, groups, -1, width)
    return x.swapaxes(1, 2).reshape(prompts, groups, -1, width)


def _apart(x_NxGxMxY: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_together`: [B, H, T, Y] with B, H, T of ``shape``."""
    prompts, groups, _, width = x_NxGxMxY.shape
    x = x_NxGxMxY.reshape(prompts, groups, shape[0] // prompts, -1, width)
    return x.swapaxes(1, 2).reshape(*shape[:3], width)


def _scores(q_BxHxTxK: jax.Array, k_NxGxSxK: jax.Array) -> jax.Array:
    """Products of queries and keys, float32 [B, H, T, S]; row b reads keys b // (B / N)."""
    prompts, groups = k_NxGxSxK.shape[:2]
    q_NxGxMxK = _together(q_BxHxTxK, prompts, groups)
    scores = jnp.einsum("NGMK,NGSK->NGMS", q_NxGxMxK, k_NxGxSxK, preferred_element_type=jnp.float32)
    return _apart(scores, q_BxHxTxK.shape)


def _read(weights_BxHxTxS: jax.Array, v_NxGxSxK: jax.Array) -> jax.Array:
    """The values that the weights of queries take, [B, H, T, K]."""
    weights_NxGxMxS = _together(weights_BxHxTxS, *v_NxGxSxK.shape[:2])
    read = jnp.einsum("NGMS,NGSK->NGMK", weights_NxGxMxS, v_NxGxSxK)
    return _apart(read, weights_BxHxTxS.shape)


def _attend(
    config: DecoderConfig,
    q_BxHxTxK: jax.Array,
    own: tuple[jax.Array, jax.Array],
    shared: Shared | None,
    mask_BxTxS: jax.Array,
) -> jax.Array:
    """Computes softmax attention; a query that may see no key averages all, so stays finite.

    Args:
      config: the decoder's configuration.
      q_BxHxTxK: queries.
      own: keys and values of each row.
      shared: those of prompts before them, of which a row reads one; None without.
      mask_BxTxS: of the slots of one shared prompt and of the row's own, in this order.

    Returns:
      What the queries read, [B, H, T, K].
    """
    scores_BxHxTxS = _scores(q_BxHxTxK, own[0])
    before = mask_BxTxS.shape[-1] - scores_BxHxTxS.shape[-1]
    if shared is not None:
        scores = _scores(q_BxHxTxK, shared.k_NxGxSxK)
        scores_BxHxTxJxP = scores.reshape(*scores.shape[:-1], -1, before)
        J = scores_BxHxTxJxP.shape[-2]
        # What a row reads does not depend on where its prompt stands: the same to the last bit.
        here_Bx1x1xJx1 = jnp.ones((1, 1, 1, 1, 1), bool)
        if shared.slot_B is not None:
            here_Bx1x1xJx1 = (shared.slot_B[:, None] == jnp.arange(J))[:, None, None, :, None]
        scores = jnp.sum(scores_BxHxTxJxP, axis=-2, where=here_Bx1x1xJx1)
        scores_BxHxTxS = jnp.concatenate([scores, scores_BxHxTxS], axis=-1)
    scores_BxHxTxS *= config.query_scale or q_BxHxTxK.shape[-1] ** -0.5
    if config.attention_cap is not None:
        scores_BxHxTxS = config.attention_cap * jnp.tanh(scores_BxHxTxS / config.attention_cap)
    lowest = jnp.finfo(jnp.float32).min  # finite: -inf would make a fully masked row NaN
    scores_BxHxTxS = jnp.where(mask_BxTxS[:, None], scores_BxHxTxS, lowest)
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1).astype(own[1].dtype)
    out_BxHxTxK = _read(weights_BxHxTxS[..., before:], own[1])
    if shared is None:
        return out_BxHxTxK
    weights = jnp.where(here_Bx1x1xJx1, weights_BxHxTxS[..., None, :before], 0)
    weights = weights.reshape(*weights.shape[:-2], J * before)
    return _read(weights, shared.v_NxGxSxK) + out_BxHxTxK


def written(kept_BxGxSxK: jax.Array, new_BxGxTxK: jax.Array, index: jax.Array) -> jax.Array:
    """Puts new keys or values at slot ``index`` of all rows, or at one of its own of each.

    Args:
      kept_BxGxSxK: those that are there.
      new_BxGxTxK: the new ones; T is 1 where each row has a slot of its own.
      index: int32, the first slot: a scalar, or [B].
    """
    if not index.ndim:
        return jax.lax.dynamic_update_slice(kept_BxGxSxK, new_BxGxTxK, (0, 0, index, 0))
    return kept_BxGxSxK.at[jnp.arange(len(index)), :, index].set(new_BxGxTxK[:, :, 0])


class _Attention(nn.Module):
    """Self-attention over its own keys, or over those of a cache that it extends first."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD, view, kv=None, index=None, shared=None):
        c = self.config
        batch, length, _ = x_BxTxD.shape
        rows_NxD = rows(x_BxTxD)

        def project(name, heads):
            out_NxHxK = Dense(c, (heads, c.key_width), c.qkv_bias, c.initializer_range, name=name)(
                rows_NxD
            )
            if c.qk_norm and name != "v":
                out_NxHxK = Norm(c, rms=True, name=f"{name}_norm")(out_NxHxK)
            return out_NxHxK.reshape(batch, length, heads, c.key_width).swapaxes(1, 2)

        q_BxHxTxK = _rotate(project("q", c.heads), view)
        k_BxGxSxK, v_BxGxSxK = _rotate(project("k", c.key_heads), view), project("v", c.key_heads)
        if kv is not None:
            k_BxGxSxK, v_BxGxSxK = (
                written(kept, new, index) for kept, new in zip(kv, (k_BxGxSxK, v_BxGxSxK))
            )
        by_head = (
            sharding.BATCH,
            "tensor" if sharding.parts("tensor", c.heads, c.key_heads) > 1 else None,
        )
        q_BxHxTxK, k_BxGxSxK, v_BxGxSxK = (
            sharding.held(x, *by_head) for x in (q_BxHxTxK, k_BxGxSxK, v_BxGxSxK)
        )
        own = (k_BxGxSxK, v_BxGxSxK)
        out_BxHxTxK = sharding.held(_attend(c, q_BxHxTxK, own, shared, view.mask_BxTxS), *by_head)
        out_NxHxK = out_BxHxTxK.swapaxes(1, 2).reshape(-1, c.heads, c.key_width)
        out_NxD = Dense(c, (c.width,), c.out_bias, _residual_stddev(c), name="out")(out_NxHxK)
        return out_NxD.reshape(x_BxTxD.shape), own


class _MLP(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD):
        c = self.config
        rows_NxD = rows(x_BxTxD)
        wide = functools.partial(Dense, c, (c.mlp_width,), c.mlp_bias, c.initializer_range)
        activation = ACTIVATIONS[c.activation]
        x_NxF = wide(name="up")(rows_NxD)
        x_NxF = activation(wide(name="gate")(rows_NxD)) * x_NxF if c.gated else activation(x_NxF)
        x_NxF = sharding.held(x_NxF, sharding.BATCH, "tensor")
        x_NxD = Dense(c, (c.width,), c.mlp_bias, _residual_stddev(c), name="down")(x_NxF)
        return x_NxD.reshape(x_BxTxD.shape)


class Block(nn.Module):
    """One transformer block.

    Attributes:
      config: the decoder's configuration.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD, view, kv=None, index=None, shared=None):
        """Applies the block.

        Args:
          x_BxTxD: input in the compute dtype.
          view: what this layer attends to.
          kv: cached keys and values of this layer, [B, G, S, K] each; None attends to the input
            itself.
          index: int32, the cache slot at which the keys and values of the input are written: a
            scalar, or one of each row, [B], where T is 1.
          shared: keys and values of prompts that come before those, a `Shared`; None without.

        Returns:
          The output x_BxTxD, and the (k, v), [B, G, S, K] each, that were attended to beside
          ``shared``.
        """
        c = self.config
        with jax.named_scope("attention"):
            normed_BxTxD = Norm(c, name="ln_1")(x_BxTxD)
            attended_BxTxD, kv = _Attention(c, name="attention")(
                normed_BxTxD, view, kv, index, shared
            )
            if c.place == "sandwich":
                attended_BxTxD = Norm(c, name="post_attention")(attended_BxTxD)
            before_BxTxD = x_BxTxD
            x_BxTxD = sharding.held(x_BxTxD + attended_BxTxD, sharding.BATCH)
        with jax.named_scope("mlp"):
            read_BxTxD = before_BxTxD if c.place == "parallel" else x_BxTxD
            out_BxTxD = _MLP(c, name="mlp")(Norm(c, name="ln_2")(read_BxTxD))
            if c.place == "sandwich":
                out_BxTxD = Norm(c, name="post_mlp")(out_BxTxD)
            x_BxTxD = sharding.held(x_BxTxD + out_BxTxD, sharding.BATCH)
        return x_BxTxD, kv


def rows(x_BxTxD: jax.Array) -> jax.Array:
    """Merges all axes but the last: [B, T, D] to [B * T, D]."""
    return x_BxTxD.reshape(-1, x_BxTxD.shape[-1])


def _residual_stddev(config: DecoderConfig) -> float:
    # GPT-2: two residual additions a block, so their variances sum to that of one weight matrix.
    return config.initializer_range / math.sqrt(2 * config.layers)
