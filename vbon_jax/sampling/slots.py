"""Slots: rows that responses take in turns, so that none waits for the longest of a batch.

Work comes in pages of N prompts with ``each`` responses. Two pages are on the device: rows that the
first has no more use for begin with the second. A row whose response ends takes the next one at the
next step, within the same program; the program ends with the page, and the host supplies another.

Rows stand in groups, each before the prompts it holds: at most two, so that a group goes on to its
next prompt while the last responses to the one before are still written. A prompt's keys and values
are held once for a group. Each row writes the slot of its own token, and reads its prompt wherever
it stands, so that a response has the same log-probs to the last bit whatever came before it.

On a mesh each device has slots and pages of its own, and none waits for another: a page of the run
is one of each of D devices, whose prompts follow each other. All arrays of a `State` begin with D.

Shape suffixes: R rows, W groups, J prompts held by a group, C responses of a page, S = 2N prompts
and 2C responses on the device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vbon_jax import sharding
from vbon_jax.models import cache as kv_cache
from vbon_jax.models import decoder, lm
from vbon_jax.sampling import decode


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows and pages of each device.

    Attributes:
      rows: R, decoded at once.
      group: rows of a group, a divisor of R.
      prompts: N, of a page.
      each: responses to a prompt of a page.
      length: padded length of a prompt in tokens.
      devices: D, that share the prompts out.
    """

    rows: int
    group: int
    prompts: int
    each: int
    length: int
    devices: int = 1

    @property
    def responses(self) -> int:
        """C, of a page of one device."""
        return self.prompts * self.each

    @property
    def batch(self) -> int:
        """Rows of all devices, which are decoded at once."""
        return self.devices * self.rows

    @property
    def page(self) -> int:
        """Responses of a page of all devices."""
        return self.devices * self.responses

    @property
    def held(self) -> int:
        """J: where a prompt has one row alone, its end is the prompt's."""
        return 1 if self.group == self.each == 1 else 2


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the programs are compiled for; hashes by value.

    Attributes:
      config: the decoder's configuration.
      shape: of the slots.
      limits: of the responses.
    """

    config: decoder.DecoderConfig
    shape: Shape
    limits: decode.Limits


class Held(NamedTuple):
    """The prompts of groups.

    Attributes:
      k: keys, a tuple of one [W, G, J * P, K] a layer; v likewise.
      mask_WxJxP: their tokens; position_WxJxP likewise.
      number_WxJ: int32, which prompt, counted over all pages; -1 for none.
      taken_WxJ: int32, how many of its responses rows have taken.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    mask_WxJxP: jax.Array
    position_WxJxP: jax.Array
    number_WxJ: jax.Array
    taken_WxJ: jax.Array


class Store(NamedTuple):
    """Two pages of prompts, and of what they are answered.

    Attributes:
      k: keys of all tokens of a prompt but the last, a tuple of one [S, G, P, K] a layer; v
        likewise.
      mask_SxP: their tokens; position_SxP likewise.
      last_S: int32, the last token of each prompt.
      before_S: int32, the number of tokens before it.
      keys_C2: raw key data of the responses.
      out: of the responses of each page, a Rollout [2, C, T].
      left_2: int32, responses of each page that are not finished.
      supplied: int32, the number of prompts that came so far.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    mask_SxP: jax.Array
    position_SxP: jax.Array
    last_S: jax.Array
    before_S: jax.Array
    keys_C2: jax.Array
    out: decode.Rollout
    left_2: jax.Array
    supplied: jax.Array


class Rows(NamedTuple):
    """What the rows are at.

    Attributes:
      response_R: int32, which of the 2C responses; 2C where there is none.
      slot_R: int32, which of its group's prompts it goes on from.
      t_R: int32, how many tokens it has drawn.
      token_R: int32, what it runs next.
      k: its own keys, a tuple of one [R, G, T, K] a layer; v likewise.
    """

    response_R: jax.Array
    slot_R: jax.Array
    t_R: jax.Array
    token_R: jax.Array
    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


class State(NamedTuple):
    """All that stays on a device between pages; between programs that of all, [D, ...]."""

    store: Store
    held: Held
    rows: Rows
    taken: jax.Array  # int32, prompts that groups have begun


def empty(setup: Setup) -> State:
    """Slots of all devices without work."""
    devices = setup.shape.devices
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (devices, *x.shape)), _empty(setup))


def _empty(setup: Setup) -> State:
    """Those of one device."""
    shape, limits = setup.shape, setup.limits
    R, T, P = shape.rows, limits.max_new_tokens, shape.length
    groups, pages = R // shape.group, 2 * shape.prompts
    kept = partial(kv_cache.init, setup.config)
    store, held, own = kept(pages, P), kept(groups, shape.held * P), kept(R, T)
    out = decode.Rollout(
        jnp.full((2, shape.responses, T), limits.pad_id, jnp.int32),
        jnp.zeros((2, shape.responses, T), bool),
        jnp.zeros((2, shape.responses, T)),
        jnp.zeros((2, shape.responses), bool),
    )
    none = jnp.zeros(pages, jnp.int32)
    data = jax.random.key_data(jax.random.split(jax.random.key(0), 2 * shape.responses))
    by_slot = (groups, shape.held, P)
    idle = jnp.full(R, 2 * shape.responses, jnp.int32)
    zero = jnp.zeros(R, jnp.int32)
    return State(
        Store(
            store.k, store.v, store.mask_BxS, store.position_BxS, none, none,
            jnp.zeros_like(data), out, jnp.zeros(2, jnp.int32), jnp.int32(0),
        ),
        Held(
            held.k, held.v, jnp.zeros(by_slot, bool), jnp.zeros(by_slot, jnp.int32),
            jnp.full(by_slot[:2], -1, jnp.int32), jnp.zeros(by_slot[:2], jnp.int32),
        ),
        Rows(idle, zero, zero, zero, own.k, own.v),
        jnp.int32(0),
    )  # fmt: skip


@functools.cache
def start(setup: Setup, mesh: Mesh) -> Callable[[], State]:
    """Gives the program that creates empty slots where the table of shardings puts them."""
    own = partial(empty, setup)
    return jax.jit(own, out_shardings=sharding.shardings(jax.eval_shape(own), mesh, "slots"))


def _by_device(f: Callable[..., Any], shared: Any, state: State, *own: Any) -> Any:
    """``f(shared, state, *own)`` by each device on its own; gives the State first, [D, ...]."""

    def local(shared: Any, state: State, *own: Any) -> Any:
        new, *others = f(shared, jax.tree.map(lambda x: x[0], state), *own)
        return jax.tree.map(lambda x: x[None], new), *others

    return sharding.apart(local, shared, state, *own)


@partial(jax.jit, static_argnames="setup", donate_argnames="state")
def supply(
    state: State,
    params: Any,
    prompts: tuple[jax.Array, jax.Array],
    keys_C: jax.Array,
    page: jax.Array | int,
    real_D: jax.Array,
    *,
    setup: Setup,
) -> State:
    """Puts a page in the place of the last but one, whose responses are all drawn.

    Args:
      state: is donated.
      params: decoder parameters.
      prompts: int32 ids [D * N, P], padded on the left, and their mask.
      keys_C: a key of each response, [D * C], see ``decode.identity_keys``.
      page: its number; all pages before the last are full.
      real_D: how many of each device's prompts, the first, are to be answered.
      setup: of the slots.

    Returns:
      The state with the page.
    """
    data_C = jax.random.key_data(keys_C)
    shared = (decoder.for_decoding(params, setup.config), page)
    put = partial(_put_page, setup=setup)
    return sharding.constrain(_by_device(put, shared, state, prompts, data_C, real_D)[0], "slots")


def _put_page(
    shared: tuple[Any, jax.Array],
    state: State,
    prompts: tuple[jax.Array, jax.Array],
    data_C: jax.Array,
    real_1: jax.Array,
    setup: Setup,
) -> tuple[State]:
    """`supply` on one device."""
    (params, page), (tokens_NxP, mask_NxP), real = shared, prompts, real_1[0]
    config, shape, limits = setup.config, setup.shape, setup.limits
    half = page % 2
    old, first = state.store, half * shape.prompts
    k, v, mask, position = old.k, old.v, old.mask_SxP, old.position_SxP

    def put(all_: jax.Array, new: jax.Array, at: jax.Array | int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(all_, new.astype(all_.dtype), at, 0)

    before = decode.prompts_before(params, config, tokens_NxP, mask_NxP, 1)
    if before is not None:
        k = tuple(put(a, b, first) for a, b in zip(k, before.k, strict=True))
        v = tuple(put(a, b, first) for a, b in zip(v, before.v, strict=True))
        mask, position = (
            put(mask, before.mask_BxP, first),
            put(position, before.position_BxP, first),
        )
    none = jax.tree.map(lambda x: jnp.zeros_like(x[:1]), old.out)
    none = none._replace(tokens_BxT=jnp.full_like(none.tokens_BxT, limits.pad_id))
    lengths_N = jnp.sum(mask_NxP, axis=1, dtype=jnp.int32)
    found = state._replace(
        store=Store(
            k, v, mask, position,
            put(old.last_S, tokens_NxP[:, -1], first),
            put(old.before_S, lengths_N - 1, first),
            put(old.keys_C2, data_C, half * shape.responses),
            jax.tree.map(lambda a, b: put(a, b, half), old.out, none),
            old.left_2.at[half].set(real * shape.each),
            old.supplied + real,
        )
    )  # fmt: skip
    return (found,)


def _load(state: State, shape: Shape) -> tuple[Held, jax.Array]:
    """Prompts of the store for the groups whose idle rows have no response left to take."""
    store, idle_R = state.store, state.rows.response_R == 2 * shape.responses
    groups, J, P = state.held.mask_WxJxP.shape
    idle_WxK, slot_WxK = (x.reshape(groups, -1) for x in (idle_R, state.rows.slot_R))
    wanted_W = jnp.sum(idle_WxK, axis=1)
    busy_WxJ = jnp.any(~idle_WxK[:, :, None] & (slot_WxK[:, :, None] == jnp.arange(J)), axis=1)

    def find(held: Held, taken: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which groups want a prompt, and which of their places are free."""
        left_WxJ = jnp.where(held.number_WxJ < 0, 0, shape.each - held.taken_WxJ)
        free_WxJ = (left_WxJ == 0) & ~busy_WxJ
        wants_W = (wanted_W > jnp.sum(left_WxJ, axis=1)) & jnp.any(free_WxJ, axis=1)
        return wants_W & (taken < store.supplied), free_WxJ

    def cond(carry: tuple[Held, jax.Array]) -> jax.Array:
        return jnp.any(find(*carry)[0])

    def body(carry: tuple[Held, jax.Array]) -> tuple[Held, jax.Array]:
        held, taken = carry
        wants_W, free_WxJ = find(held, taken)
        w = jnp.argmax(wants_W)
        j = jnp.argmax(free_WxJ[w])
        at = taken % (2 * shape.prompts)

        def moved(to: jax.Array, of: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_slice_in_dim(of, at, 1)
            return jax.lax.dynamic_update_slice(to, row, (w, 0, j * P, 0))

        new = held._replace(
            mask_WxJxP=held.mask_WxJxP.at[w, j].set(store.mask_SxP[at]),
            position_WxJxP=held.position_WxJxP.at[w, j].set(store.position_SxP[at]),
            number_WxJ=held.number_WxJ.at[w, j].set(taken),
            taken_WxJ=held.taken_WxJ.at[w, j].set(0),
        )
        if shape.length > 1:
            new = new._replace(
                k=tuple(map(moved, held.k, store.k)), v=tuple(map(moved, held.v, store.v))
            )
        return new, taken + 1

    return jax.lax.while_loop(cond, body, (state.held, state.taken))


def _hand_out(state: State, shape: Shape) -> tuple[Held, Rows]:
    """The next responses of a group's prompts, the older one's first, for its idle rows."""
    held, rows, store = state.held, state.rows, state.store
    groups, J = held.number_WxJ.shape
    number_R, C = jnp.arange(shape.rows) // shape.group, shape.responses
    left_WxJ = jnp.where(held.number_WxJ < 0, 0, shape.each - held.taken_WxJ)
    order_WxJ = jnp.argsort(held.number_WxJ, axis=1)
    upto_WxJ = jnp.cumsum(jnp.take_along_axis(left_WxJ, order_WxJ, axis=1), axis=1)
    idle_R = rows.response_R == 2 * C
    rank_R = (jnp.cumsum(idle_R.reshape(groups, -1), axis=1) - 1).reshape(-1)
    upto_RxJ = upto_WxJ[number_R]
    nth_R = jnp.sum(rank_R[:, None] >= upto_RxJ, axis=1)
    starts_R = idle_R & (nth_R < J)
    nth_R = jnp.minimum(nth_R, J - 1)
    slot_R = order_WxJ[number_R, nth_R]
    earlier_R = jnp.where(nth_R > 0, upto_RxJ[jnp.arange(shape.rows), nth_R - 1], 0)
    sample_R = held.taken_WxJ[number_R, slot_R] + rank_R - earlier_R
    at_R = held.number_WxJ[number_R, slot_R] % (2 * shape.prompts)
    given_WxJ = jnp.sum(
        starts_R.reshape(groups, -1, 1) & (slot_R.reshape(groups, -1, 1) == jnp.arange(J)), axis=1
    )

    def begin(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(starts_R, new, old)

    return held._replace(taken_WxJ=held.taken_WxJ + given_WxJ), rows._replace(
        response_R=begin(at_R * shape.each + sample_R, rows.response_R),
        slot_R=begin(slot_R, rows.slot_R),
        t_R=begin(jnp.zeros_like(rows.t_R), rows.t_R),
        token_R=begin(store.last_S[at_R], rows.token_R),
    )


@partial(jax.jit, static_argnames="setup", donate_argnames="state")
def draw(
    state: State,
    params: Any,
    temperature: jax.Array | float,
    page: jax.Array | int,
    most: jax.Array | int,
    *,
    setup: Setup,
) -> tuple[State, decode.Rollout]:
    """Decodes until all responses of a page are drawn, and begins with those of the next.

    Args:
      state: with both pages; is donated.
      params: decoder parameters, the same for all pages.
      temperature: > 0, divides the logits.
      page: number of the page.
      most: ends after so many tokens of each row, whatever is drawn by then.
      setup: of the slots.

    Returns:
      The state, and the Rollout of the page: D * C rows, and rows without a token up to a
      multiple of D * R, to be read so many at a time.
    """
    shared = (decoder.for_decoding(params, setup.config), temperature, page, most)
    state, rollout = _by_device(partial(_draw, setup=setup), shared, state)
    short = -setup.shape.page % setup.shape.batch

    def filled(x: jax.Array, value: Any = 0) -> jax.Array:
        return jnp.pad(x, ((0, short), *[(0, 0)] * (x.ndim - 1)), constant_values=value)

    rollout = jax.tree.map(filled, rollout)._replace(
        tokens_BxT=filled(rollout.tokens_BxT, setup.limits.pad_id)
    )
    return sharding.constrain(state, "slots"), sharding.constrain(rollout, "batch")


def _draw(shared: tuple[Any, ...], state: State, setup: Setup) -> tuple[State, decode.Rollout]:
    """`draw` on one device."""
    params, temperature, page, most = shared
    config, shape, limits = setup.config, setup.shape, setup.limits
    half, C, T = page % 2, shape.responses, limits.max_new_tokens
    group_R = jnp.arange(shape.rows) // shape.group

    def cond(carry: tuple[State, jax.Array]) -> jax.Array:
        state, steps = carry
        return (sharding.in_step(state.store.left_2[half]) > 0) & (steps < most)

    def body(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, steps = carry
        held, taken = _load(state, shape)
        held, rows = _hand_out(state._replace(held=held), shape)
        store, active_R = state.store, rows.response_R < 2 * C
        at_R = held.number_WxJ[group_R, rows.slot_R] % (2 * shape.prompts)
        prefix = None
        if shape.length > 1:
            prefix = kv_cache.Prefix(
                held.k, held.v, held.mask_WxJxP[group_R, rows.slot_R],
                held.position_WxJxP[group_R, rows.slot_R],
                rows.slot_R if shape.held > 1 else None,
            )  # fmt: skip
        position_R = store.before_S[at_R] + rows.t_R
        own = kv_cache.KVCache(
            rows.k, rows.v,
            jnp.arange(T) < rows.t_R[:, None],
            store.before_S[at_R][:, None] + jnp.arange(T),
            rows.t_R,
        )  # fmt: skip
        hidden, own = decoder.step(params, config, rows.token_R, position_R, own, prefix)
        keys = jax.random.wrap_key_data(store.keys_C2[jnp.minimum(rows.response_R, 2 * C - 1)])
        uniform_R = decode.uniforms(keys, rows.t_R)
        found = decode.pick(params, hidden, uniform_R, temperature, config, limits)
        stops_R = lm.is_end(found.token, limits.end_ids)
        ends_R = active_R & (stops_R | (rows.t_R == T - 1))
        of_R = rows.response_R // C  # 2 where there is none: what is written there is dropped
        nth_R = rows.response_R % C
        out = decode.Rollout(
            store.out.tokens_BxT.at[of_R, nth_R, rows.t_R].set(found.token, mode="drop"),
            store.out.mask_BxT.at[of_R, nth_R, rows.t_R].set(True, mode="drop"),
            store.out.log_probs_BxT.at[of_R, nth_R, rows.t_R].set(found.log_prob, mode="drop"),
            store.out.finished_B.at[of_R, nth_R].set(stops_R, mode="drop"),
        )
        left_2 = store.left_2.at[of_R].add(-ends_R.astype(jnp.int32), mode="drop")
        rows = Rows(
            jnp.where(ends_R, 2 * C, rows.response_R), rows.slot_R,
            jnp.minimum(rows.t_R + 1, T - 1), found.token, own.k, own.v,
        )  # fmt: skip
        store = store._replace(out=out, left_2=left_2)
        return State(store, held, rows, taken), steps + 1

    state, _ = jax.lax.while_loop(cond, body, (state, jnp.int32(0)))
    return state, jax.tree.map(lambda x: x[half], state.store.out)
