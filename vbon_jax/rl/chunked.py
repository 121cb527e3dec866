"""Losses over a large vocabulary, a few rows of logits at a time: [B, T, V] is never stored.

The rows are the N = B * T response slots, flattened. The model's output matrix comes in as
``project(head, hidden) -> logits``, so nothing is known of models here.

Gradients are taken chunk by chunk in the forward pass, while a chunk's logits are at hand, as in
Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, Section 3.2 (fused
linear cross-entropy): the backward pass multiplies them by one number, and no logit is computed
twice.

Shape suffixes: N rows, C rows of one chunk, D width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def map_logits(
    fn: Callable[..., Any],
    project: Callable[[Any, Any], Any],
    head: Any,
    hidden: Any,
    rows: tuple[Any, ...],
    chunk: int,
) -> Any:
    """fn(logits, *rows) of all rows, for scoring: a gradient through it would store the logits.

    Args:
        fn: (logits_CxV, *rows of the chunk) -> pytree of arrays with leading axis C.
        project: (head, hidden_CxD) -> logits_CxV, float32 and tempered. Two models at once: let
            head and hidden be pairs, and project give a pair of logits.
        head: pytree, what project needs of the model, in the dtype it computes in (a cast inside
            project may be done once a chunk).
        hidden: array or pytree of arrays [N, ...].
        rows: tuple of pytrees of arrays [N, ...], what else fn needs of each row.
        chunk: the most rows at once, >= 1. Chunks are made of nearly equal size; with N rows or
            more there is but one, and no loop.

    Returns:
        What fn gives, with leading axis N. Padding rows, where N does not divide, are zeros to
        project and fn, and are cut off.

    Raises:
        ValueError: chunk < 1, or leading axes that differ.
    """

    def step(piece: tuple[Any, tuple[Any, ...]]) -> tuple[tuple[()], Any]:
        return (), fn(project(head, piece[0]), *piece[1])

    return _over_chunks(step, (hidden, rows), chunk)[1]


def sum_logits(
    fn: Callable[..., tuple[jax.Array, Any]],
    project: Callable[[Any, Any], Any],
    head: Any,
    hidden: Any,
    rows: tuple[Any, ...],
    chunk: int,
    *,
    frozen: Any = (),
    train_head: bool = True,
) -> tuple[jax.Array, Any]:
    """The sum over all rows of a loss of their logits; differentiable in hidden and head.

    fn and project are called once for all rows of a chunk, and their gradients are taken at once:
    differentiated, this costs 3 matrix products of N x D x V (logits, d hidden, d head), or 2 with
    ``train_head`` False; not differentiated, 1. d head is summed over the chunks in float32.

    Args:
        fn: (logits_CxV, frozen, *rows of the chunk) -> (the chunk's share of the loss, a scalar
            that is a sum over rows; pytree of such scalars or arrays, also summed). **A row of
            zeros must add nothing and give no NaN**: where N does not divide, chunks are padded
            with zeros (False), so rows must hold a mask, and fn must be zero where it is False.
        project: (head, hidden_CxD) -> logits_CxV, float32 and tempered; see ``map_logits``.
        head, hidden: of ``map_logits``; floating point.
        rows: of ``map_logits``; constants, no gradient flows into them (a reference's hidden
            states, old log-probs, tokens, masks).
        chunk: of ``map_logits``.
        frozen: pytree, the same for all rows, constant too (a reference's head, loss weights).
        train_head: False where the head is not trained: its gradient is zero and costs nothing.

    fn and project must not close over an array that is differentiated: hand it in.

    Returns:
        (loss, aux), summed over the chunks. No gradient flows through aux.

    Raises:
        ValueError: chunk < 1, or leading axes that differ.
    """
    return _sum_logits(fn, project, chunk, train_head, head, hidden, frozen, rows)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _sum_logits(fn, project, chunk, train_head, head, hidden, frozen, rows):
    def step(piece):
        hidden, rows = piece
        return fn(project(head, hidden), frozen, *rows), ()

    return _over_chunks(step, (hidden, rows), chunk)[0]


def _forward(fn, project, chunk, train_head, head, hidden, frozen, rows):
    def step(piece):
        hidden, rows = piece

        def loss(hidden, head):
            return fn(project(head, hidden), frozen, *rows)

        (value, aux), grads = jax.value_and_grad(
            loss, argnums=(0, 1) if train_head else (0,), has_aux=True
        )(hidden, head)
        d_head = jax.tree.map(lambda g: g.astype(jnp.float32), grads[1:])
        return ((value, aux), d_head), grads[0]

    (out, d_head), d_hidden = _over_chunks(step, (hidden, rows), chunk)
    return out, (d_hidden, d_head, head)


def _backward(fn, project, chunk, train_head, saved, grad):
    del fn, project, chunk
    d_hidden, d_head, head = saved

    def scaled(slope, like):
        return (grad[0] * slope).astype(like.dtype)

    d_hidden = jax.tree.map(scaled, d_hidden, d_hidden)
    # None is a symbolic zero: no array of it is made unless someone asks for it.
    return jax.tree.map(scaled, d_head[0], head) if train_head else None, d_hidden, None, None


_sum_logits.defvjp(_forward, _backward)


def _over_chunks(step: Callable[[Any], tuple[Any, Any]], rows: Any, chunk: int) -> tuple[Any, Any]:
    """step(rows of a chunk) -> (total, rows): the totals added up, the rows put together again."""
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(rows)}
    if len(lengths) != 1:
        raise ValueError(f"hidden and rows need one leading axis, got lengths {sorted(lengths)}")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: give the number of rows at once, at least 1")
    (length,) = lengths
    if chunk >= length:
        return step(rows)
    count = -(-length // chunk)
    # A multiple of 8 divides well: into tiles, into blocks of rows, over devices.
    size = min(chunk, -(-length // count // 8) * 8)

    # Row n goes to chunk n % count, so that rows sharded over devices stay sharded in each chunk.
    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, count * size - length)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(size, count, *x.shape[1:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(count * size, *x.shape[2:])[:length]

    pieces = jax.tree.map(cut, rows)

    def body(total, piece):
        add, out = step(piece)
        return jax.tree.map(jnp.add, total, add), out

    shapes, _ = jax.eval_shape(step, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, out = jax.lax.scan(body, zeros, pieces)
    return total, jax.tree.map(join, out)
