"""The command line's own words; what the stages do is in test_stages.py."""

import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import pytest

from vbon_jax import cli, exits
from vbon_jax.errors import InputError
from vbon_jax.signals import Interrupted, Stopped

ROOT = Path(__file__).parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'tabular.py'}:ppo"
FAMILY = ("--config.method.n=(2, 64)", "--config.lora.rank=4")


def several(coordinator, processes, process):
    return (
        f"--coordinator={coordinator}", f"--num_processes={processes}", f"--process_id={process}"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dance", CONFIG], "stage is 'dance': choose one of run, sft"),
        ([CONFIG], "stage is not given"),
        (["run"], "--config is not given"),
        (["run", "--config=configs/nowhere.py"], "--config=configs/nowhere.py: no such file"),
        (["run", CONFIG, "--config.method.nn=3"], "unknown config key method.nn"),
        (["run", CONFIG, "--config.method.n=abc"], "method.n='abc': must be a number, or two"),
        (["run", CONFIG, "--config.method.n=0"], "method.n=0.0: must be at least 1"),
        (["run", CONFIG, "--speed=3"], "speed"),
        (["run", "sft", CONFIG], "'sft' is neither a stage nor a flag"),
        (["run", CONFIG, "--num_processes=2"], "go together"),
        (["sweep", CONFIG, *several("host:1", 2, 1)], "is of one process: --shard=I/N shares"),
        (["plan", CONFIG, "--distributed"], "`vbon plan` is of one process"),
        (["run", CONFIG, *several("host", 2, 0)], "--coordinator=host: write host:port"),
        (["run", CONFIG, *several("host:0", 2, 0)], "--coordinator=host:0: write host:port"),
        (["run", CONFIG, *several("host:99999", 2, 0)], "a port from 1 to 65535"),
        (["run", CONFIG, *several(":80", 1, 0)], "--coordinator=:80: write host:port"),
        (["run", CONFIG, *several("host:1", 2, 2)], "--process_id=2: it must be below"),
        (["run", CONFIG, "--config.sampling.batch_size=1000000000"], "at most 4000000"),
        (["run", CONFIG, "--config.reference.model.layers=1000000000"], "at most 1000"),
        (
            [
                "run",
                CONFIG,
                "--config.reference.model.layers=1000",
                "--config.reference.model.width=100000",
            ],
            "reference.model.layers=1000 x reference.model.width=100000 needs at least",
        ),
        (
            ["run", CONFIG, "--config.samples.m=1000000000"],
            "samples.m=1000000000: must be at most 4000000; `vbon plan` tells what a run needs",
        ),
        (["run", CONFIG, "--config.mesh.data=99"], "needs 99 devices"),
        (["run", CONFIG, "--profile=abc"], "--profile=abc: write FIRST:LAST"),
        (["run", CONFIG, "--profile=3:"], "--profile=3:: write FIRST:LAST"),
        (["run", CONFIG, "--profile=:5"], "--profile=:5: write FIRST:LAST"),
        (["run", CONFIG, "--profile=-1:5"], "--profile=-1:5: write FIRST:LAST"),
        (["run", CONFIG, "--profile=0:5"], "--profile=0:5: iterations are counted from 1"),
        (["run", CONFIG, "--profile=5:3"], "--profile=5:3: iterations are counted from 1"),
        (["sample", CONFIG, "--profile=3:5"], "--profile=3:5: it traces training: use it with"),
        (["run", CONFIG, "--shard=0/2"], "--shard=0/2: use it with `vbon sweep`"),
        (["report", CONFIG, "--shard=0/2"], "--shard=0/2: use it with `vbon sweep`"),
        (
            ["export", CONFIG, "--n=4"],
            "--n=4: method.n=8.0 is of one policy; train one for",
        ),
        (
            ["train", CONFIG, *FAMILY, "--n=4"],
            "--n=4: use it with `vbon export` or `vbon gen",
        ),
        (["generate", CONFIG, *FAMILY, "--kl=0.5"], "--kl=0.5: use it with `vbon export`"),
        (["export", CONFIG, *FAMILY, "--n=4", "--kl=1"], "--n and --kl: give one of them"),
        (["export", CONFIG, *FAMILY, "--n=65"], "--n=65: method.n=(2.0, 64.0) is trained for 1 to"),
        (["export", CONFIG, *FAMILY, "--n=0.9"], "--n=0.9: method.n=(2.0, 64.0) is trained for 1"),
        *(
            (["sweep", CONFIG, f"--shard={text}"], f"--shard={text}: write I/N")
            for text in ("", "0", "/4", "0/", "a/4", "-1/4", "0/4/2", " 0/4", "1.0/4", "\u0661/4")
        ),
        *(
            (["sweep", CONFIG, f"--shard={text}"], f"--shard={text}: of I/N, I counts from 0")
            for text in ("4/4", "7/4", "0/0")
        ),
    ],
)
def test_bad_command_lines(argv, message, capfd, tmp_path):
    assert cli.main([*argv, f"--workdir={tmp_path}"]) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("vbon: ") and message in error and "\n" not in error


def test_a_config_with_a_mistake_in_it_is_named(tmp_path, capfd):
    path = tmp_path / "mine.py"
    path.write_text("def get_config(:\n")
    assert cli.main(["run", f"--config={path}"]) == 2
    assert "mine.py" in capfd.readouterr().err
    path.write_text("def get_config():\n    raise ValueError('no luck')\n")
    assert cli.main(["run", f"--config={path}"]) == 2
    assert "no luck" in capfd.readouterr().err


def test_an_unknown_variant_is_named():
    with pytest.raises(InputError, match="no variant 'poem'"):
        cli.parse(["run", f"--config={ROOT / 'configs' / 'reviews.py'}:poem"])


def test_default_workdir_is_named_after_the_config():
    assert cli.parse(["run", CONFIG.removesuffix(":ppo")]).workdir == "runs/tabular"
    text = cli.parse(["run", f"--config={ROOT / 'configs' / 'reviews.py'}:text"])
    assert text.workdir == "runs/reviews-text"
    assert text.config.tokenizer.vocab_size == 4096


def test_overrides_reach_the_config():
    command = cli.parse(
        ["train", CONFIG, "--config.method.n=3.5", "--config.evaluate.temperatures=(0.5,1)"]
    )
    assert command.config.method.n == 3.5
    assert command.config.evaluate.temperatures == (0.5, 1.0)


def test_a_workdir_that_cannot_be_made(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert cli.main(["run", CONFIG, f"--workdir={tmp_path / 'file' / 'w'}"]) == 2
    assert "cannot be made" in capfd.readouterr().err


def test_profile_names_the_first_and_the_last_iteration():
    assert cli.parse(["train", CONFIG, "--profile=3:5"]).profile == (3, 5)
    assert cli.parse(["run", CONFIG, "--profile=7"]).profile == (7, 7)
    assert cli.parse(["train", CONFIG]).profile is None


def test_shard_names_the_share_and_how_many_there_are():
    assert cli.parse(["sweep", CONFIG, "--shard=0/4"]).shard == (0, 4)
    assert cli.parse(["sweep", CONFIG, "--shard=10/12"]).shard == (10, 12)
    assert cli.parse(["sweep", CONFIG]).shard == cli.parse(["run", CONFIG]).shard == (0, 1)


def test_help_names_every_stage(capfd):
    assert cli.main(["--help"]) == 0
    out = capfd.readouterr().out
    assert all(f"  {name}" in out for name in cli.commands())
    assert {"run", "sft", "train", "report", "plan", "generate", "bench"} <= cli.commands().keys()
    assert all(flag in out for flag in ("--workdir", "--profile=3:5", "--shard=0/4", "--version"))


def test_version_names_what_a_report_of_a_fault_needs(capfd):
    for argv in (["--version"], ["run", CONFIG, "--version"]):
        assert cli.main(argv) == 0
        out = capfd.readouterr().out
        assert out.startswith(f"vbon_jax {metadata.version('vbon_jax')} (jax {jax.__version__}, ")
        assert "CpuDevice" in out and out.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (InputError("samples.m=0: must be at least 1"), 2, "vbon: samples.m=0: must be at least 1"),
        (PermissionError(13, "Permission denied", "/w/x"), 2, "vbon: /w/x: Permission denied"),
        (OSError(28, "No space left on device"), 2, "vbon: disk: No space left on device ("),
        (OSError(5, "Input/output error", "/w/x"), 2, "vbon: /w/x: Input/output error"),
        (MemoryError(), 2, "vbon: out of memory (MemoryError: "),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."),
            2,
            "vbon: out of memory (JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 8",
        ),
        (Interrupted(signal.SIGTERM), 143, "vbon: stopped by SIGTERM; the same command goes on"),
        (Stopped(signal.SIGTERM, "it is saved"), 143, "vbon: stopped by SIGTERM: it is saved"),
        (Stopped(signal.SIGINT, "it is saved"), 130, "vbon: stopped by SIGINT: it is saved"),
        (KeyboardInterrupt(), 130, "vbon: stopped by SIGINT; the same command goes on"),
    ],
)
def test_exit_codes_are_those_of_the_help(error, code, said, monkeypatch, capfd):
    def execute(argv):
        if error is not None:
            raise error

    assert "exit codes: 0 done; 2 bad input, disk or memory full; 75 another process" in cli.usage()
    monkeypatch.setattr(cli, "execute", execute)
    assert cli.main(["run", CONFIG]) == code
    assert capfd.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), True),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: of the program"), False),
        (ValueError("shapes differ"), False),
        (KeyError("UNKNOWN: "), False),
    ],
)
def test_what_a_lost_process_leaves_behind_is_a_call_to_start_again(error, ends, monkeypatch):
    """In a run of several processes alone: in one it is a fault like any other."""
    assert exits.ending(error) is None
    monkeypatch.setattr(exits, "_on_abort", object())
    found = exits.ending(error)
    assert (found is not None and found[0] == 75) == ends
    if found is not None:
        assert "another process of the run was lost: start all of them again" in found[1]


def test_a_fault_of_the_program_is_not_bad_input(monkeypatch):
    """It keeps its traceback, and Python exits with 1."""
    monkeypatch.setattr(cli, "execute", lambda argv: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", CONFIG])


def test_a_reader_that_goes_away_is_no_error():
    """``vbon generate ... | head -1``: 128 + SIGPIPE, and nothing on standard error."""
    code = (
        "import sys; from vbon_jax import cli\n"
        "def execute(argv):\n"
        "    while True:\n"
        "        print('x' * 999, flush=True)\n"
        "cli.execute = execute; sys.exit(cli.main(['run']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_the_installed_command_answers_quickly():
    """``vbon --help`` imports neither jax nor transformers."""
    code = "import sys; from vbon_jax import cli; cli.main(['--help']); print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert not {"jax", "transformers", "tensorflow_datasets"} & set(out.split())


def test_local_launcher_uses_every_device(tmp_path):
    """launch/local.sh runs a stage with mesh.data=-1 on this host's (fake) devices."""
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    done = subprocess.run(
        ["bash", ROOT / "launch" / "local.sh", "sft", CONFIG, f"--workdir={tmp_path}",
         "--config.data.train=300", "--config.reference.fit.epochs=1",
         "--config.reference.model.layers=1"],
        capture_output=True, text=True, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "model.safetensors").exists()
    assert '"data": -1' in (tmp_path / "config.json").read_text()
