"""Best-of-n served from a policy, in a world whose 27 responses are enumerated."""

import itertools

import jax
import numpy as np
import pytest

from tests.training import tiny
from vbon_jax.bon import correction, enumeration
from vbon_jax.bon import references as bon_references
from vbon_jax.data.prompts import Prompt
from vbon_jax.evaluation import exact
from vbon_jax.evaluation.corrected import Corrected
from vbon_jax.models import decoder
from vbon_jax.training.references import response_orders

N, T, BOUND, TRIES = 4.0, 3, 2.0, 64
PROMPTS = [Prompt(7, "p7", (1,)), Prompt(3, "p3", (2,))]
STRINGS = np.array(list(itertools.product(range(3), repeat=T)), np.int32)


def token_rewards(tokens):
    """Few values, so that there are ties."""
    return np.asarray(tokens).sum(axis=-1) % 5


def reward(prompts, prompt_BxP, prompt_mask_BxP, response_BxT, response_mask_BxT):
    return token_rewards(response_BxT).astype(np.float32)


@pytest.fixture(scope="module")
def world(mesh):
    """Reference and policy; and their log-probs of all responses to each prompt."""
    config = decoder.DecoderConfig(
        vocab_size=3, positions=8, layers=1, width=8, heads=2, mlp_width=16, initializer_range=0.4
    )
    init = jax.jit(decoder.init, static_argnums=0)
    own, other = (init(config, jax.random.key(seed)) for seed in (0, 1))
    models = [
        tiny.sampler(config, params, mesh, temperature=0.8, max_new_tokens=T, end_ids=(), pad_id=0)
        for params in (own, jax.tree.map(lambda a, b: a + 0.1 * b, own, other))
    ]
    logs = [
        [exact.string_log_probs(x.model, p.tokens, STRINGS, 0.8) for p in PROMPTS] for x in models
    ]
    return *models, *logs


def served(world, ties="random", tries=TRIES, batch_size=200, count=200):
    reference, policy, log_ref, _ = world
    rng = np.random.default_rng(0)
    columns = np.stack([rng.choice(27, size=500, p=np.exp(x)) for x in log_ref])
    order = None
    if ties == "order":
        order = response_orders(STRINGS[columns.ravel()].tolist(), T).reshape(columns.shape)
    table = bon_references.references(token_rewards(STRINGS[columns]), "interval", order)
    corrected = Corrected(policy, reference, reward, table, N, "interval", BOUND, tries, batch_size)
    return table, *corrected.responses(jax.random.key(5), PROMPTS, count)


def weights(world, table, row):
    """log(pi_bon / policy) of every response, by the samples of the prompt."""
    _, _, log_ref, log_policy = world
    order = None if table.order_PxM is None else response_orders(STRINGS.tolist(), T)
    density = bon_references.density(
        table, np.full(27, row), token_rewards(STRINGS).astype(np.float32), order,
        log_ref[row].astype(np.float32), N, estimator="interval",
    )  # fmt: skip
    return np.asarray(density.log_ratio_B) + log_ref[row] - log_policy[row]


@pytest.mark.parametrize("ties", ["random", "order"])
def test_responses_have_the_distribution_of_kept_proposals(world, ties):
    table, rows, cost = served(world, ties, count=1000)
    expected_proposals = 0.0
    for row, responses in enumerate(rows):
        log_policy = world[3][row]
        log_w = weights(world, table, row)
        kept = np.minimum(log_policy, log_policy + log_w - np.log(BOUND))
        rate = np.exp(kept).sum()
        expected_proposals += 1000 / rate
        found = np.array([r.tokens for r in responses]) @ np.array([9, 3, 1])
        share = np.bincount(found, minlength=27) / len(found)
        assert np.abs(share - np.exp(kept) / rate).sum() / 2 < 0.06
        assert np.abs(share - np.exp(log_policy)).sum() / 2 > 0.15  # they are not the policy's
        of_each = [r.extra["log_weight"] for r in responses]
        np.testing.assert_allclose(of_each, log_w[found], atol=1e-4)
    assert cost.fallbacks == 0 and cost.responses == 2000
    assert cost.proposals == pytest.approx(expected_proposals, rel=0.06)
    assert cost.tokens == T * cost.proposals
    assert cost.proposals == sum(r.extra["proposals"] for row in rows for r in row)


def test_a_response_does_not_depend_on_what_is_drawn_beside_it(world):
    _, together, cost = served(world, count=12)
    _, alone, one_by_one = served(world, count=12, batch_size=5)
    same = [[[(r.tokens, r.request) for r in row] for row in rows] for rows in (together, alone)]
    assert same[0] == same[1] and cost.proposals == one_by_one.proposals
    assert 0 < one_by_one.spare <= cost.spare


def test_after_the_last_try_one_is_taken_by_its_weight(world):
    _, rows, cost = served(world, tries=1, count=100)
    assert cost.proposals == cost.responses == 200 and 0 < cost.fallbacks < 200
    assert all(r.extra["proposals"] == 1 for row in rows for r in row)
    lost = [r for row in rows for r in row if not r.extra["kept"]]
    assert len(lost) == cost.fallbacks


def test_two_proposals_are_nearer_best_of_n_than_the_policy(world):
    _, _, log_ref, log_policy = world
    for row in range(2):
        log_bon = enumeration.log_bon(log_ref[row], token_rewards(STRINGS), N)
        log_p, _ = correction.exact(log_policy[row], log_bon, BOUND)
        assert enumeration.kl(log_p, log_bon) < enumeration.kl(log_policy[row], log_bon) / 2
