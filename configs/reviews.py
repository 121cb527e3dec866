r"""The embedded task: short movie reviews steered towards positive sentiment.

    vbon run --config=configs/reviews.py

A grammar writes labelled reviews; a small GPT-2 learns them (the reference), a small classifier
learns their labels (the reward, its logit for POSITIVE), and prompts are the first 2 to 8 tokens of
reviews, as in the paper's sentiment experiment: of training reviews to train on, of held-out ones
to measure on. On 2 CPU cores it takes 6 to 17 minutes; expect a held-out win rate of 0.876 (true
best-of-8: 0.888) at a KL to the reference of 1.32 nats (best-of-8: 1.204). Seeds 1 and 2, which
train other references and rewards, win 0.869 and 0.840 at 1.30 and 1.18 nats.

    vbon run --config=configs/reviews.py:family

trains one policy for every n from 2 to 32, by adapters that n opens (docs/pages/family.md).

    vbon run --config=configs/reviews.py:text --config.data.path=TRAIN.jsonl \
        --config.data.test_path=TEST.jsonl

is the same on your own labelled text ({"text", "label"} lines), with models sized for real
sentences.
"""

import ml_collections

from vbon_jax import config as vbon_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "text", "family"):
        raise ValueError(
            f"configs/reviews.py has no variant {variant!r}: use none, :text or :family"
        )
    config = vbon_config.default()
    config.stages = ("sft", "reward", "sample", "train", "export", "evaluate")
    config.sampling.update(max_new_tokens=36, batch_size=512)
    config.train.update(batch_size=256, minibatch_size=64, learning_rate=5e-4, value_coef=1.0)
    config.memory.lengths = 4  # responses are half as long as the limit
    if variant in ("", "family"):
        config.train.average_half_life = 10.0
    if variant == "family":
        config.method.n = (2.0, 32.0)
        config.lora.update(rank=32, alpha=128.0, targets=("q", "k", "v", "out", "up", "down"))
        config.train.update(iterations=360, learning_rate=1e-3, checkpoint_every=90)
    config.prompts.test = 400  # with these three, KL to best-of-n is known to about 0.03 nats
    config.evaluate.update(m=50, samples_per_prompt=24)
    config.offline.learning_rate = 3e-4  # of dpo, qrpo, bonbon and bon_sft
    if variant == "text":
        config.prompts.test = 128
        config.tokenizer.vocab_size = 4_096
        config.reference.model.update(layers=4, width=192, heads=6, positions=128)
        config.reference.fit.update(epochs=8, learning_rate=1e-3, weight_decay=0.1, max_tokens=80)
        config.reward.model.update(layers=2, width=128, heads=4, positions=128)
        config.reward.fit.update(epochs=4, learning_rate=5e-4, weight_decay=0.1, max_tokens=80)
        config.sampling.max_new_tokens = 40
        config.train.update(iterations=500, ppo_epochs=2, learning_rate=1e-4)
    return config
