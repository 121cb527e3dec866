"""The ``vbon`` command: a stage, a config file, a workdir.

vbon run --config=configs/reviews.py --workdir=runs/reviews --config.method.n=4
"""

import os
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_dict, config_flags

from vbon_jax import settings as st
from vbon_jax.errors import InputError

COMMANDS = {
    "run": "every stage the config lists, in order; what is complete is skipped",
    "sft": "tokenizer and reference model",
    "reward": "reward model",
    "sample": "prompts and scored reference samples",
    "train": "PPO on the objective",
    "export": "the trained policy as a Hugging Face directory",
    "evaluate": "reference, best-of-n and policy on held-out prompts: table and figures",
    "generate": "responses to --prompt on standard output",
}

_FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file: configs/x.py or configs/x.py:variant.", flag_values=_FLAGS
)
flags.DEFINE_string(
    "workdir", None, "Folder of the run. Default: runs/<name of the config>.", flag_values=_FLAGS
)
flags.DEFINE_multi_string(
    "prompt", [], "A prompt for `vbon generate`; may be repeated.", flag_values=_FLAGS
)
flags.DEFINE_string(
    "coordinator", None,
    "host:port of process 0, for a run of several hosts (jax.distributed.initialize).",
    flag_values=_FLAGS,
)  # fmt: skip
flags.DEFINE_integer(
    "num_processes", None, "Number of processes of the run.", lower_bound=1, flag_values=_FLAGS
)
flags.DEFINE_integer(
    "process_id", None, "This process's number, from 0.", lower_bound=0, flag_values=_FLAGS
)
flags.DEFINE_bool("help", False, "Shows this text.", short_name="h", flag_values=_FLAGS)


def usage() -> str:
    """What ``vbon`` can do."""
    width = max(map(len, COMMANDS))
    stages = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "usage: vbon STAGE --config=FILE.py[:VARIANT] [--workdir=DIR] [--config.KEY=VALUE ...]\n\n"
        f"stages:\n{stages}\n\nflags:\n"
        "  --config         config file, such as configs/reviews.py or configs/reviews.py:text\n"
        "  --config.a.b=v   another value for one of its keys\n"
        "  --workdir        folder of the run (default: runs/<config>[-<variant>])\n"
        '  --prompt         a prompt for "generate"; may be repeated\n'
        "  --coordinator --num_processes --process_id\n"
        "                   of a run on several hosts, as jax.distributed.initialize takes them\n"
    )


def parse(argv: Sequence[str]) -> tuple[str, st.Settings, str]:
    """(stage, settings, workdir) of a command line.

    Raises InputError naming the stage, flag or config key that is wrong.
    """
    try:
        rest = _FLAGS(["vbon", *argv])[1:]
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        raise InputError(_flag_error(argv, error)) from error
    except SyntaxError as error:
        raise InputError(f"--config: {error.filename}:{error.lineno}: {error.msg}") from error
    if not rest or rest[0] not in COMMANDS:
        named = repr(rest[0]) if rest else "nothing"
        raise InputError(f"stage is {named}: choose one of {', '.join(COMMANDS)} (vbon --help)")
    if len(rest) > 1:
        raise InputError(f"{rest[1]!r} is neither a stage nor a flag: write --flag=value")
    if _FLAGS.config is None:
        raise InputError("--config is not given: name a file, such as --config=configs/reviews.py")
    config: config_dict.ConfigDict = _FLAGS.config
    workdir = _FLAGS.workdir or _default_workdir(argv)
    return rest[0], st.parse(config.to_dict()), workdir


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


def _flag_error(argv: Sequence[str], error: Exception) -> str:
    path = _config_name(argv).partition(":")[0]
    if path and not os.path.exists(path):
        return f"--config={path}: no such file"
    text = " ".join(str(error.args[0] if error.args else error).split())
    return f"command line: {text}"


def _distributed() -> None:
    given = [_FLAGS.coordinator, _FLAGS.num_processes, _FLAGS.process_id]
    if all(value is None for value in given):
        return
    if any(value is None for value in given):
        raise InputError("--coordinator, --num_processes and --process_id go together: give all")
    import jax

    jax.distributed.initialize(_FLAGS.coordinator, _FLAGS.num_processes, _FLAGS.process_id)


def execute(argv: Sequence[str]) -> None:
    """Parses and runs; raises what ``main`` turns into an exit code."""
    stage, settings, root = parse(argv)
    _distributed()
    from vbon_jax import inputs, sharding, stages, workdir  # after the flags: jax starts here

    mesh = settings.mesh
    run = inputs.Run(
        settings,
        workdir.Workdir(root),
        sharding.make_mesh(mesh.data, mesh.fsdp, mesh.tensor),
    )
    run.workdir.write_json(run.workdir.root / "config.json", st.as_dict(settings))
    if stage == "generate":
        if not _FLAGS.prompt:
            raise InputError('no --prompt: give at least one, --prompt="the film"')
        stages.generate(run, _FLAGS.prompt)
    elif stage == "run":
        for name in settings.stages:
            stages.perform(run, name, again=False)
    else:
        stages.perform(run, stage, again=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done; 2 bad input, told in one line; 128 + signal when stopped."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or {"-h", "--help", "help"} & set(argv):
        print(usage())
        return 0
    from vbon_jax.progress import Stopped

    try:
        execute(argv)
    except (InputError, *_checkpoint_errors()) as error:
        print(f"vbon: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        print(f"vbon: {error}", file=sys.stderr)
        return 128 + error.signum
    except KeyboardInterrupt:
        print("vbon: interrupted; the same command goes on from what is saved", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        print(f"vbon: {error.filename or 'disk'}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _checkpoint_errors() -> tuple[type[Exception], ...]:
    from vbon_jax.models.hf import CheckpointError

    return (CheckpointError,)


if __name__ == "__main__":
    sys.exit(main())
