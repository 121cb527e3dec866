"""Every method of the paper over its grid on the embedded reviews, and the page about it.

    vbon run --config=configs/reviews_sweep.py

The grids of the paper's Appendix F, scaled to 2 CPU cores: vBoN, PPO, DPO and BoNBoN at 11 values
with 2 seeds each, the others at 3 values; smaller models and shorter training than
configs/reviews.py. All policies of a method are trained in one program. It writes
``report.html``; several workers may run the same command on one workdir.

    vbon run --config=configs/reviews_sweep.py:text --config.data.path=TRAIN.jsonl \\
        --config.data.test_path=TEST.jsonl

is a smaller grid on your own labelled text.
"""

import os
import runpy

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    here = os.path.dirname(os.path.abspath(__file__))
    config = runpy.run_path(os.path.join(here, "reviews.py"))["get_config"](variant)
    config.stages = (
        "sft", "reward", "evaluator", "sample", "convergence", "sweep", "train", "export",
        "evaluate", "report",
    )  # fmt: skip
    config.prompts.ood = 128
    config.evaluator.train = True
    config.samples.m = 200
    config.evaluate.update(m=200, samples_per_prompt=8)
    config.offline.epochs = 1
    config.train.update(iterations=60, batch_size=128, minibatch_size=32, ppo_epochs=2,
                        learning_rate=5e-4)  # fmt: skip
    if not variant:
        config.reference.model = {"layers": 2, "width": 96, "heads": 4, "positions": 64}
        config.sampling.max_new_tokens = 32
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
    if variant == "text":
        config.prompts.ood = 0
        config.samples.m = 64
        config.evaluate.update(m=100, samples_per_prompt=4)
        config.offline.pairs = 6
        config.train.update(iterations=50, learning_rate=2e-4)
        config.sweep.update(
            bon=(1, 2, 4, 8, 16, 32, 64),
            vbon=(2, 8, 32, 64),
            lower_bound=(),
            ppo=(0.05, 0.1, 0.2, 0.5),
            dpo=(0.1, 0.3, 1.0, 3.0),
            bonbon=(2, 8, 32, 64),
            bon_sft=(8, 64),
            bond=(),
            m=(),
            temperatures=(),
            seeds=1,
        )
    return config
