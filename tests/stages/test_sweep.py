"""Sweeps: miniature ones of the tabular world, whole and in shares."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.stages.sweeps import parsed
from vbon_jax import cli, methods, sharding
from vbon_jax.data import samples as sample_files
from vbon_jax.data import tabular
from vbon_jax.errors import InputError
from vbon_jax.methods import learning
from vbon_jax.report import document, results
from vbon_jax.stages import STAGES, loading, sweep, units
from vbon_jax.stages.base import Run
from vbon_jax.stages.workdir import Workdir
from vbon_jax.training.learner import Member
from vbon_jax.training.references import references

ROOT = Path(__file__).parents[2]
STEPS, BATCH, M = 4, 16, 16
FLAGS = [
    f"--config={ROOT / 'configs' / 'tabular.py'}:ppo",
    "--config.stages=('sft','reward','sample','sweep')",
    "--config.reference.fit.epochs=1",
    "--config.data.train=600",
    "--config.reference.model.layers=1",
    "--config.reference.model.width=16",
    "--config.reference.model.heads=2",
    f"--config.samples.m={M}",
    "--config.prompts.test=4",
    "--config.sampling.batch_size=64",
    f"--config.train.iterations={STEPS}",
    f"--config.train.batch_size={BATCH}",
    "--config.train.minibatch_size=8",
    "--config.train.ppo_epochs=1",
    "--config.train.checkpoint_every=1",
    f"--config.evaluate.m={M}",
    "--config.evaluate.samples_per_prompt=4",
    f"--config.offline.responses={M}",
    "--config.offline.pairs=40",
    "--config.offline.batch_size=8",
    "--config.offline.epochs=5",  # 25 steps: 3 passes of the loop
    "--config.sweep.vbon=(2,8)",
    "--config.sweep.dpo=(0.5,1.0)",
    "--config.sweep.bon=(1,2,8)",
    f"--config.sweep.m=({M},)",
    "--config.sweep.temperatures=(0.5,)",
    "--config.sweep.temperature_m=8",
]
TIMES = ("seconds", "sample_seconds")


# --- The training of a curve -------------------------------------------------------------------


def test_a_curve_is_trained_with_what_its_series_fixes_and_the_rest_of_the_run():
    s = parsed(offline={"transform": "identity", "learning_rate": 3e-3})
    for label, own in (("qrpo", "log"), ("qrpo_identity", "identity"), ("dpo", "identity")):
        found = sweep._training(s, methods.SERIES[label][1])
        assert found.offline == dataclasses.replace(s.offline, transform=own)
        assert found.train == s.train


# --- A miniature sweep -------------------------------------------------------------------------


def vbon(stage, root, *flags):
    """Exit code of a command line."""
    return cli.main([stage, *FLAGS, f"--workdir={root}", *flags])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def near(x):
    """What equals ``x`` but for the last digits of its floats."""
    if isinstance(x, dict):
        return {k: near(v) for k, v in x.items()}
    if isinstance(x, list):
        return [near(v) for v in x]
    return pytest.approx(x, abs=1e-5) if isinstance(x, float) else x


def assert_same_table(root, other):
    """But for the seconds, the tables are equal: exactly but for the last digits of floats."""
    for name in ("sweep.jsonl", "sweep_samples.jsonl"):
        rows, wanted = without_times(read(root / name)), without_times(read(other / name))
        assert len(rows) == len(wanted)
        for row, want in zip(rows, wanted):
            assert row.keys() == want.keys()
            for key in row:
                assert row[key] == near(want[key]), (name, key)
    exact, wanted = (json.loads((x / "tabular.json").read_text())["rows"] for x in (root, other))
    assert exact == near(wanted)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished sweep of one process."""
    root = tmp_path_factory.mktemp("done")
    assert vbon("run", root) == 0
    return root


@pytest.fixture
def sampled(done, tmp_path):
    """A workdir with everything but the sweep's own results."""
    root = tmp_path / "w"
    shutil.copytree(done, root, ignore=shutil.ignore_patterns("sweep*", "tabular.json", ".lock"))
    return root


def units_of(root):
    return {p.name.split("-")[0]: p for p in (root / "sweep").iterdir() if p.is_dir()}


def test_the_table_of_a_sweep(done):
    rows = results.read_sweep(done)
    of = {name: [r for r in rows if r["method"] == name] for name in ("vbon", "dpo", "bon")}
    front = results.chosen(rows, study="front", temperature=1.0, split="test")
    assert [(r["method"], r["n"], r["beta"]) for r in front] == [
        ("reference", 1.0, None), ("bon", 1.0, None), ("bon", 2.0, None), ("bon", 8.0, None),
        ("vbon", 2.0, None), ("vbon", 8.0, None), ("dpo", None, 0.5), ("dpo", None, 1.0),
    ]  # fmt: skip
    # Matched to method.n = 8: vbon's own n, the beta of dpo nearest in KL; reference and bon too.
    colder = results.chosen(rows, study="temperature", temperature=0.5)
    assert [r["method"] for r in colder] == ["reference", "bon", "vbon", "dpo"]
    assert colder[2]["n"] == 8.0 and all(r["n"] == 8 for r in colder[1:2])
    nearest = max(of["dpo"][:2], key=lambda r: r["kl_ref"])  # after 25 steps all are far too near
    assert colder[3]["beta"] == nearest["beta"]
    study_m = results.chosen(rows, study="m")
    assert [(r["method"], r["n"], r["m"]) for r in study_m] == [("vbon", 8.0, M)]
    assert len(rows) == len(front) + len(colder) + len(study_m)
    for row in (*of["vbon"], *of["dpo"]):
        assert row["seconds"] > 0 and row["sample_seconds"] > 0 and row["refused_steps"] == 0
        assert row["kl_ref"] > 0 and row["seed"] == 0
    for row in of["bon"][:3]:
        assert row["kl_bound"] == pytest.approx(np.log(row["n"]) - 1 + 1 / row["n"], abs=1e-6)
    samples = read(done / "sweep_samples.jsonl")
    assert {x["policy"] for x in samples} == {"vbon", "dpo"}
    assert len(samples) == 2 * 4 * 4
    exact = results.read_tabular(done)
    assert [(r["method"], r["n"], r["beta"]) for r in exact] == [
        ("vbon", 2.0, None), ("vbon", 8.0, None), ("dpo", 3.0, 0.5), ("dpo", 2.0, 1.0),
    ]  # fmt: skip
    for row, other in zip(exact, (*of["vbon"][:2], *of["dpo"][:2])):
        # The tabular world's one training prompt is also every held-out one: drawn against exact.
        assert row["kl_ref"] == pytest.approx(other["kl_ref"], abs=0.05)
        assert row["kl_target"] > 0 and row["win_rate"] == pytest.approx(other["win_rate"], abs=0.4)


def test_each_unit_says_what_it_did(done):
    folders = units_of(done)
    assert set(folders) == {"vbon", "dpo"}
    for name, passes in (("vbon", STEPS), ("dpo", 3)):
        metrics = read(folders[name] / "metrics.jsonl")
        assert [x["step"] for x in metrics] == list(range(1, passes + 1))
        assert all(len(x["loss"]) == len(x["refused"]) == 2 for x in metrics)
    assert not list(done.rglob("*.tmp"))


def test_running_again_does_nothing_new(done, capfd, monkeypatch):
    """Nor does it with settings that only set the pace; a new value is trained alone."""
    monkeypatch.setattr(sweep, "_work", lambda *a: pytest.fail("a unit was done again"))
    before = {p: p.stat().st_mtime_ns for p in done.glob("sweep/*/*") if p.is_file()}
    table = (done / "sweep.jsonl").read_text()
    assert vbon("run", done) == 0
    assert vbon("sweep", done, "--config.sweep.at_once=0") == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (done / "sweep.jsonl").read_text() == table
    assert capfd.readouterr().err.count("sweep: done in") == 2
    asked = []
    monkeypatch.setattr(sweep, "_work", lambda run, unit, *rest: asked.append(unit.name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vbon("sweep", done, "--config.sweep.dpo=(0.5,2.0)")
    assert asked == ["dpo"]
    for folder in (done / "sweep").glob("dpo-*"):
        if not (folder / "rows.jsonl").exists():
            shutil.rmtree(folder)
    assert vbon("sweep", done) == 0
    assert (done / "sweep.jsonl").read_text() == table


def on_training_reward(monkeypatch, at, act):
    """``act`` runs with the ``at``-th batch of rewards of the population of two."""
    real, calls = tabular.reward, []

    def reward(prompts, responses):
        if len(responses) == 2 * BATCH:
            calls.append(1)
            if len(calls) == at:
                act()
        return real(prompts, responses)

    monkeypatch.setattr(tabular, "reward", reward)


def test_a_unit_that_was_stopped_goes_on_and_gives_the_same_rows(sampled, done, monkeypatch, capfd):
    """SIGTERM in the second iteration: saved, exit code 143; and then the rest."""
    on_training_reward(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert vbon("sweep", sampled) == 143
    folder = units_of(sampled)["vbon"]
    assert not (folder / "rows.jsonl").exists() and not (sampled / "tabular.json").exists()
    assert [x["step"] for x in read(folder / "metrics.jsonl")] == [1, 2]
    capfd.readouterr()
    assert vbon("sweep", sampled) == 0
    assert f"vbon x2: going on after iteration 2 of {STEPS}" in capfd.readouterr().err
    assert [x["step"] for x in read(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert_same_table(sampled, done)


def note(root):
    return json.loads((root / "stages" / "sweep.json").read_text())


def test_shares_one_after_another_give_the_table_of_the_whole(sampled, done, monkeypatch, capfd):
    """In between, the report shows what is done; a share that is done does nothing again."""

    def said():
        return capfd.readouterr().err

    assert vbon("sweep", sampled, "--shard=2/3") == 0  # more shares than units
    err = said()
    assert "sweep: share 2/3 is 0 of 2 units, to do: -" in err
    assert "; 2 of 2 units are left to other shares: vbon, dpo" in err
    assert not (sampled / "sweep").exists()
    assert vbon("report", sampled) == 0
    assert "report: 0 of 2 units of the sweep are done" in said()

    assert vbon("sweep", sampled, "--shard=1/2") == 0
    err = said()
    assert "sweep: share 1/2 is 1 of 2 units, to do: dpo" in err
    assert "; 1 of 2 units are left to other shares: vbon" in err
    assert set(units_of(sampled)) == {"dpo"} and not note(sampled)["complete"]
    assert not (sampled / "sweep.jsonl").exists()
    assert vbon("report", sampled) == 0
    assert "report: 1 of 2 units of the sweep are done" in said()
    assert "DPO" in (sampled / "report.html").read_text()
    part = [r for r in read(done / "sweep.jsonl") if r["method"] != "vbon"]
    assert without_times(read(sampled / "sweep.jsonl")) == near(without_times(part))
    assert not note(sampled)["complete"]

    real = sweep._work
    monkeypatch.setattr(sweep, "_work", lambda *_: pytest.fail("a unit was done again"))
    assert vbon("sweep", sampled, "--shard=1/2") == 0
    assert "sweep: share 1/2 is 1 of 2 units, to do: -" in said()
    monkeypatch.setattr(sweep, "_work", real)
    assert vbon("sweep", sampled, "--shard=0/2") == 0
    assert "left to other shares" not in said()
    assert note(sampled)["complete"]
    assert_same_table(sampled, done)


def test_the_report_leaves_the_table_of_another_sweep(done, tmp_path, monkeypatch, capfd):
    """One that is complete, or was begun under other settings, is not made again."""
    monkeypatch.setattr(document, "write", lambda root, looks: None)
    root = tmp_path / "w"
    shutil.copytree(done, root)
    (root / "sweep.jsonl").write_text("mine\n")
    assert vbon("report", root) == 0
    (root / "stages" / "sweep.json").unlink()
    Workdir(root, parsed(), STAGES).begin("sweep", again=True)
    assert vbon("report", root) == 0
    assert (root / "sweep.jsonl").read_text() == "mine\n"
    assert "units of the sweep" not in capfd.readouterr().err
    opened(root).workdir.begin("sweep", again=True)
    assert vbon("report", root) == 0
    assert "report: 2 of 2 units of the sweep are done" in capfd.readouterr().err
    assert_same_table(root, done)


def test_a_unit_that_another_process_did_meanwhile_is_left_alone(done, tmp_path, monkeypatch):
    """The whole sweep beside a share: it waits for the unit, and finds it done."""
    root = tmp_path / "w"
    shutil.copytree(done, root)
    rows = units_of(root)["dpo"] / "rows.jsonl"
    rows.rename(root / "rows")
    held = units.held

    @contextlib.contextmanager
    def waited(place):
        assert place == rows.parent
        with held(place):
            (root / "rows").rename(rows)
            yield

    monkeypatch.setattr(units, "held", waited)
    monkeypatch.setattr(sweep, "_work", lambda *_: pytest.fail("a unit was done again"))
    assert vbon("sweep", root) == 0
    assert rows.exists()
    assert_same_table(root, done)


# A share that kills itself in the third iteration of vbon.
KILLED = """
import os, pathlib, signal, sys, time
from vbon_jax import cli
from vbon_jax.data import tabular

root, batch = pathlib.Path(sys.argv[1]), int(sys.argv[2])
real, calls = tabular.reward, []

def reward(prompts, responses):
    if len(responses) == batch:
        calls.append(1)
        if len(calls) == 3:
            while not list(root.glob("sweep/vbon-*/checkpoints/[0-9]")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
    return real(prompts, responses)

tabular.reward = reward
sys.exit(cli.main(sys.argv[3:]))
"""


def test_shares_started_at_once_and_one_is_killed(sampled, done, monkeypatch, capfd):
    """Started again, it goes on from its checkpoint; what the other did is not done again."""
    with (sampled.parent / "share.log").open("w+") as log:
        other = subprocess.Popen(
            [sys.executable, "-c", KILLED, sampled, str(2 * BATCH), "sweep", *FLAGS,
             f"--workdir={sampled}", "--shard=0/2"],
            cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            assert vbon("sweep", sampled, "--shard=1/2") == 0
            code = other.wait(120)
        finally:
            other.kill()
            other.wait()
    assert code == -signal.SIGKILL, (sampled.parent / "share.log").read_text()
    assert "; 1 of 2 units are left to other shares: vbon" in capfd.readouterr().err
    assert vbon("sweep", sampled, "--shard=0/2") == 0
    assert "vbon x2: going on after iteration" in capfd.readouterr().err
    folders = units_of(sampled)
    assert [x["step"] for x in read(folders["vbon"] / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [x["step"] for x in read(folders["dpo"] / "metrics.jsonl")] == [1, 2, 3]
    assert_same_table(sampled, done)


# --- What its parts read and share -------------------------------------------------------------


def opened(root, **method):
    s = cli.parse(["sweep", *FLAGS, f"--workdir={root}"]).config
    s = dataclasses.replace(s, method=dataclasses.replace(s.method, **method))
    return Run(s, Workdir(root, s, STAGES), sharding.make_mesh())


def unit(label, study, members, **options):
    """A unit of a curve, its options changed."""
    method, series = methods.SERIES[label]
    return sweep.Unit(label, method, series, study, method.options(**options), tuple(members))


@pytest.mark.parametrize(("ties", "estimator"), [("random", "exponential"), ("order", "smoothed")])
def test_members_of_the_study_of_m_have_the_first_m_references_each(done, ties, estimator):
    run = opened(done, ties=ties)
    members = [Member(8.0, 0.1, 0, m) for m in (10, M)]
    tasks = sweep._Tasks(run)
    task, stored = tasks.of(unit("vbon", "m", members, estimator=estimator))
    table = task.references
    samples = sample_files.samples_of(run.workdir.train_samples, task.prompts, M)
    assert stored == samples
    sampler = loading.reference(run)
    assert table.m.tolist() == [10, M]
    for k, member in enumerate(members):
        own = references(samples, member.m, estimator, ties, sampler)
        np.testing.assert_array_equal(table.rewards_PxM[k, :, : member.m], own.rewards_PxM)
        assert bool(jnp.all(jnp.isposinf(table.rewards_PxM[k, :, member.m :])))
        assert sorted(samples[0].rewards[: member.m]) == pytest.approx(
            table.rewards_PxM[k, 0, : member.m].tolist()
        )
        for got, want in zip(table.fit or (), own.fit or (), strict=True):
            np.testing.assert_array_equal(got[k], want)
        if ties == "order":
            np.testing.assert_array_equal(table.order_PxM[k, :, : member.m], own.order_PxM)
    front, _ = tasks.of(unit("vbon", "front", members, estimator=estimator))
    assert front.references.rewards_PxM.shape == (1, M)
    assert front is tasks.of(unit("bond", "front", members, estimator=estimator))[0]  # read once


def test_members_start_from_the_stored_samples(done, tmp_path, monkeypatch):
    """Each from best of the whole n next to its own, out of its own m, in the unit's folder."""
    many, trained = learning.many, []

    def recorded(job, task, members, *rest):
        trained.append((job.method.name, [(x.n, x.m) for x in members]))
        return many(job, task, members, *rest)

    monkeypatch.setattr(learning, "many", recorded)
    monkeypatch.setattr(sweep, "_measure", lambda *_: None)
    run = opened(done)
    train = dataclasses.replace(run.config.train, start="weighted")
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, train=train))
    tasks = sweep._Tasks(run)
    for label, study, member in (
        ("ppo", "front", Member(3.5, 0.4, 0, M)), ("vbon", "m", Member(8.0, 0.1, 0, 5)),
    ):  # fmt: skip
        with jax.set_mesh(run.mesh):
            sweep._work(run, unit(label, study, [member]), tmp_path / label, tasks, None)
        assert len(read(tmp_path / label / "start" / "metrics.jsonl")) == 3
        first, *rest = read(tmp_path / label / "metrics.jsonl")
        assert first["kl_ref"][0] > 1e-3 and len(rest) == STEPS - 1  # it is the reference no more
    assert trained == [
        ("bon_sft", [(4.0, M)]), ("ppo", [(3.5, M)]), ("bon_sft", [(5.0, 5)]), ("vbon", [(8.0, 5)]),
    ]  # fmt: skip


def test_members_that_stand_for_n():
    s = parsed(method={"n": 8.0})
    by_n = unit("bond", "front", [
        Member(float(n), 0.1, seed, 9) for n in (2, 8) for seed in (0, 1)])  # fmt: skip
    assert sweep._matched(s, by_n, []) == [2, 3]
    assert sweep._matched(parsed(method={"n": 3.0}), by_n, []) == []
    by_beta = unit("ppo", "front", [
        Member(1 / b + 1, b, seed, 9) for b in (0.1, 0.5, 2.0) for seed in (0, 1)])  # fmt: skip
    # log 8 - 7/8 = 1.204: the means over seeds are 3, 1.3 and 0.2, though 1.2 is one of 0.2's.
    rows = [{"kl_ref": kl} for kl in (3.5, 2.5, 1.9, 0.7, 1.2, -0.8)]
    assert sweep._matched(s, by_beta, rows) == [2, 3]


def test_a_workdir_is_held_shared_and_taken_back(tmp_path, capfd):
    """Locks of two open files conflict within a process as between two."""
    s = parsed()
    one, other = (Workdir(tmp_path, s, STAGES) for _ in range(2))

    def refused():
        with pytest.raises(InputError, match="another vbon is at work there"), other.locked():
            pass

    with one.locked():
        refused()
        with one.shared(), other.locked():
            pass
        refused()
        with contextlib.suppress(ZeroDivisionError), one.shared():
            raise ZeroDivisionError
        refused()
        entered = threading.Event()

        def wait():
            with other.locked(wait=True):
                entered.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.3)
        assert f"waiting for another vbon at work in {tmp_path}" in capfd.readouterr().err
    thread.join(10)
    assert entered.is_set()
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free at the end
