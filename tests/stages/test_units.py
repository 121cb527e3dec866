"""The units of a sweep: the grids, their folders, shares and locks."""

import json
import threading
import time
from pathlib import Path

import pytest

from tests.stages.sweeps import parsed
from vbon_jax import methods
from vbon_jax.stages import STAGES, units
from vbon_jax.stages.base import Run
from vbon_jax.stages.workdir import Workdir
from vbon_jax.training.learner import Member

ROOT = Path(__file__).parents[2]


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
    found = units.of(s)
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


def test_the_study_of_m_trains_all_of_its_own_where_vbon_has_not_its_n():
    s = parsed(samples={"m": 100}, offline={"responses": 100, "pairs": 4000},
               sweep={"vbon": (2,), "m": (10, 100), "lower_bound": (4,)})  # fmt: skip
    of = {u.name: u for u in units.of(s)}
    assert [m.m for m in of["m"].members] == [10, 100]
    bound = of["lower_bound"]
    assert bound.method.name == "vbon"
    assert (bound.options.objective, bound.options.estimator) == ("lower_bound", "harmonic")
    empty = dict.fromkeys(("bon", "m", *methods.SERIES), ())
    assert units.of(parsed(sweep=empty)) == []


def place(s, root="/nowhere"):
    run = Run(s, Workdir(root, s, STAGES), None)
    return {u.name: units.folder(run, u).name for u in units.of(s)}


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


def sized(**members):
    """Units of so many members, by name."""
    return [units.Unit(name, None, None, "front", None, (None,) * k) for name, k in members.items()]


EIGHT = sized(vbon=22, ppo=22, dpo=22, bonbon=22, lower_bound=6, bon_sft=6, bond=6, m=4)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 1000])
def test_each_unit_is_in_one_share(count):
    shares = [units.share(EIGHT, i, count) for i in range(count)]
    assert sorted(u.name for own in shares for u in own) == sorted(u.name for u in EIGHT)
    assert sum(not own for own in shares) == max(0, count - len(EIGHT))
    for i, own in enumerate(shares):
        assert own == units.share(EIGHT, i, count)  # the same at each start
        assert own == [u for u in EIGHT if u in own]  # the longest first


def test_shares_are_about_as_long():
    def shares(count):
        return [[u.name for u in units.share(EIGHT, i, count)] for i in range(count)]

    assert shares(3) == [  # 44, 34 and 32 members
        ["vbon", "bonbon"], ["ppo", "lower_bound", "bond"], ["dpo", "bon_sft", "m"],
    ]  # fmt: skip
    assert shares(4) == [["vbon", "lower_bound"], ["ppo", "bon_sft"], ["dpo", "bond"],
                         ["bonbon", "m"]]  # fmt: skip
    assert units.share([], 0, 3) == []
    assert units.share(EIGHT, 10**9 - 1, 10**9) == []  # as long as a command line may say


def test_a_unit_is_done_when_its_rows_are_there(tmp_path):
    run = Run(BASE, Workdir(tmp_path, BASE, STAGES), None)
    unit = units.of(BASE)[0]
    assert not units.done(run, unit)
    with units.held(units.folder(run, unit)):
        # Of an older version, which kept records of who is at work; a program killed at work.
        (units.folder(run, unit) / "claim.1").write_text('{"state": "held"}')
        (units.folder(run, unit) / "samples.jsonl").write_text("")
    assert not units.done(run, unit)
    (units.folder(run, unit) / "rows.jsonl").write_text("{}\n")
    assert units.done(run, unit) and not units.done(run, units.of(BASE)[1])


def test_one_process_holds_a_unit_and_the_other_waits(tmp_path, capfd):
    """Locks of two open files conflict within a process as between two."""
    entered = threading.Event()

    def wait():
        with units.held(tmp_path / "a"):
            entered.set()

    thread = threading.Thread(target=wait)
    with units.held(tmp_path / "a"), units.held(tmp_path / "b"):
        thread.start()
        assert not entered.wait(0.3)
        assert f"waiting for another vbon at work in {tmp_path / 'a'}" in capfd.readouterr().err
    thread.join(10)
    assert entered.is_set()


def test_shares_may_write_the_same_file_at_once(tmp_path):
    """Each write is whole, none fails, and nothing is left behind."""

    def read(path):
        return [json.loads(line) for line in path.read_text().splitlines()]

    path, errors = tmp_path / "sweep.jsonl", []
    rows = [[{"share": k, "row": i} for i in range(200)] for k in range(4)]
    deadline = time.monotonic() + 1.0

    def write(own):
        try:
            while time.monotonic() < deadline:
                units.write_lines(path, own)
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
