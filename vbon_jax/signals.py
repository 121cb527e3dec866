"""SIGTERM and Ctrl-C: the first ends the work in order, the second at once.

A loop that saves its state looks at `StopSignal` between its steps; a user's code inside such a
step (`interruptible`) is given some seconds to return, and then interrupted. In a process of the
command line (`install`) a thread watches beside, whatever the main thread is doing: it ends the
process on the second signal, on the first where no such loop runs, and where a loop does not let
go. Files are whole or resumed at any moment, while an error raised inside a library's import or
callback may crash it.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
CALL_SECONDS = 4.0  # for a user's code to return in, after a first signal
GRACE_SECONDS = 8.0  # for what a first signal interrupts, and for the way out of a loop

_loops: list["StopSignal"] = []  # those that look at the flag, the innermost last
_calls = 0  # how many `interruptible` are open
_received: int | None = None  # the first signal of an installed process
_watched = False  # whether this process is installed
_told = threading.Event()  # of the first signal; set where nobody watches
_told.set()


class Stopped(Exception):
    """A signal asked the run to stop; what was computed is saved."""

    def __init__(self, signum: int, saved: str):
        super().__init__(f"stopped by {signal.Signals(signum).name}: {saved}")
        self.signum = signum


class Interrupted(KeyboardInterrupt):
    """A signal came, and a user's code did not return. No Exception: nobody swallows it."""

    def __init__(self, signum: int):
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class StopSignal:
    """Turns the first SIGTERM or Ctrl-C into a flag a loop looks at between steps.

    A second one raises KeyboardInterrupt. A flag that is not taken on the way out is given to
    whoever handles the signal there.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            _loops.append(self)
            for signum in SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)
        if self in _loops:
            _loops.remove(self)
        if kind is None and self.signum is not None:
            signal.raise_signal(self.signum)

    def take(self) -> int | None:
        """The signal that came, which is the caller's to honour from now on."""
        signum, self.signum = self.signum, None
        return signum

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            if _watched:
                return  # the watcher ends the process
            raise KeyboardInterrupt
        self.signum = signum
        if _calls:
            _hurry(signum)


def _hurry(signum: int) -> None:
    """Raises Interrupted in some seconds, unless `interruptible` is left before."""

    def late(*_: object) -> None:
        raise Interrupted(signum)

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, CALL_SECONDS)


@contextmanager
def interruptible() -> Iterator[None]:
    """For a user's code, which may not return: inside a step, a signal interrupts it.

    Raises:
      Interrupted: the code did not return within `CALL_SECONDS` of the signal.
    """
    global _calls
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled in the main thread
        return
    previous = signal.getsignal(signal.SIGALRM)
    _calls += 1
    try:
        if _loops and (signum := _loops[-1].signum) is not None:
            _hurry(signum)
        yield
    finally:
        _calls -= 1
        if _loops and _loops[-1].signum is not None:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, previous)


# --- The process of a command line --------------------------------------------------------------


def received() -> int | None:
    """The first signal that came to an installed process; None before."""
    return _received


def wait_told() -> None:
    """Lets the watcher say that a signal came before others say how the work ended."""
    _told.wait(1.0)


def install() -> None:
    """Handles the signals of this process from now on; called once, in its main thread."""
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup and `&` leave Ctrl-C
            signal.signal(signum, _ignore)  # the watcher acts
    global _watched
    _watched = True
    _told.clear()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # The interpreter writes a signal's number here at once, while the main thread may be in a
    # compile and its handler has to wait.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()


def _ignore(signum: int, frame: FrameType | None) -> None:
    pass


def _watch(reading: int) -> None:
    global _received
    waited = 0.0
    while True:
        ready, _, _ = select.select([reading], [], [], None if _received is None else 0.5)
        for signum in os.read(reading, 64) if ready else b"":
            if signum not in SIGNALS:
                continue
            if _received is not None:
                _end(signum, ", at once")
            if not _loops:
                _end(signum, "")
            _received = signum
            _say(
                f"vbon: {signal.Signals(signum).name}: the step is finished and saved first; again "
                "to stop at once"
            )
            _told.set()
        if _received is not None and not ready:
            waited = 0.0 if _loops and not _calls else waited + 0.5
            if waited >= GRACE_SECONDS:
                _end(_received, ": what was running did not let go")


def _end(signum: int, how: str) -> None:
    name = signal.Signals(signum).name
    if sys.stderr.isatty():
        _say("\033[?25h", end="")  # the cursor, which a progress bar hides
    _say(f"vbon: stopped by {name}{how}; the same command goes on from what is saved")
    os._exit(128 + signum)


def _say(line: str, end: str = "\n") -> None:
    """Writes past sys.stderr, whose lock the main thread may hold."""
    try:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{line}{end}".encode())
    except (OSError, ValueError):
        return
