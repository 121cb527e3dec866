import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import tiny
from tests.training.test_partly_trained import TOP, close, experience, parts
from vbon_jax.training import lengths, ppo, scoring
from vbon_jax.training.options import Memory, Train, microbatches


@pytest.fixture(scope="module")
def batch(world, mesh):
    """Of 1 to 6 tokens."""
    found = world.rollout_batch(mesh, world.fresh(mesh))
    some = masks(np.arange(16) * 5 % 6 + 1, 6) & found.rollout.mask_BxT
    return dataclasses.replace(found, rollout=found.rollout._replace(mask_BxT=some))


def masks(lengths_B, T):
    return jnp.arange(T) < jnp.array(lengths_B)[:, None]


@pytest.mark.parametrize(
    ("rows", "accumulate", "lengths_", "parts"),
    [(64, 1, 1, 1), (64, 1, 4, 4), (6, 1, 4, 3), (2, 1, 16, 2), (64, 2, 4, 2), (64, 8, 1, 8)],
)
def test_a_gradient_step_is_divided_for_memory_or_for_lengths(rows, accumulate, lengths_, parts):
    train = Train(minibatch_size=rows)
    assert microbatches(train, Memory(accumulate=accumulate, lengths=lengths_)) == parts


def test_each_part_holds_rows_of_like_length():
    found = np.array([3, 7, 1, 5, 2, 8, 4, 6])
    order = lengths.order(masks(found, 8), 4)
    assert sorted(order.tolist()) == list(range(8))
    rows = scoring.in_parts(found[order], 4)
    assert [sorted(part.tolist()) for part in rows] == [[1, 2], [3, 4], [5, 6], [7, 8]]


@pytest.mark.parametrize(("longest", "length"), [(0, 3), (3, 3), (4, 5), (5, 5), (6, 7), (7, 7)])
def test_the_shortest_length_that_holds_all_is_taken(longest, length):
    """ceil(7 / 3) = 3, ceil(14 / 3) = 5, 7; after a prompt of 2 columns."""
    mask = masks([min(longest, 1), longest], 7)
    rows = {"whole": jnp.ones((2, 9)), "response": jnp.arange(14).reshape(2, 7), "row": jnp.ones(2)}

    def seen(rows):
        response = rows["response"]
        assert rows["whole"].shape == (2, response.shape[1] + 2) and rows["row"].shape == (2,)
        return jnp.int32(response.shape[1]), response[:, 0]

    found, first = jax.jit(partial(lengths.at_shortest, seen, lengths=3))(rows, mask)
    assert int(found) == length
    np.testing.assert_array_equal(first, [0, 7])


def test_an_update_is_the_same_at_any_lengths(world, mesh, batch):
    reference, params = parts(world, mesh, TOP)
    setup = tiny.changed(world.setup, penalty="full")
    expected, expected_metrics = experience(world, reference, params, batch, setup)
    cut = tiny.changed(setup, lengths=2)
    found, metrics = experience(world, reference, params, batch, cut)
    inside = np.asarray(found.response_mask_BxT)
    assert len(set(inside.sum(axis=1).tolist())) > 4
    hidden = [np.asarray(x.ref_hidden_BxTxD)[inside] for x in (found, expected)]
    np.testing.assert_allclose(*hidden, rtol=1e-4, atol=1e-5)
    close(metrics, expected_metrics, 1e-4)
    rest = {"ref_hidden_BxTxD": None, "trunk_BxSxD": None}
    close(dataclasses.replace(found, **rest), dataclasses.replace(expected, **rest), 1e-4)

    rows = jax.tree.map(lambda x: x[:8], found)
    short = jax.tree.map(lambda x: x[lengths.order(rows.response_mask_BxT, 2)], rows)
    got = jax.jit(partial(ppo.gradients, setup=cut))(params, reference, short)
    close(got, tiny.gradients(params, reference, rows, setup), 1e-4)
