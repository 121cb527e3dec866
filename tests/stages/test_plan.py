"""What ``vbon plan`` prints."""

import json
import os
import re
import subprocess
import sys

import jax
import pytest

from tests.stages import plans
from tests.stages.plans import ROOT, command, config
from vbon_jax import cli
from vbon_jax.stages import plan
from vbon_jax.stages.need import Need
from vbon_jax.stages.plan import GIB


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return plans.make_models(tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Need({"a": GIB}, {"rollout": GIB // 2}, GIB, 0, {}, {}),
         "fits: 1.50 of 2.00 GiB a device"),
        (Need({"a": GIB, "trained": 2 * GIB}, {"x": 1}, 1, 0, {}, {}),
         "what is held alone (trained most)"),
        (Need({"a": GIB}, {"rollout": 1, "update": 2 * GIB}, 1, 0, {}, {}),
         "does not fit: 3.00 GiB a device are needed and there are 2.00; the phase 'update' is too "
         "large: set memory.remat=full"),
        (Need({"a": GIB}, {"rollout": 2 * GIB}, 1, 0, {}, {}),
         "'rollout' is too large: lower train.batch"),
        (Need({"a": 1}, {"score by reward": 2 * GIB}, 1, 0, {}, {}), "lower reward.max_tokens"),
        (Need({"a": GIB}, {"update": 1}, 3 * GIB, 0, {}, {}),
         "3.00 GiB a device are needed and there are 2.00; stage 'sample' is too large: lower "
         "sampling.batch_size"),
    ],
)  # fmt: skip
def test_the_verdict_says_what_is_too_large(found, words):
    text = plan.verdict(found, 2 * GIB)
    assert words in text and "\n" not in text


def test_what_a_device_has(root):
    assert plan.device_bytes(config(root, "memory.device_gib=1.5")) == 3 * GIB // 2
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert plan.device_bytes(config(root, "memory.device_gib=0")) == here // jax.device_count()


def test_the_command_prints_tables_and_a_verdict(root, tmp_path, capfd):
    assert cli.main([*command(root), f"--workdir={tmp_path / 'w'}"]) == 0
    out = capfd.readouterr().out
    for words in ("held by each device (data 1 x fsdp 1 x tensor 1)", "optimizer", "update",
                  "keys and values", "stage train", "operations of each device",
                  "fits: 0.00 of 1.00 GiB"):  # fmt: skip
        assert words in out
    assert not (tmp_path / "w").exists()


def test_a_mesh_larger_than_the_machine(root):
    """In a process that sees one device."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "vbon_jax.cli", *command(root, "mesh.fsdp=4", "mesh.tensor=2")],
        capture_output=True, text=True, env=env, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "held by each device (data 1 x fsdp 4 x tensor 2)" in done.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("reference.path=/no/such/place",), "/no/such/place"),
        (("reference.path={root}/encoder",), "no causal language model"),
        (("train.num_layers_unfrozen=9",), "num_layers_unfrozen is 9"),
        (("lora.rank=2", "lora.targets=('gate',)"), "LoRA target 'gate'"),
        (("reward.function=", "reward.path={root}/encoder", "train.value_network=reward"),
         "is an encoder"),
        (("train.batch_size=6", "train.minibatch_size=6", "mesh.fsdp=4"), "does not divide"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_a_line(root, capfd, flags, words):
    (root / "encoder").mkdir(exist_ok=True)
    (root / "encoder" / "config.json").write_text(
        json.dumps({"model_type": "bert", "vocab_size": 512, "hidden_size": 32, "id2label":
                    {"0": "a", "1": "b"}, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "intermediate_size": 64, "max_position_embeddings": 64})
    )  # fmt: skip
    assert cli.main(command(root, *flags)) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("vbon: ") and words in error and "\n" not in error


def test_a_slice_that_is_not_here_is_planned_by_its_own_compiler(root, tmp_path, capfd):
    """Of more devices than this machine has; what each sends is told as well."""
    flags = ["mesh.data=2", "mesh.fsdp=4", "mesh.tensor=2", "samples.path=", "memory.device_gib=0"]
    line = command(root, *flags)
    assert cli.main([*line, f"--workdir={tmp_path}", "--topology=v5e:4x4"]) == 0
    out, err = capfd.readouterr()
    assert "data 2 x fsdp 4 x tensor 2" in out and "16,384 MiB a device" in out
    assert "sent by each device" in out and re.search(r"update +│ +[0-9.]+", out)
    assert re.search(r"fits: 0.0\d of 16.00 GiB a device", out)
    assert re.search(r"plan: compiled for 16 devices in \d+ s", out + err)
    for wrong, words in (
        ("v5e:3x5", "--topology=v5e:3x5: libtpu says"), ("tpu", "write version and shape, such as"),
    ):  # fmt: skip
        assert cli.main([*line, f"--workdir={tmp_path}", f"--topology={wrong}"]) == 2
        assert words in capfd.readouterr().err
    assert cli.main(["run", *line[1:], "--topology=v5e:4x4"]) == 2
    assert "--topology=v5e:4x4: use it with `vbon plan`" in capfd.readouterr().err
