"""``vbon generate``: responses to prompts of the command line."""

import json
from collections.abc import Sequence

import jax
import numpy as np

from vbon_jax.data import prompts as prompt_files
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.sources import chat
from vbon_jax.errors import InputError
from vbon_jax.evaluation import compare, measure
from vbon_jax.sampling.requests import requests_for
from vbon_jax.sampling.sampler import Response, Sampler
from vbon_jax.stages import loading, sources
from vbon_jax.stages.base import Run


def run(run: Run, texts: Sequence[str]) -> None:
    """Prints responses to the given prompts, one JSON object a line."""
    with jax.set_mesh(run.mesh):
        rows = _generated(run, texts)
    for text, row in zip(texts, rows, strict=True):
        for r in row:
            line = {"prompt": text, "response": r.text, "reward": r.reward}
            print(json.dumps(line, ensure_ascii=False))


def _prompts(run: Run, texts: Sequence[str], model: Sampler) -> list[Prompt]:
    """The prompts as the run was trained on them: of a chat run, messages of the user."""
    if run.config.prompts.format != "chat":
        return prompt_files.from_texts(list(texts), model.tokenizer)
    found = [chat.Conversation((("user", text),), f"--prompt={text!r}") for text in texts]
    rendering = sources.rendering(run.config, run.workdir)
    return chat.prompts(found, model.tokenizer, rendering, run.config.prompts.longest)


def _generated(run: Run, texts: Sequence[str]) -> list[list[Response]]:
    """``generate.count`` responses to each prompt, from the model the config names."""
    s = run.config
    g = s.generate
    model = loading.policy(run) if g.model == "policy" else loading.reference(run)
    prompts = _prompts(run, texts, model)
    score = loading.reward(run, model.tokenizer)
    loading.check_lengths(run, prompts, model, score)
    bon = g.model == "bon"
    if bon and not float(s.method.n).is_integer():
        raise InputError(f"method.n={s.method.n}: generate.model=bon needs a whole number")
    each = g.count * (int(s.method.n) if bon else 1)
    requests = requests_for(prompts, each)
    drawn: list[Response] = []
    for group in model.at(temperature=g.temperature, top_k=g.top_k, top_p=g.top_p).responses(
        run.key("generate"), prompts, requests, min(s.sampling.batch_size, len(requests)), score
    ):
        drawn += group
    rows = measure.grouped(drawn, each)
    if bon:
        rewards = np.array([[r.reward for r in row] for row in rows])
        chosen = compare.best_of(rewards, int(s.method.n))
        rows = [[row[i] for i in columns] for row, columns in zip(rows, chosen)]
    return rows
