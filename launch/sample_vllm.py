#!/usr/bin/env python3
"""Draws reference samples with vLLM and writes a samples file that vbon_jax scores and learns from.

    python launch/sample_vllm.py --model=Qwen/Qwen3-0.6B --prompts=train.jsonl --m=64 \
        --max_new_tokens=64 --out=samples.jsonl
    vbon run --config=... --config.reference.path=Qwen/Qwen3-0.6B --config.samples.m=64 \
        --config.samples.path=samples.jsonl --config.sampling.max_new_tokens=64

Prompts are lines {"prompt": text} or {"messages": [{"role", "content"}, ...]}, which the model's
chat template renders. Needs vLLM 0.10.1 or later in the environment that runs it, which need not
have vbon_jax. Nothing is filtered: top_k and top_p are off, so that it is the reference that is
sampled. The rewards are given by the run that reads the file.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def prompts(path: str, tokenizer: Any) -> list[dict[str, Any]]:
    """The prompts' ids, and their messages where they have any."""
    found = []
    for line in filter(str.strip, Path(path).read_text(encoding="utf-8").splitlines()):
        record = json.loads(line)
        messages = record.get("messages")
        if messages:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(record["prompt"])["input_ids"]
        found.append({"prompt_token_ids": ids, "messages": messages, "text": record.get("prompt")})
    return found


def record(prompt: dict[str, Any], output: Any, tokenizer: Any, temperature: float) -> Any:
    """A line of the samples file; a response's text is what its ids say after the prompt."""
    ids = list(output.prompt_token_ids)
    rows = [list(x.token_ids) for x in output.outputs]
    finished = [x.finish_reason == "stop" for x in output.outputs]
    before = len(tokenizer.decode(ids))
    texts = [
        tokenizer.decode(ids + (row[:-1] if ended else row))[before:]
        for row, ended in zip(rows, finished)
    ]
    line = {
        "prompt": tokenizer.decode(ids) if prompt["messages"] else prompt["text"],
        "responses": texts,
        "prompt_tokens": ids,
        "response_tokens": rows,
        "log_probs": [x.cumulative_logprob for x in output.outputs],
        "finished": finished,
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
    }
    return line | ({"messages": prompt["messages"]} if prompt["messages"] else {})


def main(argv: list[str] | None = None) -> None:
    """Draws the samples; those of a prompt are a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", required=True, help="reference.path of the run")
    parser.add_argument("--prompts", required=True, help="JSON lines")
    parser.add_argument("--out", required=True, help="the samples file to write")
    parser.add_argument("--m", type=int, required=True, help="samples.m of the run")
    parser.add_argument("--max_new_tokens", type=int, required=True, help="sampling.max_new_tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling.temperature")
    parser.add_argument("--dtype", default="auto", help="of the weights and of the arithmetic")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    from vllm import LLM, SamplingParams

    # By default vLLM tells log-probs from before the temperature: of another distribution.
    llm = LLM(given.model, dtype=given.dtype, seed=given.seed, logprobs_mode="processed_logprobs")
    tokenizer = llm.get_tokenizer()
    of = prompts(given.prompts, tokenizer)
    params = SamplingParams(
        n=given.m, temperature=given.temperature, top_p=1.0, top_k=0, min_p=0.0,
        max_tokens=given.max_new_tokens, logprobs=0, seed=given.seed,
    )  # fmt: skip
    ids = [{"prompt_token_ids": x["prompt_token_ids"]} for x in of]
    outputs = llm.generate(ids, params)
    with open(given.out, "w", encoding="utf-8") as file:
        for prompt, output in zip(of, outputs, strict=True):
            line = record(prompt, output, tokenizer, given.temperature)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
