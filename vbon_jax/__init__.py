"""Variational best-of-N alignment in JAX and Flax.

The Python API; each name is imported when it is first used:

    import vbon_jax as vbon

    reference = vbon.load_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    prompts = vbon.prompts(["The film was", "In this comedy"], reference)
    samples = vbon.sample(reference, prompts, m=64, reward=my_reward)
    policy = vbon.train(reference, samples, reward=my_reward, method=vbon.VBoN(n=8))
    print(vbon.evaluate(policy, reference, prompts, reward=my_reward, n=8))

The maths alone is in ``vbon.bon`` and ``vbon.rl``: arrays in, arrays out.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vbon_jax import bon, rl
    from vbon_jax.api import (
        Evaluation,
        Samples,
        amortise,
        evaluate,
        load_model,
        load_reward,
        prompts,
        sample,
        score,
        train,
        train_family,
    )
    from vbon_jax.methods.bon_sft import BoNSFT
    from vbon_jax.methods.bonbon import BoNBoN
    from vbon_jax.methods.bond import BOND
    from vbon_jax.methods.dpo import DPO
    from vbon_jax.methods.jbond import JBOND
    from vbon_jax.methods.ppo import PPO
    from vbon_jax.methods.qrpo import QRPO
    from vbon_jax.methods.vbon import VBoN
    from vbon_jax.sampling.family import Family
    from vbon_jax.sampling.sampler import Sampler
    from vbon_jax.sharding import make_mesh
    from vbon_jax.training.options import Lora, Memory, Offline

# Where each name comes from: "" for a package of its own.
_FROM = {
    "bon": "",
    "rl": "",
    **dict.fromkeys(
        (
            "Evaluation", "Samples", "amortise", "evaluate", "load_model", "load_reward", "prompts",
            "sample", "score", "train", "train_family",
        ),
        "api",
    ),
    "VBoN": "methods.vbon",
    "PPO": "methods.ppo",
    "BOND": "methods.bond",
    "JBOND": "methods.jbond",
    "DPO": "methods.dpo",
    "QRPO": "methods.qrpo",
    "BoNBoN": "methods.bonbon",
    "BoNSFT": "methods.bon_sft",
    "Family": "sampling.family",
    "Sampler": "sampling.sampler",
    "Lora": "training.options",
    "Memory": "training.options",
    "Offline": "training.options",
    "make_mesh": "sharding",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports a name of the API."""
    if name not in _FROM:
        raise AttributeError(f"module 'vbon_jax' has no attribute {name!r}")
    if not _FROM[name]:
        return importlib.import_module(f"vbon_jax.{name}")
    return getattr(importlib.import_module(f"vbon_jax.{_FROM[name]}"), name)


def __dir__() -> list[str]:
    """The names of the API."""
    return sorted(_FROM)


__all__ = [
    "BOND",
    "DPO",
    "JBOND",
    "PPO",
    "QRPO",
    "BoNBoN",
    "BoNSFT",
    "Evaluation",
    "Family",
    "Lora",
    "Memory",
    "Offline",
    "Sampler",
    "Samples",
    "VBoN",
    "amortise",
    "bon",
    "evaluate",
    "load_model",
    "load_reward",
    "make_mesh",
    "prompts",
    "rl",
    "sample",
    "score",
    "train",
    "train_family",
]
