"""Small runs to be planned: random models in a directory, and their command lines."""

from pathlib import Path

from vbon_jax import cli
from vbon_jax.bench import plan as bench_plan
from vbon_jax.models.config import DecoderConfig

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "tabular.py:ppo")
POLICY = DecoderConfig(vocab_size=512, positions=64, layers=2, width=32, heads=4, mlp_width=64)
TINY = (
    "train.batch_size=32", "train.minibatch_size=16", "sampling.max_new_tokens=24",
    "sampling.stop_at_eos=True", "sampling.batch_size=64", "offline.batch_size=16",
    "memory.device_gib=1",
)  # fmt: skip
CLASSIFIER = bench_plan.CLASSIFIER


def make_models(path):
    """Random models, prompts and samples."""
    bench_plan.make_models(path, POLICY, POLICY)
    return path


def command(root, *flags):
    return ["plan", *bench_plan.flags(root, bench_plan.Setting((*TINY, *flags)), CONFIG)]


def config(root, *flags):
    """As the command line gives them, over those of the bench made small."""
    return cli.parse(command(root, *flags)).config
