"""``vbon generate``: responses to prompts of the command line."""

import dataclasses
import json
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vbon_jax import processes
from vbon_jax.bon.references import References, references
from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import samples as sample_files
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples
from vbon_jax.data.sources import chat
from vbon_jax.errors import InputError
from vbon_jax.evaluation import compare
from vbon_jax.evaluation.corrected import Corrected
from vbon_jax.progress import log
from vbon_jax.rewards.base import Reward
from vbon_jax.sampling import samples
from vbon_jax.sampling.requests import requests_for
from vbon_jax.sampling.responses import Response
from vbon_jax.sampling.sampler import Sampler
from vbon_jax.stages import loading, sources
from vbon_jax.stages.base import Run
from vbon_jax.training.references import orders


class Answer(NamedTuple):
    """A response that is printed, and those it was chosen from: none, or itself among others."""

    response: Response
    candidates: Sequence[Response]


def run(run: Run, texts: Sequence[str], best_of: int | None = None) -> None:
    """Prints responses to the given prompts, one JSON object a line, as soon as they are drawn.

    Args:
      run: the run whose models are used.
      texts: the prompts.
      best_of: print the best of so many responses of ``generate.model``, and all of them as its
        "candidates"; None for what the config says.

    Raises:
      InputError: a prompt that is too long, or options that do not go together.
    """
    with jax.set_mesh(run.mesh):
        for text, row in zip(texts, _generated(run, texts, best_of), strict=True):
            for answer in row:
                line = {"prompt": text} | _line(answer.response)
                if best_of is not None:
                    line["candidates"] = [_line(r) for r in answer.candidates]
                _print(json.dumps(line, ensure_ascii=False))


def stream(run: Run, texts: Sequence[str]) -> None:
    """Prints responses to the given prompts as they are written: plain text, after the prompt.

    Args:
      run: the run whose models are used.
      texts: the prompts.

    Raises:
      InputError: a prompt that is too long, or a model that chooses among whole responses.
    """
    g = run.config.generate
    if g.model in ("bon", "corrected"):
        raise InputError(
            f"--stream: generate.model={g.model} chooses among whole responses; leave out "
            "--stream, or use generate.model=policy or reference"
        )
    with jax.set_mesh(run.mesh):
        model, prompts, _ = _asked(run, texts)
        text_of = {p.id: text for p, text in zip(prompts, texts, strict=True)}
        requests = requests_for(prompts, g.count)
        begins = True
        for request, piece, ends in model.streamed(
            run.key("generate"), requests, min(run.config.sampling.batch_size, len(requests))
        ):
            if begins:
                is_chat = run.config.prompts.format == "chat"
                _print(text_of[request.prompt_id], end="\n" if is_chat else "")
            _print(piece, end="\n" if ends else "")
            begins = ends


def _print(text: str, end: str = "\n") -> None:
    """To standard output, at once; of a run of several processes in the first."""
    if processes.first():
        print(text, end=end, flush=True)


def _line(response: Response) -> dict[str, Any]:
    return {"response": response.text, "reward": response.reward}


def _prompts(run: Run, texts: Sequence[str], model: Sampler) -> list[Prompt]:
    """The prompts as the run was trained on them: of a chat run, messages of the user."""
    if run.config.prompts.format != "chat":
        return prompt_files.from_texts(list(texts), model.tokenizer)
    found = [chat.Conversation((("user", text),), f"--prompt={text!r}") for text in texts]
    rendering = sources.rendering(run.config, run.workdir)
    return chat.prompts(found, model.tokenizer, rendering, run.config.prompts.longest)


def _is_whole(path: Path) -> bool:
    """Whether a samples file of one prompt has its line."""
    return path.exists() and path.read_bytes().endswith(b"\n")


def _corrected(
    run: Run, policy: Sampler, prompts: Sequence[Prompt], reward: Reward
) -> list[list[Response]]:
    """Responses of best-of-n, drawn by the policy; the reference samples they need are kept."""
    s = run.config
    g, n = s.generate, _n(run)
    for key, value, default in (("top_k", g.top_k, 0), ("top_p", g.top_p, 1.0)):
        if value != default:
            raise InputError(
                f"generate.{key}={value}: generate.model=corrected needs the density of what it "
                f"draws, that of the whole distribution; set {key}={default}"
            )
    reference = loading.reference(run).at(temperature=g.temperature)
    prompts = [dataclasses.replace(p, id=_id(p)) for p in prompts]
    if s.samples.amortised:
        _check_temperature(run)
        table = loading.unsampled(run, prompts, reference, reward)
    else:
        table = _sampled(run, prompts, reference, reward)
    served, cost = Corrected(
        policy, reference, reward, table, n,
        s.method.estimator, g.bound, g.tries, s.sampling.batch_size,
    ).responses(run.key("generate"), prompts, g.count)  # fmt: skip
    each = cost.proposals / cost.responses
    log(
        f"generate: {each:.2f} proposals and {cost.tokens / cost.responses:.1f} tokens a response, "
        f"where best-of-n draws {n:g}; {cost.spare} more were drawn in free rows"
    )
    if cost.fallbacks:
        log(
            f"generate: of {cost.fallbacks} of {cost.responses} responses none of generate.tries="
            f"{g.tries} proposals was kept, so one of them was taken by its weight"
        )
    return served


def _check_temperature(run: Run) -> None:
    """Raises InputError unless responses are drawn at the temperature that the head has learned."""
    trained, asked = run.config.sampling.temperature, run.config.generate.temperature
    if asked != trained:
        raise InputError(
            f"generate.temperature={asked:g}: the head of samples.amortised knows rewards at "
            f"sampling.temperature={trained:g}; set them alike, or samples.amortised=False"
        )


def _sampled(run: Run, prompts: Sequence[Prompt], reference: Sampler, reward: Reward) -> References:
    """The rewards of samples.m reference samples of each prompt, which are drawn once and kept."""
    s = run.config
    g, m = s.generate, s.samples.m
    found: list[PromptSamples] = []
    for prompt in prompts:
        path = run.workdir.given(prompt.tokens, g.temperature, m)
        if not processes.by_first(partial(_is_whole, path)):
            with run.workdir.locked():
                samples.write(
                    path, reference, run.key("given"), [prompt], range(m),
                    min(s.sampling.batch_size, m), (reward, None),
                    f"reference samples of {prompt.text!r}",
                )  # fmt: skip
        found += sample_files.samples_of(path, [prompt], m)
    by_order = s.method.ties == "order"
    return references(
        sample_files.rewards(found, m), s.method.estimator,
        orders(found, m, reference) if by_order else None,
    )  # fmt: skip


def _id(prompt: Prompt) -> int:
    """Of its tokens alone, so that it has the same samples and responses in any call."""
    return zlib.crc32(np.array(prompt.tokens, np.int32).tobytes()) & 0x7FFFFFFF


def _n(run: Run) -> float:
    """The n of best-of-n that is generated for: of a family the one asked for, or its largest."""
    return run.config.method.top if run.wanted.n is None else run.wanted.n


def _asked(run: Run, texts: Sequence[str]) -> tuple[Sampler, list[Prompt], Reward]:
    """The model that the config names, as it draws here; the prompts; the run's reward."""
    g = run.config.generate
    of_policy = g.model in ("policy", "corrected")
    if of_policy and run.config.method.is_family:
        model = loading.family(run).at(_n(run))
    else:
        model = loading.policy(run) if of_policy else loading.reference(run)
    prompts = _prompts(run, texts, model)
    score = loading.reward(run, model.tokenizer)
    loading.check_lengths(run, prompts, model, score)
    return model.at(temperature=g.temperature, top_k=g.top_k, top_p=g.top_p), prompts, score


def _generated(run: Run, texts: Sequence[str], best_of: int | None) -> Iterator[list[Answer]]:
    """``generate.count`` responses to each prompt in turn, from the model the config names."""
    s = run.config
    g = s.generate
    if best_of is not None and g.model in ("bon", "corrected"):
        raise InputError(
            f"--best_of={best_of}: generate.model={g.model} is best-of-n by itself, with "
            f"n={_n(run):g}; use generate.model=policy or reference"
        )
    model, prompts, score = _asked(run, texts)
    if g.model == "corrected":
        for row in _corrected(run, model, prompts, score):
            yield [Answer(r, ()) for r in row]
        return
    if g.model == "bon" and not _n(run).is_integer():
        raise InputError(f"n={_n(run):g}: generate.model=bon needs a whole number")
    n = int(_n(run)) if g.model == "bon" else best_of or 1
    requests = requests_for(prompts, g.count * n)
    drawn: list[Response] = []
    for group in model.responses(
        run.key("generate"), prompts, requests, min(s.sampling.batch_size, len(requests)), score
    ):
        drawn += group
        while len(drawn) >= g.count * n:
            row, drawn = drawn[: g.count * n], drawn[g.count * n :]
            chosen = compare.best_of(np.array([[r.reward for r in row]]), n)[0]
            yield [Answer(row[at], row[at - at % n :][:n]) for at in chosen]
