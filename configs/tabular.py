"""The proving ground: 6 letters, responses of 4, so every figure is held against enumeration.

    vbon run --config=configs/tabular.py

A small GPT-2 learns strings of a random process (the reference), every response has a fixed random
reward, and vBoN is trained towards the best of n = 8. All 1296 responses are enumerated, so
KL(policy || bon) and the win rate in ``evaluation.json`` under "exact" are exact. On 2 CPU cores it
takes about 2 minutes; expect an exact KL(policy || bon) near 0.04 nats (4.91 before training) and a
win rate within 0.003 of best-of-8's.

    vbon run --config=configs/tabular.py:ppo

is the same by the paper's PPO, with a value head and no stored samples beside the rollouts.

    vbon run --config=configs/tabular.py:family

trains one policy for every n from 2 to 32 in about two and a half times as long
(``exact_family`` in ``evaluation.json``); expect an exact KL(policy_n || bon_n) of 0.01, 0.02,
0.03, 0.04 and 0.05 nats at n = 2, 4, 8, 16 and 32.

    vbon run --config=configs/tabular.py:sweep

holds every method against its own optimum at n = 2, 8, 32 (``tabular.json``, ``report.html``).
"""

import ml_collections

from vbon_jax import config as vbon_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "ppo", "family", "sweep"):
        raise ValueError(
            f"configs/tabular.py has no variant {variant!r}: use none, :ppo, :family or :sweep"
        )
    config = vbon_config.default()
    config.stages = ("sft", "reward", "sample", "train", "export", "evaluate")
    config.data.update(corpus="tabular", train=12_000, ood=0)
    config.prompts.update(train=1, test=16, min_tokens=1, max_tokens=1)
    config.tokenizer.update(kind="characters", vocab_size=6)
    for part in (config.reference, config.reward, config.evaluator):
        part.model.update(layers=2, width=64, heads=4, positions=8)
        part.fit.update(
            epochs=4, batch_size=256, learning_rate=3e-3, weight_decay=0.0, max_tokens=8
        )
    config.reward.function = "vbon_jax.data.tabular:reward"
    config.sampling.update(max_new_tokens=4, stop_at_eos=False, batch_size=256)
    config.samples.m = 200
    config.train.update(
        iterations=1_200, batch_size=512, minibatch_size=64, learning_rate=1e-3, value_coef=2.0,
        checkpoint_every=400,
    )  # fmt: skip
    config.offline.update(responses=200, pairs=6_400, labels="soft", epochs=4, learning_rate=3e-4)
    config.evaluate.update(m=200, samples_per_prompt=64)
    config.convergence.prompts = 1
    if variant in ("", "family"):
        config.samples.m = 2_000
        # The samples are half of each batch, and the two KLs are minimised together: at the optimum
        # every row's log-ratio is best-of-n's, and no noise is left. Adam is slow here.
        config.method.objective = "jeffreys"
        config.train.update(
            iterations=1_000, batch_size=256, group=256, replay=256, minibatch_size=512,
            ppo_epochs=1, penalty="response", baseline="group", whiten=False, optimizer="muon",
            learning_rate=1e-2, adam_eps=1e-8, max_grad_norm=100.0,
        )  # fmt: skip
    if variant == "family":
        config.method.n = (2.0, 32.0)
        config.lora.update(rank=64, alpha=256.0, targets=("q", "k", "v", "out", "up", "down"))
        config.train.update(
            iterations=1_500, group=32, replay=32, learning_rate=4e-3, checkpoint_every=500
        )
    if variant == "sweep":
        config.stages = ("sft", "reward", "sample", "sweep", "report")
        config.samples.m = 20_000  # so that stored samples are as good as the distribution
        config.offline.update(responses=2_000, pairs=80_000, epochs=2, learning_rate=1e-3)
        config.train.update(iterations=300, batch_size=512)
        config.sweep.update(
            bon=(2, 8, 32),
            vbon=(2, 8, 32),
            lower_bound=(2, 8, 32),
            ppo=(1.0, 1 / 7, 1 / 31),
            dpo=(1.0, 1 / 7, 1 / 31),
            qrpo=(1.0, 1 / 7, 1 / 31),
            qrpo_identity=(1.0, 1 / 7, 1 / 31),
            bonbon=(2, 8, 32),
            bon_sft=(2, 8, 32),
            bond=(2, 8, 32),
        )
    return config
