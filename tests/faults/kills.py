"""SIGKILL at random moments of `vbon run`, until it is complete: then bits as of no kill.

python -m tests.faults.kills --lives 30
"""

import argparse
import random
import tempfile
import threading
from pathlib import Path

from tests.faults import run


def until_complete(workdir: Path, rng: random.Random, seconds: float) -> tuple[int, list[str]]:
    """Starts the run again and again, each killed within ``seconds``, until one ends by itself.

    Returns:
      How many were killed, and the faults: tracebacks, or an end with another code than 0.
    """
    kills, faults = 0, []
    while True:
        with run.started(run.command(workdir)) as process:
            timer = threading.Timer(rng.uniform(0.0, seconds), process.kill)
            timer.start()
            ended = run.finished(process)
            timer.cancel()
        if ended.traceback:
            faults.append("a traceback")
        if ended.code == -9:
            kills += 1
            continue
        if ended.code != 0:
            faults.append(f"exit {ended.code}: {ended.last}")
        return kills, faults


def main(argv: list[str] | None = None) -> int:
    """Prints a row a run; the exit code is 1 where one differs from the undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lives", type=int, default=30, help="kills in all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    rows: list[tuple[object, ...]] = [("run", "kills", "differing", "faults")]
    wrong = total = 0
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / "whole"
        undisturbed = run.done(run.command(whole))
        assert undisturbed.code == 0, undisturbed.last
        wanted = run.digest_of(whole)
        while total < args.lives:
            workdir = Path(root) / f"killed{len(rows)}"
            kills, faults = until_complete(workdir, rng, undisturbed.seconds)
            differ = run.differing(run.digest_of(workdir), wanted)
            rows.append(
                (len(rows), kills, ", ".join(differ) or "nothing", "; ".join(faults) or "-")
            )
            print(rows[-1], flush=True)
            total += kills
            wrong += bool(differ or faults)
    print(run.table(rows))
    print(f"{total} kills in {len(rows) - 1} runs, {wrong} runs wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
