"""Whole runs of the command line on miniature worlds, in this process."""

import collections
import dataclasses
import fcntl
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
import transformers

from vbon_jax import cli, methods
from vbon_jax.bon import log_f
from vbon_jax.data import samples as sample_files
from vbon_jax.data import tabular as tabular_world
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.sources import reviews
from vbon_jax.evaluation import calibration
from vbon_jax.methods import bon_sft, learning
from vbon_jax.models import hf
from vbon_jax.sampling.sampler import Sampler
from vbon_jax.training import learner, offline

ROOT = Path(__file__).parents[2]
TABULAR = [
    "--config.reference.fit.epochs=1",
    "--config.data.train=600",
    "--config.samples.m=16",
    "--config.prompts.test=4",
    "--config.sampling.batch_size=64",
    "--config.reference.model.layers=1",
    "--config.reference.model.width=16",
    "--config.reference.model.heads=2",
    "--config.train.iterations=4",
    "--config.train.batch_size=32",
    "--config.train.minibatch_size=16",
    "--config.train.ppo_epochs=2",
    "--config.train.checkpoint_every=1",
    "--config.evaluate.m=16",
    "--config.evaluate.samples_per_prompt=2",
]


def vbon(stage, workdir, *flags, config="tabular"):
    """Exit code of a command line."""
    base, variant = (TABULAR, ":ppo") if config == "tabular" else ([], "")
    path = ROOT / "configs" / f"{config}.py{variant}"
    return cli.main([stage, f"--config={path}", f"--workdir={workdir}", *base, *flags])


def policy(workdir):
    return hf.load_decoder(workdir / "policy")[1]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        if isinstance(x, dict):
            assert_same(x, b[name])
        else:
            np.testing.assert_array_equal(x, b[name], err_msg=name)


@pytest.fixture(scope="module")
def tabular(tmp_path_factory):
    """A finished run of the tabular world."""
    workdir = tmp_path_factory.mktemp("tabular")
    assert vbon("run", workdir) == 0
    return workdir


def test_a_run_leaves_everything_behind(tabular):
    for name in (
        "config.json", "tokenizer/tokenizer.json", "reference/model.safetensors",
        "samples/train.jsonl", "checkpoints/train", "policy/config.json", "metrics.jsonl",
        "tensorboard", "evaluation.json", "evaluation.md", "evaluation_samples.jsonl",
        "figures/training_curves.png", "figures/reward_histograms.png",
        "figures/win_rate_vs_kl.png",
    ):  # fmt: skip
        assert (tabular / name).exists(), name
    metrics = [json.loads(line) for line in (tabular / "metrics.jsonl").open()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    for name in (
        "objective", "kl_ref", "kl_bon", "reward", "response_length", "eos_rate",
        "truncation_rate", "entropy", "policy_clip_fraction", "value_clip_fraction",
        "explained_variance", "seconds_rollout", "seconds_reward", "seconds_update",
        "tokens_per_second",
    ):  # fmt: skip
        assert all(np.isfinite(m[name]) for m in metrics), name
    assert all(m["first_approx_kl"] < 1e-9 for m in metrics)  # the ratio is 1 at first
    assert all(m["rollout_log_prob_error"] < 1e-5 for m in metrics)


def test_evaluation_has_the_promised_layout(tabular):
    result = json.loads((tabular / "evaluation.json").read_text())
    assert [row["policy"] for row in result["rows"]] == ["reference", "bon", "vbon"]
    for row in result["rows"]:
        assert {
            "policy", "n", "temperature", "reward", "win_rate", "win_rate_ci95", "kl_ref",
            "kl_ref_ci95", "kl_bon", "responses_per_second", "tokens_per_second",
        } <= row.keys()  # fmt: skip
        low, high = row["win_rate_ci95"]
        assert low <= row["win_rate"] <= high
    exact = result["exact"]
    assert {"kl_bon", "kl_ref", "win_rate", "bon_win_rate", "bon_kl"} <= exact.keys()
    # Best-of-8 of an injective reward with no heavy string: both facts of theory, exactly.
    assert exact["bon_kl"] == pytest.approx(np.log(8) - 7 / 8, abs=0.02)
    assert exact["bon_win_rate"] == pytest.approx(8 / 9, abs=0.005)
    assert exact["reference_kl_bon"] == pytest.approx(7 - np.log(8), abs=0.2)
    assert exact["kl_bon"] > 0 and exact["kl_ref"] > 0


def test_running_again_changes_nothing(tabular, capfd):
    before = {p: p.stat().st_mtime_ns for p in tabular.rglob("*.safetensors")}
    assert vbon("run", tabular) == 0
    assert capfd.readouterr().err.count("complete already") == 6
    assert before == {p: p.stat().st_mtime_ns for p in tabular.rglob("*.safetensors")}


def test_changed_settings_are_refused(tabular, capfd):
    assert vbon("run", tabular, "--config.method.n=4") == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert "method.n=8.0, now it is 4.0" in message and "checkpoints/train" in message
    # What only sets the pace may change.
    assert vbon("run", tabular, "--config.train.keep=5", "--config.sampling.batch_size=32") == 0


def test_transformers_loads_the_policy_with_the_same_log_probs(tabular):
    model = transformers.AutoModelForCausalLM.from_pretrained(tabular / "policy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tabular / "policy")
    line = json.loads(
        next((tabular / "samples").glob("test_opponents_t1_m16_*.jsonl")).open().readline()
    )
    assert tokenizer(line["prompt"], add_special_tokens=False)["input_ids"] == line["prompt_tokens"]
    reference_model = transformers.AutoModelForCausalLM.from_pretrained(tabular / "reference")
    prompt = line["prompt_tokens"]
    for response, log_prob in zip(line["response_tokens"], line["log_probs"]):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            log_p = reference_model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = log_p.gather(1, torch.tensor(response)[:, None]).sum()
        assert float(total) == pytest.approx(log_prob, abs=1e-4)
    assert model.config.vocab_size == 6


def test_a_cut_run_equals_the_uncut_one_bit_for_bit(tabular, tmp_path):
    """SIGTERM in the second iteration: saved, exit code 143, and the same end after going on."""
    calls = 0

    def reward(prompts, responses):
        nonlocal calls
        calls += 1
        if calls == 2 and len(responses) == 32:
            os.kill(os.getpid(), signal.SIGTERM)
        from vbon_jax.data.tabular import reward as table

        return table(prompts, responses)

    sys.modules["cut_reward"] = types.SimpleNamespace(reward=reward)
    onwards(tabular, tmp_path, "sft")
    for stage in ("reward", "sample"):
        calls = 10
        assert vbon(stage, tmp_path, "--config.reward.function=cut_reward:reward") == 0
    calls = 0
    assert vbon("train", tmp_path, "--config.reward.function=cut_reward:reward") == 143
    assert [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").open()] == [1, 2]
    # A line of a step that no checkpoint holds must not stay: it will be written again.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "objective": 0.0}\n{"step": 4, "obj')
    assert vbon("train", tmp_path, "--config.reward.function=cut_reward:reward") == 0
    assert [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").open()] == [1, 2, 3, 4]
    assert vbon("export", tmp_path, "--config.reward.function=cut_reward:reward") == 0
    assert_same(policy(tmp_path), policy(tabular))
    uncut = [json.loads(x) for x in (tabular / "metrics.jsonl").open()]
    for a, b in zip(uncut, [json.loads(x) for x in (tmp_path / "metrics.jsonl").open()]):
        assert a["objective"] == b["objective"] and a["grad_norm"] == b["grad_norm"]


def test_a_start_that_is_cut_goes_on_and_ends_as_the_uncut_one(tabular, tmp_path, monkeypatch):
    """SIGTERM in the second pass of the start, then in training's second iteration."""
    flags = [
        "--config.train.start=weighted", "--config.offline.pairs=64", "--config.offline.epochs=3",
        "--config.offline.batch_size=4", "--config.offline.learning_rate=1e-2",
    ]  # fmt: skip
    cut, uncut = tmp_path / "cut", tmp_path / "uncut"
    for workdir in (cut, uncut):
        onwards(tabular, workdir, "sft", "reward", "sample")
    assert vbon("train", uncut, *flags) == 0
    calls = []
    rows, score = learning._Examples.rows, learner.Learner.score

    def cut_in(original, call):
        def counted(*args):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        return counted

    for owner, name, original in (
        (learning._Examples, "rows", rows), (learner.Learner, "score", score),
    ):  # fmt: skip
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, cut_in(original, 2))
            assert vbon("train", cut, *flags) == 143
        assert (cut / "checkpoints" / "train").exists() == (owner is learner.Learner)
    assert vbon("train", cut, *flags) == 0
    for workdir in (cut, uncut):
        assert vbon("export", workdir, *flags) == 0
        starts = [json.loads(x) for x in (workdir / "start" / "metrics.jsonl").open()]
        assert [x["step"] for x in starts] == [1, 2, 3, 4, 5]  # 48 steps, 10 a pass
        assert [json.loads(x)["step"] for x in (workdir / "metrics.jsonl").open()] == [1, 2, 3, 4]
    assert_same(policy(cut), policy(uncut))
    # Training began where the start had ended, not as the reference.
    begun, fresh = (
        json.loads((x / "metrics.jsonl").open().readline())["kl_ref"] for x in (uncut, tabular)
    )
    assert begun > 0.05 > 1e-3 > fresh


def test_a_replay_that_is_cut_goes_on_and_ends_as_the_uncut_one(tabular, tmp_path, monkeypatch):
    flags = [
        "--config.train.start=replay",
        "--config.offline.pairs=64",
        "--config.offline.epochs=2",
    ]
    cut, uncut = tmp_path / "cut", tmp_path / "uncut"
    for workdir in (cut, uncut):
        for name in ("prompts", "samples", "tokenizer", "reference", "stages"):
            shutil.copytree(tabular / name, workdir / name)
        for stage in ("train", "export", "evaluate", "report"):
            (workdir / "stages" / f"{stage}.json").unlink(missing_ok=True)
        shutil.copy(tabular / "config.json", workdir)
    assert vbon("train", uncut, *flags) == 0
    calls, score = [], learner.Learner.score

    def counted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*args)

    with monkeypatch.context() as patch:
        patch.setattr(learner.Learner, "score", counted)
        assert vbon("train", cut, *flags) == 143
    assert not (cut / "checkpoints" / "train").exists()
    assert vbon("train", cut, *flags) == 0
    for workdir in (cut, uncut):
        assert vbon("export", workdir, *flags) == 0
        starts = [json.loads(x) for x in (workdir / "start" / "metrics.jsonl").open()]
        assert [x["step"] for x in starts] == [1, 2, 3, 4]  # 2 x 64 samples, 32 an iteration
        assert starts[0]["kl_ref"] < 1e-6 < starts[-1]["kl_ref"]
        assert "eos_rate" not in starts[0]  # of rollouts, which these are not
    assert_same(policy(cut), policy(uncut))


def test_stages_say_what_they_miss(tmp_path, capfd):
    for stage, maker in (
        ("reward", "sft"), ("sample", "sft"), ("train", "sft"), ("export", "train"),
        ("evaluate", "sft"),
    ):  # fmt: skip
        assert vbon(stage, tmp_path / stage) == 2
        error = capfd.readouterr().err.strip()
        assert error.startswith("vbon: ") and f"run `vbon {maker}`" in error and "\n" not in error


def test_an_averaged_policy_is_measured_beside_the_last_iterate(tabular, tmp_path):
    for name in ("prompts", "samples", "tokenizer", "reference", "stages"):
        shutil.copytree(tabular / name, tmp_path / name)
    for stage in ("train", "export", "evaluate", "report"):
        (tmp_path / "stages" / f"{stage}.json").unlink(missing_ok=True)
    shutil.copy(tabular / "config.json", tmp_path)
    flags = ["--config.train.average_half_life=2"]
    for stage in ("train", "export", "evaluate"):
        assert vbon(stage, tmp_path, *flags) == 0
    average, last = (hf.load_decoder(tmp_path / x)[1] for x in ("policy", "last_iterate"))
    assert_same(last, policy(tabular))  # the same training, with an average beside it
    assert np.abs(average["wte"] - last["wte"]).max() > 1e-4
    rows = {x["policy"]: x for x in json.loads((tmp_path / "evaluation.json").read_text())["rows"]}
    assert list(rows) == ["reference", "bon", "vbon", "vbon, last iterate"]
    plain = json.loads((tabular / "evaluation.json").read_text())["rows"][2]
    for name in ("reward", "win_rate", "kl_ref", "kl_bon"):
        assert rows["vbon, last iterate"][name] == pytest.approx(plain[name], abs=1e-4), name
    assert rows["vbon"]["kl_ref"] != rows["vbon, last iterate"]["kl_ref"]


def test_a_run_with_adaptive_samples_trains_on_what_each_prompt_has(tabular, tmp_path, capfd):
    """The value head too, which takes as many of each as all have."""
    onwards(tabular, tmp_path, "sft")
    flags = ["--config.samples.adaptive=1.0", "--config.samples.m=64"]
    flags += ["--config.train.iterations=2", "--config.sampling.temperature=0.4"]
    stages = "--config.stages=('sft','reward','sample','train','export')"
    assert vbon("run", tmp_path, stages, *flags) == 0
    err = capfd.readouterr().err
    assert re.search(r"sample: \d+ of 64 responses were drawn, \d+% saved; 0 of 1 prompts", err)
    counts = {len(x.rewards) for x in sample_files.read(tmp_path / "samples" / "train.jsonl")}
    assert max(counts) < 64
    assert (tmp_path / "policy" / "model.safetensors").exists()


def test_a_run_with_a_head_trains_and_serves_prompts_without_samples(tmp_path, capfd, monkeypatch):
    """Of 6 prompts 5 are sampled; the head is fitted once, and asked again before it is used."""
    flags = ["--config.samples.amortised=True", "--config.samples.prompts=5"]
    flags += ["--config.prompts.train=6", "--config.train.iterations=2"]
    stages = "--config.stages=('sft','reward','sample','train','export')"
    assert vbon("run", tmp_path, stages, *flags) == 0
    assert re.search(r"amortised: F of 5 held-out prompts is 0\.\d+ off", capfd.readouterr().err)
    assert len(sample_files.read(tmp_path / "samples" / "train.jsonl")) == 5
    (head,) = (tmp_path / "samples").glob("head_*.npz")
    told = json.loads(head.with_suffix(".json").read_text())
    assert told["holds"] and told["prompts"] == 5 and told["samples"] == 80
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert all(np.isfinite(m["kl_bon"]) for m in metrics)
    flags += ["--config.generate.model=corrected", "--config.generate.count=2", "--prompt=f"]
    assert vbon("generate", tmp_path, *flags) == 0
    captured = capfd.readouterr()
    assert len(captured.out.splitlines()) == 2 and "proposals" in captured.err
    assert "amortised:" not in captured.err  # not fitted again
    assert not list((tmp_path / "samples").glob("given_*"))  # nor any sample drawn
    assert vbon("generate", tmp_path, *flags, "--config.generate.temperature=0.5") == 2
    assert "generate.temperature=0.5: the head of samples.amort" in capfd.readouterr().err
    monkeypatch.setattr(calibration, "MOST_ERROR", -1.0)
    assert vbon("generate", tmp_path, *flags) == 2
    assert "the head does not know the rewards of prompts" in capfd.readouterr().err


def test_generate_prints_json_lines(tabular, capfd):
    flags = ["--config.generate.count=3", "--config.generate.top_k=1", "--prompt=a"]
    assert vbon("generate", tabular, *flags) == 0
    lines = [json.loads(x) for x in capfd.readouterr().out.splitlines()]
    assert len(lines) == 3 and len({x["response"] for x in lines}) == 1  # top_k=1 is greedy
    assert all(len(x["response"]) == 4 and x["prompt"] == "a" for x in lines)
    assert vbon("generate", tabular, "--config.generate.model=bon", "--prompt=a") == 0
    assert len(capfd.readouterr().out.splitlines()) == 1
    assert vbon("generate", tabular) == 2
    assert "no --prompt" in capfd.readouterr().err


def test_generate_shows_the_candidates_of_a_best_of_n(tabular, capfd):
    """Each is a response the model gives without it, and the best stands by itself."""
    flags = ["--config.generate.temperature=2.0", "--prompt=a"]
    assert vbon("generate", tabular, *flags, "--config.generate.count=6") == 0
    plain = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert vbon("generate", tabular, *flags, "--config.generate.count=2", "--best_of=3") == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert len(found) == 2 and len({r["response"] for r in plain}) > 2
    drawn = [candidate for line in found for candidate in line["candidates"]]
    assert drawn == [{key: r[key] for key in ("response", "reward")} for r in plain]
    for line in found:
        assert line["reward"] == max(candidate["reward"] for candidate in line["candidates"])
        assert {key: line[key] for key in ("response", "reward")} in line["candidates"]
    for model in ("bon", "corrected"):
        wrong = [f"--config.generate.model={model}", "--best_of=2"]
        assert vbon("generate", tabular, *flags, *wrong) == 2
        assert f"--best_of=2: generate.model={model} is best-of-n" in capfd.readouterr().err
    assert vbon("plan", tabular, "--best_of=2") == 2
    assert "--best_of=2: use it with `vbon generate`" in capfd.readouterr().err


def test_generate_streams_the_texts_that_it_prints_as_lines(tabular, capfd):
    flags = ["--prompt=a", "--prompt=b", "--config.generate.count=2"]
    assert vbon("generate", tabular, *flags) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert vbon("generate", tabular, *flags, "--stream") == 0
    streamed = capfd.readouterr().out.splitlines()
    assert streamed == [line["prompt"] + line["response"] for line in lines]
    for model in ("bon", "corrected"):
        assert (
            vbon("generate", tabular, *flags, "--stream", f"--config.generate.model={model}") == 2
        )
        assert f"--stream: generate.model={model} chooses among" in capfd.readouterr().err
    assert vbon("generate", tabular, *flags, "--stream", "--best_of=2") == 2
    assert "leave out one of them" in capfd.readouterr().err
    assert vbon("plan", tabular, "--stream") == 2
    assert "--stream: use it with `vbon generate`" in capfd.readouterr().err


def test_generate_prints_a_prompt_when_it_is_drawn(tabular, monkeypatch, capfd):
    """Not when all are: of three prompts drawn one by one, two are out when the third fails."""
    drawn = Sampler.responses

    def fail(self, *args, **kwargs):
        for i, group in enumerate(drawn(self, *args, **kwargs)):
            if i == 2:
                raise MemoryError("no more")
            yield group

    monkeypatch.setattr(Sampler, "responses", fail)
    prompts = [f"--prompt={text}" for text in ("a", "b", "c")]
    assert vbon("generate", tabular, "--config.sampling.batch_size=1", *prompts) == 2
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["a", "b"]


def test_generate_corrects_the_policy_by_reference_samples_that_it_keeps(tabular, capfd):
    flags = ["--config.generate.model=corrected", "--config.generate.count=8"]
    before = set((tabular / "samples").iterdir())
    assert vbon("generate", tabular, *flags, "--prompt=a") == 0
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 8
    assert re.search(r"generate: \d\.\d\d proposals and \d+\.\d tokens a response, where", err)
    (kept,) = set((tabular / "samples").iterdir()) - before
    written = kept.read_bytes()
    kept.write_bytes(written[:40])  # a write that was cut
    assert vbon("generate", tabular, *flags, "--prompt=b", "--prompt=a") == 0
    again, _ = capfd.readouterr()
    assert again.splitlines()[8:] == out.splitlines()  # whatever stands beside it
    assert kept.read_bytes() == written and again.splitlines()[:8] != out.splitlines()
    assert len(set((tabular / "samples").iterdir()) - before) == 2
    assert vbon("generate", tabular, *flags, "--prompt=a", "--prompt=a") == 0
    assert capfd.readouterr().out.splitlines() == 2 * out.splitlines()
    assert vbon("generate", tabular, *flags, "--prompt=a", "--config.generate.tries=1") == 0
    assert "none of generate.tries=1" in capfd.readouterr().err
    assert vbon("generate", tabular, *flags, "--prompt=a", "--config.generate.top_k=3") == 2
    assert "generate.top_k=3: generate.model=corrected needs" in capfd.readouterr().err


def test_rewards_that_are_nan_stop_with_one_line(tabular, tmp_path, capfd):
    onwards(tabular, tmp_path, "sft")
    sys.modules["nan_reward"] = types.SimpleNamespace(
        reward=lambda prompts, responses: [float("nan")] * len(responses)
    )
    assert vbon("run", tmp_path, "--config.reward.function=nan_reward:reward") == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "returned NaN for prompt='a' response='" in last


def test_a_loss_that_is_not_finite_names_step_and_checkpoint(tabular, tmp_path, capfd):
    sys.modules["inf_reward"] = types.SimpleNamespace(
        reward=lambda prompts, responses: [float(i) for i in range(len(responses))]
    )
    flags = ["--config.reward.function=inf_reward:reward", "--config.method.name=ppo"]
    onwards(tabular, tmp_path, "sft")
    for stage in ("reward", "sample"):
        assert vbon(stage, tmp_path, *flags) == 0
    calls = []
    sys.modules["inf_reward"].reward = lambda prompts, responses: (
        calls.append(1) or [np.inf if len(calls) > 2 else float(i) for i in range(len(responses))]
    )
    assert vbon("train", tmp_path, *flags) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "returned inf for prompt=" in last and "clip it" in last  # not a loss at fault later
    huge = 1e30  # finite, and its square is not
    sys.modules["inf_reward"].reward = lambda prompts, responses: [huge] * len(responses)
    assert vbon("train", tmp_path, *flags) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "at iteration 3" in last and str(tmp_path / "checkpoints" / "train" / "2") in last
    assert "(mean reward 1e+30)" in last


def test_samples_made_elsewhere_are_used(tabular, tmp_path):
    found = sample_files.read(tabular / "samples" / "train.jsonl")
    foreign = tmp_path / "theirs.jsonl"
    with foreign.open("w") as file:
        for s in found:
            for response, r in zip(s.responses, s.rewards):
                text = {"prompt": s.prompt, "text": s.prompt + response, "reward": r}
                file.write(json.dumps(text) + "\n")
    workdir = tmp_path / "w"
    flag = f"--config.samples.path={foreign}"
    onwards(tabular, workdir, "sft")
    for stage in ("reward", "sample", "train", "export"):
        assert vbon(stage, workdir, flag) == 0
    assert_same(policy(workdir), policy(tabular))


def test_text_world(tmp_path, capfd):
    """Tokenizer, reference and classifier learned from a user's labelled file."""
    data = tmp_path / "mine.jsonl"
    with data.open("w") as file:
        for e in reviews.examples(0, 240):
            file.write(json.dumps({"text": e.text, "label": e.label}) + "\n")
    small = {"layers": 1, "width": 16, "heads": 2, "positions": 64}
    flags = [
        f"--config.data.path={data}", "--config.tokenizer.vocab_size=400",
        "--config.prompts.train=8", "--config.prompts.test=4", "--config.samples.m=8",
        "--config.sampling.batch_size=32", "--config.sampling.max_new_tokens=12",
        "--config.train.iterations=2", "--config.train.batch_size=16",
        "--config.train.minibatch_size=16", "--config.evaluate.m=8",
        "--config.evaluate.samples_per_prompt=2", "--config.evaluate.temperatures=(1.0,0.5)",
        *(f"--config.{part}.model.{k}={v}" for part in ("reference", "reward")
          for k, v in small.items()),
        *(f"--config.{part}.fit.epochs=1" for part in ("reference", "reward")),
    ]  # fmt: skip
    assert vbon("run", tmp_path / "w", *flags, config="reviews") == 0
    rows = json.loads((tmp_path / "w" / "evaluation.json").read_text())["rows"]
    assert [r["temperature"] for r in rows] == [1.0] * 4 + [0.5] * 4
    named = ["reference", "bon", "vbon", "vbon, last iterate"]
    assert [r["policy"] for r in rows] == named * 2
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "w" / "reward"
    )
    assert classifier.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    # The classifier's score in the samples file is the one transformers gives the same text.
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "w" / "tokenizer")
    line = json.loads((tmp_path / "w" / "samples" / "train.jsonl").open().readline())
    for tokens, r in zip(line["response_tokens"], line["rewards"]):
        text = [t for t in tokens if t != tokenizer.eos_token_id]
        with torch.no_grad():
            logits = classifier(torch.tensor([line["prompt_tokens"] + text])).logits
        assert float(logits[0, 1]) == pytest.approx(r, abs=1e-4)
    # Training and evaluation prompts are told apart by what follows a stage's change.
    capfd.readouterr()
    bad = [f for f in flags if "data.path" not in f]
    assert vbon("run", tmp_path / "w", *bad, config="reviews") == 2
    assert "data.path" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "good", "label": 1}\n{"text": ', ":2: "),
        (
            '{"text": "good", "label": 1}\n{"text": "bad", "label": 7}\n',
            ":2: 'label' must be 0 or 1",
        ),
        ('{"text": "good", "label": 1}\n', "all 1 labels are"),
    ],
)
def test_bad_data_names_file_and_line(tmp_path, capfd, text, message):
    data = tmp_path / "bad.jsonl"
    data.write_text(text)
    assert vbon("sft", tmp_path / "w", f"--config.data.path={data}", config="reviews") == 2
    error = capfd.readouterr().err.strip()
    assert str(data) in error and message in error and "\n" not in error


def test_missing_data_is_named(tmp_path, capfd):
    flag = f"--config.data.path={tmp_path / 'no.jsonl'}"
    assert vbon("sft", tmp_path / "w", flag, config="reviews") == 2
    assert str(tmp_path / "no.jsonl") in capfd.readouterr().err


def test_a_tokenizer_without_eos_is_refused(tabular, tmp_path, capfd):
    flags = [
        f"--config.reference.path={tabular / 'reference'}",
        "--config.sampling.stop_at_eos=True",
    ]
    assert vbon("sft", tmp_path / "w", *flags) == 2
    assert "tokenizer without EOS" in capfd.readouterr().err


def test_a_prompt_longer_than_the_context_is_refused(tabular, tmp_path, capfd):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "abcdefabc"}\n')
    flags = [
        f"--config.reference.path={tabular / 'reference'}", f"--config.prompts.path={prompts}",
    ]  # fmt: skip
    for stage, code in (("sft", 0), ("reward", 0), ("sample", 2)):
        assert vbon(stage, tmp_path / "w", *flags) == code
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "prompt 1 ('abcdefabc') has 9 tokens" in error and "the model has 8" in error


def test_a_directory_that_is_no_model_is_refused(tmp_path, capfd):
    assert vbon("sft", tmp_path / "w", f"--config.reference.path={tmp_path / 'none'}") == 2
    assert str(tmp_path / "none") in capfd.readouterr().err


def test_every_variant_of_a_config_says_what_it_does():
    for path in (ROOT / "configs").glob("*.py"):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert f"vbon run --config=configs/{path.name}" in module.__doc__


def test_a_cut_samples_file_is_completed_to_the_same_bytes(tabular, tmp_path):
    """As after kill -9: whatever is missing or torn is drawn again, the same."""
    flags = ["--config.prompts.train=5", "--config.samples.m=7", "--config.sampling.batch_size=8"]
    onwards(tabular, tmp_path, "sft", "reward")
    assert vbon("sample", tmp_path, *flags) == 0
    path = tmp_path / "samples" / "train.jsonl"
    whole = path.read_bytes()
    assert whole.count(b"\n") == 5
    for kept in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        other = [*flags[:2], "--config.sampling.batch_size=16"]  # another batch, the same bytes
        assert vbon("sample", tmp_path, *(other if kept else flags)) == 0
        assert [json.loads(x)["responses"] for x in path.read_bytes().splitlines()] == [
            json.loads(x)["responses"] for x in whole.splitlines()
        ]
        if not kept:
            assert path.read_bytes() == whole


def test_a_later_stage_is_not_run_on_other_samples(tabular, tmp_path, capfd):
    """`vbon train` by name, with a setting that the samples were drawn under changed."""
    onwards(tabular, tmp_path, "sft", "reward", "sample")
    assert vbon("train", tmp_path, "--config.sampling.temperature=0.5") == 2
    assert "sampling.temperature=1.0, now it is 0.5" in capfd.readouterr().err
    # So it is with a finished run and `evaluate`, which otherwise may be done again freely.
    assert vbon("evaluate", tabular, "--config.reward.score=prob") == 2
    assert "reward.score='logit', now it is 'prob'" in capfd.readouterr().err


def test_a_setting_put_right_is_not_held_against_the_run(tabular, tmp_path, capfd):
    onwards(tabular, tmp_path, "sft", "reward")
    assert vbon("sample", tmp_path, "--config.sampling.max_new_tokens=50") == 2
    assert "the model has 8" in capfd.readouterr().err
    assert vbon("sample", tmp_path) == 0


def test_evaluation_again_draws_samples_that_fit(tabular):
    """Opponents and pool of another m: files of their own, drawn once."""
    before = set((tabular / "samples").glob("test_*"))
    assert {p.name.rsplit("_", 1)[0] for p in before} == {
        "test_opponents_t1_m16", "test_pool_t1_m16",
    }  # fmt: skip
    assert vbon("evaluate", tabular, "--config.evaluate.m=12") == 0
    new = set((tabular / "samples").glob("test_*")) - before
    assert {p.name.rsplit("_", 1)[0] for p in new} == {
        "test_opponents_t1_m12", "test_pool_t1_m12",
    }  # fmt: skip
    assert vbon("evaluate", tabular) == 0
    assert set((tabular / "samples").glob("test_*")) == before | new


def test_one_held_out_prompt_is_refused_before_any_work(tabular, tmp_path, capfd):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    onwards(tabular, tmp_path / "w", "sft", "reward")
    assert vbon("sample", tmp_path / "w", f"--config.prompts.test_path={prompts}") == 2
    assert "need at least 2" in capfd.readouterr().err


def test_n_may_be_any_real_number(tabular, tmp_path, capfd):
    onwards(tabular, tmp_path, "sft", "reward", "sample")
    assert vbon("run", tmp_path, "--config.method.n=2.5", "--config.train.iterations=1") == 0
    assert "n=2.5 is not a whole number" in capfd.readouterr().err
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["reference", "vbon"]
    assert vbon("generate", tmp_path, "--config.method.n=2.5", "--config.train.iterations=1",
                "--config.generate.model=bon", "--prompt=a") == 2  # fmt: skip
    assert "needs a whole number" in capfd.readouterr().err


@pytest.mark.parametrize(("stage", "call"), [("sample", 2), ("train", 4)])
def test_sigterm_in_any_stage_saves_and_goes_on(tabular, tmp_path, stage, call):
    """Also in the last iteration: what follows a signal is the end, not the next stage."""
    calls = 0
    stop_at = 10**9

    def reward(prompts, responses):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        from vbon_jax.data.tabular import reward as table

        return table(prompts, responses)

    sys.modules["stop_reward"] = types.SimpleNamespace(reward=reward)
    flags = ["--config.reward.function=stop_reward:reward", "--config.prompts.train=4"]
    flags += ["--config.sampling.batch_size=16"]
    onwards(tabular, tmp_path, "sft")
    for earlier in ("reward", "sample")[: 1 if stage == "sample" else 2]:
        assert vbon(earlier, tmp_path, *flags) == 0
    calls, stop_at = 0, call
    assert vbon(stage, tmp_path, *flags) == 143
    stop_at = 10**9
    assert vbon(stage, tmp_path, *flags) == 0
    if stage == "sample":
        assert [s.prompt_id for s in sample_files.read(tmp_path / "samples/train.jsonl")] == [
            0,
            1,
            2,
            3,
        ]


def test_sigterm_in_sft_goes_on_to_the_same_reference(tabular, tmp_path, monkeypatch):
    from vbon_jax.training import supervised

    steps = iter(range(10**6))
    real = supervised.sharding.place

    def place(*args):
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(supervised.sharding, "place", place)
    assert vbon("sft", tmp_path) == 143
    monkeypatch.undo()
    assert vbon("sft", tmp_path) == 0
    assert_same(hf.load_decoder(tmp_path / "reference")[1],
                hf.load_decoder(tabular / "reference")[1])  # fmt: skip


def test_two_processes_do_not_share_a_workdir(tabular, capfd):
    with (tabular / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert vbon("run", tabular) == 2
    assert "another vbon is at work there" in capfd.readouterr().err


def test_generate_under_a_mesh_gives_the_same(tabular, capfd):
    flags = ["--config.generate.count=4", "--prompt=a"]
    assert vbon("generate", tabular, *flags) == 0
    alone = capfd.readouterr().out
    mesh = ["--config.mesh.data=2", "--config.mesh.tensor=2"]
    assert vbon("generate", tabular, *flags, *mesh) == 0
    assert [json.loads(x)["response"] for x in capfd.readouterr().out.splitlines()] == [
        json.loads(x)["response"] for x in alone.splitlines()
    ]
    assert vbon("generate", tabular, *flags, "--config.mesh.data=3") == 2
    assert "does not divide among mesh.data x mesh.fsdp = 3" in capfd.readouterr().err


def onwards(tabular, workdir, *stages):
    """A workdir in which these stages are done already, as ``tabular`` did them."""
    made = {"sft": ("tokenizer", "reference"), "reward": (), "sample": ("prompts", "samples")}
    for stage in stages:
        for name in made[stage]:
            shutil.copytree(tabular / name, workdir / name)
        (workdir / "stages").mkdir(parents=True, exist_ok=True)
        shutil.copy(tabular / "stages" / f"{stage}.json", workdir / "stages")


def easy_reward(prompts, responses):
    """Of 0 to 20 by letters near the front of the alphabet, so that few steps teach it; the rest of
    below 1 makes it injective."""
    letters = tabular_world.ALPHABET
    places = [sum(letters.index(c) * 6**i for i, c in enumerate(r)) for r in responses]
    return [
        float(sum(5 - letters.index(c) for c in r) + place / 1297)
        for r, place in zip(responses, places, strict=True)
    ]


LEARNING = [
    "--config.reward.function=easy_reward:reward", "--config.samples.m=32",
    "--config.train.iterations=20", "--config.train.batch_size=64",
    "--config.train.minibatch_size=32", "--config.train.learning_rate=1e-2",
    "--config.train.checkpoint_every=20", "--config.offline.learning_rate=5e-3",
    "--config.offline.responses=32", "--config.offline.pairs=100",
    "--config.offline.batch_size=10", "--config.offline.epochs=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def easy(tabular, tmp_path_factory):
    """Reference samples of a reward that is quickly learned."""
    sys.modules["easy_reward"] = types.SimpleNamespace(reward=easy_reward)
    workdir = tmp_path_factory.mktemp("easy")
    onwards(tabular, workdir, "sft")
    for stage in ("reward", "sample"):
        assert vbon(stage, workdir, *LEARNING) == 0
    return workdir


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


ONLINE = ("reward", "kl_ref", "kl_bon", "seconds_rollout", "seconds_update", "tokens_per_second")
PPO = (*ONLINE, "objective", "policy_clip_fraction", "explained_variance")


@pytest.mark.parametrize(
    ("name", "flags", "columns", "steps"),
    [
        ("ppo", ("--config.method.beta=2.0",), PPO, 20),
        ("bond", ("--config.bond.anchor_rate=0.1",), (*ONLINE, "kl_anchor", "jbond_reward"), 20),
        ("bond", ("--config.bond.form=backward",), PPO, 20),
        ("bon_sft", (), ("nll", "seconds_update"), 3),
        ("dpo", ("--config.method.beta=0.5",), ("accuracy", "margin"), 3),
        ("qrpo", (), ("nll", "seconds_update"), 3),
        ("bonbon", (), ("accuracy", "margin", "nll"), 3),
        (
            "vbon",
            ("--config.method.estimator=exponential", "--config.method.objective=lower_bound"),
            PPO,
            20,
        ),
    ],
    ids=[
        "ppo",
        "bond-jeffreys",
        "bond-backward",
        "bon_sft",
        "dpo",
        "qrpo",
        "bonbon",
        "vbon-exponential",
    ],
)
def test_every_method_from_samples_to_evaluation(easy, tmp_path, name, flags, columns, steps):
    """Trained, exported, measured; and it did learn: more wins, and nearer to best-of-n."""
    onwards(easy, tmp_path, "sft", "reward", "sample")
    assert vbon("run", tmp_path, f"--config.method.name={name}", *LEARNING, *flags) == 0
    metrics = metrics_of(tmp_path)
    assert [m["step"] for m in metrics] == list(range(1, steps + 1))
    for column in ("loss", "grad_norm", "learning_rate", *columns):
        assert all(np.isfinite(m[column]) for m in metrics), column
    if columns is PPO:
        assert all(m["first_approx_kl"] < 1e-9 for m in metrics)
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["policy"] for row in result["rows"]] == ["reference", "bon", name]
    reference_row, bon_row, own = result["rows"]
    assert reference_row["kl_ref"] == 0 < own["kl_ref"]
    assert reference_row["reward"] < min(own["reward"], bon_row["reward"])
    assert all(np.isfinite(row["kl_bon"]) for row in result["rows"])
    exact = result["exact"]
    assert all(np.isfinite(value) for value in exact.values())
    assert exact["win_rate"] > 0.7 and exact["kl_bon"] < 0.5 * exact["reference_kl_bon"]
    # One response is in the samples' file for each of count, prompt and policy.
    shown = [json.loads(x) for x in (tmp_path / "evaluation_samples.jsonl").open()]
    assert collections.Counter(x["policy"] for x in shown) == {"reference": 8, "bon": 8, name: 8}
    assert all(x["reward"] == np.float32(easy_reward([], [x["response"]])[0]) for x in shown)
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == {
        "training_curves", "reward_histograms", "win_rate_vs_kl",
    }  # fmt: skip


def test_best_of_n_alone_trains_nothing(tabular, tmp_path, capfd):
    onwards(tabular, tmp_path, "sft", "reward", "sample")
    assert vbon("run", tmp_path, "--config.method.name=bon") == 0
    assert "(method.name=bon) trains nothing" in capfd.readouterr().err
    for name in ("policy", "metrics.jsonl", "checkpoints/train"):
        assert not (tmp_path / name).exists(), name
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["policy"] for row in result["rows"]] == ["reference", "bon"]
    whole = json.loads((tabular / "evaluation.json").read_text())["rows"]
    for name in ("reward", "win_rate", "kl_direct"):  # read off the same pool
        assert result["rows"][1][name] == whole[1][name]
    assert vbon("generate", tmp_path, "--config.method.name=bon", "--config.generate.model=bon",
                "--prompt=a") == 0  # fmt: skip
    assert len(json.loads(capfd.readouterr().out)["response"]) == 4
    assert vbon("generate", tmp_path, "--config.method.name=bon", "--prompt=a") == 2
    assert "method.name=bon has no policy: set generate.model=bon" in capfd.readouterr().err


def verifier_flags(function, ties):
    return [
        *LEARNING, f"--config.reward.function={function}:verifier", "--config.method.n=4",
        "--config.method.estimator=harmonic", f"--config.method.ties={ties}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "ties"),
    [
        ("vbon_jax.data.tabular", "random"),
        ("vbon_jax.data.tabular", "order"),
        ("easy_verifier", "order"),
    ],
)
def test_a_verifier_with_ties_either_way(tabular, tmp_path, function, ties):
    """Rewards of 0 and 1: what best-of-n is depends on the ties, how often it is right does not."""
    sys.modules["easy_verifier"] = types.SimpleNamespace(
        verifier=lambda prompts, responses: [float(r[0] == "b") for r in responses]
    )
    onwards(tabular, tmp_path, "sft")
    assert vbon("run", tmp_path, *verifier_flags(function, ties)) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    exact, bon_row = result["exact"], result["rows"][1]

    def won(right):
        return 1 - (1 - right) ** 4

    # The share of the reference's responses that are right: a win is 1, a tie 1/2.
    right = scipy.optimize.brentq(
        lambda p: 0.5 + (won(p) - p) / 2 - exact["bon_win_rate"], 0.001, 0.37
    )
    assert 0.05 < right < 0.3
    bound = np.log(4) - 3 / 4
    assert bon_row["kl_bound"] == pytest.approx(bound)
    if ties == "random":
        both, of_ref = np.array([won(right), 1 - won(right)]), np.array([right, 1 - right])
        assert exact["bon_kl"] == pytest.approx(np.sum(both * np.log(both / of_ref)), abs=1e-4)
        assert bon_row["kl_beirami"] < 0.9 * bound
    else:  # the order leaves no ties, and no response is heavy
        assert exact["bon_kl"] == pytest.approx(bound, abs=0.02)
        assert bon_row["kl_beirami"] == pytest.approx(bound, abs=0.01)
    assert exact["kl_ref"] > 0
    if (function, ties) != ("vbon_jax.data.tabular", "order"):  # a few steps do not teach a hash
        assert exact["kl_bon"] < exact["reference_kl_bon"] - 0.02
        assert exact["win_rate"] > 0.51


def test_bon_sft_takes_the_winners_of_the_order(tabular, tmp_path, monkeypatch):
    """The order of training is the one of evaluation: that of the sampled ids."""
    onwards(tabular, tmp_path, "sft")
    chosen = []

    def choose(rewards_PxM, member, settings, order_PxM):
        rows = real(rewards_PxM, member, settings, order_PxM)
        chosen.append((rewards_PxM, order_PxM, rows))
        return rows

    real = bon_sft.METHOD.learns.choose
    learns = dataclasses.replace(bon_sft.METHOD.learns, choose=choose)
    record = dataclasses.replace(bon_sft.METHOD, learns=learns)
    monkeypatch.setattr(
        methods, "METHODS", tuple(record if m.name == "bon_sft" else m for m in methods.METHODS)
    )
    flags = [*verifier_flags("vbon_jax.data.tabular", "order"), "--config.method.name=bon_sft",
             "--config.method.n=32"]  # fmt: skip
    for stage in ("reward", "sample", "train"):
        assert vbon(stage, tmp_path, *flags) == 0
    (rewards, order, rows), samples = chosen[0], sample_files.read(tmp_path / "samples/train.jsonl")
    tokens = np.array(samples[0].response_tokens, np.int32)
    np.testing.assert_array_equal(order[0], log_f.response_order(tokens, np.ones_like(tokens)))
    # The best of all 32 is always the same one: right, and last in the order among those.
    best = max(range(32), key=lambda i: (rewards[0][i], order[0][i]))
    assert samples[0].rewards[best] == 1.0
    assert set(rows.best_E.tolist()) == {best}
    nll = [m["nll"] for m in metrics_of(tmp_path)]
    assert nll[-1] < 0.5 * nll[0]


@pytest.mark.parametrize("name", ["bonbon", "bond"])
def test_two_and_two_iterations_are_four(tabular, tmp_path, monkeypatch, name):
    """Stopped in the second iteration, an offline method and J-BOND go on to the same bits."""
    flags = [
        f"--config.method.name={name}", "--config.offline.pairs=50",
        "--config.offline.batch_size=5", "--config.offline.epochs=4",
        "--config.bond.anchor_rate=0.3",
    ]  # fmt: skip
    # An iteration reads one pass of the pairs, or has three batches scored.
    what, at, stop_at = (
        (offline, "epoch_order", 2) if name == "bonbon" else (tabular_world, "reward", 5)
    )
    real, calls = getattr(what, at), 0

    def stopping(*args):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    ends = []
    for kind in ("cut", "whole"):
        workdir = tmp_path / kind
        onwards(tabular, workdir, "sft", "reward", "sample")
        if kind == "cut":
            monkeypatch.setattr(what, at, stopping)
            assert vbon("train", workdir, *flags) == 143
            assert [m["step"] for m in metrics_of(workdir)] == [1, 2]
            monkeypatch.undo()
        assert vbon("train", workdir, *flags) == 0
        assert vbon("export", workdir, *flags) == 0
        ends.append((policy(workdir), [(m["step"], m["loss"]) for m in metrics_of(workdir)]))
    (cut, cut_metrics), (whole, whole_metrics) = ends
    assert [step for step, _ in cut_metrics] == [1, 2, 3, 4]
    assert cut_metrics == whole_metrics
    assert_same(cut, whole)


def test_a_users_own_model_prompts_and_reward(tmp_path):
    """GPT-2 of transformers, a tokenizer whose only special token is EOS, no labelled text."""
    texts = [e.text for e in reviews.examples(0, 200)]
    tokenizer = tokenizers.build(texts, "bpe", 350)
    tokenizer.pad_token = None  # as GPT-2's own: empty slots are filled with EOS
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=len(tokenizer), n_positions=48, n_embd=16, n_layer=1, n_head=2,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    for split in ("train", "test"):
        with (tmp_path / f"{split}.jsonl").open("w") as file:
            for text in texts[:6]:
                file.write(json.dumps({"prompt": " ".join(text.split()[:3])}) + "\n")
    sys.modules["length_reward"] = types.SimpleNamespace(
        reward=lambda prompts, responses: [-abs(len(r) - 20.0) for r in responses]
    )
    flags = [
        f"--config.reference.path={tmp_path / 'theirs'}",
        "--config.reward.function=length_reward:reward",
        f"--config.prompts.path={tmp_path / 'train.jsonl'}",
        f"--config.prompts.test_path={tmp_path / 'test.jsonl'}",
        "--config.sampling.stop_at_eos=True", "--config.sampling.max_new_tokens=10",
        "--config.data.corpus=reviews", "--config.method.objective=lower_bound",
        "--config.method.estimator=harmonic", "--config.train.iterations=2",
    ]  # fmt: skip
    assert vbon("run", tmp_path / "w", *flags) == 0
    assert not (tmp_path / "w" / "data").exists()  # the built-in corpus was not needed
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "w" / "policy")
    assert ours.generation_config.eos_token_id == tokenizer.eos_token_id
    assert ours.generation_config.top_k == 0 and ours.generation_config.temperature == 1.0
    ids = torch.tensor([tokenizer.encode(texts[0])[:20]])
    with torch.no_grad():
        moved = (ours(ids).logits - theirs(ids).logits).abs().max()
    assert 0 < float(moved) < 1  # trained, from these weights
