"""The loop that every method goes through: order of prompts, checkpoints, signals, traces."""

import contextlib
import json
import os
import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax import signals
from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.signals import Stopped
from vbon_jax.training import loop
from vbon_jax.training.checkpoint import Checkpointer
from vbon_jax.training.loop import Place, Record, Schedule
from vbon_jax.training.metrics import MetricsWriter

PROMPTS = [Prompt(10 * i, f"p{i}", (i + 1,)) for i in range(5)]


def identities(batch_size, step, seed=3, prompts=PROMPTS):
    requests = loop.batch_requests(prompts, batch_size, step, seed)
    assert len(requests) == batch_size
    return [(r.prompt_id, r.sample) for r in requests]


def test_batches_are_one_endless_sequence_of_whole_passes():
    """Whatever the batch size: 15 positions are 3 passes, each over all prompts once."""
    sequence = [pair for step in range(5) for pair in identities(3, step)]
    assert sequence == identities(15, 0) == [p for i in range(15) for p in identities(1, i)]
    for epoch in range(3):
        own = sequence[5 * epoch : 5 * epoch + 5]
        assert sorted(own) == [(p.id, epoch) for p in PROMPTS]
    assert sequence[:5] != sequence[5:10]  # shuffled anew (as 119 of 120 times)
    assert len(set(sequence)) == 15  # a prompt met twice is drawn twice differently


def test_another_seed_has_another_order_and_tokens_follow_the_prompt():
    assert identities(5, 0, seed=3) != identities(5, 0, seed=4)
    for r in loop.batch_requests(PROMPTS, 7, 2, 0):
        assert r.tokens == next(p.tokens for p in PROMPTS if p.id == r.prompt_id)


def test_one_prompt_is_drawn_again_and_again():
    assert identities(4, 2, prompts=PROMPTS[:1]) == [(0, 8), (0, 9), (0, 10), (0, 11)]


def test_a_group_is_its_prompt_again_and_again_in_a_row():
    """The prompts are those of batches of one response each, and no identity comes twice."""
    found = [
        (r.prompt_id, r.sample)
        for step in range(5)
        for r in loop.batch_requests(PROMPTS, 9, step, 3, group=3)
    ]
    alone = [pair for step in range(5) for pair in identities(3, step)]
    assert found == [(i, 3 * epoch + j) for i, epoch in alone for j in range(3)]
    assert len(set(found)) == 45
    more = loop.batch_requests(PROMPTS, 24, 0, 3, group=2)  # more than two passes in a batch
    assert [(r.prompt_id, r.sample) for r in more[::2]] == [
        (i, 2 * epoch) for i, epoch in identities(12, 0)
    ]
    for r in more:
        assert r.tokens == next(p.tokens for p in PROMPTS if p.id == r.prompt_id)


def test_a_note_has_the_means_of_a_population():
    assert loop.note({"reward": 1.5, "kl_ref": 0.25}) == "reward 1.500  KL to ref 0.250 nats"
    assert loop.note({"reward": [1.0, 2.0], "kl_ref": [0, 1], "kl_bon": [3, 4]}) == (
        "reward 1.500  KL to ref 0.500  to BoN 3.500 nats"
    )


@pytest.fixture
def files(tmp_path):
    """Makes the record of a run of the loop that goes on after ``start``."""
    opened = []

    def make(start=0, **metadata):
        opened[:] = [Checkpointer(tmp_path / "c", 5), MetricsWriter(tmp_path, start)]
        return Record(*opened, metadata, tmp_path)

    make.path = tmp_path
    yield make
    for x in opened:
        x.close()


def adding(sign=None, at=None, **bad):
    """A step that adds step + 1 to a number, and may send a signal or write something else."""

    def one(state, step):
        values = {"loss": float(step), "grad_norm": 1.0, "kl_ref": [0.5, 1.5]}
        if step == at:
            values |= bad
            if sign is not None:
                os.kill(os.getpid(), sign)
        return {"x": state["x"] + step + 1}, values, "note"

    return one


def start():
    return {"x": jnp.zeros(2)}


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_checkpoints_come_when_planned_and_at_the_end(files):
    record = files(a=1)
    end = loop.run(start(), 0, adding(), Schedule("t", 7, 3), record)
    np.testing.assert_array_equal(end["x"], [28, 28])
    assert sorted(int(p.name) for p in record.checkpointer.directory.iterdir()) == [3, 6, 7]
    state, metadata = record.checkpointer.restore(start())
    np.testing.assert_array_equal(state["x"], end["x"])
    assert metadata == {"a": 1, "step": 7}
    assert [x["step"] for x in lines(files.path)] == [1, 2, 3, 4, 5, 6, 7]
    assert lines(files.path)[4]["kl_ref"] == [0.5, 1.5]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_rest_follows_from_there(files, signum):
    record = files()
    schedule = Schedule("t", 6, 100)
    with pytest.raises(Stopped, match=r"after iteration 3 of 6 is saved.*goes on") as stopped:
        loop.run(start(), 0, adding(signum, at=2), schedule, record)
    assert stopped.value.signum == signum
    assert record.checkpointer.latest_step == 3
    record.checkpointer.close()
    record.writer.close()
    record = files(3)
    state, _ = record.checkpointer.restore(start())
    end = loop.run(state, 3, adding(), schedule, record)
    np.testing.assert_array_equal(end["x"], [21, 21])
    assert [x["step"] for x in lines(files.path)] == [1, 2, 3, 4, 5, 6]


def test_the_last_step_is_done_even_if_a_signal_comes_with_it(files):
    record = files()
    with pytest.raises(Stopped, match="after iteration 2 of 2"):
        loop.run(start(), 0, adding(signal.SIGTERM, at=1), Schedule("t", 2, 9), record)
    state, _ = record.checkpointer.restore(start())
    again = loop.run(state, 2, adding(), Schedule("t", 2, 9), record)
    np.testing.assert_array_equal(again["x"], [3, 3])


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"loss": float("nan")}, "loss is nan"),
        ({"grad_norm": float("inf")}, "grad_norm is inf"),
        ({"loss": [1.0, float("nan")], "grad_norm": [1.0, 1.0]}, "loss is nan"),  # none refused it
        (
            {"loss": [float("nan")] * 2, "grad_norm": [1.0, 1.0], "refused": [1.0, 1.0]},
            "loss is nan",
        ),
    ],
)
def test_what_is_not_finite_stops_and_names_the_last_good_checkpoint(files, bad, name):
    record = files()
    with pytest.raises(InputError, match=rf"{name} at iteration 4; .*c/2: lower the learning"):
        loop.run(start(), 0, adding(at=3, **bad), Schedule("t", 6, 2), record)
    assert record.checkpointer.latest_step == 2


def test_what_is_not_finite_right_after_a_restore_says_so(files):
    """And the remedy of the line is what goes on from the checkpoint before."""
    record = files()
    loop.run(start(), 0, adding(), Schedule("t", 4, 2), record)
    with pytest.raises(InputError, match=r"iteration 5; .* checkpoint (\S+) was restored") as error:
        loop.run(start(), 4, adding(at=4, loss=float("nan")), Schedule("t", 6, 2), record)
    named = re.search(r"checkpoint (\S+) was restored.*remove that to go on", str(error.value))[1]
    record.checkpointer.close()
    shutil.rmtree(named)
    again = files(start=2)
    assert again.checkpointer.latest_step == 2
    with pytest.raises(InputError, match=r"iteration 4; the last good checkpoint is \S+/2:"):
        loop.run(start(), 2, adding(at=3, loss=float("nan")), Schedule("t", 6, 2), again)


def test_a_refused_member_stops_nobody(files):
    record = files()
    values = {"loss": [float("nan"), 1.0], "grad_norm": [1.0, 2.0], "refused": [1.0, 0.0]}
    end = loop.run(start(), 0, adding(at=1, **values), Schedule("t", 3, 9), record)
    np.testing.assert_array_equal(end["x"], [6, 6])
    assert np.isnan(lines(files.path)[1]["loss"][0])


@pytest.mark.parametrize("at", [1, 5])
def test_ctrl_c_without_a_record_returns_the_state_so_far(at, capsys):
    """As in a notebook, where what was learned so far is what one wants to look at."""
    end = loop.run(start(), 0, adding(signal.SIGINT, at=at), Schedule("t", 6))
    np.testing.assert_array_equal(end["x"], sum(range(at + 2)))
    assert f"t: stopped after iteration {at + 1} of 6" in capsys.readouterr().err


def test_sigterm_without_a_record_stops():
    with pytest.raises(Stopped, match="iteration 2 of 6 was the last"):
        loop.run(start(), 0, adding(signal.SIGTERM, at=1), Schedule("t", 6))


def test_what_is_not_finite_stops_without_a_record():
    with pytest.raises(InputError, match="loss is nan at iteration 2; there is no checkpoint yet"):
        loop.run(start(), 0, adding(at=1, loss=float("nan")), Schedule("t", 6))


@pytest.fixture
def traced(monkeypatch):
    """The iterations around which a trace was begun and ended, as (iterations done, event)."""
    events, done = [], []
    real_start, real_stop = jax.profiler.start_trace, jax.profiler.stop_trace

    def begin(folder):
        events.append((len(done), "begin"))
        real_start(folder)

    def end():
        events.append((len(done), "end"))
        real_stop()

    monkeypatch.setattr(jax.profiler, "start_trace", begin)
    monkeypatch.setattr(jax.profiler, "stop_trace", end)
    return events, done


def counting(done, **bad):
    one = adding(**bad)

    def counted(state, step):
        out = one(state, step)
        done.append(step)
        return out

    return counted


@pytest.mark.parametrize(
    ("profile", "first", "wanted"),
    [
        ((2, 3), 0, [(1, "begin"), (3, "end")]),
        ((3, 9), 0, [(2, "begin"), (4, "end")]),  # the loop ends before the trace does
        ((1, 3), 2, [(0, "begin"), (1, "end")]),  # it goes on from iteration 2: the third is left
        ((1, 2), 2, []),
        (None, 0, []),
    ],
)
def test_a_profile_traces_its_iterations(files, traced, profile, first, wanted, capsys):
    events, done = traced
    schedule = Schedule("t", 4, 9, profile)
    loop.run(start(), first, counting(done), schedule, files(first))
    assert events == wanted and len(done) == 4 - first
    written = list((files.path / "profile").rglob("*.xplane.pb"))
    assert bool(written) == bool(wanted)
    assert ("profile: the trace is in" in capsys.readouterr().err) == bool(wanted)


def test_a_trace_is_written_though_the_loop_stops_inside_it(files, traced):
    events, done = traced
    with pytest.raises(InputError, match="loss is nan at iteration 2"):
        loop.run(
            start(), 0, counting(done, at=1, loss=float("nan")), Schedule("t", 4, 9, (1, 4)),
            files(),
        )  # fmt: skip
    assert events == [(0, "begin"), (2, "end")]
    assert list((files.path / "profile").rglob("*.xplane.pb"))


def stuck(at, donated=False):
    """A step whose reward function does not return in the iteration after ``at``."""
    one = adding()

    def step(state, step):
        if step == at:
            if donated:
                state["x"].delete()
            with signals.interruptible():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(20)
        return one(state, step)

    return step


def test_a_step_that_does_not_return_keeps_the_one_before(files, monkeypatch):
    monkeypatch.setattr(signals, "CALL_SECONDS", 0.1)
    record = files()
    with pytest.raises(Stopped, match=r"after iteration 3 of 6 is saved"):
        loop.run(start(), 0, stuck(3), Schedule("t", 6, 100), record)
    state, metadata = record.checkpointer.restore(start())
    assert metadata["step"] == 3
    np.testing.assert_array_equal(state["x"], [6, 6])


def test_a_first_step_that_does_not_return_claims_nothing(files, monkeypatch):
    monkeypatch.setattr(signals, "CALL_SECONDS", 0.1)
    record = files()
    with pytest.raises(Stopped, match=r"inside iteration 1: nothing was learned yet"):
        loop.run(start(), 0, stuck(0), Schedule("t", 6, 100), record)
    assert record.checkpointer.latest_step is None


def test_a_state_that_was_given_away_leaves_the_newest_checkpoint(files, monkeypatch):
    monkeypatch.setattr(signals, "CALL_SECONDS", 0.1)
    record = files()
    with pytest.raises(Stopped, match=r"inside iteration 4: checkpoint 2 is the last"):
        loop.run(start(), 0, stuck(3, donated=True), Schedule("t", 6, 2), record)


def ending(at):
    """Steps that add one, until that of index ``at`` says that it was the last."""

    def one(state, step):
        values = {"loss": 1.0, "grad_norm": 1.0} | ({} if step % 2 else {"ended": step == at})
        return {"x": state["x"] + 1}, values, ""

    return one


def test_what_has_ended_is_saved_as_the_last_iteration(files):
    record = files()
    end = loop.run(start(), 0, ending(4), Schedule("t", 50, 10), record)
    np.testing.assert_array_equal(end["x"], [5, 5])
    assert record.checkpointer.latest_step == 50
    state, metadata = record.checkpointer.restore(start())
    np.testing.assert_array_equal(state["x"], [5, 5])
    assert metadata["step"] == 50
    found = lines(files.path)
    assert [x["step"] for x in found] == [1, 2, 3, 4, 5]
    assert not any("ended" in x for x in found)
    np.testing.assert_array_equal(loop.run(start(), 0, ending(2), Schedule("t", 9))["x"], [3, 3])


def place(path):
    return Place(path / "deep" / "c", path / "deep" / "m", 2, {"a": 1})


def test_a_loop_goes_on_from_its_place_and_is_complete_there(tmp_path, capfd):
    schedule, where = Schedule("t", 6, 2), place(tmp_path)
    with pytest.raises(Stopped, match="after iteration 3 of 6"):
        loop.resume(start(), adding(signal.SIGTERM, at=2), schedule, where)
    first = start()
    end = loop.resume(first, adding(), schedule, where)
    np.testing.assert_array_equal(end["x"], [21, 21])
    assert first["x"].is_deleted()  # it would be a second state in memory all along
    assert [x["step"] for x in lines(where.metrics)] == [1, 2, 3, 4, 5, 6]
    assert "going on after iteration 3 of 6" in capfd.readouterr().err

    def never(state, step):
        raise AssertionError("it is complete")

    np.testing.assert_array_equal(loop.resume(start(), never, schedule, where)["x"], [21, 21])
    assert "going on" not in capfd.readouterr().err


def test_what_a_run_begins_with_is_made_where_there_is_no_checkpoint(tmp_path):
    made = []

    def begin(state):
        made.append(True)
        return {"x": state["x"] + 100}

    schedule, where = Schedule("t", 6, 2), place(tmp_path)
    with pytest.raises(Stopped):
        loop.resume(start(), adding(signal.SIGTERM, at=2), schedule, where, begin)
    end = loop.resume(start(), adding(), schedule, where, begin)
    np.testing.assert_array_equal(end["x"], [121, 121])
    assert made == [True]


def test_a_run_that_has_ended_does_nothing_when_it_goes_on(tmp_path):
    schedule, where = Schedule("t", 50, 10), place(tmp_path)
    loop.resume(start(), ending(4), schedule, where)
    again = loop.resume(start(), ending(0), schedule, where)
    np.testing.assert_array_equal(again["x"], [5, 5])
    assert len(lines(where.metrics)) == 5


@pytest.mark.parametrize("whole", [False, True])
def test_ctrl_c_gives_what_was_learned_unless_only_all_of_it_is_of_use(whole):
    schedule = Schedule("t", 6, whole=whole)
    stopped = pytest.raises(Stopped, match="iteration 3 of 6 was the last")
    with stopped if whole else contextlib.nullcontext():
        end = loop.run(start(), 0, adding(signal.SIGINT, at=2), schedule)
        np.testing.assert_array_equal(end["x"], [6, 6])
