import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.models import log_probs as score
from vbon_jax.models.lm import LanguageModel
from vbon_jax.sampling import decode
from vbon_jax.sampling import sampler as engine
from vbon_jax.sampling.requests import Request
from vbon_jax.sampling.responses import Sampling

T = 8
EOS = 3


def sampling(**changes):
    return Sampling(
        **{"temperature": 0.8, "max_new_tokens": T, "end_ids": (EOS,), "pad_id": 0} | changes
    )


def requests(count, samples=1):
    rng = np.random.default_rng(1)
    prompts = [tuple(int(t) for t in rng.integers(4, 37, size=1 + i % 6)) for i in range(count)]
    return [Request(i, s, p) for i, p in enumerate(prompts) for s in range(samples)]


def sampler(params, config, mesh, **changes):
    model = LanguageModel(config, params, tokenizer=None)
    return engine.Sampler(model, mesh, sampling(**changes))


def rows(params, config, mesh, wanted, batch_size, **changes):
    """{(prompt id, sample): (tokens, log-probs, finished)} of a run of ``batches``."""
    out = {}
    drawing = sampler(params, config, mesh, **changes)
    for batch in drawing.batches(jax.random.key(5), wanted, batch_size):
        assert batch.temperature == drawing.settings.temperature
        r = jax.device_get(batch.rollout)
        for i, request in enumerate(batch.requests):
            keep = r.mask_BxT[i]
            out[request.prompt_id, request.sample] = (
                r.tokens_BxT[i][keep].tolist(),
                r.log_probs_BxT[i][keep],
                bool(r.finished_B[i]),
            )
    return out


@pytest.fixture(scope="module")
def drawn(params, config, mesh):
    return rows(params, config, mesh, requests(64), 64)


def test_log_probs_equal_those_of_a_full_forward(params, config, mesh):
    wanted = requests(64)
    batch = sampler(params, config, mesh).draw(jax.random.key(5), 0, wanted)
    prompts, rollout = batch.prompts, batch.rollout
    tokens = jnp.concatenate([prompts.tokens_BxP, rollout.tokens_BxT], axis=1)
    mask = jnp.concatenate([prompts.mask_BxP, rollout.mask_BxT], axis=1)
    full = score.log_probs(params, config, tokens, mask, T, 0.8)
    np.testing.assert_allclose(
        np.where(rollout.mask_BxT, full, 0.0), rollout.log_probs_BxT, atol=1e-5
    )
    # The temperature matters: without it the same comparison must fail.
    other = score.log_probs(params, config, tokens, mask, T, 1.0)
    assert np.max(np.abs(np.where(rollout.mask_BxT, other, 0.0) - rollout.log_probs_BxT)) > 0.1


def test_a_response_does_not_depend_on_the_batch(params, config, mesh, drawn):
    some = [requests(64)[i] for i in (0, 17, 40, 63)]
    alone = rows(params, config, mesh, some, 1)
    for identity, (tokens, log_probs, finished) in alone.items():
        assert tokens == drawn[identity][0]
        assert finished == drawn[identity][2]
        np.testing.assert_allclose(log_probs, drawn[identity][1], atol=1e-5)
    # Neither on the order, nor on the rows beside it.
    shuffled = rows(params, config, mesh, requests(64)[::-1], 24)
    assert {k: v[0] for k, v in shuffled.items()} == {k: v[0] for k, v in drawn.items()}


def test_identity_decides_the_response(params, config, mesh, drawn):
    prompt = requests(64)[5].tokens
    wanted = [Request(i, s, prompt) for i in range(8) for s in range(8)]
    found = rows(params, config, mesh, wanted, 64)
    assert len({tuple(v[0]) for v in found.values()}) > 32


def test_masks_end_at_the_first_eos(drawn):
    assert any(v[2] for v in drawn.values()) and not all(v[2] for v in drawn.values())
    for tokens, _, finished in drawn.values():
        assert finished == (tokens[-1] == EOS)
        assert EOS not in tokens[:-1]
        assert len(tokens) == T or finished


def test_eos_as_the_first_token(params, config, mesh):
    sure = {**params, "wte": params["wte"]}
    sure["wte"] = sure["wte"].at[EOS].set(0)
    # A hidden state is normalised, so a row of the tied head along ln_f's bias wins everywhere.
    sure["ln_f"] = {**params["ln_f"], "bias": jnp.full_like(params["ln_f"]["bias"], 5.0)}
    sure["wte"] = sure["wte"].at[EOS].set(50.0)
    found = rows(sure, config, mesh, requests(8), 8)
    assert all(v[0] == [EOS] and v[2] for v in found.values())


def test_eos_inside_the_prompt_does_not_end_it(params, config, mesh):
    found = rows(params, config, mesh, [Request(0, s, (EOS, 9, EOS)) for s in range(8)], 8)
    assert any(len(v[0]) > 1 for v in found.values())


def test_without_eos_every_response_is_full(params, config, mesh):
    found = rows(params, config, mesh, requests(16), 16, end_ids=())
    assert all(len(v[0]) == T and not v[2] for v in found.values())
    assert any(EOS in v[0] for v in found.values())


def test_top_k_one_is_greedy_and_log_probs_stay_unfiltered(params, config, mesh):
    found = rows(params, config, mesh, requests(4), 4, top_k=1, end_ids=())
    again = rows(params, config, mesh, requests(4, 3)[2::3], 4, top_k=1, end_ids=())
    for (prompt, _), (tokens, log_probs, _) in found.items():
        assert tokens == again[prompt, 2][0]  # another sample index, the same argmax
        assert np.all(log_probs < -1e-4)  # a filtered distribution would say 0


def test_a_prompt_of_several_rows_is_run_once_and_says_the_same(params, config, mesh):
    """Rows of one prompt in one draw, against each row in a draw of its own."""
    wanted = requests(6, samples=4)
    together = sampler(params, config, mesh).draw(jax.random.key(5), 0, wanted).rollout
    for i in range(0, len(wanted), 5):
        alone = sampler(params, config, mesh).draw(jax.random.key(5), 0, wanted[i : i + 1]).rollout
        np.testing.assert_array_equal(together.tokens_BxT[i], alone.tokens_BxT[0])
        np.testing.assert_allclose(together.log_probs_BxT[i], alone.log_probs_BxT[0], atol=1e-5)
    lowered = decode.rollout.lower(
        params, jnp.zeros((6, 16), jnp.int32), jnp.ones((6, 16), bool),
        decode.identity_keys(jax.random.key(0), 0, jnp.arange(24), jnp.arange(24)), 1.0,
        config=config, limits=sampling().limits,
    ).as_text()  # fmt: skip
    assert f"6x{config.heads}x16x" in lowered and f"24x{config.heads}x16x" not in lowered
