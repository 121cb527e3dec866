"""Methods as the settings describe them, on a workdir of the tabular world written by hand."""

import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vbon_jax.methods.build import Spec
from vbon_jax.stages.inputs import Run

from vbon_jax import config as settings
from vbon_jax import sharding
from vbon_jax.bon import log_f as lf
from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import samples as reference_files
from vbon_jax.data import tabular
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.samples import PromptSamples, SampleWriter
from vbon_jax.errors import InputError
from vbon_jax.methods import build as methods
from vbon_jax.models import decoder, hf
from vbon_jax.rl import preference
from vbon_jax.stages import inputs, workdir
from vbon_jax.training import offline, population
from vbon_jax.training.population import Member

ROOT = Path(__file__).parents[2]
M, PROMPTS = 12, "abc"
STEPS_IN_ALL = 14  # not a multiple of methods.STEPS


def parsed(**groups):
    """The settings of the tabular config, smaller and changed."""
    config = runpy.run_path(str(ROOT / "configs" / "tabular.py"))["get_config"]()
    config.samples.m = M
    config.prompts.train = len(PROMPTS)
    config.train.update(iterations=5, batch_size=16, minibatch_size=4, ppo_epochs=3)
    # 3 prompts x 10 pairs = 30 examples, 7 batches of 4 and 2 left over, twice.
    config.offline.update(
        responses=M, pairs=10, batch_size=4, epochs=2, learning_rate=1e-2, labels="soft"
    )
    for name, changes in groups.items():
        config[name].update(changes)
    return settings.parse(config.to_dict())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tokenizer, reference, prompts and samples, as the stages leave them; the samples are strings
    drawn evenly, in the layout of other code (without token ids and log-probs)."""
    path = tmp_path_factory.mktemp("methods")
    s = parsed()
    place = workdir.Workdir(path, s)
    tokenizer = tokenizers.build([e.text for e in tabular.corpus(0, 60)], "characters", 6)
    tokenizers.save(tokenizer, place.tokenizer)
    config = decoder.DecoderConfig(
        vocab_size=6, positions=8, layers=1, width=16, heads=2, mlp_width=64, initializer_range=0.3
    )
    params = jax.device_get(jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0)))
    hf.save_decoder(place.reference, config, params, ids=hf.TokenIds(None, None, None))
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


def opened(root, mesh, spec, member=None, **groups):
    """(run, world), with the settings of ``member`` where one is given."""
    own = {"name": spec.name, "estimator": spec.estimator}
    if member is not None:
        own |= {"n": member.n, "beta": member.beta}
    s = parsed(method=own, **groups)
    run = Run(s, workdir.Workdir(root, s), mesh)
    world = methods.world(run, spec)
    if member is not None:
        run = dataclasses.replace(run, settings=dataclasses.replace(s, seed=member.seed))
    return run, world


STRINGS = np.array([[3, 2, 1, 0, 5], [1, 1, 1, 1, 1], [5, 0, 4, 2, 2], [2, 5, 5, 5, 0]], np.int32)


def log_probs(tree, config):
    return np.asarray(
        offline._log_prob_jit(
            jax.device_get({"decoder": tree}), STRINGS, STRINGS >= 0, STRINGS[:, 1:] >= 0,
            config=config, temperature=1.0,
        )
    )  # fmt: skip


def passes(run, world, spec, state, step):
    written = []
    for i in range(methods.iterations(run.settings, spec, len(world.prompts))):
        state, values, _ = step(state, i)
        written.append(values)
    return state, written


def offline_spec(name):
    return Spec(name, "exact", "interval")


# What steers a method differs, and every member has a seed of its own.
MEMBERS = {
    "dpo": [Member(3.0, 0.5, 0, M), Member(2.0, 1.0, 1, M), Member(6.0, 0.2, 2, M)],
    "bonbon": [Member(2.0, 0.1, 0, M), Member(4.0, 0.1, 1, M), Member(12.0, 0.1, 2, M)],
    "bon_sft": [Member(1.0, 0.1, 0, M), Member(4.0, 0.1, 1, M), Member(12.0, 0.1, 2, M)],
}


@pytest.mark.parametrize(
    ("name", "at_once", "devices"), [("dpo", 1, 1), ("bonbon", 0, 1), ("bon_sft", 2, 4)]
)
def test_each_member_of_an_offline_population_equals_its_single_run(root, name, at_once, devices):
    spec, members = offline_spec(name), MEMBERS[name]
    one = sharding.make_mesh()
    mesh = sharding.make_mesh(data=devices)
    with jax.set_mesh(mesh):
        run, world = opened(root, mesh, spec)
        padded = population.padded(members, mesh)
        state, step = methods.many(run, world, spec, padded, at_once)
        state, written = passes(run, world, spec, state, step)
    ends, start = [], log_probs(world.reference["decoder"], world.config)
    for k, member in enumerate(members):
        own_run, own_world = opened(root, one, spec, member)
        alone, values = passes(own_run, own_world, spec, *methods.single(own_run, own_world))
        found = log_probs(population.member(state.params, k)["decoder"], world.config)
        wanted = log_probs(alone.params["decoder"], world.config)
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
    np.testing.assert_array_equal(start, log_probs(world.reference["decoder"], world.config))


@pytest.mark.parametrize("width", [4, 100])
def test_how_many_steps_go_at_once_changes_nothing(root, mesh, monkeypatch, width):
    """All 14 steps are done, whether the last pass is full or not."""
    spec, member = offline_spec("dpo"), MEMBERS["dpo"][1]
    ends = []
    for steps in (methods.STEPS, width):
        monkeypatch.setattr(methods, "STEPS", steps)
        run, world = opened(root, mesh, spec, member)
        state, written = passes(run, world, spec, *methods.single(run, world))
        assert len(written) == -(-STEPS_IN_ALL // steps)
        assert int(state.step) >= STEPS_IN_ALL
        ends.append(log_probs(state.params["decoder"], world.config))
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-5)


def test_steps_and_learning_rate_of_an_offline_method():
    s, spec = parsed(), offline_spec("dpo")
    assert methods.offline_steps(s, 3) == STEPS_IN_ALL
    assert methods.iterations(s, spec, 3) == 2
    _, schedule = methods.optimizer(s, spec, 3)
    rates = [float(schedule(i)) for i in (0, 7, STEPS_IN_ALL, STEPS_IN_ALL + 5)]
    np.testing.assert_allclose(rates, [1e-2, 5e-3, 0, 0], atol=1e-9)
    s = parsed(offline={"batch_size": 30})
    assert methods.offline_steps(s, 3) == 2 and methods.iterations(s, spec, 3) == 1
    with pytest.raises(InputError, match=r"offline.batch_size=30 is more than the 20 pairs of 2 "):
        methods.offline_steps(s, 2)


@pytest.mark.parametrize(
    ("spec", "updates"),
    [
        (Spec("vbon", "exact", "interval"), 5 * 3 * 4),
        (Spec("ppo", "exact", "interval"), 5 * 3 * 4),
        (Spec("bond", "backward", "interval"), 5 * 3 * 4),
        (Spec("bond", "jeffreys", "interval"), 5 * 4),  # one pass over a rollout
    ],
)
def test_the_learning_rate_of_an_online_method_reaches_0_at_the_end(root, mesh, spec, updates):
    s = parsed()
    assert methods.iterations(s, spec, 3) == 5
    _, schedule = methods.optimizer(s, spec, 3)
    np.testing.assert_allclose(schedule(updates), 0, atol=1e-12)
    assert float(schedule(updates - 1)) == pytest.approx(s.train.learning_rate / updates, rel=1e-5)
    own = methods.online(s, spec, None, 3)
    assert own.learning_rate(0) == pytest.approx(s.train.learning_rate)
    assert own.learning_rate(4) == pytest.approx(s.train.learning_rate / 5, rel=1e-5)


def test_spec_reads_what_is_structure():
    bond = parsed(method={"name": "bond"})
    assert methods.spec(bond) == ("bond", "jeffreys", "interval")
    bond = parsed(method={"name": "bond"}, bond={"form": "backward"})
    assert methods.spec(bond) == ("bond", "backward", "interval")
    bound = parsed(method={"objective": "lower_bound", "estimator": "harmonic", "n": 3.0})
    assert methods.spec(bound) == ("vbon", "lower_bound", "harmonic")


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (Spec("vbon", "exact", "interval"), {"decoder", "value"}),
        (Spec("bond", "backward", "interval"), {"decoder", "value"}),
        (Spec("bond", "jeffreys", "interval"), {"decoder", "anchor"}),
        (Spec("dpo", "exact", "interval"), {"decoder"}),
    ],
)
def test_the_first_state_is_the_reference_in_arrays_of_its_own(root, mesh, spec, names):
    run, world = opened(root, mesh, spec)
    reference = inputs.Decoder(world.config, world.reference)
    first = methods.first_state(run.settings, spec, reference, run.key("train"), 3)
    assert first.params.keys() == names and int(first.step) == 0
    for name in names - {"value"}:
        jax.tree.map(
            np.testing.assert_array_equal, first.params[name],
            jax.device_get(world.reference["decoder"]),
        )  # fmt: skip
    own = [x for name in names for x in jax.tree.leaves(first.params[name])]
    assert len({id(x) for x in own}) == len(own)
    assert not any(np.shares_memory(x, y) for i, x in enumerate(own) for y in own[:i])
    paths = " ".join(jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(first.opt_state))
    assert "decoder" in paths and "anchor" not in paths and ("value" in paths) == ("value" in names)


def test_bonbon_takes_beta_from_n_and_alpha_from_its_winners(root, mesh, monkeypatch):
    """beta_n by its formula; alpha at which both terms weigh alike while policy = reference."""
    spec = offline_spec("bonbon")
    run, world = opened(root, mesh, spec)
    members = MEMBERS["bonbon"]
    recorded = []

    def over_members(f, mesh, at_once, donate):
        return lambda pool, state, choices, beta, alpha: recorded.append((beta, alpha)) or (
            state, {"loss": jnp.zeros(3)},
        )  # fmt: skip

    monkeypatch.setattr(population, "over_members", over_members)
    state, step = methods.many(run, world, spec, members, 1)
    step(state, 0)
    betas, alphas = (np.asarray(x) for x in recorded[0])
    np.testing.assert_allclose(
        betas, [1 / 2, 1 / (2 * 3 * (11 / 6)), preference.bonbon_beta(12)], rtol=1e-6
    )
    pool, rewards, order, log_ref = methods._pool(run, world)
    assert order is None and rewards.shape == (3, M) and log_ref.shape == (3 * M,)
    for member, beta, alpha in zip(members, betas, alphas):
        chosen = offline.choices(
            "bonbon", rewards, n=int(member.n), pairs=10, responses=M, labels="soft",
            seed=member.seed,
        )  # fmt: skip
        nll = -np.mean(log_ref[chosen.best_E])
        assert alpha * nll == pytest.approx((1 - alpha) * (1 / (2 * beta)) ** 2, rel=1e-4)
    # log pi_ref of a file without it is scored: the same as by the rows of the pool, one by one.
    np.testing.assert_allclose(
        log_ref[:4],
        offline._log_prob_jit(
            world.reference, pool.tokens_NxS[:4], pool.mask_NxS[:4], pool.response_mask_NxT[:4],
            config=world.config, temperature=1.0,
        ),
        rtol=1e-5,
    )  # fmt: skip


def test_log_probs_of_our_own_samples_are_taken_as_they_are(root, mesh, tmp_path):
    spec = offline_spec("bonbon")
    run, world = opened(root, mesh, spec)
    s = run.settings
    place = workdir.Workdir(tmp_path, s)
    tokenizer = inputs.load_tokenizer(run)
    tokenizers.save(tokenizer, place.tokenizer)
    place.complete("sft")
    rng = np.random.default_rng(0)
    marks = rng.normal(size=(3, M)).astype(np.float32)
    with SampleWriter(place.train_samples) as writer:
        for row, prompt in zip(marks, world.prompts):
            writer.append(
                PromptSamples(
                    prompt.text, ("aaaa",) * M, tuple(range(M)), prompt.id, prompt.tokens,
                    response_tokens=((1, 2, 3, 4),) * M, log_probs=tuple(row.tolist()),
                    finished=(False,) * M,
                )
            )  # fmt: skip
    _, rewards, _, log_ref = methods._pool(Run(s, place, mesh), world)
    np.testing.assert_array_equal(log_ref, marks.ravel())
    np.testing.assert_array_equal(rewards, np.tile(np.arange(M), (3, 1)))


def test_ties_by_order_reach_the_offline_methods(root, mesh):
    spec = offline_spec("bon_sft")
    run, world = opened(root, mesh, spec)
    s = dataclasses.replace(
        run.settings, method=dataclasses.replace(run.settings.method, ties="order")
    )
    run = dataclasses.replace(run, settings=s)
    *_, order, _ = methods._pool(run, world)
    tokenizer = inputs.load_tokenizer(run)
    samples = reference_files.samples_of(run.workdir.train_samples, world.prompts, M)
    ids = np.array([tokenizers.encode(tokenizer, text) for x in samples for text in x.responses])
    np.testing.assert_array_equal(order.ravel(), lf.response_order(ids, np.ones(ids.shape, bool)))
    assert order.shape == (3, M) and len(np.unique(order)) > M


def test_the_world_reads_the_workdir(root, mesh):
    run, world = opened(root, mesh, Spec("vbon", "exact", "smoothed"))
    assert [p.text for p in world.prompts] == list(PROMPTS)
    np.testing.assert_array_equal(
        world.references.rewards_PxM,
        np.sort([list(x) for x in np.asarray(methods._pool(run, world)[1])], axis=1),
    )
    assert world.sampling.max_new_tokens == 4 and world.sampling.eos_id is None
    ids = tokenizers.encode(inputs.load_tokenizer(run), "fade")
    assert world.response_text(ids) == "fade"
    rows = np.array([ids]), np.ones((1, 4), bool)
    np.testing.assert_allclose(
        world.reward([world.prompts[1]], None, None, *map(jnp.asarray, rows)),
        tabular.reward(["b"], ["fade"]),
    )
