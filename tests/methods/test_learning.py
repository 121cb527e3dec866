"""Methods as the config describes them, on a workdir of the tabular world written by hand."""

import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax import config as configs
from vbon_jax import methods, sharding
from vbon_jax.bon import log_f as lf
from vbon_jax.bon.pool import resample, winner_weights
from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import samples as sample_files
from vbon_jax.data import tabular
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.samples import PromptSamples, SampleWriter
from vbon_jax.errors import InputError
from vbon_jax.methods import bonbon, bond, jbond, judging, learning, vbon
from vbon_jax.methods.learning import Job
from vbon_jax.models import decoder, hf
from vbon_jax.rl import preference
from vbon_jax.sampling.sampler import named_key
from vbon_jax.stages import STAGES, loading
from vbon_jax.stages.base import Run
from vbon_jax.stages.workdir import Workdir
from vbon_jax.training import offline, policies, population
from vbon_jax.training.learner import Member

ROOT = Path(__file__).parents[2]
M, PROMPTS = 12, "abc"
STEPS_IN_ALL = 14  # not a multiple of learning.STEPS
CONFIG = decoder.DecoderConfig(
    vocab_size=6, positions=8, layers=1, width=16, heads=2, mlp_width=64, initializer_range=0.3
)


def parsed(**groups):
    """The tabular config, smaller and changed."""
    config = runpy.run_path(str(ROOT / "configs" / "tabular.py"))["get_config"]("ppo")
    config.samples.m = M
    config.prompts.train = len(PROMPTS)
    config.train.update(iterations=5, batch_size=16, minibatch_size=4, ppo_epochs=3)
    # 3 prompts x 10 pairs = 30 examples, 7 batches of 4 and 2 left over, twice.
    config.offline.update(
        responses=M, pairs=10, batch_size=4, epochs=2, learning_rate=1e-2, labels="soft"
    )
    for name, changes in groups.items():
        config[name].update(changes)
    return configs.parse(config.to_dict())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tokenizer, reference, prompts and samples, as the stages leave them; the samples are strings
    drawn evenly, in the layout of other code (without token ids and log-probs)."""
    path = tmp_path_factory.mktemp("methods")
    place = Workdir(path, parsed(), STAGES)
    tokenizer = tokenizers.build([e.text for e in tabular.corpus(0, 60)], "characters", 6)
    tokenizers.save(tokenizer, place.tokenizer)
    params = jax.device_get(jax.jit(decoder.init, static_argnums=0)(CONFIG, jax.random.key(0)))
    hf.save_decoder(place.reference, CONFIG, params, ids=hf.TokenIds(None, None, None))
    prompts = prompt_files.from_texts(list(PROMPTS), tokenizer)
    place.prompts("train").parent.mkdir()
    prompt_files.write_jsonl(place.prompts("train"), prompts)
    rng, strings = np.random.default_rng(1), tabular.strings()
    with SampleWriter(place.train_samples) as writer:
        for prompt in prompts:
            texts = tuple(strings[i] for i in rng.integers(0, len(strings), M))
            rewards = tuple(tabular.reward([prompt.text] * M, list(texts)))
            writer.append(PromptSamples(prompt.text, texts, rewards, prompt.id, prompt.tokens))
    for stage in ("sft", "reward", "sample"):
        place.complete(stage)
    return path


def opened(root, mesh, name, member=None, **groups):
    """(job, task, samples) of a method, with the options of ``member`` where one is given."""
    own = {"name": name}
    if member is not None:
        own |= {"n": member.n, "beta": member.beta}
    c = parsed(**(groups | {"method": own | groups.get("method", {})}))
    run = Run(c, Workdir(root, c, STAGES), mesh)
    task, samples = loading.task(run, c.method.estimator)
    return loading.job(run, task.sampler.model.config, len(task.prompts)), task, samples


def job_of(prompts, **groups):
    """A job as ``opened`` makes it, without the workdir."""
    c = parsed(**groups)
    method = methods.of_config(c)
    return Job(method, method.from_config(c), loading.training(c), CONFIG, prompts)


def recording(job):
    """The job, and a list that gets the (rewards, member, order) its examples are chosen from."""
    seen, learns = [], job.method.learns

    def choose(rewards_PxM, member, settings, order_PxM):
        seen.append((rewards_PxM, member, order_PxM))
        return learns.choose(rewards_PxM, member, settings, order_PxM)

    own = dataclasses.replace(learns, choose=choose)
    return dataclasses.replace(job, method=dataclasses.replace(job.method, learns=own)), seen


STRINGS = np.array([[3, 2, 1, 0, 5], [1, 1, 1, 1, 1], [5, 0, 4, 2, 2], [2, 5, 5, 5, 0]], np.int32)


def log_probs(tree, config):
    return np.asarray(
        offline._log_prob_jit(
            jax.device_get({"decoder": tree}), STRINGS, STRINGS >= 0, STRINGS[:, 1:] >= 0,
            config=config, temperature=1.0,
        )
    )  # fmt: skip


def passes(job, state, step):
    written = []
    for i in range(job.iterations):
        state, values, _ = step(state, i)
        written.append(values)
    return state, written


# What steers a method differs, and every member has a seed of its own.
MEMBERS = {
    "dpo": [Member(3.0, 0.5, 0, M), Member(2.0, 1.0, 1, M), Member(6.0, 0.2, 2, M)],
    "qrpo": [Member(3.0, 0.5, 0, M), Member(2.0, 1.0, 1, M), Member(6.0, 0.2, 2, M)],
    "bonbon": [Member(2.0, 0.1, 0, M), Member(4.0, 0.1, 1, M), Member(12.0, 0.1, 2, M)],
    "bon_sft": [Member(1.0, 0.1, 0, M), Member(4.0, 0.1, 1, M), Member(12.0, 0.1, 2, M)],
}


@pytest.mark.parametrize(
    ("name", "at_once", "devices"),
    [("dpo", 1, 1), ("qrpo", 0, 1), ("bonbon", 0, 1), ("bon_sft", 2, 4)],
)
def test_each_member_of_an_offline_population_equals_its_single_run(root, name, at_once, devices):
    members = MEMBERS[name]
    one = sharding.make_mesh()
    mesh = sharding.make_mesh(data=devices)
    with jax.set_mesh(mesh):
        job, task, samples = opened(root, mesh, name)
        padded = population.padded(members, mesh)
        state, step = learning.many(job, task, padded, samples, at_once)
        state, written = passes(job, state, step)
    config, reference = job.config, task.reference["decoder"]
    ends, start = [], log_probs(reference, config)
    for k, member in enumerate(members):
        own_job, own_task, own_samples = opened(root, one, name, member)
        alone, values = passes(own_job, *learning.single(own_job, own_task, member, own_samples))
        found = log_probs(population.member(state.params, k)["decoder"], config)
        wanted = log_probs(alone.params["decoder"], config)
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        for together, own in zip(written, values, strict=True):
            assert together["loss"][k] == pytest.approx(own["loss"], rel=1e-4)
            assert together["learning_rate"] == own["learning_rate"]
            assert together["refused"][k] == 0 and "refused" not in own
            assert together["seconds_update"] > 0 and own["seconds_update"] > 0
        assert int(population.member(state.step, k)) == int(alone.step)
        ends.append(found)
        assert np.max(np.abs(found - start)) > 0.05
    assert all(np.max(np.abs(ends[i] - ends[i - 1])) > 0.05 for i in range(3))
    np.testing.assert_array_equal(start, log_probs(reference, config))


@pytest.mark.parametrize("width", [4, 100])
def test_how_many_steps_go_at_once_changes_nothing(root, mesh, monkeypatch, width):
    """All 14 steps are done, whether the last pass is full or not."""
    member = MEMBERS["dpo"][1]
    ends = []
    for steps in (learning.STEPS, width):
        monkeypatch.setattr(learning, "STEPS", steps)
        job, task, samples = opened(root, mesh, "dpo", member)
        state, written = passes(job, *learning.single(job, task, member, samples))
        assert len(written) == -(-STEPS_IN_ALL // steps)
        assert int(state.step) >= STEPS_IN_ALL
        ends.append(log_probs(state.params["decoder"], job.config))
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-5)


def test_steps_and_learning_rate_of_an_offline_method():
    method = {"name": "dpo"}
    job = job_of(3, method=method)
    assert job.offline_steps == STEPS_IN_ALL
    assert job.iterations == 2
    rates = [float(job.schedule(i)) for i in (0, 7, STEPS_IN_ALL, STEPS_IN_ALL + 5)]
    np.testing.assert_allclose(rates, [1e-2, 5e-3, 0, 0], atol=1e-9)
    job = job_of(3, method=method, offline={"batch_size": 30})
    assert job.offline_steps == 2 and job.iterations == 1
    with pytest.raises(InputError, match=r"offline.batch_size=30 is more than the 20 pairs of 2 "):
        _ = dataclasses.replace(job, prompts=2).offline_steps


@pytest.mark.parametrize(
    ("name", "form", "updates"),
    [
        ("vbon", "jeffreys", 5 * 3 * 4),
        ("ppo", "jeffreys", 5 * 3 * 4),
        ("bond", "backward", 5 * 3 * 4),
        ("bond", "jeffreys", 5 * 4),  # one pass over a rollout
    ],
)
def test_the_learning_rate_of_an_online_method_reaches_0_at_the_end(name, form, updates):
    job = job_of(3, method={"name": name}, bond={"form": form})
    rate = job.training.train.learning_rate
    assert job.iterations == 5
    np.testing.assert_allclose(job.schedule(updates), 0, atol=1e-12)
    assert float(job.schedule(updates - 1)) == pytest.approx(rate / updates, rel=1e-5)
    own = job.program()
    assert own.learning_rate(0) == pytest.approx(rate)
    assert own.learning_rate(4) == pytest.approx(rate / 5, rel=1e-5)


def test_the_config_names_a_method_and_its_options():
    job = job_of(3, method={"name": "bond"}, bond={"anchor_rate": 0.3})
    assert job.method is jbond.METHOD
    assert job.options == jbond.JBOND(n=8, estimator="interval", anchor_rate=0.3)
    job = job_of(3, method={"name": "bond"}, bond={"form": "backward"})
    assert (job.method, job.options) == (bond.METHOD, bond.BOND(n=8, estimator="interval"))
    job = job_of(3, method={"objective": "lower_bound", "estimator": "harmonic", "n": 3.0})
    assert job.method is vbon.METHOD
    assert job.options == vbon.VBoN(n=3.0, objective="lower_bound", estimator="harmonic")


@pytest.mark.parametrize(
    ("name", "form", "names"),
    [
        ("vbon", "jeffreys", {"decoder", "value"}),
        ("bond", "backward", {"decoder", "value"}),
        ("bond", "jeffreys", {"decoder", "anchor"}),
        ("dpo", "jeffreys", {"decoder"}),
    ],
)
def test_the_first_state_is_the_reference_in_arrays_of_its_own(root, mesh, name, form, names):
    job, task, _ = opened(root, mesh, name, bond={"form": form})
    first = job.first_state(task.sampler.model.params, named_key(0, "train"))
    assert first.params.keys() == names and int(first.step) == 0
    for part in names - {"value"}:
        jax.tree.map(
            np.testing.assert_array_equal, first.params[part],
            jax.device_get(task.reference["decoder"]),
        )  # fmt: skip
    own = [x for part in names for x in jax.tree.leaves(first.params[part])]
    assert len({id(x) for x in own}) == len(own)
    assert not any(np.shares_memory(x, y) for i, x in enumerate(own) for y in own[:i])
    paths = " ".join(jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(first.opt_state))
    assert "decoder" in paths and "anchor" not in paths and ("value" in paths) == ("value" in names)


def test_bonbon_takes_beta_from_n_and_alpha_from_its_winners(root, mesh, monkeypatch):
    """beta_n by its formula; alpha at which both terms weigh alike while policy = reference."""
    job, task, samples = opened(root, mesh, "bonbon")
    members = MEMBERS["bonbon"]
    recorded = []

    def over_members(f, mesh, at_once, donate):
        return lambda pool, state, choices, beta, alpha: recorded.append((beta, alpha)) or (
            state, {"loss": jnp.zeros(3)},
        )  # fmt: skip

    monkeypatch.setattr(population, "over_members", over_members)
    job, seen = recording(job)
    state, step = learning.many(job, task, members, samples, 1)
    step(state, 0)
    betas, alphas = (np.asarray(x) for x in recorded[0])
    np.testing.assert_allclose(
        betas, [1 / 2, 1 / (2 * 3 * (11 / 6)), preference.bonbon_beta(12)], rtol=1e-6
    )
    pool, log_ref = learning._pool(job, task, samples)
    rewards = sample_files.rewards(samples, M)
    assert rewards.shape == (3, M) and log_ref.shape == (3 * M,)
    assert [member for _, member, _ in seen] == members
    for member, beta, alpha, (given, _, order) in zip(members, betas, alphas, seen):
        np.testing.assert_array_equal(given, rewards)
        assert order is None
        chosen = bonbon.choose(rewards, member, job.training.offline)
        nll = -np.mean(log_ref[chosen.best_E])
        assert alpha * nll == pytest.approx((1 - alpha) * (1 / (2 * beta)) ** 2, rel=1e-4)
    # log pi_ref of a file without it is scored: the same as by the rows of the pool, one by one.
    np.testing.assert_allclose(
        log_ref[:4],
        offline._log_prob_jit(
            task.reference, pool.tokens_NxS[:4], pool.mask_NxS[:4], pool.response_mask_NxT[:4],
            config=job.config, temperature=1.0,
        ),
        rtol=1e-5,
    )  # fmt: skip


def test_log_probs_of_our_own_samples_are_taken_as_they_are(root, mesh, tmp_path):
    job, task, _ = opened(root, mesh, "bonbon")
    c = parsed()
    place = Workdir(tmp_path, c, STAGES)
    rng = np.random.default_rng(0)
    marks = -np.abs(rng.normal(size=(3, M))).astype(np.float32)
    with SampleWriter(place.train_samples) as writer:
        for row, prompt in zip(marks, task.prompts):
            writer.append(
                PromptSamples(
                    prompt.text, ("aaaa",) * M, tuple(range(M)), prompt.id, prompt.tokens,
                    response_tokens=((1, 2, 3, 4),) * M, log_probs=tuple(row.tolist()),
                    finished=(False,) * M,
                )
            )  # fmt: skip
    samples = loading.samples(Run(c, place, mesh), task.prompts)
    pool, log_ref = learning._pool(job, task, samples)
    np.testing.assert_array_equal(log_ref, marks.ravel())
    np.testing.assert_array_equal(pool.log_ref_N, marks.ravel())
    job, seen = recording(job)
    learning.single(job, task, MEMBERS["bonbon"][0], samples)
    np.testing.assert_array_equal(seen[0][0], np.tile(np.arange(M), (3, 1)))


def test_ties_by_order_reach_the_offline_methods(root, mesh):
    job, task, samples = opened(root, mesh, "bon_sft", method={"ties": "order"})
    job, seen = recording(job)
    learning.single(job, task, MEMBERS["bon_sft"][0], samples)
    ((_, _, order),) = seen
    tokenizer = task.sampler.tokenizer
    ids = np.array([tokenizers.encode(tokenizer, text) for x in samples for text in x.responses])
    np.testing.assert_array_equal(order.ravel(), lf.response_order(ids, np.ones(ids.shape, bool)))
    assert order.shape == (3, M) and len(np.unique(order)) > M


def test_the_task_reads_the_workdir(root, mesh):
    _, task, samples = opened(root, mesh, "vbon", method={"estimator": "smoothed"})
    assert [p.text for p in task.prompts] == list(PROMPTS)
    assert [x.prompt for x in samples] == list(PROMPTS)
    np.testing.assert_array_equal(
        task.references.rewards_PxM, np.sort(sample_files.rewards(samples, M), axis=1)
    )
    settings = task.sampler.settings
    assert settings.max_new_tokens == 4 and settings.end_ids == ()
    ids = tokenizers.encode(task.sampler.tokenizer, "fade")
    assert task.sampler.texts([task.prompts[0].tokens], [ids]) == ["fade"]
    rows = np.array([ids]), np.ones((1, 4), bool)
    np.testing.assert_allclose(
        task.reward([task.prompts[1]], None, None, *map(jnp.asarray, rows)),
        tabular.reward(["b"], ["fade"]),
    )


# Two prompts to learn from, one that judges: a look every 10 of 200 steps, which overfit.
JUDGED = {"offline": {"pairs": 10, "batch_size": 4, "epochs": 40, "learning_rate": 3e-4}}


@pytest.fixture
def one_held_out(monkeypatch):
    monkeypatch.setattr(Job, "held_out", property(lambda job: 1))


def test_a_tenth_of_the_prompts_judges_what_learns_by_weights():
    for prompts, held_out in ((3, 0), (10, 1), (59, 5), (5000, 64)):
        job = job_of(prompts, method={"name": "bon_sft"})
        assert job.held_out == held_out
        assert job_of(prompts, method={"name": "dpo"}).held_out == 0
        assert job_of(prompts).held_out == 0
        left = prompts - held_out
        assert job.offline_steps == 2 * (left * 10 // 4)


def until_ended(job, state, step):
    """All iterations: (state, what was written, the weights after each)."""
    written, weights = [], []
    for i in range(job.iterations):
        state, values, _ = step(state, i)
        weights.append(jax.device_get(state.params["decoder"]))
        written.append(values)
        if values["ended"]:
            break
    return state, written, weights


def test_training_is_judged_by_prompts_it_does_not_see(root, mesh, one_held_out):
    """The best weights are given, and it ends when they have not changed for three looks."""
    member = MEMBERS["bon_sft"][1]
    job, task, samples = opened(root, mesh, "bon_sft", member, **JUDGED)
    job, seen = recording(job)
    state, step = learning.single(job, task, member, samples)
    rewards = sample_files.rewards(samples, M)
    np.testing.assert_array_equal(seen[0][0], rewards[:2])
    state, written, weights = until_ended(job, state, step)
    kl = [x["kl_held_out"] for x in written]
    best = int(np.argmin(kl))
    assert 0 < best == len(kl) - 1 - judging.PATIENCE and len(kl) < job.iterations == 20
    jax.tree.map(np.testing.assert_array_equal, policies.policy(state.params), weights[best])
    # KL(best-of-n || policy): log pi_bon, by the weights, less log policy, of samples of best-of-n.
    pool, log_ref = learning._pool(job, task, samples)
    chances = winner_weights(rewards[2:], 4)
    seen = resample(np.random.default_rng(member.seed), chances, judging.LOOKED_AT)[0]
    rows = 2 * M + seen
    log_policy = offline._log_prob_jit(
        {"decoder": weights[best]}, pool.tokens_NxS[rows], pool.mask_NxS[rows],
        pool.response_mask_NxT[rows], config=job.config, temperature=1.0,
    )  # fmt: skip
    log_bon = np.log(M * chances[0][seen]) + log_ref[rows]
    assert kl[best] == pytest.approx(np.mean(log_bon - np.asarray(log_policy)), abs=1e-4)


@pytest.mark.parametrize("at_once", [0, 1])
def test_each_member_gives_the_best_of_its_single_run(root, mesh, one_held_out, at_once):
    """Though those that would have ended go on until all have."""
    members = MEMBERS["bon_sft"]
    with jax.set_mesh(mesh):
        job, task, samples = opened(root, mesh, "bon_sft", **JUDGED)
        state, step = learning.many(job, task, members, samples, at_once)
        state, written, _ = until_ended(job, state, step)
    lengths = []
    for k, member in enumerate(members):
        own_job, task, samples = opened(root, mesh, "bon_sft", member, **JUDGED)
        alone, of_alone, _ = until_ended(own_job, *learning.single(own_job, task, member, samples))
        for together, own in zip(written, of_alone):
            assert together["kl_held_out"][k] == pytest.approx(own["kl_held_out"], abs=1e-3)
        found = policies.policy(population.member(state.params, k))
        np.testing.assert_allclose(
            log_probs(found, job.config), log_probs(policies.policy(alone.params), job.config),
            atol=1e-3,
        )  # fmt: skip
        lengths.append(len(of_alone))
    assert len(set(lengths)) > 1 and len(written) == max(lengths)


def test_the_learning_rate_rises_before_it_falls():
    job = job_of(3, train={"warmup": 2})
    each = job.steps_an_iteration
    rate = job.training.train.learning_rate
    rates = [float(job.schedule(i * each)) / rate for i in range(6)]
    np.testing.assert_allclose(rates, [0, 1 / 2, 1, 2 / 3, 1 / 3, 0], atol=1e-6)


def test_an_average_stands_beside_the_weights_and_is_none_of_the_optimizer(root, mesh):
    job, task, _ = opened(root, mesh, "vbon", train={"average_half_life": 3.0})
    first = job.first_state(task.sampler.model.params, named_key(0, "train"))
    assert first.params.keys() == {"decoder", "value", "average"}
    paths = " ".join(jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(first.opt_state))
    assert "decoder" in paths and "average" not in paths
    assert job.program().group == 1
    assert opened(root, mesh, "vbon", train={"group": 2})[0].program().group == 2
