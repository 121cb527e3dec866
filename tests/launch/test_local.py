"""`launch/local.sh`: one process, and several that are watched over."""

import os
import pty
import re
import signal
import sys
import time

import pytest

from tests.launch.fakes import LAUNCH, Stage, program

LOCAL = LAUNCH / "local.sh"
RUN = ("run", "--config=configs/reviews.py", "--workdir=a b")
MESH = "--config.mesh.data=-1"


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    program(stage.bin, "nvidia-smi", 'print("NVIDIA-SMI has failed"); sys.exit(9)')
    return stage


def starts(stage):
    """The arguments of each process, of one start after another."""
    return sorted(stage.noted("vbon", "process"), key=lambda line: line["process"])


def until_ready(stage, count):
    deadline = time.monotonic() + 20
    while len(stage.noted("vbon", "ready")) < count:
        assert time.monotonic() < deadline, "the processes did not start"
        time.sleep(0.02)


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("flag", [(), ("-n", "1")], ids=["plain", "n=1"])
def test_one_process_gets_all_devices_and_no_coordinator(stage, flag):
    code, out, err = stage.run(LOCAL, *flag, *RUN)
    assert (code, out, err) == (0, "table of 0\n", "remark of 0")
    (line,) = starts(stage)
    assert line["args"] == [*RUN, MESH]
    assert line["env"]["JAX_COMPILATION_CACHE_DIR"] == str(stage.home / ".cache/vbon_jax/xla")


@pytest.mark.parametrize("n", [2, 4])
def test_processes_of_a_run_are_told_of_each_other(stage, n):
    code, out, err = stage.run(LOCAL, "-n", str(n), *RUN)
    assert code == 0
    assert out == "table of 0\n"
    assert sorted(err.replace("remark of 0", "", 1).splitlines()) == sorted(
        line for i in range(1, n) for line in (f"[{i}] remark of {i}", f"[{i}] table of {i}")
    )
    found = starts(stage)
    assert [line["process"] for line in found] == list(range(n))
    coordinator = found[0]["args"][4]
    assert re.fullmatch(r"--coordinator=127\.0\.0\.1:[23]\d{4}", coordinator)
    for i, line in enumerate(found):
        expected = [*RUN, MESH, coordinator, f"--num_processes={n}", f"--process_id={i}"]
        assert line["args"] == expected
        assert line["stdin"] == ""
        assert "CUDA_VISIBLE_DEVICES" not in line["env"]


def test_a_mesh_that_is_named_is_left_alone(stage):
    for flag in ((), ("-n2",)):
        assert stage.run(LOCAL, *flag, *RUN, "--config.mesh.fsdp=2")[0] == 0
    assert len(starts(stage)) == 3
    assert not any(MESH in line["args"] for line in starts(stage))


def test_a_sweep_is_shared_and_has_no_coordinator(stage):
    assert stage.run(LOCAL, "-n", "4", "sweep", "--config=c.py")[0] == 0
    assert [line["args"] for line in starts(stage)] == [
        ["sweep", "--config=c.py", MESH, f"--shard={i}/4"] for i in range(4)
    ]


@pytest.mark.parametrize("code", [1, 2])
def test_a_process_that_fails_ends_the_others(stage, code):
    does = {"0": ["hang"], "1": [code], "2": ["hang"]}
    found, _, err = stage.run(LOCAL, "-n", "3", *RUN, FAKE_DOES=does, FAKE_AFTER="2")
    assert found == code
    assert len(starts(stage)) == 3, "nothing is started again"
    assert "start again" not in err
    ended = [line["signal"] for line in stage.noted("vbon", "signal")]
    assert ended == [signal.SIGTERM] * 2
    assert all(gone(line["pid"]) for line in starts(stage))


def test_a_process_that_does_not_end_is_killed_after_a_grace(stage):
    process = stage.start(
        LOCAL, "-n", "2", *RUN, FAKE_DOES={"0": ["deaf"], "1": ["hang"]}, LAUNCH_GRACE="2"
    )
    until_ready(stage, 2)
    deaf, other = starts(stage)
    begun = time.monotonic()
    os.kill(other["pid"], signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert 1 <= time.monotonic() - begun < 10, "the grace, of which a second is rounded"
    assert gone(deaf["pid"])


@pytest.mark.parametrize("lost", [75, "killed"])
def test_all_start_again_when_a_process_was_lost(stage, lost):
    does = {"0": ["hang", 0], "1": [lost, 0]}
    code, _, err = stage.run(LOCAL, "-n", "2", *RUN, FAKE_DOES=does, FAKE_AFTER="1")
    assert code == 0
    assert [line["process"] for line in starts(stage)] == [0, 0, 1, 1]
    said = [line for line in err.splitlines() if "local.sh" in line]
    number = 137 if lost == "killed" else lost
    assert len(said) == 1 and f"exit code {number}" in said[0] and "1 of 3 times" in said[0]
    assert "Killed" not in err, "bash reports nothing of its own"


def test_starts_are_bounded(stage):
    does = {"0": ["hang"], "1": [75]}
    code, _, err = stage.run(LOCAL, "-n", "2", *RUN, FAKE_DOES=does, LAUNCH_RESTARTS="2")
    assert code == 75
    assert [line["process"] for line in starts(stage)].count(1) == 3
    assert err.count("local.sh: ") == 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on_once_and_ends_it(stage, signum):
    process = stage.start(LOCAL, "-n", "4", *RUN, FAKE_DOES={i: ["hang", 0] for i in "0123"})
    until_ready(stage, 4)
    process.send_signal(signum)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signum
    assert [line["signal"] for line in stage.noted("vbon", "signal")] == [signum] * 4
    assert len(starts(stage)) == 4 and "local.sh" not in err


def test_a_process_that_is_lost_while_all_stop_starts_nothing(stage):
    does = {"0": ["leave"], "1": ["hang"]}
    process = stage.start(LOCAL, "-n", "2", *RUN, FAKE_DOES=does)
    until_ready(stage, 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode in (75, 143)
    assert len(starts(stage)) == 2 and "local.sh" not in err


def test_ctrl_c_of_a_terminal_reaches_each_process_once(stage):
    """A second signal would end it without saving."""
    master, slave = pty.openpty()
    become = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    become += "os.execv(sys.argv[1], sys.argv[1:])"
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", become, str(LOCAL), "-n", "2", *RUN],
        stage.env | {"FAKE_DOES": '{"0": ["hang"], "1": ["hang"]}'},
        file_actions=[(os.POSIX_SPAWN_DUP2, slave, fd) for fd in (0, 1, 2)],
        setsid=True,
    )
    os.close(slave)
    try:
        until_ready(stage, 2)
        os.write(master, b"\x03")
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(master)
    assert os.waitstatus_to_exitcode(status) == 130
    signals = [line["signal"] for line in stage.noted("vbon", "signal")]
    assert signals == [signal.SIGINT] * 2


def gpus(stage, count):
    names = "".join(f"GPU {i}: NVIDIA X (UUID: GPU-{i})\\n" for i in range(count))
    program(stage.bin, "nvidia-smi", f'print("{names}", end="")')


def test_gpus_are_divided_evenly(stage):
    gpus(stage, 4)
    assert stage.run(LOCAL, "-n", "2", *RUN)[0] == 0
    assert stage.run(LOCAL, "-n", "2", *RUN, CUDA_VISIBLE_DEVICES="7,5")[0] == 0
    shares = [(line["process"], line["env"]["CUDA_VISIBLE_DEVICES"]) for line in starts(stage)]
    assert shares == [(0, "0,1"), (0, "7"), (1, "2,3"), (1, "5")]


def test_gpus_that_do_not_divide_are_refused(stage):
    gpus(stage, 4)
    code, _, err = stage.run(LOCAL, "-n", "3", *RUN)
    assert (code, err) == (2, "local.sh: -n 3: the 4 GPUs of this host do not divide by it\n")
    assert not starts(stage)
    assert stage.run(LOCAL, "-n", "3", *RUN, JAX_PLATFORMS="cpu")[0] == 0, "it needs none of them"


WORDS = [(), ("-n",), ("-n", "2"), ("-n", "0", "run"), ("-n", "x", "run")]


@pytest.mark.parametrize("words", WORDS)
def test_what_it_cannot_do_is_refused(stage, words):
    code, out, err = stage.run(LOCAL, *words)
    assert code == 2
    assert "launch/local.sh -n 4 run" in out or f"-n {words[1]}: write a number" in err
    assert not starts(stage)
