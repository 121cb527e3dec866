"""Tries bad command lines, config values, config files and input files.

    python -m tests.faults.bad_inputs [--only=WORD] [--limit=300]

Each must end with exit code 2, one line on standard error, the last, that begins with "vbon: ", no
traceback, and no question on standard input, within `--limit` seconds. Options: --only, cases whose
name holds the word; --limit, in seconds.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.faults import run

Make = Callable[[Path], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
      name: what it is.
      flags: of `vbon`; "@/" stands for the case's folder.
      stage: the command; "" for none.
      make: puts files into the folder.
      config: the config file, likewise; "" for that of the small run.
      workdir: the workdir, likewise.
    """

    name: str
    flags: tuple[str, ...] = ()
    stage: str = "run"
    make: Make = lambda folder: None
    config: str = ""
    workdir: str = "@/run"


def written(name: str, content: str | bytes) -> Make:
    """Makes a file."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def linked(name: str, to: str) -> Make:
    """Makes a file and a link to it."""

    def make(folder: Path) -> None:
        written(to, "precious")(folder)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(folder / to)

    return make


def tokenizer_with_code(folder: Path) -> None:
    """A tokenizer directory whose own Python code would be run after a "y"."""
    auto = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    written("evil.py", f"open({str(folder / 'ran')!r}, 'w')\n")(folder)
    written("tokenizer_config.json", json.dumps(auto))(folder)
    written("config.json", json.dumps({"model_type": "evil", **auto}))(folder)


def of_key(key: str, *values: str) -> list[Case]:
    """Cases of one config key."""
    return [Case(f"{key}={value}", (f"--config.{key}={value}",)) for value in values]


HUGE = "1000000000"
SEVERAL = ("--num_processes=2", "--process_id=0")
COMMANDS = [
    Case("unknown stage", stage="dance"),
    Case("no stage", stage=""),
    Case("two stages", ("sft",)),
    Case("unknown flag", ("--speed=3",)),
    Case("no such config", config="@/nowhere.py"),
    Case("profile of sample", ("--profile=1:2",), "sample"),
    Case("profile backwards", ("--profile=5:3",)),
    Case("generate without a prompt", (), "generate"),
    Case("two processes of a sweep", ("--coordinator=host:1", *SEVERAL), "sweep"),
    Case("coordinator without a port", ("--coordinator=host", *SEVERAL)),
    Case("coordinator port 70000", ("--coordinator=host:70000", *SEVERAL)),
    Case("coordinator alone", ("--coordinator=host:1",)),
    Case("num_processes=0", ("--num_processes=0",)),
]
VALUES = [
    *of_key("nn", "3"),
    *of_key("method.n", "abc", "0", "nan", "inf"),
    *of_key("method.name", "magic"),
    *of_key("sampling.temperature", "0", "-1", "nan"),
    *of_key("sampling.batch_size", "0", HUGE, "1.5"),
    *of_key("sampling.max_new_tokens", "0", HUGE),
    *of_key("samples.m", "0", HUGE),
    *of_key("evaluate.m", HUGE),
    *of_key("evaluate.temperatures", "()", "(0,)"),
    *of_key("train.batch_size", "33", HUGE),
    *of_key("train.iterations", "0", HUGE),
    *of_key("reference.model.layers", "0", HUGE),
    *of_key("reference.model.width", "15", HUGE, "100000"),
    *of_key("reference.model.positions", HUGE),
    *of_key("reference.fit.batch_size", HUGE),
    *of_key("prompts.train", "0", HUGE),
    *of_key("data.train", HUGE),
    *of_key("tokenizer.vocab_size", HUGE),
    *of_key("mesh.data", "99", "0"),
    *of_key("seed", "-1", "99999999999"),
    *of_key("stages", "('dance',)", "()"),
]
CONFIGS = [
    Case(f"config: {name}", make=written("c.py", text), config="@/c.py")
    for name, text in (
        ("no Python", "def get_config(:\n"),
        ("raises", "def get_config():\n    raise ValueError('no luck')\n"),
        ("exits", "import sys\ndef get_config():\n    sys.exit(3)\n"),
        ("without get_config", "x = 1\n"),
        ("returns a number", "def get_config():\n    return 3\n"),
        ("import fails", "import nowhere_to_be_found\n"),
        ("bytes", "\0\1\2"),
    )
]
WORKDIRS = [
    Case("workdir is a file", make=written("run", "x")),
    Case("workdir below a file", make=written("f", "x"), workdir="@/f/run"),
    Case("workdir that cannot be", workdir="/proc/nowhere/run"),
    Case("workdir with [", workdir="@/run[1]"),
    Case("workdir with *", workdir="@/run*"),
    Case("workdir with ?", workdir="@/run?"),
    Case("lock is a link", make=linked("run/.lock", "precious")),
    Case("lock is a folder", make=written("run/.lock/x", "")),
    *(Case(f"{stage} without its input", stage=stage) for stage in ("train", "export", "sample")),
]
FILES = [
    Case(f"{key}: {name}", (f"--config.{key}=@/f",), make=make)
    for key in ("data.path", "samples.path")
    for name, make in (
        ("missing", lambda folder: None),
        ("empty", written("f", "")),
        ("folder", written("f/x", "")),
        ("bytes", written("f", bytes(range(256)))),
        ("no JSON", written("f", "{'a': 1}\n")),
        ("a list", written("f", "[1, 2]\n")),
        ("other keys", written("f", '{"a": 1}\n')),
        ("numbers", written("f", '{"text": 1, "label": 1, "prompt": 2, "responses": 3}\n')),
    )
] + [
    Case(f"{key}: {name}", (f"--config.{key}=@/m",), make=make)
    for key in ("reference.path", "tokenizer.path")
    for name, make in (
        ("missing", lambda folder: None),
        ("empty folder", written("m/x", "")),
        ("file", written("m", "")),
        ("no JSON", written("m/config.json", "{")),
        ("unknown model", written("m/config.json", '{"model_type": "evil"}')),
    )
]
FILES.append(Case("tokenizer with code", ("--config.tokenizer.path=@/",), make=tokenizer_with_code))


def rewards(name: str, body: str) -> Case:
    """A reward function that goes wrong, in the folder that is on PYTHONPATH."""
    text = f"import sys\ndef reward(prompts, responses):\n    {body}\n"
    module = f"bad_reward_{name.replace(' ', '_')}"
    flags = (f"--config.reward.function={module}:reward",)
    return Case(f"reward: {name}", flags, make=written(f"{module}.py", text))


REWARDS = [
    *of_key("reward.function", "nowhere", "nowhere:x", "json:nothing", ":"),
    rewards("raises", "raise KeyError('x')"),
    rewards("exits", "sys.exit(0)"),
    rewards("too few", "return [0.0]"),
    rewards("NaN", "return [float('nan')] * len(responses)"),
    rewards("words", "return ['good'] * len(responses)"),
    rewards("None", "return None"),
    rewards("out of memory", "raise MemoryError"),
]
CASES = [*COMMANDS, *VALUES, *CONFIGS, *WORKDIRS, *FILES, *REWARDS]


def arguments(case: Case, folder: Path) -> list[str]:
    """The arguments of `vbon` for a case, its files made."""
    case.make(folder)
    config = case.config or str(run.ROOT / "configs" / "tabular.py:ppo")
    words = [case.stage] if case.stage else []
    words += [f"--config={config}", f"--workdir={case.workdir}"]
    words += [] if case.config else [*run.SMALL]
    return [word.replace("@/", f"{folder}/") for word in (*words, *case.flags)]


def faults_of(code: int, lines: list[str]) -> list[str]:
    """What is wrong with how a bad input was answered."""
    wrong = [] if code == 2 else [f"code {code}"]
    wrong += ["traceback"] if any("Traceback" in line for line in lines) else []
    said = [line for line in lines if line.startswith("vbon: ")]
    wrong += [] if len(said) == 1 and lines[-1] == said[0] else [f"{len(said)} lines"]
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Prints a row a case; returns the number of cases that went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--limit", type=float, default=300.0)
    options = parser.parse_args(argv)
    chosen = [case for case in CASES if options.only in case.name]
    rows = [("input", "exit", "seconds", "wrong", "last line")]
    with tempfile.TemporaryDirectory(prefix="faults-inputs-") as place:
        for i, case in enumerate(chosen):
            folder = Path(place, str(i))
            folder.mkdir()
            argv = [sys.executable, "-m", "vbon_jax", *arguments(case, folder)]
            ended = run.done(argv, timeout=options.limit, path=folder)
            wrong = faults_of(ended.code, ended.lines)
            wrong += ["its code ran"] if (folder / "ran").exists() else []
            last = ended.last.replace(str(folder), "@")[:120]
            rows.append(
                (case.name, ended.code, f"{ended.seconds:.1f}", "; ".join(wrong) or "-", last)
            )
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    bad = sum(row[3] != "-" for row in rows[1:])
    print(run.table(rows))
    print(f"{len(chosen)} inputs, {bad} answered wrongly")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(), 1))
