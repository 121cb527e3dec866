"""The embedded task: short movie reviews steered towards positive sentiment.

    vbon run --config=configs/reviews.py

A grammar writes labelled reviews; a small GPT-2 learns them (the reference), a small classifier
learns their labels (the reward, its logit for POSITIVE), and prompts are the first 2 to 8 tokens of
reviews, as in the paper's sentiment experiment: of training reviews to train on, of held-out ones
to measure on. On 2 CPU cores it takes about 5 minutes; expect a held-out win rate near 0.87 (true
best-of-8: 0.889) at a KL to the reference near 1.2 nats (best-of-8: 1.204).

    vbon run --config=configs/reviews.py:text --config.data.path=TRAIN.jsonl \
        --config.data.test_path=TEST.jsonl

is the same on your own labelled text ({"text", "label"} lines), with models sized for real
sentences.
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "text"):
        raise ValueError(f"configs/reviews.py has no variant {variant!r}: use none, or :text")
    config = ml_collections.ConfigDict(
        {
            "seed": 0,
            "stages": ("sft", "reward", "sample", "train", "export", "evaluate"),
            "data": {
                "corpus": "reviews",
                "path": "",
                "tfds": "",
                "tfds_dir": "",
                "test_path": "",
                "train": 6_000,
                "test": 1_000,
                "ood": 600,
            },
            "prompts": {
                "format": "text",
                "path": "",
                "test_path": "",
                "ood_path": "",
                "train": 800,
                "test": 128,
                "ood": 0,
                "min_tokens": 2,
                "max_tokens": 8,
                "longest": 512,
                "subreddits": (),
                "gap": "\n",
                "template_arguments": "",
            },
            "tokenizer": {"path": "", "kind": "bpe", "vocab_size": 2_048},
            "reference": {
                "path": "",
                "model": {"layers": 3, "width": 128, "heads": 4, "positions": 64},
                "fit": {
                    "epochs": 4,
                    "batch_size": 64,
                    "learning_rate": 2e-3,
                    "weight_decay": 0.01,
                    "max_tokens": 40,
                },
            },
            "reward": {
                "path": "",
                "function": "",
                "label": "POSITIVE",
                "score": "logit",
                "template": "{prompt}{response}",
                "max_tokens": 0,
                "weight": 1.0,
                "others": {},
                "missing_eos": "none",
                "missing_eos_value": 0.0,
                "model": {"layers": 2, "width": 64, "heads": 4, "positions": 64},
                "fit": {
                    "epochs": 3,
                    "batch_size": 64,
                    "learning_rate": 1e-3,
                    "weight_decay": 0.01,
                    "max_tokens": 40,
                },
            },
            "evaluator": {
                "train": False,
                "path": "",
                "function": "",
                "label": "POSITIVE",
                "score": "logit",
                "template": "{prompt}{response}",
                "max_tokens": 0,
                "model": {"layers": 3, "width": 96, "heads": 4, "positions": 64},
                "fit": {
                    "epochs": 3,
                    "batch_size": 64,
                    "learning_rate": 1e-3,
                    "weight_decay": 0.01,
                    "max_tokens": 40,
                },
            },
            "sampling": {
                "temperature": 1.0,
                "max_new_tokens": 36,
                "stop_at_eos": True,
                "batch_size": 512,
            },
            "samples": {"m": 64, "path": ""},
            "method": {
                "name": "vbon",
                "objective": "exact",
                "n": 8.0,
                "beta": 1 / 7,
                "estimator": "interval",
                "ties": "random",
            },
            "bond": {"form": "jeffreys", "jeffreys": 0.5, "anchor_rate": 0.02, "beta": 0.1},
            "train": {
                "iterations": 150,
                "batch_size": 256,
                "minibatch_size": 64,
                "ppo_epochs": 4,
                "learning_rate": 5e-4,
                "adam_eps": 1e-5,
                "weight_decay": 0.0,
                "max_grad_norm": 1.0,
                "clip_policy": 0.2,
                "clip_value": 0.2,
                "value_coef": 1.0,
                "gamma": 1.0,
                "lam": 0.95,
                "whiten": True,
                "penalty": "full",
                "num_layers_unfrozen": -1,
                "value_network": "head",
                "checkpoint_every": 50,
                "keep": 2,
            },
            "lora": {"rank": 0, "alpha": 16.0, "targets": ("q", "v")},
            "memory": {
                "compute_dtype": "float32",
                "param_dtype": "float32",
                "frozen_dtype": "float32",
                "optimizer_dtype": "float32",
                "remat": "dots",
                "accumulate": 1,
                "chunk": 1_024,
                "device_gib": 0.0,
            },
            "export": {"form": "model"},
            "offline": {
                "responses": 6,
                "pairs": 12,
                "labels": "hard",
                "epochs": 2,
                "batch_size": 64,
                "learning_rate": 3e-4,
            },
            "evaluate": {"temperatures": (1.0,), "m": 100, "samples_per_prompt": 4},
            "convergence": {
                "prompts": 128,
                "m": (5, 20, 50, 100, 200, 250, 400),
                "m_full": 600,
                "level": 0.05,
            },
            "sweep": {
                "bon": (),
                "vbon": (),
                "lower_bound": (),
                "lower_bound_estimator": "harmonic",
                "ppo": (),
                "dpo": (),
                "bonbon": (),
                "bon_sft": (),
                "bond": (),
                "m": (),
                "temperatures": (),
                "temperature_m": 64,
                "seeds": 1,
                "at_once": 1,
                "stale_seconds": 60.0,
            },
            "generate": {
                "model": "policy",
                "count": 1,
                "temperature": 1.0,
                "top_k": 0,
                "top_p": 1.0,
            },
            "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        }
    )
    if variant == "text":
        config.tokenizer.vocab_size = 4_096
        config.reference.model = {"layers": 4, "width": 192, "heads": 6, "positions": 128}
        config.reference.fit.update(epochs=8, learning_rate=1e-3, weight_decay=0.1, max_tokens=80)
        config.reward.model = {"layers": 2, "width": 128, "heads": 4, "positions": 128}
        config.reward.fit.update(epochs=4, learning_rate=5e-4, weight_decay=0.1, max_tokens=80)
        config.sampling.max_new_tokens = 40
        config.train.update(iterations=500, ppo_epochs=2, learning_rate=1e-4)
    return config
