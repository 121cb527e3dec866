"""The ``vbon`` command: a stage, a config file, a workdir.

vbon run --config=configs/reviews.py --workdir=runs/reviews --config.method.n=4
"""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags, logging
from ml_collections import config_flags

from vbon_jax import exits
from vbon_jax.errors import InputError
from vbon_jax.stages import COMMANDS, STAGES

if TYPE_CHECKING:
    from vbon_jax.config import Config


def _flags(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    """The flags of a command line and the words beside them; raises what absl raises."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Config file.", flag_values=values, sys_argv=["vbon", *argv]
    )
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "A prompt to generate from.", flag_values=values)
    flags.DEFINE_integer(
        "best_of", None, "Responses to choose from.", lower_bound=1, flag_values=values
    )
    for name in ("n", "kl", "reward"):
        flags.DEFINE_float(name, None, "Which policy of a family.", flag_values=values)
    flags.DEFINE_string("topology", None, "A TPU slice to plan for.", flag_values=values)
    flags.DEFINE_bool("stream", False, "Text as it is written.", flag_values=values)
    flags.DEFINE_bool("distributed", False, "One of several processes.", flag_values=values)
    flags.DEFINE_string("coordinator", None, "host:port of process 0.", flag_values=values)
    flags.DEFINE_integer(
        "num_processes", None, "Processes of the run.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer(
        "process_id", None, "This process, from 0.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_string("profile", None, "FIRST:LAST iterations to trace.", flag_values=values)
    flags.DEFINE_string("shard", None, "I/N: the share of a sweep to do.", flag_values=values)
    return values, values(["vbon", *argv])[1:]


def commands() -> dict[str, str]:
    """Every word that ``vbon`` takes, with its line of help."""
    of_stages = {name: stage.help for name, stage in STAGES.items()}
    return {"run": COMMANDS["run"], **of_stages, **COMMANDS}


def usage() -> str:
    """What ``vbon`` can do."""
    width = max(map(len, commands()))
    stages = "\n".join(f"  {name:<{width}}  {text}" for name, text in commands().items())
    return (
        "usage: vbon STAGE --config=FILE.py[:VARIANT] [--workdir=DIR] [--config.KEY=VALUE ...]\n\n"
        f"stages:\n{stages}\n\nflags:\n"
        "  --config         config file, such as configs/reviews.py or configs/reviews.py:text\n"
        "  --config.a.b=v   another value for one of its keys\n"
        "  --workdir        folder of the run (default: runs/<config>[-<variant>])\n"
        '  --prompt         a prompt for "generate"; may be repeated\n'
        '  --best_of=8      "generate" draws so many, prints the best and all candidates\n'
        '  --n=16           of a family of policies, the one to "export" or "generate" from\n'
        '  --kl=0.5, --reward=2.0  "export" the one of this KL to the reference, or mean reward\n'
        '  --stream         "generate" prints plain text as it is written\n'
        '  --topology=v5e:4x4  "plan" for a TPU slice, which need not be here\n'
        "  --profile=3:5    a JAX profiler trace of these iterations of training\n"
        '  --shard=0/4      "sweep" does the first of 4 shares of its units\n'
        "  --version        the version of vbon_jax, of JAX and of its devices\n"
        "  --distributed    one of the processes of a run, which JAX finds by itself under Slurm,\n"
        "                   Open MPI, on Cloud TPU and GKE; elsewhere say who they are:\n"
        "  --coordinator=HOST:PORT --num_processes=N --process_id=I\n\n"
        "exit codes: 0 done; 2 bad input, disk or memory full; 75 another process of the run was\n"
        "lost, start all again; 128 + the signal's number when stopped, saved first (a second\n"
        "signal stops at once)\n"
    )


def version() -> str:
    """The versions a report of a fault should name."""
    from importlib import metadata

    import jax

    return f"vbon_jax {metadata.version('vbon_jax')} (jax {jax.__version__}, {jax.devices()})"


@dataclasses.dataclass(frozen=True)
class Processes:
    """Those of a run of several, as far as flags say who they are; else JAX finds them."""

    coordinator: str | None
    count: int | None
    index: int | None


@dataclasses.dataclass(frozen=True)
class Command:
    """What a command line asks for."""

    stage: str
    config: "Config"
    workdir: str
    prompts: list[str]
    best_of: int | None
    stream: bool
    topology: str | None
    profile: tuple[int, int] | None
    processes: Processes | None
    shard: tuple[int, int]
    wanted: tuple[float | None, float | None, float | None]  # n, KL, reward


def parse(argv: Sequence[str]) -> Command:
    """Reads a command line.

    Raises InputError naming the stage, flag or config key that is wrong.
    """
    from vbon_jax import config as vbon_config  # imports jax, which --help should not wait for

    path = _config_name(argv).partition(":")[0]
    if path and not os.path.isfile(path):
        raise InputError(f"--config={path}: no such file")
    try:
        values, rest = _flags(argv)
        config = None if values.config is None else values.config.to_dict()
    except SyntaxError as error:
        raise InputError(f"--config: {error.filename}:{error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:  # a config file is a program: it may raise anything
        raise InputError(_flag_error(argv, error)) from error
    if not rest or rest[0] not in commands():
        named = repr(rest[0]) if rest else "not given"
        raise InputError(f"stage is {named}: choose one of {', '.join(commands())} (vbon --help)")
    if len(rest) > 1:
        raise InputError(f"{rest[1]!r} is neither a stage nor a flag: write --flag=value")
    if config is None:
        raise InputError("--config is not given: name a file, such as --config=configs/reviews.py")
    if values.profile is not None and rest[0] not in ("run", "train"):
        raise InputError(
            f"--profile={values.profile}: it traces training: use it with `vbon train` or `vbon "
            "run`"
        )
    if values.best_of is not None and rest[0] != "generate":
        raise InputError(f"--best_of={values.best_of}: use it with `vbon generate`")
    if values.topology is not None and rest[0] != "plan":
        raise InputError(f"--topology={values.topology}: use it with `vbon plan`")
    if values.shard is not None and rest[0] != "sweep":
        raise InputError(f"--shard={values.shard}: use it with `vbon sweep`")
    if values.stream and rest[0] != "generate":
        raise InputError("--stream: use it with `vbon generate`")
    if values.stream and values.best_of is not None:
        raise InputError(
            f"--stream --best_of={values.best_of}: which is the best is known when all are whole; "
            "leave out one of them"
        )
    parsed = vbon_config.parse(config)
    several = _processes(values)
    if several is not None and rest[0] in ("plan", "sweep"):
        raise InputError(
            f"--distributed, --coordinator: `vbon {rest[0]}` is of one process"
            + (": --shard=I/N shares a sweep's units out" if rest[0] == "sweep" else "")
        )
    return Command(
        rest[0],
        parsed,
        values.workdir or _default_workdir(argv),
        values.prompt,
        values.best_of,
        values.stream,
        values.topology,
        _profile(values.profile),
        several,
        _shard(values.shard),
        _wanted(rest[0], values, parsed),
    )


def _wanted(
    stage: str, values: flags.FlagValues, config: "Config"
) -> tuple[float | None, float | None, float | None]:
    """Which policy of a family is asked for: n, KL and reward, of which one is given at most."""
    given = {name: values[name].value for name in ("n", "kl", "reward")}
    asked = {name: value for name, value in given.items() if value is not None}
    for name, value in asked.items():
        allowed = ("export", "generate") if name == "n" else ("export",)
        if stage not in allowed:
            words = " or ".join(f"`vbon {word}`" for word in allowed)
            raise InputError(f"--{name}={value:g}: use it with {words}")
        if not config.method.is_family:
            raise InputError(
                f"--{name}={value:g}: method.n={config.method.n} is of one policy; train one for "
                "every n by two numbers, such as --config.method.n='(2, 64)'"
            )
    if len(asked) > 1:
        raise InputError(f"{' and '.join(f'--{name}' for name in asked)}: give one of them")
    if (n := asked.get("n")) is not None and not 1 <= n <= config.method.top:
        raise InputError(f"--n={n:g}: method.n={config.method.n} is trained for 1 to its second")
    return given["n"], given["kl"], given["reward"]


def _processes(values: flags.FlagValues) -> Processes | None:
    """What the flags say of a run of several processes; None for a run of one."""
    coordinator, num_processes = values.coordinator, values.num_processes
    process_id = values.process_id
    given = (coordinator, num_processes, process_id)
    if all(value is None for value in given):
        return Processes(None, None, None) if values.distributed else None
    if any(value is None for value in given):
        raise InputError("--coordinator, --num_processes and --process_id go together: give all")
    assert coordinator is not None and num_processes is not None and process_id is not None
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and 1 <= int(port) <= 65_535):
        raise InputError(
            f"--coordinator={coordinator}: write host:port, a port from 1 to 65535, such as "
            "--coordinator=10.0.0.1:8476"
        )
    if process_id >= num_processes:
        raise InputError(
            f"--process_id={process_id}: it must be below --num_processes={num_processes}"
        )
    return Processes(coordinator, num_processes, process_id)


def _profile(text: str | None) -> tuple[int, int] | None:
    """What ``--profile=FIRST:LAST`` says."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (first.isdecimal() and (last.isdecimal() or not colon)):
        raise InputError(f"--profile={text}: write FIRST:LAST, such as --profile=3:5")
    found = int(first), int(last if colon else first)
    if not 1 <= found[0] <= found[1]:
        raise InputError(f"--profile={text}: iterations are counted from 1, the first one first")
    return found


def _shard(text: str | None) -> tuple[int, int]:
    """What ``--shard=I/N`` says: which share, from 0, and of how many; the whole by default."""
    if text is None:
        return 0, 1
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not found:
        raise InputError(f"--shard={text}: write I/N, share I of N, such as --shard=0/4")
    i, count = int(found[1]), int(found[2])
    if i >= count:
        raise InputError(
            f"--shard={text}: of I/N, I counts from 0 to N-1, such as --shard=0/4 to --shard=3/4"
        )
    return i, count


def _config_name(argv: Sequence[str]) -> str:
    for i, word in enumerate(argv):
        if word.lstrip("-").startswith("config="):
            return word.split("=", 1)[1]
        if word.lstrip("-") == "config" and i + 1 < len(argv):
            return argv[i + 1]
    return ""


def _default_workdir(argv: Sequence[str]) -> str:
    path, _, variant = _config_name(argv).partition(":")
    name = os.path.splitext(os.path.basename(path))[0]
    return os.path.join("runs", f"{name}-{variant}" if variant else name)


def _flag_error(argv: Sequence[str], error: BaseException) -> str:
    """One line of what absl or ml_collections says in many."""
    if isinstance(error, KeyError | AttributeError):
        said = str(error.args[0] if error.args else error)
        first = re.search(r"\w+", said)  # the key, before a "Did you mean"
        name = first[0] if first else ""
        for word in argv:
            key = word.lstrip("-").partition("=")[0]
            if key.startswith("config.") and name in key.split("."):
                return _unknown_key(key.removeprefix("config."))
        misspelt = re.search(r'Key "([^"]+)" does not exist', said)
        if misspelt:
            return f"--config: {_unknown_key(misspelt[1])}"
    lines = [line.strip() for line in str(error.args[0] if error.args else error).splitlines()]
    # An error raised inside the config file comes wrapped in its traceback: its last line tells.
    text = lines[-1] if "Traceback" in " ".join(lines) else " ".join(filter(None, lines))
    known = isinstance(error, flags.Error)
    return f"command line: {text}" if known else f"--config: {type(error).__name__}: {text}"


def _unknown_key(name: str) -> str:
    """Says that there is no such config key, and which ones come near."""
    from vbon_jax.config import Config
    from vbon_jax.keys import rows

    known = {key: key.rpartition(".")[2] for key, _, _ in rows(Config)}
    if name in known:
        return f"config key {name} is not in the file: start it from vbon_jax.config.default()"
    leaves = difflib.get_close_matches(name.rpartition(".")[2], set(known.values()))
    near = [key for key, leaf in known.items() if leaf in leaves]
    meant = difflib.get_close_matches(name, near, cutoff=0.0)
    return f"unknown config key {name}" + (f": did you mean {' or '.join(meant)}?" if meant else "")


def execute(argv: Sequence[str]) -> None:
    """Parses and runs; raises what ``main`` turns into an exit code."""
    if argv and argv[0] == "bench":  # its options are its own
        from vbon_jax.bench import command as bench

        bench.main(argv[1:])
        return
    command = parse(argv)
    logging.set_verbosity(logging.FATAL)  # libraries' remarks would stand between our own lines
    config = command.config
    sweeps = command.stage == "sweep" or (command.stage == "run" and "sweep" in config.stages)
    from vbon_jax import processes, sharding  # after the flags: jax starts here
    from vbon_jax.stages import base, plan, sizes, workdir

    if command.processes is not None:
        of = command.processes
        processes.connect(of.coordinator, of.count, of.index)

    folder = workdir.Workdir(command.workdir, config, STAGES)
    if command.stage == "plan":
        plan.run(config, folder, command.topology)
        return
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    wanted = base.Wanted(*command.wanted)
    run = base.Run(config, folder, mesh, command.profile, command.shard, wanted)
    processes.refuse_apart(mesh)
    if sweeps and processes.count() > 1:
        raise InputError(
            "stage sweep: a run of several processes has none; leave it out of the config's "
            "stages and share its units out by `vbon sweep --shard=I/N`"
        )
    base.refuse_uneven(config, mesh)
    devices = plan.device_bytes(config) * mesh.size
    sizes.refuse_impossible(config, sizes.host_bytes(), devices)
    if command.stage == "generate":
        if not command.prompts:
            raise InputError('no --prompt: give at least one, --prompt="the film"')
        from vbon_jax.stages import generate

        if command.stream:
            generate.stream(run, command.prompts)
        else:
            generate.run(run, command.prompts, command.best_of)
        return
    with run.workdir.locked(wait=command.stage == "sweep"):  # its shares start all at once
        if command.stage == "run":
            base.perform_all(run, [STAGES[name] for name in config.stages])
        else:
            base.perform(run, STAGES[command.stage], again=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done; 2 bad input, told in one line; 128 + signal when stopped."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0] != "bench" and {"-h", "--help", "help"} & set(argv)):
        print(usage())
        return 0
    if "--version" in argv:
        print(version())
        return 0
    try:
        execute(argv)
    except BaseException as error:
        if exits.ending(error) is None:  # a fault of the program keeps its traceback
            raise
        return exits.report(error)
    return 0


if __name__ == "__main__":
    from vbon_jax.__main__ import entry

    entry()
