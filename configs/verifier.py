"""A verifier as the reward, 0 or 1: ties everywhere, broken at random, held against enumeration.

    vbon run --config=configs/verifier.py

The world of configs/tabular.py; a response is right when its first letter is its last (about one in
six of the reference's). The best of n = 4 is then any right response where one was drawn, and
formula (1) takes g as the mass of all right ones. About 2 minutes on 2 CPU cores; expect an exact
KL(policy || bon) near 0.01 nats. Your own verifier: --config.reward.function=module:function.
"""

import os
import runpy

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    here = os.path.dirname(os.path.abspath(__file__))
    config = runpy.run_path(os.path.join(here, "tabular.py"))["get_config"]()
    config.reward.function = "vbon_jax.data.tabular:verifier"
    config.method.update(n=4.0, ties="random", beta=1 / 3)
    config.train.update(iterations=300, batch_size=512)
    return config
