"""The proving ground: 6 letters, responses of 4, so every figure is held against enumeration.

    vbon run --config=configs/tabular.py

A small GPT-2 learns strings of a random process (the reference), every response has a fixed random
reward, and vBoN is trained towards the best of n = 8. All 1296 responses are enumerated, so
KL(policy || bon) and the win rate in ``evaluation.json`` under "exact" are exact. On 2 CPU cores it
takes about 2 minutes; expect an exact KL(policy || bon) near 0.1 nats (4.91 before training) and
0.99 of best-of-8's win rate.

    vbon run --config=configs/tabular.py:sweep

holds every method against its own optimum at n = 2, 8, 32 (``tabular.json``, ``report.html``).
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "sweep"):
        raise ValueError(f"configs/tabular.py has no variant {variant!r}: use none, or :sweep")
    model = {"layers": 2, "width": 64, "heads": 4, "positions": 8}
    fit = {
        "epochs": 4,
        "batch_size": 256,
        "learning_rate": 3e-3,
        "weight_decay": 0.0,
        "max_tokens": 8,
    }
    config = ml_collections.ConfigDict(
        {
            "seed": 0,
            "stages": ("sft", "reward", "sample", "train", "export", "evaluate"),
            "data": {
                "corpus": "tabular",
                "path": "",
                "tfds": "",
                "tfds_dir": "",
                "test_path": "",
                "train": 12_000,
                "test": 1_000,
                "ood": 0,
            },
            "prompts": {
                "format": "text",
                "path": "",
                "test_path": "",
                "ood_path": "",
                "train": 1,
                "test": 16,
                "ood": 0,
                "min_tokens": 1,
                "max_tokens": 1,
                "longest": 512,
                "subreddits": (),
                "gap": "\n",
                "template_arguments": "",
            },
            "tokenizer": {"path": "", "kind": "characters", "vocab_size": 6},
            "reference": {"path": "", "model": dict(model), "fit": fit},
            "reward": {
                "path": "",
                "function": "vbon_jax.data.tabular:reward",
                "label": "POSITIVE",
                "score": "logit",
                "template": "{prompt}{response}",
                "max_tokens": 0,
                "weight": 1.0,
                "others": {},
                "missing_eos": "none",
                "missing_eos_value": 0.0,
                "model": dict(model),
                "fit": dict(fit),
            },
            "evaluator": {
                "train": False,
                "path": "",
                "function": "",
                "label": "POSITIVE",
                "score": "logit",
                "template": "{prompt}{response}",
                "max_tokens": 0,
                "model": dict(model),
                "fit": dict(fit),
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
                "ties": "random",
            },
            "bond": {"form": "jeffreys", "jeffreys": 0.5, "anchor_rate": 0.02, "beta": 0.1},
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
                "num_layers_unfrozen": -1,
                "value_network": "head",
                "checkpoint_every": 400,
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
                "responses": 200,
                "pairs": 6_400,
                "labels": "soft",
                "epochs": 4,
                "batch_size": 64,
                "learning_rate": 3e-4,
            },
            "evaluate": {"temperatures": (1.0,), "m": 200, "samples_per_prompt": 64},
            "convergence": {
                "prompts": 1,
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
            bonbon=(2, 8, 32),
            bon_sft=(2, 8, 32),
            bond=(2, 8, 32),
        )
    return config
