"""Signals as a flag, as an interruption, and as the end of a process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vbon_jax import signals
from vbon_jax.signals import Interrupted, StopSignal

ROOT = Path(__file__).parents[1]


def send(signum=signal.SIGTERM):
    os.kill(os.getpid(), signum)


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(signals, "CALL_SECONDS", 0.1)


def test_the_first_signal_is_a_flag_and_the_second_an_interruption():
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        send()
        assert stop.signum == signal.SIGTERM
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_call_that_returns_in_time_is_not_interrupted(hasty):
    with StopSignal() as stop:
        with signals.interruptible():
            send()
        time.sleep(0.2)
        assert stop.take() == signal.SIGTERM


@pytest.mark.parametrize("when", ["inside", "before"])
def test_a_call_that_does_not_return_is_interrupted(hasty, when):
    with StopSignal() as stop:
        if when == "before":
            send()
        with pytest.raises(Interrupted, match="SIGTERM"), signals.interruptible():
            if when == "inside":
                send()
            time.sleep(20)
        assert stop.take() == signal.SIGTERM
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_flag_nobody_looked_at_is_handed_on():
    with pytest.raises(KeyboardInterrupt), StopSignal():
        send(signal.SIGINT)


def process(body, *sent, first="begun\n"):
    """(code, lines) of a process of the command line whose ``cli.main`` is ``body``."""
    code = (
        "import sys, time, types\n"
        "from vbon_jax import __main__, exits, signals\n"
        "signals.GRACE_SECONDS = 1.0\n"
        f"def main():\n    print('begun', file=sys.stderr, flush=True)\n{body}\n"
        "sys.modules['vbon_jax.cli'] = types.SimpleNamespace(main=main)\n"
        "import vbon_jax; vbon_jax.cli = sys.modules['vbon_jax.cli']\n"
        "exits.LEAVE_SECONDS = 0.5\n"
        "__main__.entry()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as child:  # fmt: skip
        assert child.stderr.readline() == first
        for i, signum in enumerate(sent):
            time.sleep(0.3 if i else 0.05)
            child.send_signal(signum)
        lines = child.stderr.read().splitlines()
    return child.returncode, lines


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("swallows", [False, True])
def test_the_first_signal_ends_what_is_no_step(signum, swallows):
    """Also what catches whatever is raised."""
    body = "    while True:\n        try: time.sleep(60)\n        except BaseException: pass"
    code, lines = process(body if swallows else "    time.sleep(60)", signum)
    name = signal.Signals(signum).name
    assert code == 128 + signum
    assert lines == [f"vbon: stopped by {name}; the same command goes on from what is saved"]


def test_a_call_that_swallows_its_interruption_is_ended_after_a_while():
    body = (
        "    signals.CALL_SECONDS = 0.1\n"
        "    with signals.StopSignal(), signals.interruptible():\n"
        "        while True:\n"
        "            try: time.sleep(60)\n"
        "            except BaseException: pass"
    )
    code, lines = process(body, signal.SIGTERM)
    assert code == 143 and "did not let go" in lines[-1] and len(lines) == 2


def test_the_second_signal_ends_at_once_what_finishes_its_step():
    body = "    with signals.StopSignal():\n        while True: time.sleep(0.1)"
    code, lines = process(body, signal.SIGTERM, signal.SIGINT)
    assert code == 130 and "the step is finished and saved first" in lines[0]
    assert lines[-1].startswith("vbon: stopped by SIGINT, at once")


def test_a_failed_process_does_not_wait_for_the_threads_of_libraries():
    body = (
        "    import threading\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    from vbon_jax.errors import InputError\n"
        "    raise InputError('samples.m=0: no')"
    )
    began = time.monotonic()
    assert process(body) == (2, ["vbon: samples.m=0: no"])
    assert time.monotonic() - began < 20


def test_a_fault_of_the_program_ends_in_its_traceback():
    code, lines = process("    1 / 0")
    assert code == 1 and lines[-1] == "ZeroDivisionError: division by zero"


def test_a_signal_after_the_end_changes_no_exit_code():
    """While libraries and the interpreter go down: the work is done, and its code says so."""
    code = (
        "import atexit, time\n"
        "from vbon_jax import exits\n"
        "exits.prepare()\n"
        "atexit.register(lambda: (print('leaving', flush=True), time.sleep(0.5)))\n"
        "exits.leave(0)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "leaving\n"
        process.terminate()
        assert process.wait(timeout=20) == 0
