"""Offline methods on a tiny decoder: the pool, the losses and the steps."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vbon_jax import sharding
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples, response_ids
from vbon_jax.errors import InputError
from vbon_jax.methods import bon_sft, bonbon, dpo, qrpo
from vbon_jax.models import decoder
from vbon_jax.rl import preference
from vbon_jax.training import offline, state

TEMPERATURE = 0.8
P, M, T, COLUMNS = 3, 4, 5, 4
PAD, EOS = 0, 3
BETA, ALPHA = 0.3, 0.4
METHODS = (bon_sft.METHOD, dpo.METHOD, qrpo.METHOD, bonbon.METHOD)
SINGLE = ("bon_sft", "qrpo")  # that learn from single responses
NAMES = [method.name for method in METHODS]


def samples_of(prompt, responses, **optional):
    return PromptSamples(prompt, tuple(responses), tuple(0.0 for _ in responses), **optional)


def ids_of(longest, end_ids=(EOS,)):
    """Ids of stored responses: those sampled, or a digit a token with an end."""

    def ids(samples, i, prompt):
        closing = next(iter(end_ids), None)
        return response_ids(samples, i, encode, end_ids, closing, longest)

    return ids


def encode(text):
    return [10 + int(c) for c in text]


@pytest.fixture(scope="module")
def world(config, params):
    """A pool of random responses of a random reference, and a policy that is not it."""
    rng = np.random.default_rng(6)

    def ids(low, high):
        return tuple(int(t) for t in rng.integers(4, 37, size=rng.integers(low, high + 1)))

    prompts = [Prompt(i, f"p{i}", ids(1, COLUMNS)) for i in range(P)]
    responses = [[ids(1, T) for _ in range(M)] for _ in range(P)]
    samples = [
        samples_of(p.text, ["?"] * M, response_tokens=tuple(r))
        for p, r in zip(prompts, responses, strict=True)
    ]
    arrays = offline.build_pool(samples, prompts, ids_of(T), M, T, COLUMNS, PAD)
    reference = {"decoder": jax.device_get(params)}
    static = {"config": config, "temperature": TEMPERATURE}
    log_ref = offline.log_ref(reference, *arrays, 5, **static)
    flat = [(p.tokens, r) for p, rs in zip(prompts, responses, strict=True) for r in rs]
    return SimpleNamespace(
        flat=flat, arrays=arrays,
        pool=offline.Pool(*map(jnp.asarray, (*arrays, log_ref)), TEMPERATURE), reference=reference,
        policy=jax.tree.map(lambda x: x * 1.1, reference), config=config,
    )  # fmt: skip


def twin_log_probs(world, params):
    """log p of every response, each alone and without padding on the left, in float64."""
    hidden_of = jax.jit(decoder.hidden, static_argnums=1)
    found = []
    for prompt, response in world.flat:
        whole = [*prompt, *response]
        tokens = np.zeros((1, COLUMNS + T), np.int32)
        tokens[0, : len(whole)] = whole
        mask = np.arange(COLUMNS + T)[None] < len(whole)
        hidden = hidden_of(params["decoder"], world.config, tokens, mask)
        logits = np.asarray(decoder.logits(params["decoder"], world.config, hidden), np.float64)[0]
        log_probs = logits / TEMPERATURE
        log_probs -= np.logaddexp.reduce(log_probs, axis=-1, keepdims=True)
        found.append(sum(log_probs[len(prompt) - 1 + t, r] for t, r in enumerate(response)))
    return np.array(found)


def log_probs_of(world, params):
    return offline.log_ref(
        params, *world.arrays, P * M, config=world.config, temperature=TEMPERATURE
    )


@pytest.fixture(scope="module")
def optimizer():
    return state.adamw(optax.linear_schedule(1e-2, 0.0, 50), 1e-8, 0.01, 1.0)


@pytest.fixture(scope="module")
def setups(config, optimizer):
    """What each method is compiled for."""
    return {
        method.name: offline.OfflineSetup(
            config, optimizer, method.learns.loss, method.learns.pairs
        )
        for method in METHODS
    }


loss = jax.jit(offline.loss, static_argnames="setup")


def test_the_pool_by_hand():
    prompts = [Prompt(7, "a", (5, 6)), Prompt(8, "b", (9,))]
    samples = [
        # Sampled ids are taken as they are: the second was cut and has no EOS.
        samples_of("a", ["x", "y", "z"], response_tokens=((4, EOS), (8, 8, 8), (1, 1, 1))),
        # Encoded texts: one ends, one leaves no room for its end.
        samples_of("b", ["1", "123", "5"]),
    ]
    tokens, mask, response_mask = offline.build_pool(samples, prompts, ids_of(3), 2, 3, 3, PAD)
    np.testing.assert_array_equal(
        tokens, [[0, 5, 6, 4, 3, 0], [0, 5, 6, 8, 8, 8], [0, 0, 9, 11, 3, 0], [0, 0, 9, 11, 12, 13]]
    )
    np.testing.assert_array_equal(response_mask, [[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(mask[:, 3:], response_mask)
    np.testing.assert_array_equal(mask[:, :3], [[0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]])
    assert tokens.dtype == np.int32
    assert mask.dtype == response_mask.dtype == bool


def test_a_text_known_to_be_cut_gets_no_end():
    samples = [samples_of("a", ["1", "1", "12345"], finished=(True, False, False))]
    prompts = [Prompt(0, "a", (5,))]
    tokens, _, response_mask = offline.build_pool(samples, prompts, ids_of(4), 3, 4, 1, PAD)
    np.testing.assert_array_equal(tokens[:, 1:], [[11, 3, 0, 0], [11, 0, 0, 0], [11, 12, 13, 14]])
    np.testing.assert_array_equal(response_mask.sum(1), [2, 1, 4])
    _, _, response_mask = offline.build_pool(samples, prompts, ids_of(4, ()), 3, 4, 1, PAD)
    np.testing.assert_array_equal(response_mask.sum(1), [1, 1, 4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 3}, r"prompt 4 \('a'\) has 2 responses, m = 3 are needed"),
        ({"prompt_length": 1}, r"prompt 4 \('a'\) has 2 tokens, more than prompt_length = 1"),
        ({"prompts": [Prompt(4, "other", (5, 6))]}, r"'other'\) was given samples of 'a'"),
        ({"prompts": []}, "samples of 1 prompts were given for 0 prompts"),
        (
            {"samples": [samples_of("a", ["1", ""])], "ids_of": ids_of(3, ())},
            "response 1 .* has no token",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_bad_samples_are_refused(change, message):
    good = {
        "samples": [samples_of("a", ["1", "2"])], "prompts": [Prompt(4, "a", (5, 6))],
        "ids_of": ids_of(3), "m": 2, "max_new_tokens": 3, "prompt_length": 2, "pad_id": PAD,
    }  # fmt: skip
    offline.build_pool(**good)
    with pytest.raises(InputError, match=message):
        offline.build_pool(**good | change)


def test_log_ref_equals_a_slow_twin_whatever_the_batch(world):
    want = twin_log_probs(world, world.reference)
    assert want.min() < -5
    np.testing.assert_allclose(world.pool.log_ref_N, want, rtol=1e-5, atol=1e-5)
    whole = log_probs_of(world, world.reference)
    assert whole.dtype == np.float32 and whole.shape == (P * M,)
    np.testing.assert_allclose(world.pool.log_ref_N, whole, rtol=1e-5)


def test_padding_of_the_pool_does_not_matter(world):
    tokens, mask, response_mask = world.arrays
    noise = np.random.default_rng(0).integers(4, 37, tokens.shape).astype(np.int32)
    dirty = offline.log_ref(
        world.reference, np.where(mask, tokens, noise), mask, response_mask, 5,
        config=world.config, temperature=TEMPERATURE,
    )  # fmt: skip
    np.testing.assert_allclose(dirty, world.pool.log_ref_N, rtol=1e-5)


def test_an_epoch_takes_every_example_once():
    order = offline.epoch_order(11, 4, 0, seed=3)
    assert order.shape == (2, 4) and order.dtype == np.int32
    assert len(set(order.ravel().tolist())) == 8 and 0 <= order.min() <= order.max() < 11
    np.testing.assert_array_equal(order, offline.epoch_order(11, 4, 0, seed=3))
    for other in (offline.epoch_order(11, 4, 1, seed=3), offline.epoch_order(11, 4, 0, seed=4)):
        assert (order != other).any()
    np.testing.assert_array_equal(np.sort(offline.epoch_order(12, 4, 2, 0).ravel()), np.arange(12))
    with pytest.raises(InputError, match="batch_size = 12 must be between 1 and the 11"):
        offline.epoch_order(11, 12, 0, seed=3)


ROWS = offline.Choices(
    np.int32([0, 5, 10, 6]), np.int32([1, 4, 11, 7]), np.float32([1, 0.5, 0.8, 0.6])
)


@pytest.mark.parametrize("method", NAMES)
def test_loss_equals_a_slow_twin(world, setups, method):
    total, metrics = loss(world.policy, world.pool, ROWS, BETA, ALPHA, setup=setups[method])
    log_policy, log_ref = (
        twin_log_probs(world, world.policy),
        twin_log_probs(world, world.reference),
    )
    ratio = log_policy - log_ref
    nll = -log_policy[ROWS.best_E]
    gap = ratio[ROWS.best_E] - ratio[ROWS.worst_E]
    want = {
        "bon_sft": nll,
        "dpo": np.log1p(np.exp(-BETA * gap)) + (1 - ROWS.target_E) * BETA * gap,
        "qrpo": BETA * (ROWS.target_E - ratio[ROWS.best_E]) ** 2,
        "bonbon": ALPHA * nll + (1 - ALPHA) * (gap - 1 / (2 * BETA)) ** 2,
    }[method].mean()
    np.testing.assert_allclose(total, want, rtol=1e-4)
    expected = {"loss": want, "nll": nll.mean()}
    if method not in SINGLE:
        expected |= {"accuracy": (gap > 0).mean(), "margin": gap.mean()}
        assert 0 < expected["accuracy"] < 1
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_reference_itself_has_no_margin(world, setups):
    beta_n = preference.bonbon_beta(4)
    alpha = preference.bonbon_alpha(-float(np.mean(world.pool.log_ref_N[ROWS.best_E])), beta_n)
    total, metrics = loss(world.reference, world.pool, ROWS, beta_n, alpha, setup=setups["bonbon"])
    np.testing.assert_allclose(metrics["margin"], 0, atol=1e-5)
    np.testing.assert_allclose(total, 2 * alpha * metrics["nll"], rtol=1e-4)  # both terms alike


@pytest.fixture(scope="module")
def run(world, setups):
    """run(method, ...): jitted `steps`; members=True is vmap over all but the pool."""

    @partial(jax.jit, static_argnames=("setup", "members"), donate_argnums=0)
    def jitted(train_state, pool, rows, beta, alpha, setup, members):
        def one(train_state, rows, beta, alpha):
            return offline.steps(train_state, pool, rows, beta, alpha, setup=setup)

        return (jax.vmap(one) if members else one)(train_state, rows, beta, alpha)

    def call(method, train_state, rows, beta=BETA, alpha=ALPHA, members=False):
        numbers = map(jnp.float32, (beta, alpha))
        return jitted(train_state, world.pool, rows, *numbers, setups[method], members)

    return call


def fresh(world, optimizer, seed=0):
    params = jax.tree.map(jnp.array, world.reference)  # a copy: the state is donated
    return state.create(params, optimizer, jax.random.key(seed))


def random_rows(seed, steps, batch):
    best, gap = np.random.default_rng(seed).integers((0, 1), (P * M, P * M), (steps, batch, 2)).T
    worst = (best + gap) % (P * M)
    preferred = np.full(best.shape, 0.9, np.float32)
    rows = offline.Choices(best.astype(np.int32), worst.astype(np.int32), preferred)
    return jax.tree.map(np.transpose, rows)


@pytest.mark.parametrize("method", NAMES)
def test_steps_learn_their_choices(world, optimizer, setups, run, method):
    once = ROWS._replace(target_E=np.ones(4, np.float32))
    rows = jax.tree.map(lambda x: np.tile(x, (2, 1)), once)
    setup = setups[method]
    before = loss(world.reference, world.pool, once, BETA, ALPHA, setup=setup)[1]
    train_state = fresh(world, optimizer)
    old_leaf = train_state.params["decoder"]["wte"]
    new, metrics = run(method, train_state, rows)
    assert old_leaf.is_deleted() and int(new.step) == 2
    assert float(metrics["grad_norm"]) > 0
    for _ in range(9):
        new, metrics = run(method, new, rows)
    after = loss(new.params, world.pool, once, BETA, ALPHA, setup=setup)[1]
    assert float(after["loss"]) < float(metrics["loss"]) < float(before["loss"])
    if method == "bon_sft":
        assert float(after["nll"]) < float(before["nll"]) - 1
    elif method == "qrpo":
        assert float(after["loss"]) < 0.2 * float(before["loss"])
    else:
        assert float(after["accuracy"]) == 1 and float(after["margin"]) > 1


def test_two_and_two_steps_are_four(world, optimizer, run):
    rows = random_rows(0, 4, 4)
    whole, metrics = run("dpo", fresh(world, optimizer), rows)
    half, first = run("dpo", fresh(world, optimizer), jax.tree.map(lambda x: x[:2], rows))
    twice, second = run("dpo", half, jax.tree.map(lambda x: x[2:], rows))
    assert int(whole.step) == int(twice.step) == 4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, twice.params
    )
    for name in ("loss", "nll", "accuracy", "margin"):
        mean = (float(first[name]) + float(second[name])) / 2
        np.testing.assert_allclose(metrics[name], mean, rtol=1e-4, atol=1e-6, err_msg=name)
    assert float(metrics["grad_norm"]) == pytest.approx(
        max(float(first["grad_norm"]), float(second["grad_norm"])), rel=1e-4
    )


def test_members_of_a_population_are_single_runs(world, optimizer, run):
    """vmap over states, choices, beta and alpha, with one pool for all."""
    betas, alphas = [0.1, 0.7], [0.9, 0.2]
    each = [random_rows(seed, 2, 4) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *each)
    states = [fresh(world, optimizer, seed) for seed in (1, 2)]
    stacked_state = jax.tree.map(lambda *x: jnp.stack(x), *states)
    population, metrics = run("bonbon", stacked_state, stacked, betas, alphas, members=True)
    for k in range(2):
        single, own = run("bonbon", states[k], each[k], betas[k], alphas[k])
        member = jax.tree.map(lambda x, k=k: x[k], population.params)
        found, want = log_probs_of(world, member), log_probs_of(world, single.params)
        np.testing.assert_allclose(found, want, atol=1e-4)
        assert np.max(np.abs(want - world.pool.log_ref_N)) > 0.05
        for name in own:
            np.testing.assert_allclose(metrics[name][k], own[name], rtol=1e-3, err_msg=name)


def test_sharded_equals_one_device(world, optimizer, run, mesh):
    rows = random_rows(0, 2, 4)
    alone, _ = run("dpo", fresh(world, optimizer), rows)
    many = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(many):
        placed = sharding.place(fresh(world, optimizer), many)
        shared, _ = run("dpo", placed, rows)
        kernel = shared.params["decoder"]["blocks"]["attention"]["q"]["kernel"]
        assert not kernel.sharding.is_fully_replicated
        shared = jax.device_get(shared.params)
    # Not leaf by leaf: a key's bias has no gradient, and AdamW makes steps of its rounding.
    found, want = log_probs_of(world, shared), log_probs_of(world, alone.params)
    np.testing.assert_allclose(found, want, atol=1e-4)
    assert np.max(np.abs(want - world.pool.log_ref_N)) > 0.05
