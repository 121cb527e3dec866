"""The proving ground: 6 letters, responses of 4, so every figure is held against enumeration.

    vbon run --config=configs/tabular.py

A small GPT-2 learns strings of a random process (the reference), every response has a fixed random
reward, and vBoN is trained towards the best of n = 8. All 1296 responses are enumerated, so
KL(policy || bon) and the win rate in ``evaluation.json`` under "exact" are exact. On 2 CPU cores it
takes about 2 minutes; expect an exact KL(policy || bon) near 0.1 nats (4.91 before training) and
0.99 of best-of-8's win rate.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    model = {"layers": 2, "width": 64, "heads": 4, "positions": 8}
    fit = {
        "epochs": 4,
        "batch_size": 256,
        "learning_rate": 3e-3,
        "weight_decay": 0.0,
        "max_tokens": 8,
    }
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "stages": ("sft", "reward", "sample", "train", "export", "evaluate"),
            "data": {
                "corpus": "tabular",
                "path": "",
                "test_path": "",
                "train": 12_000,
                "test": 1_000,
            },
            "prompts": {
                "path": "",
                "test_path": "",
                "train": 1,
                "test": 16,
                "min_tokens": 1,
                "max_tokens": 1,
            },
            "tokenizer": {"path": "", "kind": "characters", "vocab_size": 6},
            "reference": {"path": "", "model": model, "fit": fit},
            "reward": {
                "path": "",
                "function": "vbon_jax.data.tabular:reward",
                "label": "POSITIVE",
                "score": "logit",
                "model": model,
                "fit": fit,
            },
            "sampling": {
                "temperature": 1.0,
                "max_new_tokens": 4,
                "stop_at_eos": False,
                "batch_size": 256,
            },
            "samples": {"m": 200, "path": ""},
            "method": {
                "name": "vbon",
                "objective": "exact",
                "n": 8.0,
                "beta": 1 / 7,
                "estimator": "interval",
            },
            "train": {
                "iterations": 1_200,
                "batch_size": 512,
                "minibatch_size": 64,
                "ppo_epochs": 4,
                "learning_rate": 1e-3,
                "adam_eps": 1e-5,
                "weight_decay": 0.0,
                "max_grad_norm": 1.0,
                "clip_policy": 0.2,
                "clip_value": 0.2,
                "value_coef": 2.0,
                "gamma": 1.0,
                "lam": 0.95,
                "whiten": True,
                "penalty": "full",
                "checkpoint_every": 400,
                "keep": 2,
            },
            "evaluate": {"temperatures": (1.0,), "m": 200, "samples_per_prompt": 64},
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
