"""Pages: the work that slots are supplied with, page after page, by the host."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vbon_jax import sharding
from vbon_jax.sampling import decode, slots
from vbon_jax.sampling.requests import Request, pad_left
from vbon_jax.sampling.slots import Shape

# Responses of a page for each row, about. Rows run dry if the longest response of one page outlasts
# all of the next: with 4, if it is more than 4 times as long as the mean.
PAGES = 4


def shape_for(
    rows: int, prompts: int, each: int, length: int, new_tokens: int, devices: int = 1
) -> Shape:
    """The pages that ``prompts`` prompts of ``each`` responses are drawn in, ``rows`` at a time.

    A prompt of very many responses is more than one prompt of a page, and so is one of many where
    some of the ``devices`` would have none. Prompts of few responses are as many as need no more
    memory than the rows, twice over.
    """
    rows = max(rows // devices, 1)
    most = PAGES * rows

    def share_out(count: int) -> bool:
        return count % devices == 0 or count >= 4 * devices

    parts = [k for k in range(1, min(each, most) + 1) if each % k == 0]
    part = max((k for k in parts if share_out(prompts * (each // k))), default=1)
    total = -(-prompts * (each // part) // devices)
    rows = min(rows, total * part)
    # Half of a prompt's responses or fewer, so that rows seldom wait for a prompt's last; but no
    # more groups than prompts.
    wide = max(1, part // 2, -(-rows // total))
    group = max(k for k in range(1, wide + 1) if rows % k == 0)
    fit = max(rows, 2 * rows * new_tokens // length)
    return Shape(rows, group, min(max(most // part, 1), fit, total), part, length, devices)


@partial(jax.jit, static_argnames="shape")
def batches(rollout: decode.Rollout, *, shape: Shape) -> tuple[decode.Rollout, ...]:
    """A page, as `slots.draw` gives it, in Rollouts of D * R rows."""
    firsts = range(0, shape.page, shape.batch)
    return tuple(
        sharding.constrain(jax.tree.map(lambda x, i=i: x[i : i + shape.batch], rollout), "batch")
        for i in firsts
    )


def drawn(
    params: Any,
    key: jax.Array,
    requests: Sequence[Request],
    mesh: Mesh,
    temperature: float,
    setup: slots.Setup,
    every: int | None = None,
    step: int = 0,
) -> Iterator[tuple[Sequence[Request], decode.Rollout]]:
    """Draws responses to requests, a page at a time.

    Args:
      params: decoder parameters.
      key: with (prompt id, sample) it fixes a response.
      requests: in order, ``each`` to a prompt.
      mesh: where the rows are.
      temperature: > 0.
      setup: of the slots.
      every: gives a page as far as it is drawn after so many tokens of each row, and again until it
        is whole; None gives it once.
      step: the training step, which fixes a response as well.

    Yields:
      The requests of a page and their Rollout, see `slots.draw`. The page after it is dispatched
      when it is asked for.
    """
    shape, pad_id = setup.shape, setup.limits.pad_id
    parts = [requests[i : i + shape.page] for i in range(0, len(requests), shape.page)]

    def supplied(state: slots.State, number: int) -> slots.State:
        if number >= len(parts):
            return state
        rows = parts[number]
        prompts = [r.tokens for r in rows[:: shape.each]]
        many = shape.devices * shape.prompts
        filled = [*prompts, *prompts[:1] * (many - len(prompts))]
        of_all = [*rows, *[rows[0]] * (shape.page - len(rows))]
        ids, samples = (
            np.array([getattr(r, name) for r in of_all], np.int32)
            for name in ("prompt_id", "sample")
        )
        before = shape.prompts * np.arange(shape.devices)
        real = np.clip(len(prompts) - before, 0, shape.prompts).astype(np.int32)
        tokens, ids, samples, real = sharding.place(
            (pad_left(filled, shape.length, pad_id), ids, samples, real), mesh, "batch"
        )
        keys = decode.identity_keys(key, step, ids, samples)
        with jax.set_mesh(mesh):
            return slots.supply(state, params, tokens, keys, number, real, setup=setup)

    state = supplied(supplied(slots.start(setup, mesh)(), 0), 1)
    most = np.int32(every or np.iinfo(np.int32).max)
    for number, rows in enumerate(parts):
        while True:
            with jax.set_mesh(mesh):
                state, rollout = slots.draw(
                    state, params, np.float32(temperature), number, most, setup=setup
                )
            if every is None or not sharding.fetch(state.store.left_2)[:, number % 2].any():
                break
            yield rows, rollout
        state = supplied(state, number + 2)
        yield rows, rollout
