"""Losses over a large vocabulary, computed for a chunk of rows at a time.

The logits [B, T, V] of a whole batch are never stored. The rows are the N = B * T response tokens,
flattened. The model's output projection is passed in as ``project(head, hidden) -> logits``, so
this module does not depend on any model.

Gradients are computed chunk by chunk in the forward pass, while a chunk's logits are available, as
in Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, Section 3.2 (fused
linear cross-entropy). The backward pass only scales them, so no logit is computed twice.

Shape suffixes: N rows, C rows of one chunk, D width, V vocabulary.
"""

import math
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
    """Applies a function to the logits of all rows, a chunk at a time.

    Meant for scoring: differentiating through it would store the logits of all chunks.

    Args:
      fn: maps (logits_CxV, *rows of the chunk) to a pytree of arrays with leading axis C.
      project: maps (head, hidden_CxD) to logits_CxV, float32 and tempered. For two models at once,
        head and hidden are pairs and it returns a pair of logits.
      head: pytree of what project needs of the model, in the dtype that it computes in; a cast
        inside project may be repeated for every chunk.
      hidden: array or pytree of arrays [N, ...].
      rows: tuple of pytrees of arrays [N, ...], everything else that fn needs of each row.
      chunk: maximum number of rows at a time, >= 1. Chunks have nearly equal sizes; if it is N or
        more, there is one chunk and no loop.

    Returns:
      The outputs of fn with leading axis N. Where N is not divisible, project and fn also see
      padding rows of zeros, whose outputs are dropped.

    Raises:
      ValueError: if chunk < 1, or leading axes differ.
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
    lanes: int = 1,
    hold: Callable[[Any], Any] = lambda d_head: d_head,
) -> tuple[jax.Array, Any]:
    """Sums a loss of the logits over all rows, a chunk at a time.

    Differentiable with respect to hidden and head.

    fn and project are called once for each chunk, and their gradients are taken at the same time.
    Differentiated, this costs 3 matrix products of size N x D x V (logits, d hidden, d head), or 2
    if ``train_head`` is False; not differentiated, it costs 1. d head is accumulated in float32.

    fn and project must not close over an array that is differentiated: pass it as an argument.

    Args:
      fn: maps (logits_CxV, frozen, *rows of the chunk) to a pair: the chunk's part of the loss, a
        scalar that is a sum over rows, and a pytree of auxiliary scalars or arrays, which are also
        summed. **A row of zeros must contribute nothing and must not give NaN**: where N is not
        divisible, chunks are padded with zeros (False), so rows must contain a mask and fn must be
        zero where it is False.
      project: maps (head, hidden_CxD) to logits_CxV, float32 and tempered; see ``map_logits``.
      head: as in ``map_logits``; floating point.
      hidden: as in ``map_logits``; floating point.
      rows: as in ``map_logits``. They are constants, no gradient flows into them (hidden states of
        the reference, old log-probabilities, tokens, masks).
      chunk: as in ``map_logits``.
      frozen: pytree that is the same for all rows and also constant (the reference's head, weights
        of the loss).
      train_head: whether the head is trained. If not, its gradient is zero and costs nothing.
      lanes: over how many devices the rows are split, evenly. Each then sums its own part of d head
        over all chunks, and the parts are added once, in place of once a chunk.
      hold: maps the parts, with a leading axis of lanes, to the same where the devices are to have
        them: the compiler, left alone, may send logits about instead.

    Returns:
      (loss, aux), both summed over the chunks. No gradient flows through aux.

    Raises:
      ValueError: if chunk < 1, or leading axes differ.
    """
    return _sum_logits(fn, project, (chunk, lanes, hold), train_head, head, hidden, frozen, rows)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _sum_logits(fn, project, sizes, train_head, head, hidden, frozen, rows):
    def step(piece):
        hidden, rows = piece
        return fn(project(head, hidden), frozen, *rows), ()

    return _over_chunks(step, (hidden, rows), *sizes[:2])[0]


def _forward(fn, project, sizes, train_head, head, hidden, frozen, rows):
    def lane(piece):
        hidden, rows = piece

        def loss(hidden, head):
            return fn(project(head, hidden), frozen, *rows)

        (value, aux), grads = jax.value_and_grad(
            loss, argnums=(0, 1) if train_head else (0,), has_aux=True
        )(hidden, head)
        d_head = jax.tree.map(lambda g: g.astype(jnp.float32), grads[1:])
        return ((value, aux), d_head), grads[0]

    chunk, lanes, hold = sizes

    def step(piece):
        if lanes == 1:
            return lane(piece)
        divided = jax.tree.map(lambda x: x.reshape(lanes, -1, *x.shape[1:]), piece)
        (out, d_head), d_hidden = jax.vmap(lane)(divided)
        joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), d_hidden)
        return (_summed(out), hold(d_head)), joined

    (out, d_head), d_hidden = _over_chunks(step, (hidden, rows), chunk, lanes)
    return out, (d_hidden, d_head if lanes == 1 else _summed(d_head), head)


def _summed(tree):
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), tree)


def _backward(fn, project, sizes, train_head, saved, grad):
    del fn, project, sizes
    d_hidden, d_head, head = saved

    def scaled(slope, like):
        return (grad[0] * slope).astype(like.dtype)

    d_hidden = jax.tree.map(scaled, d_hidden, d_hidden)
    # None is a symbolic zero: no array of it is made unless someone asks for it.
    return jax.tree.map(scaled, d_head[0], head) if train_head else None, d_hidden, None, None


_sum_logits.defvjp(_forward, _backward)


def _over_chunks(
    step: Callable[[Any], tuple[Any, Any]], rows: Any, chunk: int, lanes: int = 1
) -> tuple[Any, Any]:
    """Applies step to each chunk of rows, sums its totals and reassembles its outputs by row."""
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
    even = math.lcm(8, lanes)
    size = -(-length // count // even) * even
    size = size if lanes > 1 else min(chunk, size)

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
