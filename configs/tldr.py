"""The paper's summarization experiment: Pythia-2.8B on Reddit posts, best of 100.

    base=https://openaipublic.blob.core.windows.net/summarize-from-feedback/datasets
    wget -P tldr_3_filtered $base/tldr_3_filtered/train.jsonl $base/tldr_3_filtered/test.jsonl
    vbon run --config=configs/tldr.py

Trained on posts of r/relationships and r/relationship_advice; measured on held-out posts of these
and, out of distribution, on as many of all other subreddits, at four temperatures ("rows" and
"ood" of evaluation.json). Reference and reward are the 2.8B models of Huang et al. (2024), at
cleanrl on the Hugging Face hub; the 6.9B reward only evaluates. The paper's three seeds are three
responses a prompt (evaluate.samples_per_prompt); another seed of training is another run,

    vbon run --config=configs/tldr.py --config.seed=1 --workdir=runs/tldr1

or all three are one population of configs/tldr.py:sweep, which holds vBoN, PPO at the paper's beta
and BoNBoN side by side on the same samples.

The reward checkpoints are read as GPTNeoXForSequenceClassification with one output, as the paper's
code and TRL read them. One saved by Huang et al.'s training code is of its own class: rename its
lm_backbone.* to gpt_neox.*, scalar_head.weight to score.weight; its bias changes no order. Weights
in pickles alone are refused with the line that converts them.

One 80 GiB GPU holds it: by `vbon plan` training needs 62 GiB, of them 46 for the cache of 128
responses while they are drawn, 10 for both 2.8B models in bfloat16, 7 for the 8 trained layers in
float32 with AdamW. Measuring holds the policy in float32 and the evaluator as well (24 GiB), and so
draws 64 at a time. With several devices, --config.mesh.fsdp=N shards the weights; :sweep, which
holds three policies, wants at least two. By operations (not measured) the 2,000,000 reference
samples and their scores are some 10 hours of one H100, all measurements half of that, the 78 PPO
iterations under an hour. Fewer prompts cost less: --config.prompts.train=2000.

Expect a win rate of best-of-100 near 0.99 and of vBoN below it, most at high temperature; the paper
prints its figures only as curves.
"""

import ml_collections

from vbon_jax import config as vbon_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "sweep"):
        raise ValueError(f"configs/tldr.py has no variant {variant!r}: use none, or :sweep")
    config = vbon_config.default()
    config.stages = (
        "sft", "reward", "evaluator", "sample", "train", "export", "evaluate", "report",
    )  # fmt: skip
    config.prompts.update(
        format="tldr",
        path="tldr_3_filtered/train.jsonl",
        test_path="tldr_3_filtered/test.jsonl",
        # The paper does not say how many: an episode each, and halves of equal size.
        train=10_000,
        test=256,
        ood=256,
        longest=512,  # Huang et al.; the paper's code cuts prompt and response at 600
        subreddits=("relationships", "relationship_advice"),
        gap="\n\n",  # as these checkpoints were trained; the paper's code has "\n"
    )
    config.reference.path = "cleanrl/EleutherAI_pythia-2.8b-deduped__sft__tldr"
    # These models were trained to score a summary at its EOS, so the text they read ends with it.
    template = "{prompt}{response}<|endoftext|>"
    config.reward.update(
        path="cleanrl/EleutherAI_pythia-2.8b-deduped__reward__tldr",
        score="scalar",
        template=template,
        # Huang et al. The paper's code has -20 for vBoN, where it never bites: an EOS is added to
        # what was cut. Here it would, and two such among 100 rewards bend the exponential curve
        # until it is nearly flat where the good responses are.
        missing_eos="replace",
        missing_eos_value=-1.0,
    )
    config.evaluator.update(
        path="cleanrl/EleutherAI_pythia-6.9b-deduped__reward__tldr",
        score="scalar",
        template=template,
    )
    # 53 tokens: Huang et al.; the paper's code has 50.
    config.sampling.update(temperature=0.7, max_new_tokens=53, batch_size=64)
    config.samples.m = 200
    config.method.update(n=100.0, beta=0.05, estimator="exponential")
    # The paper's table of PPO but for what it leaves open: weight decay, unfrozen layers and the
    # rollout are those of its code. 78 x 128 = 9,984 episodes.
    config.train.update(
        iterations=78, batch_size=128, minibatch_size=32, ppo_epochs=4, learning_rate=3e-6,
        adam_eps=1e-5, weight_decay=0.01, max_grad_norm=1.0, clip_policy=0.2, clip_value=0.2,
        value_coef=0.2, gamma=1.0, lam=0.95, whiten=True, penalty="sampled",
        num_layers_unfrozen=8, value_network="head", checkpoint_every=13,
    )  # fmt: skip
    config.memory.update(
        compute_dtype="bfloat16", frozen_dtype="bfloat16", remat="full", accumulate=4, chunk=1_024,
    )  # fmt: skip
    # Three responses a prompt: the paper's three seeds of sampling.
    config.evaluate.update(temperatures=(0.25, 0.5, 0.75, 1.0), m=100, samples_per_prompt=3)
    config.offline.learning_rate = 3e-4  # of dpo, qrpo, bonbon and bon_sft; :sweep has its own
    if variant == "sweep":
        config.stages = ("sft", "reward", "evaluator", "sample", "sweep", "report")
        # Not the paper's, which gives neither pairs nor rates of BoNBoN, nor beta of DPO, here.
        config.offline.update(pairs=1, epochs=1, batch_size=16, learning_rate=3e-6)
        config.sweep.update(
            bon=(100,),
            vbon=(100,),
            ppo=(0.05,),
            bonbon=(100,),
            temperatures=(0.25, 0.5, 0.75, 1.0),
            temperature_m=100,
            seeds=3,
        )
    return config
