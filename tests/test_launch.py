"""What `launch/` starts, without the programs it starts."""

import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import pytest

from tests.stages.test_adoption import ASKED, M, lines, vbon, write
from tests.stages.test_adoption import first as first
from tests.stages.test_adoption import place as place
from vbon_jax.data import tokenizer as tokenizers

LAUNCH = Path(__file__).parents[1] / "launch"
STAGES = {"stages": "('sft','reward','sample')", "prompts__date": "2024-02-29"}


@pytest.fixture(scope="module")
def sample_vllm():
    spec = importlib.util.spec_from_file_location("sample_vllm", LAUNCH / "sample_vllm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorded:
    """vLLM's `LLM`, of which the answers are known: the fields of RequestOutput that are read."""

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers, self.asked = tokenizer, answers, {}

    def __call__(self, model, **settings):
        self.asked = settings
        return self

    def get_tokenizer(self):
        return self.tokenizer

    def generate(self, prompts, params):
        self.asked |= vars(params)
        return [
            types.SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[
                    types.SimpleNamespace(
                        text="not read", token_ids=tuple(ids), cumulative_logprob=log_prob,
                        finish_reason="stop" if finished else "length",
                    )
                    for ids, log_prob, finished in zip(
                        line["response_tokens"], line["log_probs"], line["finished"]
                    )
                ],
            )
            for prompt, line in zip(prompts, self.answers, strict=True)
        ]  # fmt: skip


@pytest.fixture
def drawn(place, first, sample_vllm, tmp_path, monkeypatch):
    """The file of a vLLM that draws what the run ``first`` drew, and what it was asked for."""
    tokenizer = tokenizers.load(place / "lm")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "strftime_now('%d %b %Y')", "'29 Feb 2024'"
    )
    answers = lines(first / "samples" / "train.jsonl")
    fake = Recorded(tokenizer, answers)
    parameters = types.SimpleNamespace
    monkeypatch.setitem(
        sys.modules, "vllm", types.SimpleNamespace(LLM=fake, SamplingParams=parameters)
    )
    asked = [{"messages": [{"role": "user", "content": text}]} for text in ASKED]
    write(tmp_path / "asked.jsonl", asked)
    out = tmp_path / "vllm.jsonl"
    sample_vllm.main([
        f"--model={place / 'lm'}", f"--prompts={tmp_path / 'asked.jsonl'}", f"--out={out}",
        f"--m={M}", "--max_new_tokens=6",
    ])  # fmt: skip
    return out, fake.asked


def test_samples_of_vllm_are_scored_and_become_the_samples_of_the_run(
    place, first, drawn, tmp_path
):
    out, asked = drawn
    assert asked["logprobs_mode"] == "processed_logprobs"
    assert (asked["n"], asked["max_tokens"], asked["temperature"]) == (M, 6, 1.0)
    assert (asked["top_p"], asked["top_k"], asked["min_p"]) == (1.0, 0, 0.0)
    assert vbon(place, "run", tmp_path / "run", samples__path=out, **STAGES) == 0
    found = lines(tmp_path / "run" / "samples" / "train.jsonl")
    for line, expected in zip(found, lines(first / "samples" / "train.jsonl"), strict=True):
        assert line.pop("rewards") == pytest.approx(expected.pop("rewards"), abs=1e-5)
        assert (line.pop("top_k"), line.pop("top_p")) == (0, 1.0)
        assert line == expected


def test_samples_of_another_model_or_without_enough_responses_are_refused(
    place, drawn, tmp_path, capfd
):
    out, _ = drawn
    rows = [json.loads(x) for x in out.read_text().splitlines()]
    capfd.readouterr()
    for change, said in (
        ({"log_probs": [1.2 * x for x in rows[0]["log_probs"]]}, "log_probs of prompt="),
        ({"top_k": 20}, "with top_k=20"),
        ({k: rows[0][k][:2] for k in ("responses", "response_tokens", "log_probs", "finished")},
         "has 2 responses, samples.m=4 are needed"),
        ({"rewards": [0.0] * M}, "prompt 1 has no 'rewards', prompt 0 has"),
    ):  # fmt: skip
        write(tmp_path / "bad.jsonl", [rows[0] | change, *rows[1:]])
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        bad = {"samples__path": tmp_path / "bad.jsonl"} | STAGES
        assert vbon(place, "run", tmp_path / "run", **bad) == 2
        assert said in capfd.readouterr().err
