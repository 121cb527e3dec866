"""``vbon plan`` held against measured memory: stage ``train`` in processes of its own.

``python -m vbon_jax.bench_plan`` makes random checkpoints in a temporary directory, trains two
iterations under each of ``SETTINGS``, prints the table and removes them. Linux and CPU only: it
reads /proc. Every run is done twice and the second one measured, so that its programs come from
JAX's compilation cache: compiling takes memory of its own, on a GPU the host's.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from vbon_jax import bench_load
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.models import decoder, heads, hf
from vbon_jax.models.config import DecoderConfig

CONFIG = "configs/reviews.py"
# GPT-2's vocabulary, sized so that an iteration takes seconds on two cores.
POLICY = DecoderConfig(
    vocab_size=50_257, positions=256, layers=8, width=512, heads=8, mlp_width=2_048
)
REWARD = DecoderConfig(
    vocab_size=8_192, positions=256, layers=4, width=384, heads=6, mlp_width=1_536
)
PROMPTS = 64


class Setting(NamedTuple):
    """flags: of ``vbon``, without ``--config.``; devices: CPU devices to feign, of one machine."""

    flags: tuple[str, ...]
    devices: int = 1


BASE = (
    "prompts.train=64", "prompts.test=2", "samples.m=4", "train.iterations=2",
    "train.checkpoint_every=2", "train.batch_size=32", "train.minibatch_size=16",
    "train.ppo_epochs=1", "prompts.longest=16", "train.penalty=sampled", "sampling.max_new_tokens=56",
    "sampling.batch_size=32", "memory.chunk=256",  "reward.function=vbon_jax.bench_plan:length",
)  # fmt: skip
SETTINGS = {
    "all of it": Setting(()),
    "2 upper layers, full KL": Setting(("train.num_layers_unfrozen=2", "train.penalty=full")),
    "adapters, bfloat16 frozen": Setting(
        ("lora.rank=8", "memory.frozen_dtype=bfloat16", "memory.chunk=1024")
    ),
    "remat full, 4 microbatches": Setting(
        ("memory.remat=full", "memory.accumulate=4", "memory.chunk=64")
    ),
    "fsdp 2": Setting(("mesh.fsdp=2",), devices=2),
}


def length(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A reward that holds nothing."""
    del prompts
    return [float(len(r)) for r in responses]


def make_models(root: Path, policy: DecoderConfig = POLICY, reward: DecoderConfig = REWARD) -> None:
    """Random ``policy`` and ``reward`` directories, prompts and samples of them in ``root``."""
    texts = [f"the {a} film of number {b}" for a in ("good", "bad", "long") for b in range(200)]
    tokenizer = tokenizers.build(texts, "bpe", min(policy.vocab_size, 1_000))
    bench_load.random_checkpoint(root / "policy", policy)
    body = jax.jit(decoder.init, static_argnums=0)(reward, jax.random.key(0))
    params = {"decoder": body, "score": heads.init_score(reward, 2, jax.random.key(1))}
    hf.save_classifier(
        root / "reward", reward, params, ("NEGATIVE", "POSITIVE"), bos_id=None, eos_id=0, pad_id=1
    )
    for name in ("policy", "reward"):
        tokenizers.save(tokenizer, root / name)
    rng = np.random.default_rng(0)
    with (root / "prompts.jsonl").open("w") as file:
        for text in texts[:PROMPTS]:
            print(json.dumps({"prompt": text}), file=file)
    with (root / "samples.jsonl").open("w") as file:
        for text in texts[:PROMPTS]:
            line = {
                "prompt": text,
                "responses": ["a film"] * 4,
                "rewards": rng.normal(size=4).tolist(),
            }
            print(json.dumps(line), file=file)


def arguments(root: Path, config: str, setting: Setting) -> list[str]:
    """Flags of ``vbon`` for a setting over what ``make_models`` made."""
    paths = (
        f"reference.path={root / 'policy'}", f"prompts.path={root / 'prompts.jsonl'}",
        f"prompts.test_path={root / 'prompts.jsonl'}", f"samples.path={root / 'samples.jsonl'}",
    )  # fmt: skip
    given = (*BASE, *paths, *(f.replace("ROOT", str(root)) for f in setting.flags))
    return [f"--config={config}", *(f"--config.{flag}" for flag in given)]
