"""Other programs that draw responses, given the same weights: transformers and vLLM."""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from vbon_jax.bench.sampling import Engine
from vbon_jax.models import hf
from vbon_jax.models.lm import LanguageModel

NEEDS = {"transformers": "torch", "vllm": "vllm"}  # the package an engine is there with


def installed() -> list[str]:
    """The engines that this environment has."""
    return [name for name, package in NEEDS.items() if importlib.util.find_spec(package)]


@contextlib.contextmanager
def directory(model: LanguageModel) -> Iterator[str]:
    """Writes a model's weights as a Hugging Face directory, which is removed at the end."""
    with tempfile.TemporaryDirectory() as path:
        hf.save_decoder(
            path, model.config, model.params, ids=hf.TokenIds(None, None, None), like=model.source
        )
        yield path


def transformers(path: str) -> Engine:
    """`generate` of transformers, in float32, with its cache of keys and values.

    Args:
      path: of `directory`.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")

    def draw(ids_BxP: np.ndarray, new: int) -> int:
        ids = torch.tensor(ids_BxP, device=model.device)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
                min_new_tokens=new, max_new_tokens=new, pad_token_id=0,
            )  # fmt: skip
        return out[:, ids.shape[1] :].numel()

    return draw


def vllm(path: str) -> Engine:
    """vLLM, with its prefix cache, in its own choice of batches.

    Args:
      path: of `directory`.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(path, dtype="float32", skip_tokenizer_init=True)

    def draw(ids_BxP: np.ndarray, new: int) -> int:
        params = SamplingParams(
            temperature=1.0, top_k=0, top_p=1.0, max_tokens=new, ignore_eos=True, detokenize=False
        )
        prompts: list[Any] = [{"prompt_token_ids": row} for row in ids_BxP.tolist()]
        return sum(len(x.outputs[0].token_ids) for x in llm.generate(prompts, params))

    return draw


ENGINES = {"transformers": transformers, "vllm": vllm}
