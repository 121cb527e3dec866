"""The memory that ``vbon plan`` predicts for stage ``train``, against the measured peak.

Random models in a temporary directory are trained for two iterations under each of ``SETTINGS`` on
CPU, in processes of their own. Linux only: it reads /proc.

Measured is the peak of resident memory during the stage, less what was resident before it. The
stage is run once before in the same process. So what libraries, compiled programs and the compiler
itself keep (0.2 to 0.4 GB, whatever the model) is resident by then, programs come from JAX's
compilation cache, and what is measured is arrays and temporaries, like a GPU's
``peak_bytes_in_use``. The allocator is told to return freed memory at once.
"""

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vbon_jax import cli, sharding
from vbon_jax.bench import load
from vbon_jax.bench.machine import Row
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.models import decoder, heads, hf
from vbon_jax.models.config import DecoderConfig
from vbon_jax.stages import STAGES, base
from vbon_jax.stages.need import need
from vbon_jax.stages.workdir import Workdir
from vbon_jax.training import loop
from vbon_jax.training.checkpoint import Checkpointer

CONFIG = "configs/reviews.py"
# GPT-2's vocabulary; an iteration takes seconds on two cores.
POLICY = DecoderConfig(
    vocab_size=50_257, positions=256, layers=6, width=768, heads=12, mlp_width=3_072
)
REWARD = DecoderConfig(
    vocab_size=50_257, positions=256, layers=4, width=512, heads=8, mlp_width=2_048
)
PROMPTS, SAMPLES = 64, 4
LABELS = ("NEGATIVE", "POSITIVE")
BASE = (
    f"samples.m={SAMPLES}", "train.iterations=2", "train.checkpoint_every=2", "train.batch_size=32",
    "train.minibatch_size=16", "train.ppo_epochs=1", "train.penalty=sampled", "memory.chunk=1024",
    "sampling.max_new_tokens=56", "reward.function=vbon_jax.bench.plan:zero",
)  # fmt: skip
CLASSIFIER = ("reward.function=", "reward.path={root}/reward")


class Setting(NamedTuple):
    """A configuration to be compared.

    Attributes:
      flags: config keys and values, "train.penalty=full", applied after ``BASE``; {root} stands for
        the directory of the models.
      devices: number of CPU devices to emulate; they share the process's memory.
    """

    flags: tuple[str, ...]
    devices: int = 1


SETTINGS = {
    "all trained": Setting(()),
    "2 layers, full KL": Setting(("train.num_layers_unfrozen=2", "train.penalty=full")),
    "LoRA, frozen bfloat16": Setting(
        ("lora.rank=8", "memory.frozen_dtype=bfloat16", "memory.remat=none", *CLASSIFIER)
    ),
    "remat full, 4 microbatches": Setting(
        ("memory.remat=full", "memory.accumulate=4", "memory.chunk=64")
    ),
    "value network": Setting(
        ("train.value_network=reward", "memory.optimizer_dtype=bfloat16", *CLASSIFIER)
    ),
    "2 devices (fsdp)": Setting(("mesh.fsdp=2",), devices=2),
    "dpo": Setting(
        ("method.name=dpo", "offline.responses=4", "offline.pairs=1", "offline.epochs=1",
         "offline.batch_size=16", "sampling.batch_size=32")
    ),
}  # fmt: skip


def zero(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A reward that takes no memory, and is that of the random classifier, whose head is zero.

    Args:
      prompts: not used.
      responses: texts.

    Returns:
      A zero per response.
    """
    del prompts
    return [0.0 for _ in responses]


def make_models(root: Path, policy: DecoderConfig = POLICY, reward: DecoderConfig = REWARD) -> None:
    """Writes random models with a small tokenizer, prompts and samples.

    Args:
      root: an existing directory. Afterwards it has the models ``policy`` and ``reward``,
        ``prompts.jsonl`` and ``samples.jsonl``.
      policy: configuration of the policy.
      reward: configuration of the reward model.
    """
    texts = [f"the {word} film of number {i}" for word in ("good", "bad") for i in range(200)]
    tokenizer = tokenizers.build(texts, "bpe", 400)
    load.random_checkpoint(root / "policy", policy)
    body = jax.jit(decoder.init, static_argnums=0)(reward, jax.random.key(0))
    score = jax.tree.map(jnp.zeros_like, heads.init_score(reward, len(LABELS), jax.random.key(1)))
    hf.save_classifier(
        root / "reward", reward, {"decoder": body, "score": score}, LABELS,
        ids=hf.TokenIds(0, 0, 1),
    )  # fmt: skip
    for name in ("policy", "reward"):
        tokenizers.save(tokenizer, root / name)
    prompts = [{"prompt": text} for text in texts[:PROMPTS]]
    samples = [
        line | {"responses": ["a film"] * SAMPLES, "rewards": [0.0] * SAMPLES} for line in prompts
    ]
    for name, lines in (("prompts", prompts), ("samples", samples)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def flags(root: Path, setting: Setting, config: str = CONFIG) -> list[str]:
    """Makes the flags of ``vbon`` for a setting.

    Args:
      root: where `make_models` wrote the models.
      setting: what differs from ``BASE``.
      config: config file that gives all keys not set here.

    Returns:
      --config and a flag per key.
    """
    paths = (
        "reference.path={root}/policy", "prompts.path={root}/prompts.jsonl",
        "prompts.test_path={root}/prompts.jsonl", "samples.path={root}/samples.jsonl",
    )  # fmt: skip
    given = (flag.format(root=root) for flag in (*BASE, *paths, *setting.flags))
    return [f"--config={config}", *(f"--config.{flag}" for flag in given)]


def compare(root: Path, setting: Setting, config: str = CONFIG) -> dict[str, Any]:
    """Predicts and measures one setting, each in a fresh process.

    Args:
      root: where `make_models` wrote the models.
      setting: what differs from ``BASE``.
      config: config file that gives all keys not set here.

    Returns:
      Bytes of all devices together in stage ``train``: "held" throughout; "planned" and "measured",
      the peak before a checkpoint is saved (on an accelerator, the peak); "planned_saving" and
      "measured_saving", the peak while one is saved. And "phase", the largest of the plan.

    Raises:
      RuntimeError: if a process failed, with what it wrote.
    """
    line = flags(root, setting, config)
    planned = _in_a_process("plan", root, line, setting.devices)
    return planned | _in_a_process("train", root, line, setting.devices)


def _in_a_process(what: str, root: Path, line: list[str], devices: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "vbon_jax.bench.plan", json.dumps([what, str(root), line])],
        env=os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(root / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "MALLOC_MMAP_THRESHOLD_": str(2**18),
            "MALLOC_TRIM_THRESHOLD_": str(2**18),
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the process to {what} failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _plan_here(root: Path, line: list[str]) -> dict[str, Any]:
    c = cli.parse(["plan", *line]).config
    mesh = sharding.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    found = need(c, mesh, Workdir(root / "workdir", c, STAGES))
    held, phases = sum(found.held.values()), dict(found.phases)
    saving = phases.pop("checkpoint")
    phase = max(phases, key=phases.__getitem__)
    figures = {"held": held, "planned": held + phases[phase], "planned_saving": held + saving}
    return {name: size * mesh.size for name, size in figures.items()} | {"phase": phase}


def _train_here(root: Path, line: list[str]) -> dict[str, Any]:
    c = cli.parse(["train", *line]).config
    folder = root / "workdir"
    shutil.rmtree(folder, ignore_errors=True)
    mesh = sharding.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    run = base.Run(c, Workdir(folder, c, STAGES), mesh)
    for stage in ("sft", "reward", "sample", "train"):
        base.perform(run, STAGES[stage], again=False)
    shutil.rmtree(run.workdir.checkpoints("train"))
    run.workdir.forget("train")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peaks = load.resident_bytes("VmRSS"), {}

    class Marked(Checkpointer):
        """Notes the peak of memory before a checkpoint is saved, and while it is."""

        def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
            peaks["measured"] = load.resident_bytes("VmHWM") - before
            load.reset_peak()
            super().save(step, state, metadata)
            peaks["measured_saving"] = load.resident_bytes("VmHWM") - before

    loop.Checkpointer = Marked  # type: ignore[misc]
    load.reset_peak()
    base.perform(run, STAGES["train"], again=False)
    return peaks


def results(config: str = CONFIG) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compares every one of ``SETTINGS``, with random models that are removed at the end.

    Args:
      config: config file that gives all keys not set here.

    Yields:
      The setting's name, and what `compare` returned.
    """
    with tempfile.TemporaryDirectory() as directory:
        make_models(Path(directory))
        for name, setting in SETTINGS.items():
            yield name, compare(Path(directory), setting, config)


def rows(name: str, result: Mapping[str, Any]) -> list[Row]:
    """Makes the lines of the table.

    Args:
      name: of the setting.
      result: what `compare` returned.

    Returns:
      The planned peak in training, and while a checkpoint is saved.
    """
    return [
        Row(
            "memory", f"{name}, {what}, planned", result[f"planned{saving}"] / 1e6, "MB",
            result[f"planned{saving}"] / result[f"measured{saving}"], "measured",
        )
        for what, saving in ((result["phase"], ""), ("saving", "_saving"))
    ]  # fmt: skip


if __name__ == "__main__":  # a process of `compare`
    what, root, line = json.loads(sys.argv[1])
    print(json.dumps({"plan": _plan_here, "train": _train_here}[what](Path(root), line)))
