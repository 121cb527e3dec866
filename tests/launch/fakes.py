"""Programs in place of `vbon` and of what starts it: they note their calls and do what is asked."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAUNCH = Path(__file__).parents[2] / "launch"

# What each program begins with: a line in the log for each call.
NOTE = f"""#!{sys.executable} -SE
import json, os, signal, subprocess, sys, time
name, args = os.path.basename(sys.argv[0]), sys.argv[1:]
def note(**more):
    line = dict(program=name, args=args, pid=os.getpid(), env=dict(os.environ)) | more
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(json.dumps(line) + "\\n")
"""

# FAKE_DOES: for each start of a process what it does, the last for all starts after it: an exit
# code, or "hang" until a signal, "leave" with code 75 at a signal, "deaf" to SIGTERM, "killed" by
# nobody it knows. One that is signalled takes a while to end, in which a second signal is noted.
# FAKE_AFTER: how many must hang before one fails.
VBON = """
flags = dict(word.split("=", 1) for word in args if "=" in word)
mine = flags.get("--process_id") or flags.get("--shard", "0").split("/")[0]
mine = os.environ.get("SLURM_PROCID", mine)
note(process=int(mine), stdin=sys.stdin.read())
def noted(key, value):
    with open(os.environ["FAKE_LOG"]) as file:
        lines = [json.loads(line) for line in file]
    return sum(line["program"] == name and line.get(key) == value for line in lines)
does = json.loads(os.environ.get("FAKE_DOES", "{}")).get(mine, [0])
does = does[min(noted("process", int(mine)), len(does)) - 1]
print("table of", mine, flush=True)
print("remark of", mine, file=sys.stderr, end="", flush=True)
came = []
def stopped(signum, frame):
    came.append(signum)
    note(signal=signum)
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, stopped)
while does and noted("ready", True) < int(os.environ.get("FAKE_AFTER", 0)):
    if does in ("hang", "leave", "deaf"):
        break
    time.sleep(0.02)
if does == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if does == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if does in ("hang", "leave", "deaf"):
    note(ready=True)
    for _ in range(600):
        if came:
            break
        time.sleep(0.05)
    time.sleep(0.2 + 0.4 * int(mine))
    does = 75 if does == "leave" else 128 + came[0]
sys.exit(does)
"""


def program(folder: Path, name: str, code: str) -> None:
    """Puts a program into a folder of the PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(NOTE + code)
    (folder / name).chmod(0o755)


class Stage:
    """A folder of fake programs, the environment that finds them, and what they noted."""

    def __init__(self, folder: Path):
        self.bin, self.home, self.log = folder / "bin", folder / "home", folder / "log"
        self.home.mkdir()
        self.log.touch()
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SKYPILOT_", "CUDA_", "JAX_", "XLA_"))
        }
        self.env = inherited | {
            "PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.home), "FAKE_LOG": str(self.log)
        }  # fmt: skip
        program(self.bin, "vbon", VBON)

    def start(self, *command: str | Path, **env: Any) -> subprocess.Popen[str]:
        more = {k: v if isinstance(v, str) else json.dumps(v) for k, v in env.items()}
        return subprocess.Popen(
            [str(word) for word in command], env=self.env | more, text=True, cwd=self.home,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *command: str | Path, **env: Any) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command that ends."""
        process = self.start(*command, **env)
        try:
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
        return process.returncode, out, err

    def noted(self, program: str, key: str = "args") -> list[dict[str, Any]]:
        """The lines of a program that have a key."""
        return list(self._lines(program, key))

    def _lines(self, program: str, key: str) -> Iterator[dict[str, Any]]:
        for text in self.log.read_text().splitlines():
            line = json.loads(text)
            if line["program"] == program and key in line:
                yield line
