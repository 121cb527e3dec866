"""Values of prefixes: a table of mean returns, against a slow twin."""

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax.rl import prefix


def twin(history, keep):
    """Mean return of each cell seen, older ones counting less; each cell by a plain loop."""
    total = np.zeros((prefix.POSITIONS, prefix.RANKS))
    weight = np.zeros_like(total)
    for ranks, returns, mask in history:
        total, weight = keep * total, keep * weight
        for b, t in zip(*np.nonzero(mask)):
            cell = t * prefix.POSITIONS // ranks.shape[1], min(int(ranks[b, t] * 16), 15)
            total[cell] += returns[b, t]
            weight[cell] += 1
    return total, weight


def batches(rng, count, T=24):
    for _ in range(count):
        shape = (5, T)
        yield rng.random(shape, np.float32), rng.normal(size=shape), rng.random(shape) < 0.7


def test_a_table_has_the_mean_returns_of_its_cells(rng):
    history, table = list(batches(rng, 3)), prefix.empty()
    for ranks, returns, mask in history:
        table = prefix.updated(table, jnp.array(ranks), jnp.array(returns), jnp.array(mask), 0.5)
    total, weight = twin(history, 0.5)
    np.testing.assert_allclose(table.total, total, atol=1e-5)
    np.testing.assert_allclose(table.weight, weight, atol=1e-5)
    ranks = history[0][0]
    found = prefix.values(table, jnp.array(ranks))
    for b, t in ((0, 0), (3, 7), (4, 23)):
        i, k = t * 16 // 24, int(ranks[b, t] * 16)
        mean = total[i].sum() / weight[i].sum()
        value = (total[i, k] + prefix.PRIOR * mean) / (weight[i, k] + prefix.PRIOR)
        np.testing.assert_allclose(found[b, t], value, atol=1e-5)


def test_what_was_never_seen_has_the_value_of_its_position_or_none(rng):
    ranks = jnp.full((2, 32), 0.99)
    mask = jnp.ones((2, 1)) * (jnp.arange(32) < 4)  # two positions of the sixteen
    table = prefix.updated(
        prefix.empty(), ranks, jnp.full((2, 32), 3.0), mask * jnp.ones((2, 1)), 1
    )
    elsewhere = prefix.values(table, jnp.zeros((2, 32)))
    np.testing.assert_allclose(elsewhere[:, :4], 3.0, rtol=1e-6)
    np.testing.assert_array_equal(elsewhere[:, 4:], 0.0)


def test_ranks_at_both_ends_and_short_responses_fall_in_a_cell():
    ranks = jnp.array([[0.0, 1.0, 0.5]])  # fewer tokens than positions
    table = prefix.updated(prefix.empty(), ranks, jnp.ones((1, 3)), jnp.ones((1, 3), bool), 1.0)
    assert table.weight.sum() == 3
    assert [table.weight[0, 0], table.weight[5, 15], table.weight[10, 8]] == [1, 1, 1]


def test_padding_teaches_nothing():
    nan = jnp.full((1, 4), jnp.nan)
    table = prefix.updated(prefix.empty(), jnp.zeros((1, 4)), nan, jnp.zeros((1, 4), bool), 1.0)
    np.testing.assert_array_equal(table.total, 0)


def test_values_ahead_are_those_of_the_next_token(rng):
    ranks, returns = rng.random((5, 24), np.float32), rng.normal(size=(5, 24))
    seen = jnp.ones(ranks.shape, bool)
    table = prefix.updated(prefix.empty(), jnp.array(ranks), jnp.array(returns), seen, 1.0)
    at_own = prefix.values(table, jnp.array(ranks))
    shifted = jnp.array(np.roll(ranks, -1, axis=1))
    candidates = jnp.stack([shifted, 1 - shifted], axis=-1)  # at token t, ranks after it
    found = prefix.values(table, candidates, ahead=1)
    assert found.shape == (5, 24, 2)
    np.testing.assert_allclose(found[:, :-1, 0], at_own[:, 1:], rtol=1e-6)
    flipped = prefix.values(table, 1 - jnp.array(ranks))
    np.testing.assert_allclose(found[:, :-1, 1], flipped[:, 1:], rtol=1e-6)


def test_a_lookahead_leaves_the_expected_gradient_as_it_is(rng):
    """Q-Prop's identity, over all tokens of a state, for values that are any numbers."""
    V, K = 7, 3
    logits, advantage = jnp.array(rng.normal(size=V)), jnp.array(rng.normal(size=V))
    log_pi = jax.nn.log_softmax(logits)
    top, ids = jax.lax.top_k(log_pi, K)
    candidate, other = jnp.array(rng.normal(size=K)), jnp.float32(0.3)
    every = jnp.arange(V)
    found = jax.vmap(
        lambda a: prefix.lookahead(*(x[None, None] for x in (candidate, other, ids, top, a)))
    )(every)
    q = jnp.full(V, other).at[ids].set(candidate)
    np.testing.assert_allclose(found.value_BxT[:, 0, 0], jnp.exp(log_pi) @ q, rtol=1e-5)
    np.testing.assert_allclose(
        found.drawn_BxT[:, 0, 0], q - jnp.exp(log_pi) @ q, rtol=1e-4, atol=1e-6
    )

    def plain(x):
        return jnp.exp(log_pi) @ (jax.nn.log_softmax(x) * advantage)

    def with_lookahead(x):
        log_p = jax.nn.log_softmax(x)
        rest = jnp.exp(log_pi) @ (log_p * (advantage - found.drawn_BxT[:, 0, 0]))
        return rest + jnp.exp(log_p)[ids] @ found.credit_BxTxK[0, 0, 0]

    np.testing.assert_allclose(jax.grad(with_lookahead)(logits), jax.grad(plain)(logits), atol=1e-6)
