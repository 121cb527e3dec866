"""Stops `vbon run` by SIGTERM and Ctrl-C at random moments, and goes on.

    python -m tests.faults.signals --moments=20 --seed=0

The small run of `tests.faults.run` is started, and at a random moment between its start and its
end (start-up, fits, sampling, training, export, evaluation) is sent SIGTERM or SIGINT. It must end
with 128 + the signal's number and without a traceback within `--limit` seconds; the same command
must then complete, and its results must equal those of an undisturbed run. Every fifth moment two
signals are sent: the second must end it at once.

Options: --moments, how many; --seed, of the moments; --limit, seconds until the end; --folder,
where the runs lie (default: a temporary folder).
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import run

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AT_ONCE = 2.0  # seconds, of a second signal


def stopped(argv: list[str], after: float, signums: list[int]) -> tuple[run.Ended, float]:
    """Runs a process and sends it signals, the first ``after`` seconds from its start.

    Returns:
      How it ended, and the seconds from the last signal to its end.
    """
    with run.started(argv) as process:
        end = time.monotonic() + after
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.01)
        for i, signum in enumerate(signums):
            time.sleep(0.3 if i else 0.0)
            process.send_signal(signum)
        sent = time.monotonic()
        ended = run.finished(process)
        return ended, time.monotonic() - sent


def faults_of(ended: run.Ended, seconds: float, signums: list[int], limit: float) -> list[str]:
    """What is wrong with how a process ended."""
    allowed = {0, *(128 + s for s in signums)}
    if not ended.lines:
        allowed |= {-s for s in signums}  # before a line of ours ran
    wrong = [] if ended.code in allowed else [f"code {ended.code}"]
    wrong += ["traceback"] if ended.traceback else []
    late = seconds > (AT_ONCE if signums[1:] else limit)
    return wrong + (["late"] if late else [])


def main(argv: list[str] | None = None) -> int:
    """Prints a row a moment; returns the number of moments that went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=10.0)
    parser.add_argument("--folder", default="")
    options = parser.parse_args(argv)
    folder = Path(options.folder or tempfile.mkdtemp(prefix="faults-signals-"))
    assert run.done(run.command(folder / "warm")).code == 0  # compiles
    whole = run.done(run.command(folder / "whole"))
    assert whole.code == 0, whole.lines
    wanted = run.digest_of(folder / "whole")
    moments = random.Random(options.seed)
    rows = [("moment", "signal", "exit", "seconds", "then", "equal", "wrong", "last line")]
    bad = 0
    for i in range(options.moments):
        workdir, after = folder / f"run{i}", moments.uniform(0.05, whole.seconds)
        signums = [SIGNALS[i % 2]] * (2 if i % 5 == 4 else 1)
        ended, seconds = stopped(run.command(workdir), after, signums)
        again = run.done(run.command(workdir))
        differing = run.differing(run.digest_of(workdir), wanted)
        wrong = faults_of(ended, seconds, signums, options.limit)
        wrong += ["not complete"] if again.code else []
        wrong += ["other results: " + " ".join(differing)] if differing else []
        bad += bool(wrong)
        names = "+".join(signal.Signals(s).name for s in signums)
        rows.append(
            (f"{after:.2f} s", names, ended.code, f"{seconds:.2f}", again.code, not differing,
             "; ".join(wrong) or "-", ended.last[:90])
        )  # fmt: skip
        print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(run.table(rows))
    print(f"{options.moments} moments, {bad} wrong; an undisturbed run takes {whole.seconds:.1f} s")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(), 1))
