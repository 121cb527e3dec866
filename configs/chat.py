r"""Your own task: a small chat model towards the best of 16 of a reward model. Not in the paper.

    vbon run --config=configs/chat.py --config.prompts.path=TRAIN.jsonl \
        --config.prompts.test_path=TEST.jsonl

The files hold {"messages": [{"role", "content"}, ...]} or {"prompt": ...} a line; all of them are
used, through the chat template of Qwen/Qwen3-0.6B, without its thinking. The reward model reads the
same messages and the answer through its own. Other models: --config.reference.path=, .reward.path=,
each a Hugging Face name or directory.

Adapters are trained (LoRA, rank 32 on every projection), so that it fits a 24 GiB GPU with room to
spare: by `vbon plan` 13 GiB. To train the whole model,

    --config.lora.rank=0 --config.train.learning_rate=2e-6

takes 19, float32 weights with AdamW among them: more than the 18 that JAX takes of such a GPU
unless XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 is set.
policy/ is the merged model; --config.export.form=adapter writes a directory for peft in its place.

Of 1,000 prompts, 64,000 answers of up to 256 tokens are drawn before 150 iterations of 64: by
operations (not measured) two to three hours on such a GPU. Expect a win rate below 16/17 = 0.94 at
a KL to the reference of at most log 16 - 15/16 = 1.84 nats.
"""

import ml_collections

from vbon_jax import config as vbon_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"configs/chat.py has no variant {variant!r}: use none")
    config = vbon_config.default()
    config.prompts.update(
        format="chat",
        path="prompts/train.jsonl",
        test_path="prompts/test.jsonl",
        longest=512,
        template_arguments='{"enable_thinking": false}',
    )
    config.reference.path = "Qwen/Qwen3-0.6B"
    config.reward.update(
        path="Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        score="scalar",
        template="chat",
        max_tokens=1_024,
        # The model judges what was cut as if its author had stopped there: without this, the policy
        # would learn to be cut. metrics.jsonl has the share, missing_eos.
        missing_eos="subtract",
        missing_eos_value=5.0,
    )
    # 0.7 is what Qwen recommends without thinking; its top_p of 0.8 would be another distribution.
    config.sampling.update(temperature=0.7, max_new_tokens=256, batch_size=64)
    config.method.update(n=16.0, beta=1 / 15, estimator="interval")
    config.train.update(
        iterations=150, batch_size=64, minibatch_size=32, ppo_epochs=2, learning_rate=1e-4,
        checkpoint_every=25,
    )  # fmt: skip
    config.offline.learning_rate = 3e-4  # of dpo, qrpo, bonbon and bon_sft
    config.lora.update(rank=32, alpha=64.0, targets=("q", "k", "v", "out", "gate", "up", "down"))
    config.memory.update(
        compute_dtype="bfloat16", frozen_dtype="bfloat16", remat="full", accumulate=4, chunk=512
    )
    config.evaluate.update(temperatures=(0.7,), m=64, samples_per_prompt=4)
    return config
