r"""Every method of the paper over its grid on the embedded reviews, and the page about it.

    vbon run --config=configs/reviews_sweep.py

The grids of the paper's Appendix F, scaled to 2 CPU cores: vBoN, PPO, DPO and BoNBoN at 11 values
with 2 seeds each, the others at 3 values; smaller models and shorter training than
configs/reviews.py. All policies of a method are trained in one program. It writes
``report.html``. To share the sweep, see `vbon sweep --shard=i/N`.

    vbon run --config=configs/reviews_sweep.py:text --config.data.path=TRAIN.jsonl \
        --config.data.test_path=TEST.jsonl

is a smaller grid on your own labelled text.
"""

import ml_collections

from vbon_jax import config as vbon_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "text"):
        raise ValueError(f"configs/reviews_sweep.py has no variant {variant!r}: use none, or :text")
    config = vbon_config.default()
    config.stages = (
        "sft", "reward", "evaluator", "sample", "convergence", "sweep", "train", "export",
        "evaluate", "report",
    )  # fmt: skip
    config.evaluator.train = True
    config.train.update(iterations=60, ppo_epochs=2, learning_rate=5e-4, value_coef=1.0)
    config.offline.update(epochs=1, learning_rate=3e-4)
    config.sampling.batch_size = 512
    config.memory.lengths = 4  # responses are half as long as the limit
    if variant == "text":
        _own_texts(config)
        return config
    config.prompts.ood = 128
    config.reference.model.update(layers=2, width=96)
    config.sampling.max_new_tokens = 32
    config.samples.m = 200
    config.evaluate.update(m=200, samples_per_prompt=8)
    config.sweep.update(
        bon=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128),
        vbon=(1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512),
        lower_bound=(2, 8, 32),
        ppo=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0),
        dpo=(0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0),
        bonbon=(2, 3, 4, 6, 8, 16, 32, 64, 96, 128, 200),
        bon_sft=(8, 32, 128),
        bond=(2, 8, 32),
        m=(8, 32, 200),
        temperatures=(0.25, 0.5, 0.75, 1.0),
        seeds=2,
    )
    return config


def _own_texts(config: ml_collections.ConfigDict) -> None:
    """Models sized for real sentences, as in configs/reviews.py:text, and smaller grids."""
    config.tokenizer.vocab_size = 4_096
    config.reference.model.update(layers=4, width=192, heads=6, positions=128)
    config.reference.fit.update(epochs=8, learning_rate=1e-3, weight_decay=0.1, max_tokens=80)
    config.reward.model.update(layers=2, width=128, heads=4, positions=128)
    config.reward.fit.update(epochs=4, learning_rate=5e-4, weight_decay=0.1, max_tokens=80)
    config.sampling.max_new_tokens = 40
    config.train.update(iterations=100, learning_rate=1e-4, average_half_life=10.0)
    config.offline.pairs = 6
    config.sweep.update(
        bon=(1, 2, 4, 8, 16, 32, 64),
        vbon=(2, 8, 32, 64),
        ppo=(0.05, 0.1, 0.2, 0.5),
        dpo=(0.1, 0.3, 1.0, 3.0),
        bonbon=(2, 8, 32, 64),
        bon_sft=(8, 64),
        qrpo=(0.05, 0.14, 0.5),
    )
