"""``vbon plan`` held against the memory that stage ``train`` takes, in processes of its own.

``python -m vbon_jax.bench.plan`` makes random models in a temporary directory, trains two
iterations under each of ``SETTINGS`` on CPU, prints the table and removes them. Linux only: it
reads /proc.

The figure is the peak of resident memory during the stage, less what was resident before it. The
stage is done once before in the same process: what libraries, compiled programs and the compiler
itself keep (0.2 to 0.4 GB, whatever the model) is there by then, programs come from JAX's
compilation cache, and the figure is what arrays and temporaries take, as a GPU's
``peak_bytes_in_use``. The allocator is told to give back at once what is freed.
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from vbon_jax.bench import load as bench_load
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.models import decoder, heads, hf
from vbon_jax.models.config import DecoderConfig

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
    "sampling.max_new_tokens=56", "reward.function=vbon_jax.bench.plan:length",
)  # fmt: skip
CLASSIFIER = ("reward.function=", "reward.path={root}/reward")


class Setting(NamedTuple):
    """flags: of ``vbon``, without --config., after BASE; {root} is where the models are.
    devices: CPU devices to feign; they share the process."""

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


def length(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A reward that holds nothing."""
    del prompts
    return [float(len(response)) for response in responses]


def make_models(root: Path, policy: DecoderConfig = POLICY, reward: DecoderConfig = REWARD) -> None:
    """Random models ``policy`` and ``reward`` with a small tokenizer, prompts and samples."""
    texts = [f"the {word} film of number {i}" for word in ("good", "bad") for i in range(200)]
    tokenizer = tokenizers.build(texts, "bpe", 400)
    bench_load.random_checkpoint(root / "policy", policy)
    body = jax.jit(decoder.init, static_argnums=0)(reward, jax.random.key(0))
    score = heads.init_score(reward, len(LABELS), jax.random.key(1))
    hf.save_classifier(
        root / "reward", reward, {"decoder": body, "score": score}, LABELS, ids=hf.TokenIds(0, 0, 1),
    )  # fmt: skip
    for name in ("policy", "reward"):
        tokenizers.save(tokenizer, root / name)
    rng = np.random.default_rng(0)
    prompts = [{"prompt": text} for text in texts[:PROMPTS]]
    samples = [
        line | {"responses": ["a film"] * SAMPLES, "rewards": rng.normal(size=SAMPLES).tolist()}
        for line in prompts
    ]
    for name, lines in (("prompts", prompts), ("samples", samples)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def flags(root: Path, setting: Setting, config: str = CONFIG) -> list[str]:
    """The command line's flags for a setting, on what ``make_models`` made in ``root``."""
    paths = (
        "reference.path={root}/policy", "prompts.path={root}/prompts.jsonl",
        "prompts.test_path={root}/prompts.jsonl", "samples.path={root}/samples.jsonl",
    )  # fmt: skip
    given = (flag.format(root=root) for flag in (*BASE, *paths, *setting.flags))
    return [f"--config={config}", *(f"--config.{flag}" for flag in given)]


def compare(root: Path, setting: Setting, config: str = CONFIG) -> dict[str, Any]:
    """Plans and measures one setting, each in a fresh process, on what ``make_models`` made.

    Returns:
      Bytes of all devices together in stage ``train``: "held", there all the time; "planned" and
      "measured", the peak before a checkpoint is saved (on an accelerator that is all of it), and
      "phase", the greediest of the plan; "planned_saving" and "measured_saving", while one is.

    Raises RuntimeError with what a process wrote that failed.
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
    from vbon_jax import cli, sharding
    from vbon_jax.stages import plan

    s = cli.parse(["plan", *line]).settings
    mesh = sharding.make_mesh(s.mesh.data, s.mesh.fsdp, s.mesh.tensor)
    found = plan.need(s, mesh, root / "workdir")
    held, phases = sum(found.held.values()), dict(found.phases)
    saving = phases.pop("checkpoint")
    phase = max(phases, key=phases.__getitem__)
    figures = {"held": held, "planned": held + phases[phase], "planned_saving": held + saving}
    return {name: size * mesh.size for name, size in figures.items()} | {"phase": phase}


def _train_here(root: Path, line: list[str]) -> dict[str, Any]:
    from vbon_jax import cli, sharding
    from vbon_jax.stages import all_stages as stages
    from vbon_jax.stages import inputs, workdir
    from vbon_jax.training.checkpoint import Checkpointer

    s = cli.parse(["train", *line]).settings
    mesh = sharding.make_mesh(s.mesh.data, s.mesh.fsdp, s.mesh.tensor)
    folder = root / "workdir"
    shutil.rmtree(folder, ignore_errors=True)
    run = inputs.Run(s, workdir.Workdir(folder, s), mesh)
    for stage in ("sft", "reward", "sample", "train"):
        stages.perform(run, stage, again=False)
    shutil.rmtree(folder / "checkpoints")
    run.workdir.forget("train")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peaks = bench_load._resident("VmRSS"), {}

    def peak_of(name: str) -> None:
        peaks[name] = bench_load._resident("VmHWM") - before
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    class Marked(Checkpointer):
        def save(self, *args: Any) -> None:
            peak_of("measured")
            super().save(*args)
            peak_of("measured_saving")

    peak_of("start")
    stages.Checkpointer = Marked  # type: ignore[misc]
    stages.perform(run, "train", again=False)
    return {name: size for name, size in peaks.items() if name != "start"}


def table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """{setting: a result of `compare`} as a table for the screen."""
    shown = Table(title="vbon plan against measured memory, MB")
    shown.add_column("setting", no_wrap=True)
    shown.add_column("greediest phase", no_wrap=True)
    columns = ("held", "planned", "measured", "ratio", "saving: planned", "measured", "ratio")
    for column in columns:
        shown.add_column(column, justify="right")
    for setting, row in results.items():
        cells = [f"{row['held'] / 1e6:.0f}"]
        for saving in ("", "_saving"):
            planned, measured = (row[name + saving] for name in ("planned", "measured"))
            cells += [f"{planned / 1e6:.0f}", f"{measured / 1e6:.0f}", f"{planned / measured:.2f}"]
        shown.add_row(setting, row["phase"], *cells)
    return shown


def main(arguments: Sequence[str]) -> None:
    """Without arguments, or with --config, the whole table; with the JSON of one process, that."""
    if len(arguments) == 1 and arguments[0].startswith("["):
        what, root, line = json.loads(arguments[0])
        here = {"plan": _plan_here, "train": _train_here}[what]
        print(json.dumps(here(Path(root), line)))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--config", default=CONFIG, help="which gives all keys not set here")
    parser.add_argument("--only", action="append", choices=SETTINGS, help="a setting; repeatable")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        make_models(Path(directory))
        results = {}
        for name in given.only or SETTINGS:
            results[name] = compare(Path(directory), SETTINGS[name], given.config)
            print(f"{name}: {results[name]}", file=sys.stderr)
        Console().print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
