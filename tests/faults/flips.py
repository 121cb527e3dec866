"""Single-byte flips in each kind of file of a run: seen, or harmless and equal.

python -m tests.faults.flips --count 100

A file is flipped where the stages after it have yet to read it, and the run goes on from there, all
in this process. What ends with exit 2 is one line, whose remedy `test_remedies` tries.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax

from tests.faults import run
from vbon_jax import cli
from vbon_jax.stages import notes
from vbon_jax.training.metrics import MetricsWriter

FLAGS = ("--config.prompts.train=4",)
STAGES = ("sft", "sample", "train", "export")
# Lines that tell of damage, on the way to results that are equal.
TOLD = ("damaged", "set aside", "doing the stage again", "sampled again", "since; no result")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
      name: of it.
      after: how far the run had come; see `snapshots`.
      patterns: where such files lie in the workdir.
      stages: that the run does from there on, evaluation too where it reads them.
    """

    name: str
    after: str
    patterns: tuple[str, ...]
    stages: tuple[str, ...] = STAGES


KINDS = (
    Kind("checkpoint", "half", ("checkpoints/train/7/**/*",)),
    Kind("metrics", "half", ("metrics.jsonl",)),
    Kind("samples, cut", "cut", ("samples/train.jsonl",)),
    Kind("samples", "sample", ("samples/train.jsonl",)),
    Kind("prompts", "sample", ("prompts/*.jsonl",)),
    Kind("reference", "sft", ("reference/*",)),
    Kind("tokenizer", "sft", ("tokenizer/*",)),
    Kind("policy", "export", ("policy/*",), (*STAGES, "evaluate")),
    Kind("held-out samples", "unread", ("samples/test_*.jsonl",), (*STAGES, "evaluate")),
    Kind("notes", "evaluate", ("stages/*.json",), (*STAGES, "evaluate")),
    Kind("config.json", "evaluate", ("config.json",), (*STAGES, "evaluate", "report")),
    Kind("evaluation.json", "evaluate", ("evaluation.json",), (*STAGES, "evaluate", "report")),
)


def vbon(
    workdir: Path, stages: tuple[str, ...], *flags: str, stage: str = "run"
) -> tuple[int, list[str]]:
    """The command line in this process: exit code, and lines of standard error."""
    argv = run.command(workdir, *FLAGS, f"--config.stages={stages!r}", *flags, stage=stage)[3:]
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(argv)
    return code, [line for line in err.getvalue().splitlines() if line.strip()]


def snapshots(root: Path) -> dict[str, Path]:
    """Copies of one run's workdir after each stage, "half" of training and in a "cut" sample."""
    workdir, found = root / "w", {}

    def keep(name: str) -> None:
        found[name] = root / name / "w"
        shutil.copytree(workdir, found[name])

    def does(stages: tuple[str, ...]) -> None:
        code, lines = vbon(workdir, stages)
        assert code == 0, lines[-1]

    does(STAGES[:1])
    keep("sft")
    write = MetricsWriter.write

    def stopped(self: MetricsWriter, step: int, values: dict[str, object]) -> None:
        write(self, step, values)
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    does(STAGES[:2])
    keep("sample")
    with mock.patch.object(MetricsWriter, "write", stopped):
        assert vbon(workdir, STAGES[:3])[0] == 128 + signal.SIGTERM
    keep("half")
    does(STAGES)
    keep("export")
    does((*STAGES, "evaluate"))
    keep("evaluate")
    keep("unread")  # held-out samples that an evaluation made anew reads
    (found["unread"] / "evaluation.json").unlink()
    shutil.copytree(found["sft"], root / "cut" / "w")
    found["cut"] = root / "cut" / "w"
    lines = (found["sample"] / "samples/train.jsonl").read_bytes().splitlines(keepends=True)
    (found["cut"] / "samples").mkdir()
    (found["cut"] / "samples/train.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]))
    started = _incomplete((found["sample"] / "stages/sample.json").read_bytes())
    (found["cut"] / "stages/sample.json").write_bytes(started)
    return found


def _incomplete(note: bytes) -> bytes:
    """A note as it is while its stage is at work."""
    value = json.loads(note)
    settings, files = value["settings"], value["files"]
    return json.dumps(notes.as_json(notes.Note(settings, False, files))).encode()


def flipped(path: Path, rng: random.Random) -> str:
    """Changes one byte of a file; says which."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= rng.randrange(1, 256)
    path.write_bytes(data)
    return f"{path} at {at}"


def outcome(
    kind: Kind, start: Path, wanted: dict[str, str], root: Path, rng: random.Random
) -> tuple[str, str]:
    """Flips a byte in a copy of ``start``, lets the run go on: how it ended, and a word on it."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(start, root)
    files = sorted(
        p for x in kind.patterns for p in root.glob(x) if p.is_file() and p.stat().st_size
    )
    where = flipped(rng.choice(files), rng)
    try:
        code, lines = vbon(root, kind.stages)
    except Exception as error:
        return "TRACEBACK", f"{where}: {type(error).__name__}: {error}"
    if code == 2:
        errors = [line for line in lines if line.startswith("vbon: ")]
        return ("refused", lines[-1]) if len(errors) == 1 else ("LINES", f"{where}: {errors}")
    if code != 0:
        return "CODE", f"{where}: exit {code}: {lines[-1]}"
    found = run.digest_of(root)
    differ = [k for k in run.differing(found, wanted) if k in found and k != "metrics.jsonl"]
    told = [line for line in lines if any(word in line for word in TOLD)]
    if differ:
        return "DIFFERS", f"{where}: {differ} {told}"
    return ("recovered", told[0]) if told else ("harmless", where)


def trials(root: Path, count: int, seed: int, kinds: tuple[Kind, ...]) -> Iterator[tuple[str, ...]]:
    """Yields (kind, outcome, word) of each flip."""
    starts = snapshots(root / "starts")
    wanted = run.digest_of(starts["evaluate"])
    for kind in kinds:
        rng = random.Random(f"{seed} {kind.name}")
        for i in range(count):
            if i % 8 == 7:  # programs of so many runs would fill the process
                jax.clear_caches()
            yield kind.name, *outcome(kind, starts[kind.after], wanted, root / "w", rng)


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Prints how many of each kind ended how; the exit code is 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="flips in each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", help="of this kind alone; may be repeated")
    args = parser.parse_args(argv)
    kinds = tuple(k for k in KINDS if not args.kind or k.name in args.kind)
    counts: dict[str, collections.Counter[str]] = {k.name: collections.Counter() for k in kinds}
    with tempfile.TemporaryDirectory() as root:
        for kind, ended, word in trials(Path(root), args.count, args.seed, kinds):
            counts[kind][ended] += 1
            if sum(counts[kind].values()) == args.count:
                say(f"{kind}: {dict(counts[kind])}")
            if ended.isupper():
                say(f"{ended}: {word}")
    columns = ("refused", "recovered", "harmless", *sorted({
        x for c in counts.values() for x in c if x.isupper()
    }))  # fmt: skip
    rows = [("flips in", "count", *columns)]
    rows += [(k, sum(c.values()), *[c[x] for x in columns]) for k, c in counts.items()]
    say(run.table(rows))
    return int(len(columns) > 3)


if __name__ == "__main__":
    raise SystemExit(main())
