"""Chunks of rows against all rows at once: values, gradients, memory, work done."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vbon_jax.rl import chunked, ppo
from vbon_jax.rl.masking import masked
from vbon_jax.rl.next_token import next_token

N, D, V = 23, 5, 11
CHUNKS = [1, 7, N, N + 10]


def project(head, hidden):
    return jnp.tanh(jnp.einsum("ND,VD->NV", hidden, head) / 3) * 3 / 0.7


def fn(logits, frozen, ref_hidden, tokens, old, advantages, mask):
    """A PPO loss with the whole distributions' KL and entropy, and sums to be logged."""
    ref_head, count = frozen
    found = next_token(logits, project(ref_head, ref_hidden), tokens)
    loss, info = ppo.policy_loss(found.log_prob, old, advantages, mask, 0.2, count)
    loss += jnp.sum(masked(0.3 * found.kl - 0.1 * found.entropy, mask)) / count
    return loss, {"kl": jnp.sum(masked(found.kl, mask)), "ratio": info["ratio_mean"]}


@pytest.fixture(scope="module")
def drawn():
    return draw(N, D, V)


def draw(n, d, v, seed=0):
    rng = np.random.default_rng(seed)
    head, ref_head = (jnp.float32(rng.normal(size=(v, d))) for _ in range(2))
    hidden, ref_hidden = (jnp.float32(rng.normal(size=(n, d))) for _ in range(2))
    mask = jnp.asarray(rng.random(n) < 0.7).at[0].set(True)
    rows = (
        ref_hidden,
        jnp.int32(rng.integers(0, v, n)),
        jnp.float32(rng.normal(-2, 0.3, n)),
        jnp.float32(rng.normal(size=n)),
        mask,
    )
    return head, hidden, (ref_head, jnp.float32(mask.sum())), rows


def dense(head, hidden, frozen, rows):
    return fn(project(head, hidden), frozen, *rows)


def ours(head, hidden, frozen, rows, chunk=7, train_head=True):
    return chunked.sum_logits(
        fn, project, head, hidden, rows, chunk, frozen=frozen, train_head=train_head
    )


def both(of, **kwargs):
    return jax.jit(jax.value_and_grad(partial(of, **kwargs), argnums=(0, 1), has_aux=True))


def assert_same(got, expected, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), got, expected)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_sum_logits_equals_all_rows_at_once(drawn, chunk):
    expected = both(dense)(*drawn)
    assert_same(both(ours, chunk=chunk)(*drawn), expected)
    assert_same(jax.jit(partial(ours, chunk=chunk))(*drawn), expected[0])  # not differentiated
    assert all(np.abs(g).max() > 1e-3 for g in expected[1])


@pytest.mark.parametrize(("lanes", "chunk"), [(2, 8), (4, 16), (4, 1_000)])
def test_rows_that_devices_share_give_the_same_with_one_sum_of_the_head(lanes, chunk):
    """Whatever the chunks: the parts of d head are added after the loop."""
    args = draw(24, 4, 6)
    split = partial(chunked.sum_logits, fn, project, lanes=lanes)

    def ours(head, hidden, frozen, rows):
        return split(head, hidden, rows, chunk, frozen=frozen)

    assert_same(both(ours)(*args), both(dense)(*args))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_map_logits_equals_all_rows_at_once_and_takes_two_models(drawn, chunk):
    head, hidden, (ref_head, _), (ref_hidden, tokens, *_) = drawn

    def pair(heads, hiddens):
        return tuple(map(project, heads, hiddens))

    def score(logits, tokens):
        return next_token(*logits, tokens), logits[0][:, :2]

    args = ((head, ref_head), (hidden, ref_hidden))
    got = jax.jit(lambda h, x, t: chunked.map_logits(score, pair, h, x, (t,), chunk))(*args, tokens)
    assert_same(got, score(pair(*args), tokens))


@pytest.mark.parametrize("chunk", [7, N])
def test_an_untrained_head_gets_no_gradient_and_costs_no_product(drawn, chunk):
    _, (d_head, d_hidden) = both(ours, chunk=chunk, train_head=False)(*drawn)
    assert not np.any(d_head)
    assert_same(d_hidden, both(dense)(*drawn)[1][1])

    def products(of):  # a loop's body counts once; one product is the reference's
        return str(jax.make_jaxpr(of)(*drawn)).count("dot_general")

    loss = partial(ours, chunk=chunk)
    assert products(loss) == 2
    assert products(jax.grad(partial(loss, train_head=False), 1, has_aux=True)) == 3
    assert products(jax.grad(loss, (0, 1), has_aux=True)) == 4


def test_the_gradient_scales_and_the_logged_sums_have_none(drawn):
    def of(sums):
        return lambda *args: -2.5 * sums(*args)[0] + jnp.sum(args[1] ** 2)

    got = jax.grad(of(ours), (0, 1))(*drawn)
    assert_same(got, jax.grad(of(dense), (0, 1))(*drawn))
    logged = jax.grad(lambda *args: ours(*args)[1]["kl"], (0, 1))(*drawn)
    assert not any(np.any(g) for g in logged)


def test_rows_and_frozen_are_constants(drawn):
    head, hidden, frozen, (ref_hidden, *rest) = drawn

    def loss(frozen, ref_hidden):
        return ours(head, hidden, frozen, (ref_hidden, *rest))[0]

    assert not any(np.any(g) for g in jax.tree.leaves(jax.grad(loss, (0, 1))(frozen, ref_hidden)))


def test_inside_a_scan_and_over_a_population(drawn):
    head, hidden, frozen, rows = drawn

    def descend(of, head, hidden, scale):
        def step(head, _):
            def loss(head):
                # Both close over numbers that differ between members.
                fn_scaled = lambda *args: jax.tree.map(lambda x: scale * x, fn(*args))  # noqa: E731
                return of(fn_scaled, lambda w, x: scale * project(w, x), head, hidden)

            value, slope = jax.value_and_grad(loss)(head)
            return head - 0.1 * slope, value

        return jax.lax.scan(step, head, None, length=3)

    def in_chunks(fn, project, head, hidden):
        return chunked.sum_logits(fn, project, head, hidden, rows, 7, frozen=frozen)[0]

    def at_once(fn, project, head, hidden):
        return fn(project(head, hidden), frozen, *rows)[0]

    members = (jnp.stack([head, head + 0.1]), jnp.stack([hidden, -hidden]), jnp.float32([0.5, 2]))
    got = jax.jit(jax.vmap(partial(descend, in_chunks)))(*members)
    assert_same(got, jax.vmap(partial(descend, at_once))(*members), rtol=1e-4)


def test_a_head_in_bfloat16_gets_a_gradient_in_bfloat16_summed_in_float32():
    def count(logits, frozen, mask):
        return jnp.sum(jnp.where(mask, logits[:, 0], 0.0)), ()

    def loss(head, hidden, chunk):
        mask = jnp.ones(len(hidden), bool)
        return chunked.sum_logits(
            count, lambda w, x: x * w.astype(jnp.float32), head, hidden, (mask,), chunk
        )[0]

    # 256 + 1 is 256 in bfloat16: a running sum there would not pass 256.
    slope = jax.grad(loss)(jnp.bfloat16(1), jnp.ones((512, 1)), 1)
    assert slope.dtype == jnp.bfloat16 and slope == 512
    slope = jax.grad(loss, 1)(jnp.float32(2), jnp.ones((5, 1), jnp.bfloat16), 2)
    assert slope.dtype == jnp.bfloat16 and np.all(np.float32(slope) == 2)


def largest_buffer(of, *args):
    """Elements of the largest array that a compiled program names."""
    text = jax.jit(of).lower(*args).compile().as_text()
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_no_array_of_rows_times_vocabulary_is_stored():
    n, v = 256, 4096
    args = draw(n, 8, v)

    def slopes(of):
        return jax.value_and_grad(of, argnums=(0, 1), has_aux=True)

    assert largest_buffer(slopes(dense), *args) >= n * v  # the check can see one
    assert largest_buffer(slopes(partial(ours, chunk=32)), *args) <= 32 * v
    head, hidden, _, (_, tokens, *_) = args
    scored = partial(chunked.map_logits, lambda x, t: x[:, 0] + t, project)
    assert largest_buffer(lambda *a: scored(*a, (tokens,), 32), head, hidden) <= 32 * v


def test_rows_over_devices_stay_so_in_every_chunk(drawn):
    n, devices = 64, jax.devices()
    assert len(devices) == 8
    head, hidden, frozen, rows = draw(n, D, V)
    mesh = Mesh(np.array(devices), "data")
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in [["data"], []])
    run = jax.jit(
        jax.value_and_grad(partial(ours, chunk=32), argnums=(0, 1), has_aux=True),
        in_shardings=(whole, split, whole, split),
    )
    text = run.lower(head, hidden, frozen, rows).compile().as_text()
    assert f"f32[4,{V}]" in text and f"f32[32,{V}]" not in text  # 32 rows over 8 devices
    assert_same(run(head, hidden, frozen, rows), both(dense)(head, hidden, frozen, rows))


def test_wrong_arguments_are_named(drawn):
    head, hidden, frozen, rows = drawn
    with pytest.raises(ValueError, match="chunk is 0"):
        ours(head, hidden, frozen, rows, chunk=0)
    with pytest.raises(ValueError, match=r"lengths \[22, 23\]"):
        ours(head, hidden[1:], frozen, rows)
