"""The Python API on a tiny model: every step, and what it says of bad input."""

import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import vbon_jax as vbon
from tests import standins
from vbon_jax import api
from vbon_jax.data.sources import reviews
from vbon_jax.errors import InputError
from vbon_jax.methods import starting
from vbon_jax.models import decoder, heads
from vbon_jax.rl import prefix
from vbon_jax.training.references import references

TEXTS = ("the film is", "i think the acting", "a drama of", "this comedy")
SMALL = {"batch_size": 16, "minibatch_size": 8, "ppo_epochs": 1, "learning_rate": 3e-3}


def length(prompts, responses):
    return [len(response) / 10 for response in responses]


def target_of(reward, rewards, n=4):
    """Log(pi_bon / pi_ref) / n of a response by its rank among those of the reference."""
    below, equal, m = np.sum(rewards < reward), np.sum(rewards == reward), len(rewards) + 1
    ratio = np.log(((below + equal + 1) / m) ** n - (below / m) ** n)
    return (ratio - np.log((equal + 1) / m)) / n


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("api")
    standins.gpt2(where / "gpt2", [e.text for e in reviews.examples(0, 200)], layers=4)
    return where


@pytest.fixture(scope="module")
def reference(place):
    return vbon.load_model(place / "gpt2", max_new_tokens=8)


@pytest.fixture(scope="module")
def prompts(reference):
    return vbon.prompts(TEXTS, reference)


@pytest.fixture(scope="module")
def samples(reference, prompts):
    return vbon.sample(reference, prompts, m=8, reward=length)


def test_the_package_is_imported_lazily():
    code = "import sys, vbon_jax; print(sorted({'jax', 'transformers', 'flax'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_name_of_the_api_is_there_and_no_other():
    for name in vbon.__all__:
        assert getattr(vbon, name) is not None
    assert sorted(vbon.__all__) == dir(vbon)
    with pytest.raises(AttributeError, match="no attribute 'VBON'"):
        vbon.VBON  # noqa: B018


def test_the_maths_is_arrays_in_arrays_out():
    ratio = vbon.bon.distribution.log_bon_ratio(np.log(0.5), np.log(0.1), 1.0)
    np.testing.assert_allclose(ratio, 0.0, atol=1e-6)


def test_samples_are_those_of_the_reward_and_the_seed(reference, prompts, samples):
    assert samples.rewards.shape == (4, 8)
    one = samples.samples[0]
    assert samples.rewards[0].tolist() == pytest.approx(length([], one.responses))
    again = vbon.sample(reference, prompts, m=8, reward=length, batch_size=5)
    assert [x.response_tokens for x in again.samples] == [
        x.response_tokens for x in samples.samples
    ]
    other = vbon.sample(reference, prompts, m=8, reward=length, seed=1)
    assert other.samples[0].response_tokens != one.response_tokens


def test_saved_samples_are_read_back(samples, tmp_path):
    from vbon_jax.data import samples as sample_files

    samples.save(tmp_path / "samples.jsonl")
    samples.save(tmp_path / "samples.jsonl")  # and replaced
    assert sample_files.read(tmp_path / "samples.jsonl") == list(samples.samples)


def test_vbon_moves_towards_the_reward_and_leaves_the_reference_alone(
    reference, prompts, samples, tmp_path
):
    before = jax.device_get(reference.model.params)
    policy = vbon.train(
        reference, samples, reward=length, method=vbon.VBoN(n=4), iterations=30,
        **SMALL | {"learning_rate": 1e-2},
    )  # fmt: skip
    after = jax.device_get(reference.model.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    found = vbon.evaluate(policy, reference, prompts, reward=length, n=4, m=16, each=8)
    assert found["policy"]["reward"] > found["reference"]["reward"]
    assert found["policy"]["kl_ref"] > 0.01
    assert found["bon"]["win_rate"] > found["reference"]["win_rate"]
    shown = str(found)
    assert "win rate" in shown and "n/a" not in shown
    # Saved, it is the same model to transformers.
    policy.save(tmp_path / "policy")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    ids = torch.tensor([prompts[0].tokens])
    from vbon_jax.models import decoder

    hidden = decoder.hidden(
        policy.model.params, policy.model.config, np.array(ids), np.ones(ids.shape, bool)
    )
    ours = decoder.logits(policy.model.params, policy.model.config, hidden)
    np.testing.assert_allclose(ours, theirs(ids).logits.detach().numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (vbon.PPO(beta=0.3), SMALL | {"iterations": 1}),
        (vbon.BOND(n=4), SMALL | {"iterations": 1}),
        (vbon.JBOND(), SMALL | {"iterations": 1}),
        (vbon.DPO(beta=0.3), {"epochs": 1, "pairs": 2, "batch_size": 8}),
        (vbon.QRPO(beta=0.3), {"epochs": 1, "pairs": 2, "batch_size": 8, "transform": "identity"}),
        (vbon.BoNBoN(n=4), {"epochs": 1, "pairs": 2, "batch_size": 8}),
        (vbon.BoNSFT(n=4), {"epochs": 1, "pairs": 2, "batch_size": 8}),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, dict) else "",
)
def test_every_method_trains(reference, samples, method, settings):
    policy = vbon.train(
        reference, samples, reward=length, method=method, **settings | {"learning_rate": 1e-2}
    )
    moved = jax.tree.map(
        lambda a, b: float(np.max(np.abs(a - b))), policy.model.params, reference.model.params
    )
    assert max(jax.tree.leaves(moved)) > 1e-4
    assert len(policy.generate(TEXTS[:1], count=2)[0]) == 2


@pytest.mark.parametrize("lora", [None, vbon.Lora(rank=2)])
def test_training_begins_with_what_is_learned_from_the_samples(reference, prompts, samples, lora):
    """At a learning rate of almost 0 it is that policy still; and any n has a nearest whole one."""
    options = vbon.Offline(pairs=8, epochs=6, batch_size=8, learning_rate=1e-2)
    still = SMALL | {"learning_rate": 1e-30, "iterations": 1, "average_half_life": 1.0}
    given = {"reward": length, "lora": lora, "seed": 3}
    found = vbon.train(reference, samples, method=vbon.VBoN(n=4.2), start=options, **given, **still)
    offline = {"pairs": 8, "epochs": 6, "batch_size": 8, "learning_rate": 1e-2}
    likely = vbon.train(reference, samples, method=vbon.BoNSFT(n=4), **given, **offline)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        found.model.params, likely.model.params,
    )  # fmt: skip
    unmoved = vbon.train(reference, samples, method=vbon.VBoN(n=4.2), **given, **still)
    moved = jax.tree.map(
        lambda a, b: float(np.max(np.abs(a - b))), found.model.params, unmoved.model.params
    )
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_training_begins_with_the_methods_own_update_on_the_samples(reference, samples):
    """The policy has come nearer to the best before it draws its first response."""
    given = {"reward": length, "seed": 3, "method": vbon.VBoN(n=4)}
    still = SMALL | {"iterations": 1, "learning_rate": 1e-2, "group": 4, "baseline": "group"}
    drawn, policies_begun = [], []
    begun = starting.begun

    def look(fresh, own):
        policies_begun.append(jax.device_get(own))
        return begun(fresh, own)

    def noted(prompts, responses):
        drawn.append(len(policies_begun))
        return length(prompts, responses)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starting, "begun", look)
        vbon.train(
            reference, samples, **given | {"reward": noted}, **still, start="replay",
            offline=vbon.Offline(pairs=40, epochs=2),
        )  # fmt: skip
    assert drawn and set(drawn) == {1}  # none before
    (own,) = policies_begun
    replayed = reference.with_params(own)
    texts = TEXTS[:2]
    longer, before = (
        np.mean([len(x) for row in m.generate(texts, count=64) for x in row])
        for m in (replayed, reference)
    )
    assert longer > 1.1 * before  # the reward is the length
    with pytest.raises(InputError, match=r"offline=Offline.*: dpo itself learns from stored sam"):
        vbon.train(reference, samples, method=vbon.DPO(), offline=vbon.Offline())
    with pytest.raises(InputError, match=r"train\.group=16 is more than the m = 8 samples of each"):
        vbon.train(reference, samples, **given, **still | {"group": 16}, start="replay")


def test_values_of_prefixes_know_the_stored_samples(reference, samples, monkeypatch):
    """Before the first iteration: the mean of the target over all samples, cell by cell."""
    monkeypatch.setattr(starting, "STORED", samples.rewards.size)  # each of them once
    seen = []
    valued = starting.valued

    def look(*given):
        state = valued(*given)
        seen.append(jax.device_get(state.params["prefix"]))
        return state

    monkeypatch.setattr(starting, "valued", look)
    settings = SMALL | {"value_network": "prefix", "iterations": 2}
    given = {"reward": length, "method": vbon.VBoN(n=4)}
    policy = vbon.train(reference, samples, **given, **settings)
    assert len(policy.generate(TEXTS[:1])[0]) == 1

    total, weight = np.zeros((2, prefix.POSITIONS, prefix.RANKS))
    for row in samples.samples:
        rewards = np.array(row.rewards)
        for reward, ids in zip(row.rewards, row.response_tokens, strict=True):
            target = target_of(reward, rewards)
            for t in range(len(ids)):
                text = reference.texts([row.prompt_tokens], [ids[:t]])[0]
                own = np.float32(len(text) / 10)
                mine = rewards.astype(np.float32)
                rank = (np.sum(mine < own) + np.sum(mine == own) / 2) / 8
                cell = t * prefix.POSITIONS // 8, min(int(rank * prefix.RANKS), 15)
                total[cell] += target
                weight[cell] += 1
    np.testing.assert_allclose(seen[0].weight, weight)
    np.testing.assert_allclose(seen[0].total, total, atol=1e-4)

    # A start by replay knows them as well, before it and after it.
    seen.clear()
    vbon.train(
        reference, samples, **given, **settings | {"start": "replay"},
        offline=vbon.Offline(pairs=4, epochs=1),
    )  # fmt: skip
    assert [float(table.weight.sum() > 0) for table in seen] == [1.0, 1.0]


def test_a_value_head_knows_the_stored_samples(reference, samples, monkeypatch):
    """Before the first iteration: the ridge regression of the target on all hidden states.

    Where it says nothing of a tenth of the prompts, or there is no tenth, the head stays 0.
    """
    prompts = vbon.prompts([f"{text} {word}" for text in TEXTS for word in ("a", "it", "so")],
                           reference)  # fmt: skip
    few, samples = samples, vbon.sample(reference, prompts, m=8, reward=length)
    monkeypatch.setattr(starting, "STORED", samples.rewards.size)  # each of them once
    seen, valued = [], starting.valued
    share = 0.1
    monkeypatch.setattr(heads, "explained_variance", lambda head, moments: share)

    def look(*given):
        state = valued(*given)
        seen.append(jax.device_get(state.params["value"]["head"]))
        return state

    monkeypatch.setattr(starting, "valued", look)
    method = vbon.VBoN(n=4)
    vbon.train(reference, samples, reward=length, method=method, **SMALL, iterations=1)
    vbon.train(reference, few, reward=length, method=method, **SMALL, iterations=1)
    share = 0.0
    vbon.train(reference, samples, reward=length, method=method, **SMALL, iterations=1)
    assert [bool(head["kernel"].any()) for head in seen] == [True, False, False]

    model, run = reference.model, jax.jit(decoder.hidden, static_argnums=1)
    rows, targets = [], []
    for row in samples.samples:
        rewards, prompt = np.array(row.rewards), row.prompt_tokens
        for reward, ids in zip(row.rewards, row.response_tokens, strict=True):
            whole = np.pad([[*prompt, *ids]], ((0, 0), (0, 24 - len(prompt) - len(ids))))
            mask = np.arange(24)[None] < len(prompt) + len(ids)
            hidden = run(model.params, model.config, whole.astype(np.int32), mask)
            at = slice(len(prompt) - 1, len(prompt) - 1 + len(ids))
            rows += list(np.asarray(hidden[0], np.float64)[at])
            targets += [target_of(reward, rewards)] * len(ids)
    x, y = np.array(rows), np.array(targets)
    centred = x - x.mean(axis=0)
    covariance = centred.T @ centred / len(x)
    covariance += np.trace(covariance) / len(x) * np.eye(x.shape[1])
    kernel = np.linalg.solve(covariance, centred.T @ y / len(x))
    np.testing.assert_allclose(seen[0]["kernel"][:, 0], kernel, atol=2e-3)
    assert np.corrcoef(x @ seen[0]["kernel"][:, 0], x @ kernel)[0, 1] > 0.999
    values = x @ seen[0]["kernel"][:, 0] + seen[0]["bias"]
    np.testing.assert_allclose(values.mean(), y.mean(), atol=1e-4)


def test_next_tokens_are_looked_at_where_asked(reference, samples):
    """Rewards of whole responses, of prefixes and of candidates; the policy learns from them."""
    seen = []

    def noted(prompts, responses):
        seen.append(len(prompts))
        return length(prompts, responses)

    settings = SMALL | {"value_network": "prefix", "lookahead": 3, "iterations": 1}
    policy = vbon.train(reference, samples, reward=noted, method=vbon.VBoN(n=4), **settings)
    assert seen.count(3 * SMALL["batch_size"]) == 8  # three next tokens at each of eight places
    assert len(policy.generate(TEXTS[:1])[0]) == 1
    with pytest.raises(InputError, match=r"train\.lookahead=3 reads values of prefixes"):
        vbon.train(reference, samples, reward=noted, method=vbon.VBoN(n=4), **SMALL, lookahead=3)


def test_a_start_is_held_to_its_limits(reference, samples):
    given = {"reward": length, "method": vbon.VBoN(n=4)}
    with pytest.raises(
        InputError, match=r"offline.batch_size=64 is more than the 48 pairs of 4 pr"
    ):
        vbon.train(reference, samples, start="weighted", **given, **SMALL)
    with pytest.raises(InputError, match=r"start.epochs=0: must be at least 1"):
        vbon.train(reference, samples, start=vbon.Offline(epochs=0), **given, **SMALL)
    with pytest.raises(InputError, match="start='best': choose one of reference, weighted"):
        vbon.train(reference, samples, start="best", **given, **SMALL)


def test_a_family_has_a_policy_for_every_n(reference, samples, tmp_path):
    settings = SMALL | {"iterations": 2, "group": 2, "learning_rate": 0.1}
    given = {"reward": length, "method": vbon.VBoN(n=(2, 8)), "lora": vbon.Lora(rank=2)}
    family = vbon.train_family(reference, samples, **given, **settings)
    texts = {n: family.at(n).generate(TEXTS, seed=3) for n in (1, 2.5, 8)}
    assert texts[1] == reference.generate(TEXTS, seed=3)
    family.at(8).save(tmp_path / "policy")
    loaded = vbon.load_model(tmp_path / "policy", max_new_tokens=8)
    assert loaded.generate(TEXTS, seed=3) == texts[8] != texts[1]
    with pytest.raises(InputError, match="n is of a family of policies: use train_family"):
        vbon.train(reference, samples, **given, **settings)
    with pytest.raises(InputError, match="n is of one policy: use train, or give two"):
        vbon.train_family(reference, samples, **given | {"method": vbon.VBoN(n=8)}, **settings)
    with pytest.raises(InputError, match=r"lora\.rank=0: the gates that n opens"):
        vbon.train_family(reference, samples, **given | {"lora": vbon.Lora()}, **settings)


def test_a_head_of_all_prompts_stands_beside_few_samples(reference, monkeypatch, capfd):
    """What is learned from is the head and the samples; a head that cannot know is refused."""
    texts = [f"{text} {word}" for text in TEXTS for word in ("a", "it", "so", "the", "and")]
    prompts = vbon.prompts(texts, reference)
    samples = vbon.sample(reference, prompts, m=16, reward=length)
    seen = []
    monkeypatch.setattr(
        api, "references", lambda *given: seen.append(given[-1]) or references(*given)
    )
    known = vbon.amortise(samples, reference, reward=length)
    assert "a head is worth" in capfd.readouterr().err
    once = SMALL | {"iterations": 1}
    policy = vbon.train(reference, known, reward=length, method=vbon.VBoN(n=4), **once)
    assert seen == [known.prior] and len(known.prior.cumulative_PxE) == len(texts)
    assert len(policy.generate(texts[:1])[0]) == 1
    for method in (vbon.DPO(), vbon.VBoN(n=4, ties="order"), vbon.VBoN(estimator="exponential")):
        with pytest.raises(InputError, match="does not go with amortised samples"):
            vbon.train(reference, known, method=method, reward=length)

    def unknowable(prompts, responses):
        return [10 * (zlib.crc32(p.encode()) % 7) + len(r) for p, r in zip(prompts, responses)]

    samples = vbon.sample(reference, prompts, m=16, reward=unknowable)
    with pytest.raises(InputError, match="the head does not know the rewards of prompts"):
        vbon.amortise(samples, reference, reward=unknowable)


def test_adapters_and_upper_layers_are_merged(reference, samples):
    common = SMALL | {"iterations": 1, "reward": length, "method": vbon.VBoN(n=4)}
    lora = vbon.train(reference, samples, lora=vbon.Lora(rank=2), **common)
    upper = vbon.train(reference, samples, num_layers_unfrozen=1, **common)
    shapes = jax.tree.map(np.shape, reference.model.params)
    for policy in (lora, upper):
        assert jax.tree.map(np.shape, policy.model.params) == shapes
    kernel = ("blocks", "mlp", "up", "kernel")

    def weight(sampler):
        tree = sampler.model.params
        for name in kernel:
            tree = tree[name]
        return np.asarray(tree)

    assert np.array_equal(weight(upper)[:-1], weight(reference)[:-1])
    assert not np.array_equal(weight(upper)[-1], weight(reference)[-1])


def test_a_classifier_as_the_reward(place, reference, prompts):
    texts = [e.text for e in reviews.examples(0, 200)]
    standins.distilbert(place / "distilbert", texts)
    reward = vbon.load_reward(place / "distilbert", score="prob")
    samples = vbon.sample(reference, prompts[:2], m=3, reward=reward)
    one = samples.samples[1]
    np.testing.assert_allclose(
        reward([prompts[1].text] * 3, one.responses), samples.rewards[1], atol=1e-6
    )
    assert ((samples.rewards > 0) & (samples.rewards < 1)).all()
    with pytest.raises(InputError, match="knows NEGATIVE, POSITIVE"):
        vbon.load_reward(place / "distilbert", label="GOOD")


def test_generation_is_a_function_of_its_seed(reference):
    first = reference.generate(TEXTS, count=2)
    assert first == reference.generate(TEXTS, count=2, batch_size=3)
    assert first != reference.generate(TEXTS, count=2, seed=1)
    streamed = ["".join(reference.stream(text, seed=1)) for text in TEXTS[:1]]
    assert streamed == reference.generate(TEXTS[:1], seed=1)[0]
    assert all(len(row) == 2 for row in first)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"iteration": 3},
            "iteration=3: vbon has no such setting; it has adam_eps, average_half_life",
        ),
        ({"minibatch_size": 7}, "train.batch_size=128 is not a multiple of"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: must be above 0"),
        ({"value_network": "reward"}, "value_network='reward' needs a run"),
        (
            {"memory": vbon.Memory(param_dtype="float8")},
            "memory.param_dtype='float8': choose one of",
        ),
        ({"reward": None}, "reward is not given: VBoN learns from rollouts"),
        ({"method": vbon.BOND(n=1)}, "so n must be above 1"),
        ({"num_layers_unfrozen": 9}, "num_layers_unfrozen is 9 and the model has 4 layers"),
    ],
)
def test_bad_settings_are_named(reference, samples, wrong, message):
    with pytest.raises(InputError) as error:
        vbon.train(reference, samples, **{"reward": length, "method": vbon.VBoN(n=4)} | wrong)
    assert message in str(error.value)


def test_other_bad_input_is_named(reference, prompts, samples):
    with pytest.raises(InputError, match=r"VBoN.n=0.5: must be at least 1"):
        vbon.VBoN(n=0.5)
    with pytest.raises(TypeError, match="positional"):
        vbon.DPO(0.1)  # beta or n? it must be said
    with pytest.raises(TypeError, match="give the options of a method, one of VBoN, PPO"):
        vbon.train(reference, samples, reward=length, method="vbon")
    with pytest.raises(InputError, match="need at least 2"):
        vbon.evaluate(reference, reference, prompts[:1], reward=length)
    with pytest.raises(InputError, match="is more than m=2 reference responses"):
        vbon.evaluate(reference, reference, prompts, reward=length, m=2)
    with pytest.raises(InputError, match="returned NaN for"):
        vbon.sample(reference, prompts, m=2, reward=lambda p, r: [float("nan")] * len(r))
    for use in (lambda f: vbon.score(f, ["a"], ["b"]),
                lambda f: vbon.sample(reference, prompts, m=2, reward=f)):  # fmt: skip
        with pytest.raises(InputError, match=r"returned -inf for .*finite in float32; clip it"):
            use(lambda p, r: [float("-inf")] * len(r))
    with pytest.raises(InputError, match="has no token"):
        vbon.prompts(["the film", ""], reference)
    with pytest.raises(InputError, match="positions and the model has 48"):
        vbon.prompts(["the film " * 40], reference)
