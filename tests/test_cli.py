"""The command line's own words; what the stages do is in test_stages.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vbon_jax import cli
from vbon_jax.errors import InputError

ROOT = Path(__file__).parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'tabular.py'}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dance", CONFIG], "stage is 'dance': choose one of run, sft"),
        ([CONFIG], "stage is not given"),
        (["run"], "--config is not given"),
        (["run", "--config=configs/nowhere.py"], "--config=configs/nowhere.py: no such file"),
        (["run", CONFIG, "--config.method.nn=3"], "unknown config key method.nn"),
        (["run", CONFIG, "--config.method.n=abc"], "config.method.n=abc"),
        (["run", CONFIG, "--config.method.n=0"], "method.n=0.0: must be at least 1"),
        (["run", CONFIG, "--speed=3"], "speed"),
        (["run", "sft", CONFIG], "'sft' is neither a stage nor a flag"),
        (["run", CONFIG, "--num_processes=2"], "go together"),
        (["run", CONFIG, "--config.mesh.data=99"], "needs 99 devices"),
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
    assert cli.parse(["run", CONFIG]).workdir == "runs/tabular"
    text = cli.parse(["run", f"--config={ROOT / 'configs' / 'reviews.py'}:text"])
    assert text.workdir == "runs/reviews-text"
    assert text.settings.tokenizer.vocab_size == 4096


def test_overrides_reach_the_settings():
    command = cli.parse(
        ["train", CONFIG, "--config.method.n=3.5", "--config.evaluate.temperatures=(0.5,1)"]
    )
    assert command.settings.method.n == 3.5
    assert command.settings.evaluate.temperatures == (0.5, 1.0)


def test_a_workdir_that_cannot_be_made(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert cli.main(["run", CONFIG, f"--workdir={tmp_path / 'file' / 'w'}"]) == 2
    assert "cannot be made" in capfd.readouterr().err


@pytest.mark.parametrize("stage", ["sweep", "run"])
def test_a_sweep_takes_no_coordinator(stage, capfd):
    flags = ["--coordinator=host:1", "--num_processes=2", "--process_id=0"]
    config = str(ROOT / "configs" / "reviews_sweep.py")
    assert cli.main([stage, f"--config={config}", *flags]) == 2
    assert "start the same command on each host without it" in capfd.readouterr().err


def test_help_names_every_stage(capfd):
    assert cli.main(["--help"]) == 0
    out = capfd.readouterr().out
    assert all(f"  {name}" in out for name in cli.COMMANDS)


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
