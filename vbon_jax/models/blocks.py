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
        x *= scale + 1.0 if c.norm_offset else scale
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
            y += (c.lora_alpha / a.shape[-1]) * ((x @ a) @ b)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.features)
            y += bias.reshape(-1).astype(dtype)
        return y.reshape(x.shape[0], *self.features)


_LORA = ("lora_a", "lora_b")


class View(NamedTuple):
    """What the queries of a layer attend to, and their rotary angles.

    Attributes:
      mask_BxTxS: bool, True where query t may attend to key s.
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


def _attend(
    config: DecoderConfig,
    q_BxHxTxK: jax.Array,
    k_BxGxSxK: jax.Array,
    v_BxGxSxK: jax.Array,
    mask_BxTxS: jax.Array,
) -> jax.Array:
    """Computes softmax attention; a query that may see no key averages all, so stays finite."""
    batch, heads, length, width = q_BxHxTxK.shape
    groups, slots = k_BxGxSxK.shape[1:3]
    # The R heads that share keys are rows of one product.
    q_BxGxNxK = q_BxHxTxK.reshape(batch, groups, -1, width)
    scores = jnp.einsum("BGNK,BGSK->BGNS", q_BxGxNxK, k_BxGxSxK, preferred_element_type=jnp.float32)
    scores *= config.query_scale or width**-0.5
    if config.attention_cap is not None:
        scores = config.attention_cap * jnp.tanh(scores / config.attention_cap)
    lowest = jnp.finfo(jnp.float32).min  # finite: -inf would make a fully masked row NaN
    scores_BxHxTxS = scores.reshape(batch, heads, length, slots)
    scores_BxHxTxS = jnp.where(mask_BxTxS[:, None], scores_BxHxTxS, lowest)
    weights = jax.nn.softmax(scores_BxHxTxS, axis=-1).astype(v_BxGxSxK.dtype)
    out = jnp.einsum("BGNS,BGSK->BGNK", weights.reshape(scores.shape), v_BxGxSxK)
    return out.reshape(q_BxHxTxK.shape)


class _Attention(nn.Module):
    """Self-attention over its own keys, or over those of a cache that it extends first."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD, view, kv=None, index=None):
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
            k_BxGxSxK = jax.lax.dynamic_update_slice(kv[0], k_BxGxSxK, (0, 0, index, 0))
            v_BxGxSxK = jax.lax.dynamic_update_slice(kv[1], v_BxGxSxK, (0, 0, index, 0))
        out_BxHxTxK = _attend(c, q_BxHxTxK, k_BxGxSxK, v_BxGxSxK, view.mask_BxTxS)
        out_NxHxK = out_BxHxTxK.swapaxes(1, 2).reshape(-1, c.heads, c.key_width)
        out_NxD = Dense(c, (c.width,), c.out_bias, _residual_stddev(c), name="out")(out_NxHxK)
        return out_NxD.reshape(x_BxTxD.shape), (k_BxGxSxK, v_BxGxSxK)


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
        x_NxD = Dense(c, (c.width,), c.mlp_bias, _residual_stddev(c), name="down")(x_NxF)
        return x_NxD.reshape(x_BxTxD.shape)


class Block(nn.Module):
    """One transformer block.

    Attributes:
      config: the decoder's configuration.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD, view, kv=None, index=None):
        """Applies the block.

        Args:
          x_BxTxD: input in the compute dtype.
          view: what this layer attends to.
          kv: cached keys and values of this layer, [B, G, S, K] each; None attends to the input
            itself.
          index: int32 scalar, the cache slot at which the keys and values of the input are written.

        Returns:
          The output x_BxTxD, and the (k, v), [B, G, S, K] each, that were attended to.
        """
        c = self.config
        with jax.named_scope("attention"):
            normed_BxTxD = Norm(c, name="ln_1")(x_BxTxD)
            attended_BxTxD, kv = _Attention(c, name="attention")(normed_BxTxD, view, kv, index)
            if c.place == "sandwich":
                attended_BxTxD = Norm(c, name="post_attention")(attended_BxTxD)
            before_BxTxD = x_BxTxD
            x_BxTxD += attended_BxTxD
        with jax.named_scope("mlp"):
            read_BxTxD = before_BxTxD if c.place == "parallel" else x_BxTxD
            out_BxTxD = _MLP(c, name="mlp")(Norm(c, name="ln_2")(read_BxTxD))
            if c.place == "sandwich":
                out_BxTxD = Norm(c, name="post_mlp")(out_BxTxD)
            x_BxTxD += out_BxTxD
        return x_BxTxD, kv


def rows(x_BxTxD: jax.Array) -> jax.Array:
    """Merges all axes but the last: [B, T, D] to [B * T, D]."""
    return x_BxTxD.reshape(-1, x_BxTxD.shape[-1])


def _residual_stddev(config: DecoderConfig) -> float:
    # GPT-2: two residual additions a block, so their variances sum to that of one weight matrix.
    return config.initializer_range / math.sqrt(2 * config.layers)
