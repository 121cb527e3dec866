"""Responses drawn in slots are those drawn alone, whatever came before and stands beside."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.sampling.test_decode import EOS, T, requests, rows, sampler
from vbon_jax import sharding
from vbon_jax.models import decoder
from vbon_jax.sampling import pages, slots

KEY = jax.random.key(5)  # of `rows`


def alone(params, config, mesh, request, **changes):
    """(tokens, log-probs, finished) of one response in a rollout of its own."""
    rollout = sampler(params, config, mesh, **changes).draw(KEY, 0, [request]).rollout
    kept = rollout.mask_BxT[0]
    found = (rollout.tokens_BxT[0][kept].tolist(), rollout.log_probs_BxT[0][kept])
    return *found, bool(rollout.finished_B[0])


@pytest.mark.parametrize(
    ("prompts", "each", "batch_size"),
    [
        (30, 1, 4),  # rows that take a new prompt each time, over several pages
        (7, 12, 8),  # groups that go on from one prompt to the next
        (2, 50, 8),  # more responses to a prompt than a page has
        (3, 5, 64),  # fewer responses than rows
    ],
)
def test_responses_are_those_drawn_alone(params, config, mesh, prompts, each, batch_size):
    wanted = requests(prompts, each)
    drawn = rows(params, config, mesh, wanted, batch_size)
    assert list(drawn) == [(r.prompt_id, r.sample) for r in wanted]  # in order, none twice
    for request in wanted[:: 1 + len(wanted) // 12]:
        tokens, log_probs, finished = alone(params, config, mesh, request)
        got = drawn[request.prompt_id, request.sample]
        assert (got[0], got[2]) == (tokens, finished)
        np.testing.assert_allclose(got[1], log_probs, atol=1e-5)


def test_a_run_that_goes_on_draws_the_same_to_the_last_bit(params, config, mesh):
    wanted, drawing = requests(11, 6), sampler(params, config, mesh)

    def log_probs(skip):
        found = []
        for batch in drawing.batches(KEY, wanted, 8, skip):
            found += [np.asarray(x) for x in batch.rollout.log_probs_BxT[: batch.size]]
        return np.stack(found)

    whole = log_probs(0)
    assert len(whole) == len(wanted)
    for done in (1, 4, 9):
        np.testing.assert_array_equal(log_probs(done * 6), whole[done * 6 :])
    assert not list(drawing.batches(KEY, wanted, 8, len(wanted)))


def test_no_row_waits_for_the_longest(params, config, mesh):
    """Steps of a run whose rows are seldom empty: a batch at a time would take many more."""
    wanted = requests(24, 16)
    ends = {"end_ids": tuple(range(3, 37, 4))}
    drawn = rows(params, config, mesh, wanted, 8, **ends)
    lengths = np.array([len(tokens) for tokens, *_ in drawn.values()])
    by_batch = lengths.reshape(-1, 8).max(axis=1).sum()
    steps = sum(counted(params, config, mesh, wanted, 8, **ends))
    assert steps < 0.75 * by_batch
    assert lengths.sum() > 0.85 * 8 * steps


def counted(params, config, mesh, wanted, batch_size, **changes):
    """A one for each step, by a program whose step tells that it ran."""
    ran = []
    whole = decoder.step

    def telling(*args, **kwargs):
        jax.debug.callback(lambda: ran.append(1), ordered=True)
        return whole(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "step", telling)
        again = jax.jit(slots.draw.__wrapped__, static_argnames="setup", donate_argnames="state")
        patch.setattr(slots, "draw", again)
        for batch in sampler(params, config, mesh, **changes).batches(KEY, wanted, batch_size):
            jax.block_until_ready(batch.rollout)
    jax.effects_barrier()
    return ran


def test_one_compile_of_each_program_serves_a_run(params, config, mesh):
    before = slots.supply._cache_size(), slots.draw._cache_size()
    rows(params, config, mesh, requests(30, 3), 5, temperature=0.5)
    rows(params, config, mesh, requests(30, 3), 5, temperature=1.5)
    after = slots.supply._cache_size(), slots.draw._cache_size()
    assert [b - a for a, b in zip(before, after)] == [1, 1]


def test_the_decode_loop_copies_no_keys_or_values(params, config):
    """In the compiled program: every layer's are written in place, step by step."""
    shape = pages.shape_for(8, 6, 16, 8, T)
    setup = slots.Setup(config, shape, sampler(params, config, None).settings.limits)
    state = jax.eval_shape(lambda: slots.empty(setup))
    text = slots.draw.lower(state, params, 1.0, 0, 8, setup=setup).compile().as_text()
    sizes = [f"f32[{x.shape[0]},{','.join(map(str, x.shape[1:]))}]" for x in state.rows.k]
    sizes += [f"f32[{','.join(map(str, x.shape))}]" for x in state.held.k]
    copies = [x for x in text.splitlines() if " copy(" in x and any(f"= {s}" in x for s in sizes)]
    assert not copies, copies


def test_one_token_prompts_and_no_end(params, config, mesh):
    short = [dataclasses.replace(r, tokens=r.tokens[:1]) for r in requests(5, 4)]
    drawn = rows(params, config, mesh, short, 4, end_ids=())
    assert all(len(tokens) == T and not finished for tokens, _, finished in drawn.values())
    for request in short[::7]:
        tokens, log_probs, _ = alone(params, config, mesh, request, end_ids=())
        assert drawn[request.prompt_id, request.sample][0] == tokens
        np.testing.assert_allclose(
            drawn[request.prompt_id, request.sample][1], log_probs, atol=1e-5
        )


def test_on_several_devices_the_responses_are_the_same(params, config, mesh):
    wanted = requests(9, 8)
    expected = rows(params, config, mesh, wanted, 16)
    many = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(many):
        found = rows(sharding.place({"decoder": params}, many)["decoder"], config, many, wanted, 16)
    assert list(found) == list(expected)
    for identity, (tokens, log_probs, finished) in found.items():
        assert (tokens, finished) == (expected[identity][0], expected[identity][2])
        np.testing.assert_allclose(log_probs, expected[identity][1], atol=1e-5)
    assert any(tokens[-1] == EOS for tokens, *_ in found.values())


def test_text_is_streamed_from_several_devices(params, config):
    """Whether a page is whole is asked of all of them."""
    many = sharding.make_mesh(4, 1, 1)
    placed = sharding.place({"decoder": params}, many)["decoder"]
    wanted = requests(5, 2)
    drawing = sampler(placed, config, many)
    shape = pages.shape_for(4, 5, 2, 8, T, devices=4)
    setup = slots.Setup(config, shape, drawing.settings.limits)
    looks = list(pages.drawn(placed, KEY, wanted, many, 1.0, setup, every=3))
    whole = list(pages.drawn(placed, KEY, wanted, many, 1.0, setup))
    assert len(looks) > len(whole) >= 2
    counts = [int(rollout.mask_BxT.sum()) for rows, rollout in looks if rows == whole[0][0]]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    last = {id(rows): rollout for rows, rollout in looks}
    for (_, one), other in zip(whole, last.values(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
