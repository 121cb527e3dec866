"""A verifier as the reward, 0 or 1: ties everywhere, broken at random, held against enumeration.

    vbon run --config=configs/verifier.py

The world of configs/tabular.py; a response is right when its first letter is its last (about one in
six of the reference's). The best of n = 4 is then any right response where one was drawn, and
formula (1) takes g as the mass of all right ones. About 2 minutes on 2 CPU cores; expect an exact
KL(policy || bon) near 0.01 nats. Your own verifier: --config.reward.function=module:function.
"""

import ml_collections

from vbon_jax import config as vbon_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"configs/verifier.py has no variant {variant!r}: use none")
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
    config.reward.function = "vbon_jax.data.tabular:verifier"
    config.sampling.update(max_new_tokens=4, stop_at_eos=False, batch_size=256)
    config.samples.m = 200
    config.method.update(n=4.0, ties="random", beta=1 / 3)
    config.train.update(
        iterations=300, batch_size=512, minibatch_size=64, learning_rate=1e-3, value_coef=2.0,
        checkpoint_every=400,
    )  # fmt: skip
    config.offline.update(responses=200, pairs=6_400, labels="soft", epochs=4, learning_rate=3e-4)
    config.evaluate.update(m=200, samples_per_prompt=64)
    config.convergence.prompts = 1
    return config
