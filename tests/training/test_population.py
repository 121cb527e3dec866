"""A population against the runs of its members: the real steps, on a world of random numbers."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.tiny import sampler, token_reward
from vbon_jax import methods, sharding
from vbon_jax.bon import references as bon_references
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples
from vbon_jax.errors import InputError
from vbon_jax.methods import learning, starting
from vbon_jax.methods.jbond import JBOND
from vbon_jax.methods.learning import Job, Training
from vbon_jax.methods.ppo import PPO as PPOOptions
from vbon_jax.methods.vbon import VBoN
from vbon_jax.models import decoder
from vbon_jax.sampling.sampler import named_key
from vbon_jax.training import loop, offline, population
from vbon_jax.training.checkpoint import Checkpointer
from vbon_jax.training.learner import Member
from vbon_jax.training.loop import Task
from vbon_jax.training.metrics import MetricsWriter
from vbon_jax.training.options import Train

ITERATIONS, BATCH, VOCABULARY, T, M = 3, 16, 37, 5, 24
VBON = VBoN(estimator="interval")
PPO = PPOOptions(estimator="interval")
BOND = JBOND(anchor_rate=0.2, estimator="smoothed")
TRAINING = Training(
    Train(
        iterations=ITERATIONS, batch_size=BATCH, minibatch_size=8, ppo_epochs=2,
        learning_rate=5e-3, value_coef=2.0,
    )
)  # fmt: skip
# n, beta and seed differ between all of them.
MEMBERS = [Member(2.0, 0.5, 0, M), Member(9.0, 0.1, 1, M), Member(64.0, 0.02, 2, M)]


@pytest.fixture(scope="module")
def tiny():
    """Jobs and tasks on a mesh: a random decoder, 5 prompts of 1-3 tokens, EOS at 3."""
    config = decoder.DecoderConfig(
        vocab_size=VOCABULARY, positions=16, layers=1, width=16, heads=2, mlp_width=32,
        initializer_range=0.4,
    )  # fmt: skip
    params = jax.device_get(jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0)))
    rng = np.random.default_rng(2)
    prompts = [
        Prompt(10 + i, f"p{i}", tuple(int(t) for t in rng.integers(4, 37, size=1 + i % 3)))
        for i in range(5)
    ]
    rewards = rng.normal(2, 1, size=(5, M)).round(1).astype(np.float32)  # with ties

    def build(mesh, options, m=M, reward=token_reward):
        """(job, task) of a method."""
        table = bon_references.references(rewards[:, :m], options.estimator)
        placed = sharding.place({"decoder": params}, mesh)["decoder"]
        model = sampler(
            config, placed, mesh, temperature=0.9, max_new_tokens=T, end_ids=(3,), pad_id=0
        )
        job = Job(methods.of_options(options), options, TRAINING, config, len(prompts))
        return job, Task(prompts, table, reward, model)

    sequences = np.random.default_rng(5).integers(4, VOCABULARY, size=(12, 3 + T)).astype(np.int32)
    everything = np.ones(sequences.shape, bool)
    log_prob = jax.jit(offline.log_prob, static_argnames=("config", "temperature"))

    def log_probs(tree):
        """log p of fixed responses."""
        return np.asarray(
            log_prob(
                jax.device_get({"decoder": tree}), sequences, everything, everything[:, 3:],
                config=config, temperature=0.9,
            )
        )  # fmt: skip

    return SimpleNamespace(build=build, log_probs=log_probs, start=log_probs(params))


@pytest.fixture(scope="module")
def one_device():
    return sharding.make_mesh()


def passes(state, step, count=ITERATIONS):
    """The state after some iterations, and what each wrote."""
    written = []
    for i in range(count):
        state, values, _ = step(state, i)
        written.append(values)
    return state, written


def single(tiny, mesh, member, options, **task):
    """log-probs of every set of parameters of a run of its own, and what it wrote."""
    job, task = tiny.build(mesh, options, **task)
    state, written = passes(*learning.single(job, task, member, ()))
    return measured(tiny, state.params), written


def measured(tiny, params):
    return {name: tiny.log_probs(tree) for name, tree in params.items() if name != "value"}


def many(tiny, mesh, options, members=MEMBERS, at_once=1, **task):
    job, task = tiny.build(mesh, options, **task)
    state, written = passes(*learning.many(job, task, members, (), at_once))
    every = [measured(tiny, population.member(state.params, i)) for i in range(len(members))]
    return every, written


@pytest.fixture(scope="module")
def singles(tiny, one_device):
    """The runs of the members of a method, each made once."""
    made = {}

    def of(options):
        if options not in made:
            made[options] = [single(tiny, one_device, m, options) for m in MEMBERS]
        return made[options]

    return of


def assert_members_equal_singles(found, written, wanted):
    for k, ((log_probs, alone), own) in enumerate(zip(wanted, found)):
        assert own.keys() == log_probs.keys()
        for name in own:
            np.testing.assert_allclose(
                own[name], log_probs[name], rtol=2e-5, atol=1e-4, err_msg=f"{name} of member {k}"
            )
        for step, values in enumerate(alone):
            for name in ("loss", "reward", "kl_ref", "kl_bon", "grad_norm"):
                np.testing.assert_allclose(
                    written[step][name][k], values[name], rtol=2e-3, atol=1e-4, err_msg=name
                )


@pytest.mark.parametrize(("options", "at_once"), [(PPO, 1), (VBON, 2), (BOND, 0)])
def test_each_member_equals_the_run_of_its_own(tiny, one_device, singles, options, at_once):
    wanted = singles(options)
    found, written = many(tiny, one_device, options, at_once=at_once)
    assert_members_equal_singles(found, written, wanted)
    for values in written:
        assert values["refused"] == [0.0, 0.0, 0.0]
    # The comparison means something: the members have moved, each to a place of its own.
    ends = [own["decoder"] for own in found]
    assert all(np.max(np.abs(end - tiny.start)) > 0.05 for end in ends)
    assert all(np.max(np.abs(a - b)) > 0.05 for a, b in itertools.combinations(ends, 2))


@pytest.mark.parametrize(
    "train",
    [
        {"replay": 3, "group": 2, "baseline": "both", "value_network": "prefix", "batch_size": 8},
        {"lookahead": 3, "value_network": "prefix", "lam": 0.5},
        {"start": "replay", "group": 2, "baseline": "group", "learning_rate": 1e-2},
    ],
)
def test_members_equal_their_runs_with_stored_samples_or_next_tokens(tiny, one_device, train):
    job, task = tiny.build(one_device, VBON)
    changed = dataclasses.replace(TRAINING.train, minibatch_size=4, whiten=False, **train)
    job = dataclasses.replace(job, training=dataclasses.replace(TRAINING, train=changed))
    if changed.start == "replay":  # that of the start, in place of what follows it
        job = starting.job(job)
        assert job.iterations >= ITERATIONS and job.program().from_store == len(task.prompts)
    rng = np.random.default_rng(3)
    rewards = np.asarray(task.references.rewards_PxM)
    samples = [
        PromptSamples(
            p.text, ("?",) * M, tuple(rng.permutation(row).tolist()),
            response_tokens=tuple(
                tuple(ids) for ids in rng.integers(4, VOCABULARY, size=(M, 1 + i)).tolist()
            ),
        )
        for i, (p, row) in enumerate(zip(task.prompts, rewards))
    ]  # fmt: skip
    members = [dataclasses.replace(m, m=M - 4 * k) for k, m in enumerate(MEMBERS)]
    singles = []
    for member in members:
        state, written = passes(*learning.single(job, task, member, samples))
        singles.append((tiny.log_probs(state.params["decoder"]), written))
    state, written = passes(*learning.many(job, task, members, samples, 0))
    found = [population.member(state.params, k) for k in range(len(members))]
    assert_members_equal_singles(
        [{"decoder": tiny.log_probs(own["decoder"])} for own in found], written,
        [({"decoder": log_probs}, values) for log_probs, values in singles],
    )  # fmt: skip
    assert all(np.max(np.abs(log_probs - tiny.start)) > 0.02 for log_probs, _ in singles)


def compiled(caplog):
    """The names of what was compiled while jax.log_compiles was on."""
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]


def test_members_shared_out_among_devices_equal_those_on_one(tiny, singles, caplog):
    """Three members and five copies of the last on a (4, 2, 1) mesh; no later pass compiles."""
    mesh = sharding.make_mesh(4, 2, 1)
    members = population.padded(MEMBERS, mesh)
    assert len(members) == 8 and members[3:] == [MEMBERS[-1]] * 5
    with jax.set_mesh(mesh):
        job, task = tiny.build(mesh, VBON)
        state, step = learning.many(job, task, members, (), 1)
        with jax.log_compiles():
            state, values, _ = step(state, 0)
            assert any("everywhere" in text for text in compiled(caplog))
            caplog.clear()
            written = [values]
            for i in range(1, ITERATIONS):
                state, values, _ = step(state, i)
                written.append(values)
            assert not compiled(caplog)
    for x in jax.tree.leaves(state):  # each device holds one member, whole
        assert {s.data.shape for s in x.addressable_shards} == {(1, *x.shape[1:])}
    found = [measured(tiny, population.member(state.params, i)) for i in range(8)]
    assert_members_equal_singles(found[:3], written, singles(VBON))
    for copy in found[3:]:
        np.testing.assert_allclose(copy["decoder"], found[2]["decoder"], atol=1e-5)


def test_padded_leaves_even_numbers_alone():
    assert population.padded(MEMBERS, sharding.make_mesh()) == MEMBERS
    assert population.padded(MEMBERS, sharding.make_mesh(1, 3)) == MEMBERS
    four = population.padded(MEMBERS, sharding.make_mesh(2, 1, 2))  # tensor shares no members
    assert four == [*MEMBERS, MEMBERS[-1]]


@pytest.mark.parametrize(
    ("count", "most", "wanted"), [(33, 10, 3), (33, 11, 11), (7, 3, 1), (6, 9, 6), (1, 1, 1)]
)
def test_side_by_side_goes_into_the_count(count, most, wanted):
    assert population._divisor(count, most) == wanted


def recorded(monkeypatch):
    """The jitted programs of populations made from here on, with the arguments of each call."""
    programs, real = [], population.over_members

    def over_members(f, mesh, at_once, donate=False):
        jitted = real(f, mesh, at_once, donate)
        program = SimpleNamespace(jitted=jitted, calls=[])
        programs.append(program)

        def call(*args):
            program.calls.append(jax.tree.map(jnp.copy, args))  # the state will be donated
            return jitted(*args)

        return call

    monkeypatch.setattr(population, "over_members", over_members)
    return programs


def test_other_values_and_seeds_need_no_compile(tiny, one_device, monkeypatch, caplog):
    """The programs of one population serve another of the same shape, and every pass."""
    programs = recorded(monkeypatch)
    many(tiny, one_device, VBON, at_once=2)
    others = [Member(3.0, 0.3, 7, M), Member(5.5, 0.7, 8, M), Member(400.0, 0.9, 9, M)]
    found, _ = many(tiny, one_device, VBON, others, at_once=2)
    draw, update, draw_others, update_others = programs
    for first, second in ((draw, draw_others), (update, update_others)):
        assert len(first.calls) == ITERATIONS
        caplog.clear()
        with jax.log_compiles():
            for args in second.calls:
                out = first.jitted(*args)
        assert not compiled(caplog)
    state, _ = out
    for k, own in enumerate(found):
        again = measured(tiny, population.member(state.params, k))
        np.testing.assert_allclose(again["decoder"], own["decoder"], atol=1e-6)


def test_members_with_fewer_references_equal_runs_with_those_alone(tiny, one_device, singles):
    """References of each member's own m, padded with +inf to the most."""
    job, task = tiny.build(one_device, VBON)
    few = tiny.build(one_device, VBON, m=4)[1].references
    few = few._replace(rewards_PxM=jnp.pad(few.rewards_PxM, ((0, 0), (0, M - 4)),
                                           constant_values=jnp.inf))  # fmt: skip
    tables = jax.tree.map(lambda *x: jnp.stack(x), few, task.references)
    members = [dataclasses.replace(MEMBERS[1], m=4), MEMBERS[1]]
    task = dataclasses.replace(task, references=tables)
    state, written = passes(*learning.many(job, task, members, (), 0))
    found = [measured(tiny, population.member(state.params, i)) for i in range(2)]
    wanted = [single(tiny, one_device, members[0], VBON, m=4), singles(VBON)[1]]
    assert_members_equal_singles(found, written, wanted)
    assert np.max(np.abs(found[0]["decoder"] - found[1]["decoder"])) > 0.01  # m matters


def huge_for(which, from_pass=1):
    """A reward that is finite, but whose square is not, for some members from a pass on."""
    calls = []

    def reward(prompts, *rows):
        calls.append(1)
        values = token_reward(prompts, *rows).reshape(-1, BATCH)
        if len(calls) > from_pass:
            values[which] = 3e38
        return values.ravel()

    return reward


def test_a_member_that_diverges_is_refused_and_the_others_go_on(tiny, one_device, tmp_path):
    """Through the real loop: its steps are counted and undone, and no other member notices."""
    healthy, _ = many(tiny, one_device, PPO)
    job, task = tiny.build(one_device, PPO, reward=huge_for([1]))
    state, step = learning.many(job, task, MEMBERS, (), 1)
    state, _, _ = step(state, 0)
    before = measured(tiny, population.member(state.params, 1))
    opt_state = jax.device_get(population.member(state.opt_state, 1))
    checkpointer, writer = Checkpointer(tmp_path / "c", 1), MetricsWriter(tmp_path, 1)
    schedule = loop.Schedule("train", ITERATIONS, ITERATIONS)
    state = loop.run(state, 1, step, schedule, loop.Record(checkpointer, writer, {}))
    writer.close()
    checkpointer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all('"refused": [0.0, 1.0, 0.0]' in line for line in lines)
    np.testing.assert_array_equal(state.step, [3, 3, 3])
    after = measured(tiny, population.member(state.params, 1))
    np.testing.assert_array_equal(after["decoder"], before["decoder"])
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(population.member(state.opt_state, 1)), opt_state,
    )  # fmt: skip
    for k in (0, 2):
        own = measured(tiny, population.member(state.params, k))
        np.testing.assert_allclose(own["decoder"], healthy[k]["decoder"], atol=1e-5)


def test_a_population_that_diverges_as_a_whole_stops(tiny, one_device, tmp_path):
    job, task = tiny.build(one_device, PPO, reward=huge_for([0, 1, 2], from_pass=0))
    state, step = learning.many(job, task, MEMBERS, (), 1)
    checkpointer, writer = Checkpointer(tmp_path / "c", 1), MetricsWriter(tmp_path, 0)
    with pytest.raises(
        InputError, match=r"loss is (nan|inf) at iteration 1; there is no checkpoint yet"
    ):
        record = loop.Record(checkpointer, writer, {})
        loop.run(state, 0, step, loop.Schedule("train", 3, 3), record)
    writer.close()
    checkpointer.close()


def test_a_nan_reward_names_the_members_prompt(tiny, one_device):
    def reward(prompts, *rows):
        values = token_reward(prompts, *rows)
        values[BATCH + 3] = np.nan
        return values

    job, task = tiny.build(one_device, VBON, reward=reward)
    state, step = learning.many(job, task, MEMBERS, (), 1)
    requests = loop.batch_requests(task.prompts, BATCH, 0, MEMBERS[1].seed)
    text = next(p.text for p in task.prompts if p.id == requests[3].prompt_id)
    with pytest.raises(InputError, match=rf"gave NaN for prompt='{text}' response=.*1 of 48 "):
        step(state, 0)


def test_keep_finite_looks_at_loss_and_gradient():
    old = population.state.TrainState(jnp.int32(4), {"a": jnp.float32(1)}, {"m": jnp.float32(2)}, 0)
    new = population.state.TrainState(jnp.int32(5), {"a": jnp.float32(7)}, {"m": jnp.float32(8)}, 0)
    for loss, grad_norm, refused in ((1.0, 2.0, 0), (np.nan, 2.0, 1), (1.0, np.inf, 1)):
        metrics = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(grad_norm)}
        kept, out = population.keep_finite(old, new, metrics)
        assert float(out["refused"]) == refused and out["grad_norm"] == metrics["grad_norm"]
        assert (int(kept.step), float(kept.params["a"]), float(kept.opt_state["m"])) == (
            (5, 1, 2) if refused else (5, 7, 8)
        )


def test_repeated_states_are_copies_with_keys_of_their_own(tiny, one_device):
    job, task = tiny.build(one_device, VBON)
    keys = jnp.stack([named_key(m.seed, "train") for m in MEMBERS])
    one = job.first_state(task.sampler.model.params, keys[0])
    states = population.repeated(one, keys, one_device)
    for k in range(3):
        member = population.member(states, k)
        jax.tree.map(np.testing.assert_array_equal, member.params, one.params)
        np.testing.assert_array_equal(
            jax.random.key_data(member.key),
            jax.random.key_data(named_key(MEMBERS[k].seed, "train")),
        )
