"""SIGKILL at random moments of `vbon run`, until it is complete: then bits as of no kill.

python -m tests.faults.kills --lives 30
python -m tests.faults.kills --lives 20 --processes 2

Of a run of several processes one at random is killed, and the others must end by themselves;
those that wait for one that was killed before it met them are ended here, as a launcher does.
"""

import argparse
import random
import signal
import tempfile
import threading
import time
from pathlib import Path

from tests.faults import run

LOST = 75  # the exit code of a process that lost another one
WITHIN = 60.0  # seconds in which it ends
MEET = 10.0  # seconds of a start in which processes may not have met yet


def argvs(workdir: Path, processes: int) -> list[list[str]]:
    """The command lines of the run's processes."""
    if processes == 1:
        return [run.command(workdir)]
    return run.together(processes, workdir, "--config.mesh.data=-1")


def until_complete(
    workdir: Path, rng: random.Random, seconds: float, processes: int
) -> tuple[list[float], list[str]]:
    """Starts the run again and again, each killed within ``seconds``, until one ends by itself.

    Returns:
      Of each kill the seconds in which the other processes ended (0 where there are none, or they
      were ended here), and the faults: tracebacks, an end with another code, a process that stays.
    """
    kills: list[float] = []
    faults: list[str] = []
    while True:
        killed: list[float] = []
        after = rng.uniform(0.0, seconds)
        with run.all_started(argvs(workdir, processes)) as group:
            victim = group[rng.randrange(processes)]

            def kill(victim=victim, group=group, killed=killed, early=after < MEET) -> None:
                if victim.poll() is None:
                    killed.append(time.monotonic())
                    victim.kill()
                    for other in group if early else ():
                        other.terminate()

            timer = threading.Timer(after, kill)
            timer.start()
            ended = [run.finished(process) for process in group]
            timer.cancel()
        faults += ["a traceback" for each in ended if each.traceback]
        if killed and any(each.code == -9 for each in ended):
            alone = processes == 1 or after < MEET
            kills.append(0.0 if alone else time.monotonic() - killed[0])
            others = [each.code for each in ended if each.code != -9]
            if kills[-1] > WITHIN or set(others) - {LOST, *([128 + signal.SIGTERM] * alone)}:
                faults.append(f"{kills[-1]:.0f} s after a kill the others ended with {others}")
            continue
        faults += [f"exit {each.code}: {each.last}" for each in ended if each.code != 0]
        return kills, faults


def main(argv: list[str] | None = None) -> int:
    """Prints a row a run; the exit code is 1 where one differs from the undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lives", type=int, default=30, help="kills in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="of the run")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    rows: list[tuple[object, ...]] = [("run", "kills", "others ended in s", "differing", "faults")]
    wrong = total = 0
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / "whole"
        began = time.monotonic()
        undisturbed = run.all_done(argvs(whole, args.processes))
        seconds = time.monotonic() - began
        assert [each.code for each in undisturbed] == [0] * args.processes, undisturbed[0].last
        wanted = run.digest_of(whole)
        while total < args.lives:
            workdir = Path(root) / f"killed{len(rows)}"
            kills, faults = until_complete(workdir, rng, seconds, args.processes)
            differ = run.differing(run.digest_of(workdir), wanted)
            longest = f"at most {max(kills, default=0.0):.1f}"
            told = (", ".join(differ) or "nothing", "; ".join(faults) or "-")
            rows.append((len(rows), len(kills), longest, *told))
            print(rows[-1], flush=True)
            total += len(kills)
            wrong += bool(differ or faults)
    print(run.table(rows))
    print(f"{total} kills in {len(rows) - 1} runs, {wrong} runs wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
