"""How a command ends: one line and an exit code for each error, and an end that nothing delays."""

import atexit
import ctypes
import logging
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from vbon_jax import signals
from vbon_jax.errors import InputError, disk_line

LEAVE_SECONDS = 5.0  # for what libraries do at exit, after an error
DONE_SECONDS = 60.0  # and after work that is done
LOST = 75  # EX_TEMPFAIL of sysexits.h: start it again
LOST_LINE = (
    "another process of the run was lost: start all of them again, the same command goes on from "
    "what is saved"
)
# What errors of collectives begin with; a status that is the program's fault is not among them.
_COLLECTIVE = (
    "UNKNOWN:",
    "INTERNAL:",
    "UNAVAILABLE:",
    "ABORTED:",
    "CANCELLED:",
    "DEADLINE_EXCEEDED",
)
_on_abort: Any = None  # the handler, which must live as long as the process; None in a run of one
_code = 0  # of the process that leaves
_reported = False  # whether the last line was printed

# They log errors that are raised as well, with tracebacks; ours is the one line.
_LOUD = ("absl", "orbax", "asyncio", "tensorstore")


def ending(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the one line of an error.

    Args:
      error: what came out of a command.

    Returns:
      (code, line); None for a fault of the program, whose traceback is shown.
    """
    if isinstance(error, signals.Stopped):
        return 128 + error.signum, str(error)
    signum = signals.received()
    if isinstance(error, KeyboardInterrupt):
        signum = getattr(error, "signum", signum or signal.SIGINT)
    if signum is not None:  # also what a library made of the interruption
        name = signal.Signals(signum).name
        return 128 + signum, f"stopped by {name}; the same command goes on from what is saved"
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE, ""
    if isinstance(error, InputError):
        return 2, " ".join(str(error).split("\n"))
    if isinstance(error, OSError) and (error.filename or error.errno):
        return 2, disk_line(error, error.filename)
    if _out_of_memory(error):
        said = " ".join(str(error).split())[:200] or "no more to be had"
        return 2, (
            f"out of memory ({type(error).__name__}: {said}): `vbon plan` with the same flags "
            "tells what a run needs and which keys lower it"
        )
    if of_the_others(error):
        said = " ".join(str(error).split())[:200]
        return LOST, f"{LOST_LINE} ({type(error).__name__}: {said})"
    return None


def end_with_the_others(line: str) -> None:
    """From now on this process ends with code `LOST` when another one of its run is lost.

    JAX's client aborts the process then, whatever its main thread waits for. A handler of Python's
    own would not run: this one is called by the C library.

    Args:
      line: what is said then.
    """
    global _on_abort

    def handle(signum: int) -> None:
        os.write(2, f"vbon: {line}\n".encode())
        os._exit(LOST)

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _on_abort = kind(handle)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, kind], ctypes.c_void_p
    libc.signal(signal.SIGABRT, _on_abort)


def of_the_others(error: BaseException) -> bool:
    """Whether an error is what a process meets whose run has lost another one."""
    known = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError", "ValueError")
    return _on_abort is not None and known and str(error).startswith(_COLLECTIVE)


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory, or a number of its size, ran out: in Python, NumPy or XLA."""
    if isinstance(error, MemoryError | OverflowError):
        return True
    said = str(error)
    known = (
        "RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "Maximum allowed dimension",
        "array is too big",
    )  # fmt: skip
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError", "ValueError") and any(
        words in said for words in known
    )


def report(error: BaseException) -> int:
    """Shows how a command ended: one line, or the traceback of a fault of the program.

    Args:
      error: what came out of it.

    Returns:
      The exit code.
    """
    found = ending(error)
    if found is None:
        traceback.print_exception(error)
        return 1
    global _reported
    _reported = True
    code, line = found
    if isinstance(error, signals.Stopped | KeyboardInterrupt):
        signals.wait_told()
    if isinstance(error, BrokenPipeError):  # the reader of `vbon generate` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if line:
        print(f"vbon: {line}", file=sys.stderr, flush=True)
    return code


def prepare() -> None:
    """Makes this process one of the command line, before anything slow is imported.

    Signals are handled, nothing can ask a question on standard input, and what libraries say of
    errors that they raise as well is not shown.
    """
    atexit.register(_last)  # the first registered is the last called
    signals.install()
    sys.stdin = open(os.devnull)  # noqa: SIM115  # for the whole process
    logging.raiseExceptions = False  # of the log itself
    threading.excepthook = _of_thread
    sys.unraisablehook = _of_nobody
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's own log


def _of_thread(args: Any) -> None:
    """One line for an error that ended a library's thread."""
    if isinstance(args.exc_value, OSError | SystemExit):
        return  # the disk's: whoever waits for the thread's work meets it too
    name = args.thread.name if args.thread else "?"
    said = str(args.exc_value).partition("\n")[0]
    print(f"vbon: thread {name}: {args.exc_type.__name__}: {said}", file=sys.stderr)


def _of_nobody(args: Any) -> None:
    """One line for an error that no caller can see, as of a file closed by the collector."""
    # The disk's are told by whoever writes, and the signals' watcher ends what does not let go.
    if isinstance(args.exc_value, OSError | KeyboardInterrupt) or _reported:
        return
    print(f"vbon: ignored: {args.exc_type.__name__}: {args.exc_value}", file=sys.stderr)


def leave(code: int) -> NoReturn:
    """Ends the process with a code, whatever threads of libraries do.

    It takes no signal any more: the work has ended, and its code says how.

    Args:
      code: the exit code; after an error the end comes within `LEAVE_SECONDS`.
    """
    global _code
    _code = code
    for signum in signals.SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    ends = threading.Timer(LEAVE_SECONDS if code else DONE_SECONDS, os._exit, (code,))
    ends.daemon = True
    ends.start()
    sys.exit(code)


def _last() -> None:
    """The end of a failed process: destructors of compiled libraries may wait for ever."""
    if _code:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(_code)
