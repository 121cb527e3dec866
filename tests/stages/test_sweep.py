"""Sweeps: their grids, and miniature ones of the tabular world by one worker and by two."""

import contextlib
import dataclasses
import fcntl
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax import cli, methods, sharding
from vbon_jax import config as vbon_config
from vbon_jax.data import samples as sample_files
from vbon_jax.data import tabular
from vbon_jax.errors import InputError
from vbon_jax.methods import learning
from vbon_jax.report import results
from vbon_jax.stages import STAGES, claims, loading, sweep
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


def parsed(**groups):
    """The tabular config, changed."""
    config = runpy.run_path(str(ROOT / "configs" / "tabular.py"))["get_config"]("sweep")
    for name, changes in groups.items():
        if isinstance(changes, dict):
            config[name].update(changes)
        else:
            config[name] = changes
    return vbon_config.parse(config.to_dict())


# --- The grids ---------------------------------------------------------------------------------


def test_the_grid_of_each_method_times_its_seeds():
    s = parsed(
        seed=7, method={"beta": 0.25, "n": 8.0}, samples={"m": 100},
        offline={"responses": 100, "pairs": 4000},
        sweep={
            "vbon": (2, 8, 32.5), "lower_bound": (), "ppo": (0.5,), "dpo": (1.0, 0.1),
            "qrpo": (0.5,), "qrpo_identity": (), "bonbon": (2, 4, 8, 16),
            "bon_sft": (3,), "bond": (2,), "m": (10, 100), "seeds": 2,
        },
    )  # fmt: skip
    found = sweep.units(s)
    sizes = {u.name: len(u.members) for u in found}
    assert sizes == {
        "bonbon": 8, "vbon": 6, "dpo": 4, "bond": 2, "bon_sft": 2, "ppo": 2, "qrpo": 2, "m": 2,
    }  # fmt: skip
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    of = {u.name: u for u in found}
    assert of["vbon"].members == tuple(
        Member(n, 0.25, seed, 100) for n in (2.0, 8.0, 32.5) for seed in (7, 8)
    )
    assert of["dpo"].members == tuple(
        Member(n, beta, seed, 100) for n, beta in ((2.0, 1.0), (11.0, 0.1)) for seed in (7, 8)
    )
    # m = 100 at n = 8 is among the units of vbon already.
    assert of["m"].members == tuple(Member(8.0, 0.25, seed, 10) for seed in (7, 8))
    assert (of["m"].label, of["m"].study, of["vbon"].study) == ("vbon", "m", "front")
    for name in ("vbon", "m"):
        assert of[name].method.name == "vbon"
        assert (of[name].options.objective, of[name].options.estimator) == ("exact", "interval")
    assert of["bond"].method.when(parsed(bond={"form": "backward"}))
    assert of["bond"].options.estimator == "interval"
    assert all(u.label == u.method.name for u in found)


def test_a_curve_is_trained_with_what_its_series_fixes_and_the_rest_of_the_run():
    s = parsed(offline={"transform": "identity", "learning_rate": 3e-3})
    for label, own in (("qrpo", "log"), ("qrpo_identity", "identity"), ("dpo", "identity")):
        found = sweep._training(s, methods.SERIES[label][1])
        assert found.offline == dataclasses.replace(s.offline, transform=own)
        assert found.train == s.train


def test_the_study_of_m_trains_all_of_its_own_where_vbon_has_not_its_n():
    s = parsed(samples={"m": 100}, offline={"responses": 100, "pairs": 4000},
               sweep={"vbon": (2,), "m": (10, 100), "lower_bound": (4,)})  # fmt: skip
    of = {u.name: u for u in sweep.units(s)}
    assert [m.m for m in of["m"].members] == [10, 100]
    bound = of["lower_bound"]
    assert bound.method.name == "vbon"
    assert (bound.options.objective, bound.options.estimator) == ("lower_bound", "harmonic")
    empty = dict.fromkeys(("bon", "m", *methods.SERIES), ())
    assert sweep.units(parsed(sweep=empty)) == []


def place(s, root="/nowhere"):
    run = Run(s, Workdir(root, s, STAGES), None)
    return {u.name: sweep.folder(run, u).name for u in sweep.units(s)}


BASE = parsed(sweep={"vbon": (2, 8), "temperatures": (0.5,)})


@pytest.mark.parametrize(
    ("groups", "changed"),
    [
        ({"sweep": {"vbon": (2, 4), "temperatures": (0.5,)}}, {"vbon"}),
        ({"sweep": {"vbon": (2, 8), "temperatures": (0.5,), "ppo": (9.0,)}}, {"ppo"}),
        ({"sweep": {"vbon": (2, 8), "temperatures": (0.5,), "bon": (1,)}}, set()),  # no unit of it
        (
            {
                "sweep": {
                    "vbon": (2, 8),
                    "temperatures": (0.5,),
                    "lower_bound_estimator": "smoothed",
                }
            },
            {"lower_bound"},
        ),
        ({"sweep": {"vbon": (2, 8), "temperatures": (0.5,), "stale_seconds": 9.0}}, set()),
        ({"sweep": {"vbon": (2, 8), "temperatures": (0.5,), "at_once": 0}}, set()),
        ({"sampling": {"batch_size": 8}}, set()),
        ({"train": {"checkpoint_every": 7, "keep": 9}}, set()),
        ({"method": {"objective": "exact", "name": "ppo"}}, set()),
        ({"sweep": {"vbon": (2, 8), "temperatures": ()}}, None),
        ({"sweep": {"vbon": (2, 8), "temperatures": (0.5,), "temperature_m": 3}}, None),
        ({"sweep": {"vbon": (2, 8), "temperatures": (0.5,), "seeds": 2}}, None),
        ({"seed": 1}, None),
        ({"method": {"n": 4.0}}, None),
        ({"method": {"ties": "order"}}, None),
        ({"train": {"learning_rate": 1e-4}}, None),
        ({"bond": {"beta": 0.7}}, None),
        ({"evaluate": {"samples_per_prompt": 3}}, None),
        ({"reward": {"function": "vbon_jax.data.tabular:verifier"}}, None),
        ({"evaluator": {"function": "vbon_jax.data.tabular:verifier"}}, None),
    ],
)
def test_a_folder_is_named_for_what_its_results_follow_from(groups, changed):
    """changed: the units that get another folder; None for all."""
    groups = {"sweep": {"vbon": (2, 8), "temperatures": (0.5,)}, **groups}
    before, after = place(BASE), place(parsed(**groups))
    assert before.keys() == after.keys()
    assert {k for k in before if before[k] != after[k]} == (
        before.keys() if changed is None else changed
    )
    assert all(name.startswith(f"{unit}-") for unit, name in before.items())
    assert len(set(before.values())) == len(before)


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
    """A finished sweep of one worker."""
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


def history(folder):
    """The records of a unit's claim: (state, pid) by generation."""
    found = sorted(folder.glob("claim.*"), key=lambda p: int(p.suffix[1:]))
    assert [p.suffix for p in found] == [f".{i + 1}" for i in range(len(found))]
    return [(r["state"], r["pid"]) for r in (json.loads(p.read_text()) for p in found)]


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


def test_each_unit_was_claimed_once_and_says_what_it_did(done):
    folders = units_of(done)
    assert set(folders) == {"vbon", "dpo"}
    for name, passes in (("vbon", STEPS), ("dpo", 3)):
        assert history(folders[name]) == [("held", os.getpid()), ("done", os.getpid())]
        metrics = read(folders[name] / "metrics.jsonl")
        assert [x["step"] for x in metrics] == list(range(1, passes + 1))
        assert all(len(x["loss"]) == len(x["refused"]) == 2 for x in metrics)
    assert not list(done.rglob("*.tmp")) and not list(done.rglob(".claim-*"))


def test_running_again_does_nothing_new(done, capfd, monkeypatch):
    """Nor does it with settings that only set the pace; a new value is trained alone."""
    monkeypatch.setattr(sweep, "_work", lambda *a: pytest.fail("a unit was done again"))
    before = {p: p.stat().st_mtime_ns for p in done.glob("sweep/*/*") if p.is_file()}
    table = (done / "sweep.jsonl").read_text()
    assert vbon("run", done) == 0
    assert vbon("sweep", done, "--config.sweep.at_once=0", "--config.sweep.stale_seconds=5.0") == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (done / "sweep.jsonl").read_text() == table
    assert capfd.readouterr().err.count("sweep: done in") == 2
    asked = []
    monkeypatch.setattr(sweep, "_work", lambda run, unit, *rest: asked.append(unit.name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vbon("sweep", done, "--config.sweep.dpo=(0.5,2.0)")
    assert asked == ["dpo"]
    for folder in (done / "sweep").glob("dpo-*"):
        if not (folder / "rows.jsonl").exists():  # released: another may have it at once
            assert [state for state, _ in history(folder)] == ["held", "released"]
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
    """SIGTERM in the second iteration: saved, released, exit code 143; and then the rest."""
    on_training_reward(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert vbon("sweep", sampled) == 143
    folder = units_of(sampled)["vbon"]
    assert [state for state, _ in history(folder)] == ["held", "released"]
    assert not (folder / "rows.jsonl").exists() and not (sampled / "tabular.json").exists()
    assert [x["step"] for x in read(folder / "metrics.jsonl")] == [1, 2]
    capfd.readouterr()
    assert vbon("sweep", sampled) == 0
    assert f"vbon x2: going on after iteration 2 of {STEPS}" in capfd.readouterr().err
    assert [x["step"] for x in read(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [state for state, _ in history(folder)] == ["held", "released", "held", "done"]
    assert_same_table(sampled, done)


def test_a_worker_that_lost_its_claim_stops_and_publishes_nothing(
    sampled, done, monkeypatch, capfd
):
    """Another worker, which thought it dead, has the unit for a while."""

    def overtake():
        folder = units_of(sampled)["vbon"]
        assert claims._publish(folder, 2, "held")

    def sleep(seconds):  # the loop waits: nothing of the unit may be there; the other gives it back
        folder = units_of(sampled)["vbon"]
        assert not (folder / "rows.jsonl").exists()
        assert "vbon" not in (sampled / "sweep.jsonl").read_text()
        claims._publish(folder, 3, "released")

    on_training_reward(monkeypatch, 2, overtake)
    monkeypatch.setattr(sweep.time, "sleep", sleep)
    assert vbon("sweep", sampled) == 0
    said = capfd.readouterr().err
    assert "sweep: vbon was taken over by another worker" in said
    assert "sweep: waiting for vbon, held by other workers" in said
    states = [state for state, _ in history(units_of(sampled)["vbon"])]
    assert states == ["held", "held", "released", "held", "done"]
    assert_same_table(sampled, done)


# Another worker: it begins its first unit when both have one, and kills itself in the third
# iteration of vbon if asked to.
WORKER = """
import os, pathlib, signal, sys, time
from vbon_jax import cli
from vbon_jax.stages import sweep
from vbon_jax.data import tabular

root, kill, batch = pathlib.Path(sys.argv[1]), sys.argv[2] == "kill", int(sys.argv[3])
sweep.POLL_SECONDS = 0.2
real_work, real_reward, calls, places = sweep._work, tabular.reward, [], []

def work(run, unit, place, *rest):
    places.append(place)
    while len(list(root.glob("sweep/*/claim.1"))) < 2:
        time.sleep(0.01)
    real_work(run, unit, place, *rest)

def reward(prompts, responses):
    if kill and places and places[-1].name.startswith("vbon") and len(responses) == batch:
        calls.append(1)
        if len(calls) == 3:
            while not any(p.name.isdigit() for p in places[-1].glob("checkpoints/*")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
    return real_reward(prompts, responses)

sweep._work, tabular.reward = work, reward
sys.exit(cli.main(sys.argv[4:]))
"""


@contextlib.contextmanager
def another_worker(root, how, monkeypatch):
    """A second process on the workdir; this one's first unit waits until that has one too."""
    real = sweep._work

    def work(run, unit, place, *rest):
        wait_for(lambda: len(list(root.glob("sweep/*/claim.1"))) == 2)
        real(run, unit, place, *rest)

    monkeypatch.setattr(sweep, "_work", work)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.2)
    with (root.parent / "worker.log").open("w+") as log:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, root, how, str(2 * BATCH), "sweep", *FLAGS,
             f"--workdir={root}"],
            cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield worker
        finally:
            worker.kill()
            worker.wait()


def wait_for(what, seconds=120):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "the other worker does not get on"
        time.sleep(0.01)


def test_two_processes_share_a_sweep(sampled, done, monkeypatch):
    with another_worker(sampled, "live", monkeypatch) as worker:
        assert vbon("sweep", sampled) == 0
        assert worker.wait(120) == 0, (sampled.parent / "worker.log").read_text()
    doers = []
    for name, folder in units_of(sampled).items():
        (first, holder), (last, finisher) = history(folder)  # claimed once, finished once
        assert (first, last) == ("held", "done") and holder == finisher
        doers.append(holder)
        passes = {"vbon": STEPS, "dpo": 3}[name]
        assert [x["step"] for x in read(folder / "metrics.jsonl")] == list(range(1, passes + 1))
    assert sorted(doers) == sorted([os.getpid(), worker.pid])  # one each
    assert_same_table(sampled, done)


def test_a_killed_worker_is_followed_by_the_other(sampled, done, monkeypatch, capfd):
    with another_worker(sampled, "kill", monkeypatch) as worker:
        wait_for(lambda: list(sampled.glob("sweep/vbon-*/claim.1")))  # the longest goes first
        assert vbon("sweep", sampled) == 0
        assert worker.wait(1) == -signal.SIGKILL
    me, folders = os.getpid(), units_of(sampled)
    assert history(folders["dpo"]) == [("held", me), ("done", me)]
    assert history(folders["vbon"]) == [("held", worker.pid), ("held", me), ("done", me)]
    # It went on from the dead one's checkpoint, and did not begin anew.
    assert "vbon x2: going on after iteration" in capfd.readouterr().err
    assert [x["step"] for x in read(folders["vbon"] / "metrics.jsonl")] == [1, 2, 3, 4]
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
    tasks, claim = sweep._Tasks(run), types.SimpleNamespace(held=lambda: True)
    for label, study, member in (
        ("ppo", "front", Member(3.5, 0.4, 0, M)), ("vbon", "m", Member(8.0, 0.1, 0, 5)),
    ):  # fmt: skip
        with jax.set_mesh(run.mesh):
            sweep._work(run, unit(label, study, [member]), tmp_path / label, tasks, None, claim)
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


def test_workers_may_write_the_same_file_at_once(tmp_path):
    """Each write is whole, none fails, and nothing is left behind."""
    path, errors = tmp_path / "sweep.jsonl", []
    rows = [[{"worker": w, "row": i} for i in range(200)] for w in range(4)]
    deadline = time.monotonic() + 1.0

    def write(own):
        try:
            while time.monotonic() < deadline:
                sweep._write_lines(path, own)
                assert read(path) in rows
                Workdir.write_json(tmp_path / "tabular.json", own)
                assert json.loads((tmp_path / "tabular.json").read_text()) in rows
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(own,)) for own in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert {p.name for p in tmp_path.iterdir()} == {"sweep.jsonl", "tabular.json"}
