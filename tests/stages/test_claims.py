import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from vbon_jax.errors import InputError
from vbon_jax.stages import claims

LONG = 3600.0  # no heartbeat is stale within a test


def take(folder, stale_after=LONG):
    claim = claims.try_claim(folder, stale_after)
    assert claim is not None
    return claim


def newest(folder):
    return folder / f"claim.{claims._highest(folder)}"


def rewrite(path, **changes):
    """A record as another host would have left it, heartbeat and all."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_piece_has_one_holder_until_it_is_done(tmp_path):
    folder = tmp_path / "runs" / "one"
    assert not claims.done(folder) and not folder.exists()
    with take(folder) as claim:
        assert claim.held()
        assert claims.try_claim(folder, LONG) is None
        assert not claims.done(folder)
        assert claim.finish() and claim.finish()
        assert claims.done(folder)
        assert claims.try_claim(folder, LONG) is None
    assert claims.done(folder) and claims.try_claim(folder, LONG) is None
    record = json.loads((folder / "claim.1").read_text())
    assert record["pid"] == os.getpid() and record["host"] and record["started"]
    assert sorted(p.name for p in folder.iterdir()) == ["claim.1", "claim.2"]  # no draft, no probe


def test_what_is_not_finished_is_released_at_once(tmp_path):
    with pytest.raises(ZeroDivisionError), take(tmp_path) as first:
        raise ZeroDivisionError
    assert not first.held() and not claims.done(tmp_path)
    with take(tmp_path) as second:
        assert second.held() and not first.held()
        assert not first.finish()
        assert second.held() and not claims.done(tmp_path)


def test_stale_heartbeat_is_taken_over_and_the_loser_publishes_nothing(tmp_path):
    loser = take(tmp_path, 100.0)
    with loser:  # its own heartbeat comes only after 20 s
        path = newest(tmp_path)
        os.utime(path, (time.time() - 95,) * 2)
        assert claims.try_claim(tmp_path, 100.0) is None
        os.utime(path, (time.time() - 105,) * 2)
        winner = take(tmp_path, 100.0)
        assert winner.held() and not loser.held()
        assert not loser.finish() and not claims.done(tmp_path)
        assert winner.held()
    assert winner.held()  # the loser's way out has not released what is not its own
    with winner:
        assert winner.finish()
    assert claims.done(tmp_path)


def test_heartbeat_keeps_a_live_claim(tmp_path):
    quiet = take(tmp_path / "quiet", 0.5)  # not entered: no heartbeat
    with take(tmp_path / "live", 0.5):
        for _ in range(2):
            os.utime(newest(tmp_path / "live"), (0, 0))
            deadline = time.monotonic() + 30
            while newest(tmp_path / "live").stat().st_mtime == 0:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert claims.try_claim(tmp_path / "live", 10.0) is None
        time.sleep(0.5)
    take(tmp_path / "quiet", 0.5)
    assert not quiet.held()


def test_heartbeat_stops_when_the_claim_is_lost_and_when_it_ends(tmp_path):
    with take(tmp_path, 0.1) as loser:
        path = newest(tmp_path)
        claims._publish(tmp_path, 2, "held")
        loser._thread.join(5)
        assert not loser._thread.is_alive()
        os.utime(path, (0, 0))
        time.sleep(0.1)
        assert path.stat().st_mtime == 0
    with take(tmp_path / "other", 0.1) as claim:
        thread = claim._thread
    assert not thread.is_alive()


def test_the_clock_of_this_host_is_not_asked(tmp_path, monkeypatch):
    with take(tmp_path):
        monkeypatch.setattr(time, "time", lambda: 4e9)
        assert claims.try_claim(tmp_path, 10.0) is None


HOLD = """
import sys, time
from vbon_jax.stages import claims
with claims.try_claim(sys.argv[1], 3600.0) as claim:
    print("held", flush=True)
    time.sleep(60)
"""


def test_killed_holder_of_this_machine_is_followed_at_once(tmp_path):
    worker = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    )
    with worker:
        try:
            assert worker.stdout.readline() == "held\n"
            assert claims.try_claim(tmp_path, LONG) is None
        finally:
            worker.kill()
        # Its pid lives on as a zombie until it is waited for.
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        os.kill(worker.pid, 0)
        assert take(tmp_path).generation == 2
    assert worker.returncode == -signal.SIGKILL


def test_a_pid_that_is_gone_counts_on_its_own_machine_only(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    take(tmp_path)
    rewrite(newest(tmp_path), pid=process.pid, machine="another boot pid:[4026531836]")
    assert claims.try_claim(tmp_path, LONG) is None
    rewrite(newest(tmp_path), pid=process.pid, machine="")  # a host that cannot tell
    assert claims.try_claim(tmp_path, LONG) is None
    rewrite(newest(tmp_path), machine=claims._machine())
    assert take(tmp_path).generation == 2


def test_a_record_cut_short_waits_for_its_heartbeat(tmp_path):
    take(tmp_path)
    newest(tmp_path).write_text('{"state": "do')
    assert not claims.done(tmp_path)
    assert claims.try_claim(tmp_path, LONG) is None
    os.utime(newest(tmp_path), (0, 0))
    assert take(tmp_path).generation == 2


def test_the_reply_of_a_server_that_was_lost_is_not_held_against_the_winner(tmp_path, monkeypatch):
    real = os.link

    def link_twice(source, target):
        real(source, target)
        real(source, target)  # what a client does whose first request had no reply

    monkeypatch.setattr(os, "link", link_twice)
    assert take(tmp_path).generation == 1
    assert claims.try_claim(tmp_path, LONG) is None


def test_one_of_many_threads_takes_over(tmp_path):
    for piece in range(20):
        folder = tmp_path / str(piece)
        dead = take(folder)
        os.utime(newest(folder), (0, 0))
        start, won = threading.Barrier(8), []

        def race(folder=folder, start=start, won=won):
            start.wait()
            claim = claims.try_claim(folder, LONG)
            if claim is not None:
                won.append(claim)

        threads = [threading.Thread(target=race) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1 and won[0].held() and won[0].generation == 2 and not dead.held()


WORKER = """
import os, pathlib, signal, sys, time
from vbon_jax.stages import claims
root, number, pieces = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if number == 0:
    with claims.try_claim(root / "piece7", 3600.0):
        (root / "ready.0").touch()
        while not (root / "piece9").exists():  # the others are at work
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
(root / f"ready.{number}").touch()
while not (root / "go").exists():
    time.sleep(0.001)
folders = [root / f"piece{i}" for i in range(pieces)]
while not all(claims.done(f) for f in folders):
    for folder in folders:
        claim = claims.try_claim(folder, 3600.0)
        if claim is None:
            continue
        with claim:
            with (folder / "log").open("a") as log:
                log.write(f"begin {number}\\n")
                log.flush()
                time.sleep(0.002)
                log.write(f"end {number}\\n")
            assert claim.finish()
    time.sleep(0.005)
"""


def test_processes_racing_do_each_piece_exactly_once_also_if_one_is_killed(tmp_path):
    count, pieces = 4, 40
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, tmp_path, str(number), str(pieces)])
        for number in range(count)
    ]
    while not all((tmp_path / f"ready.{number}").exists() for number in range(count)):
        time.sleep(0.01)
        assert all(worker.poll() is None for worker in workers)
    (tmp_path / "go").touch()
    codes = [worker.wait(60) for worker in workers]
    assert codes[0] == -signal.SIGKILL and codes[1:] == [0] * (count - 1)
    logs = [(tmp_path / f"piece{i}" / "log").read_text().split() for i in range(pieces)]
    for log in logs:
        assert len(log) == 4 and log[0] == "begin" and log[2] == "end" and log[1] == log[3]
    assert len({log[1] for log in logs}) >= 2  # several had a share of the work


def test_wrong_folders_and_times_are_named(tmp_path):
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match=r"stale_after=.* seconds: give a number above 0"):
            claims.try_claim(tmp_path, seconds)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/piece: work cannot be claimed there \(Not a dir"):
        claims.try_claim(tmp_path / "file" / "piece", LONG)


def test_a_file_system_without_hard_links_is_named_and_left_clean(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(InputError, match="has hard links"):
        claims.try_claim(tmp_path, LONG)
    assert not list(tmp_path.iterdir())
