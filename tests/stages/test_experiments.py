"""The configs of real checkpoints, run whole on miniature ones: only paths and sizes differ."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from tests import standins
from tests.data import imdb_shaped, tldr_shaped
from vbon_jax import cli, sharding
from vbon_jax.models import decoder, hf, trainable
from vbon_jax.models.hf import peft
from vbon_jax.stages import STAGES, base, loading
from vbon_jax.stages.workdir import Workdir

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
SIZES = [
    "--config.samples.m=12", "--config.sampling.batch_size=16",
    "--config.sampling.max_new_tokens=8", "--config.method.n=8", "--config.train.iterations=2",
    "--config.train.batch_size=16", "--config.train.minibatch_size=8", "--config.evaluate.m=12",
]  # fmt: skip


def vbon(stage, workdir, config, *flags):
    """Exit code of a command line with the sizes above."""
    path = config if isinstance(config, Path) else ROOT / "configs" / config
    return cli.main([stage, f"--config={path}", f"--workdir={workdir}", *SIZES, *flags])


def lines(path):
    return [json.loads(line) for line in path.open()]


def prompts_of(workdir, split):
    return lines(workdir / "prompts" / f"{split}.jsonl")


def begun(workdir, other, *stages):
    """A new workdir in which these stages are done, as they were in ``workdir``."""
    (other / "stages").mkdir(parents=True)
    for name in ("tokenizer", "prompts", "samples"):
        shutil.copytree(workdir / name, other / name)
    for stage in stages:
        shutil.copy(workdir / "stages" / f"{stage}.json", other / "stages")


def tensors(path):
    return safetensors.torch.load_file(path / "model.safetensors")


def our_log_probs(config, params, tokens):
    mask = np.ones_like(tokens, bool)
    logits = decoder.logits(params, config, decoder.hidden(params, config, tokens, mask))
    return np.asarray(jax.nn.log_softmax(logits))


def their_log_probs(path, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.log_softmax(-1).numpy()


def assert_exported(workdir, reference, trained=None):
    """transformers loads policy/ and gives our log-probs, which are not those of the reference.

    trained: the layers whose tensors differ from the reference's; all else is equal to the bit."""
    config, params = hf.load_decoder(workdir / "policy")
    tokens = np.array([p["tokens"][-5:] for p in prompts_of(workdir, "test") if
                       len(p["tokens"]) >= 5][:3], np.int32)  # fmt: skip
    theirs = their_log_probs(workdir / "policy", tokens)
    np.testing.assert_allclose(our_log_probs(config, params, tokens), theirs, rtol=0, atol=1e-4)
    assert np.abs(theirs - their_log_probs(reference, tokens)).max() > 1e-5
    new, old = tensors(workdir / "policy"), tensors(reference)
    assert new.keys() == old.keys()
    moved = {name for name in new if not torch.equal(new[name].float(), old[name].float())}
    if trained is not None:
        layers = {int(name.split(".")[2]) for name in moved if name.split(".")[2].isdigit()}
        assert layers == set(trained)
        assert all(any(f".{i}." in name for i in trained) or "_norm" in name or "ln_f" in name
                   for name in moved)  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / "policy")
    ids = transformers.GenerationConfig.from_pretrained(workdir / "policy")
    assert ids.eos_token_id == tokenizer.eos_token_id


def assert_trained(workdir, *names):
    """Two steps, the ratio 1 before the first, whatever the arithmetic, and what is counted."""
    metrics = lines(workdir / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2]
    assert all(m["first_approx_kl"] < 1e-9 for m in metrics)
    for name in ("loss", "grad_norm", "reward", "kl_ref", "kl_bon", *names):
        assert all(np.isfinite(m[name]) for m in metrics), name
    return metrics


def assert_evaluated(workdir, temperatures, keys=("rows",)):
    result = json.loads((workdir / "evaluation.json").read_text())
    for key in keys:
        rows = [(r["split"], r["temperature"], r["policy"]) for r in result[key]]
        split = "test" if key == "rows" else key
        assert rows == [(split, t, p) for t in temperatures for p in ("reference", "bon", "vbon")]
        for r in result[key]:
            assert all(np.isfinite(r[name]) for name in ("reward", "win_rate", "kl_ref", "kl_bon"))
    assert (workdir / "report.html").exists()
    return result


def scores_of(path, rows):
    """Logits [R, C] that transformers gives rows of ids, one at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        return np.array([model(torch.tensor([ids])).logits[0].numpy() for ids in rows])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")


# The sentiment experiment ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imdb(place):
    """(workdir, the reviews)."""
    reviews = imdb_shaped.prepare_imdb(place / "tfds", 40, 16)
    texts = [e.text for split in reviews.values() for e in split]
    standins.gpt2(place / "gpt2", texts)
    standins.distilbert(place / "distilbert", texts)
    flags = [
        f"--config.data.tfds_dir={place / 'tfds'}", f"--config.reference.path={place / 'gpt2'}",
        f"--config.reward.path={place / 'distilbert'}", "--config.prompts.train=8",
        "--config.prompts.test=4",
    ]  # fmt: skip
    assert vbon("run", place / "imdb", "imdb.py", *flags) == 0
    return place / "imdb", reviews


def test_imdb_prompts_are_beginnings_of_its_reviews(imdb):
    workdir, reviews = imdb
    for split, count in (("train", 8), ("test", 4)):
        prompts = prompts_of(workdir, split)
        assert len(prompts) == count
        assert all(2 <= len(p["tokens"]) <= 8 for p in prompts)
        assert all(any(e.text.startswith(p["prompt"]) for e in reviews[split]) for p in prompts)


def test_imdb_rewards_are_the_probability_of_positive(imdb, place):
    """By the classifier's own tokenizer, [CLS] and [SEP] around the text."""
    found = lines(imdb[0] / "samples" / "train.jsonl")[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "distilbert")
    rows = [tokenizer(found["prompt"] + r)["input_ids"] for r in found["responses"]]
    assert all(tokenizer.decode(ids[:1] + ids[-1:]) == "[CLS] [SEP]" for ids in rows)
    logits = scores_of(place / "distilbert", rows)
    expected = torch.tensor(logits).softmax(-1)[:, 1]
    np.testing.assert_allclose(found["rewards"], expected, rtol=0, atol=1e-5)


def test_imdb_trains_two_layers_and_evaluates(imdb, place):
    workdir = imdb[0]
    metrics = assert_trained(workdir, "reward_truncated")
    assert "missing_eos" not in metrics[0]
    assert_exported(workdir, place / "gpt2", trained=(1, 2))
    assert_evaluated(workdir, (1.0,))


# The summarization experiment --------------------------------------------------------------------


@pytest.fixture(scope="module")
def tldr(place):
    """(workdir, the flags it was run with)."""
    posts = tldr_shaped.write(place / "train.jsonl", 24, seed=0)
    tldr_shaped.write(place / "test.jsonl", 16, seed=1)
    texts = [post["post"] for post in posts]
    standins.neox(place / "sft", texts)
    standins.neox_reward(place / "reward", texts, 24, 2)
    standins.neox_reward(place / "evaluator", texts, 32, 3)
    flags = [
        f"--config.prompts.path={place / 'train.jsonl'}",
        f"--config.prompts.test_path={place / 'test.jsonl'}",
        f"--config.reference.path={place / 'sft'}", f"--config.reward.path={place / 'reward'}",
        f"--config.evaluator.path={place / 'evaluator'}", "--config.prompts.longest=96",
        "--config.prompts.train=8", "--config.prompts.test=4", "--config.prompts.ood=3",
        "--config.train.num_layers_unfrozen=2",
    ]  # fmt: skip
    assert vbon("run", place / "tldr", "tldr.py", *flags) == 0
    return place / "tldr", flags


def test_tldr_prompts_are_of_the_two_subreddits_and_ood_of_others(tldr):
    workdir = tldr[0]
    names = ("relationships", "relationship_advice")
    for split, count in (("train", 8), ("test", 4), ("ood", 3)):
        prompts = prompts_of(workdir, split)
        assert len(prompts) == count
        for p in prompts:
            parts = p["prompt"].split("\n\n")
            assert parts[0].startswith("SUBREDDIT: r/") and parts[1].startswith("TITLE: ")
            assert parts[2].startswith("POST: ") and p["prompt"].endswith("\n\nTL;DR:")
            assert (parts[0].removeprefix("SUBREDDIT: r/") in names) == (split != "ood")
            assert len(p["tokens"]) <= 96


def test_tldr_rewards_are_read_at_the_eos_or_replaced(tldr, place):
    """In bfloat16, as the config says; transformers here in float32."""
    found = lines(tldr[0] / "samples" / "train.jsonl")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "reward")
    texts = [f"{x['prompt']}{r}<|endoftext|>" for x in found for r in x["responses"]]
    finished = np.array([f for x in found for f in x["finished"]])
    assert 0 < finished.mean() < 1
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert all(row[-1] == tokenizer.eos_token_id for row in ids)
    expected = np.where(finished, scores_of(place / "reward", ids)[:, 0], -1.0)
    rewards = np.array([r for x in found for r in x["rewards"]])
    np.testing.assert_array_equal(rewards[~finished], -1.0)
    np.testing.assert_allclose(rewards, expected, rtol=0, atol=0.05)


def test_tldr_trains_in_bfloat16_and_evaluates_in_and_out_of_distribution(tldr, place):
    workdir = tldr[0]
    metrics = assert_trained(workdir, "reward_truncated")
    assert all(m["missing_eos"] == pytest.approx(m["truncation_rate"]) for m in metrics)
    assert_exported(workdir, place / "sft", trained=(1, 2))
    result = assert_evaluated(workdir, (0.25, 0.5, 0.75, 1.0), ("rows", "ood"))
    for key in ("rows", "ood"):
        assert all(np.isfinite(r["evaluator_reward"]) for r in result[key])
        assert all("evaluator_truncated" in r for r in result[key] if r["policy"] == "vbon")
    shown = lines(workdir / "evaluation_samples_ood.jsonl")
    assert len(shown) == 4 * 3 * 3 * 3  # temperatures, policies, prompts, responses


def test_tldr_evaluates_what_was_trained_unrounded(tldr):
    """The policy in float32, beside a reference in bfloat16."""
    workdir, flags = tldr
    config = cli.parse(
        ["evaluate", f"--config={ROOT / 'configs' / 'tldr.py'}", *SIZES, *flags]
    ).config
    run = base.Run(config, Workdir(workdir, config, STAGES), sharding.make_mesh())
    policy, reference = loading.policy(run).model, loading.reference(run).model
    assert {x.dtype.name for x in jax.tree.leaves(policy.params)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(reference.params)} == {"bfloat16"}
    assert policy.config == reference.config and policy.config.compute_dtype == "bfloat16"


def test_tldr_with_a_value_network_that_starts_as_the_reward(tldr, place):
    workdir, flags = tldr
    begun(workdir, place / "value", "sft", "reward", "sample")
    flags = [*flags, "--config.train.value_network=reward"]
    assert vbon("train", place / "value", "tldr.py", *flags) == 0
    assert vbon("export", place / "value", "tldr.py", *flags) == 0
    metrics = assert_trained(place / "value")
    assert metrics[0]["value_mean"] != lines(workdir / "metrics.jsonl")[0]["value_mean"]
    assert_exported(place / "value", place / "sft", trained=(1, 2))


# Chat --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(place):
    """(workdir, the flags it was run with)."""
    said = [f"{who.capitalize()} {what}. {ask}" for who, what, ask in zip(
        tldr_shaped.WHO * 2, tldr_shaped.WHAT[1:] * 2, tldr_shaped.ASK * 3)]  # fmt: skip
    for name, texts in (("chat_train", said[:8]), ("chat_test", said[6:10])):
        with (place / f"{name}.jsonl").open("w") as file:
            for i, text in enumerate(texts):
                user = {"role": "user", "content": text}
                system = {"role": "system", "content": "Be brief."}
                answer = {"role": "assistant", "content": "Talk to them."}
                record = (
                    {"prompt": text},
                    {"messages": [system, user]},
                    {"messages": [user, answer]},
                    {"messages": [user, answer, user]},
                )[i % 4]
                file.write(json.dumps(record) + "\n")
    standins.qwen3(place / "qwen", said)
    standins.qwen3_reward(place / "skywork", said)
    flags = [
        f"--config.prompts.path={place / 'chat_train.jsonl'}",
        f"--config.prompts.test_path={place / 'chat_test.jsonl'}",
        f"--config.reference.path={place / 'qwen'}", f"--config.reward.path={place / 'skywork'}",
        "--config.lora.rank=3", "--config.reward.max_tokens=60",
    ]  # fmt: skip
    assert vbon("run", place / "chat", "chat.py", *flags) == 0
    return place / "chat", flags


def test_chat_prompts_end_where_the_answer_begins(chat):
    prompts = prompts_of(chat[0], "train")
    assert len(prompts) == 8
    for p in prompts:
        assert p["prompt"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert p["messages"][-1]["role"] == "user"
    assert prompts[1]["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>u")
    assert [p["prompt"].count("<|im_start|>assistant") for p in prompts[:4]] == [1, 1, 1, 2]


def test_chat_rewards_are_of_the_messages_by_the_rewards_own_template(chat, place):
    """Texts of more than 60 tokens lose their beginning; an answer that is cut costs 5."""
    found = lines(chat[0] / "samples" / "train.jsonl")
    prompts = prompts_of(chat[0], "train")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "skywork")
    rows = [
        tokenizer.apply_chat_template(
            [*p["messages"], {"role": "assistant", "content": r}], return_dict=False
        )
        for p, x in zip(prompts, found)
        for r in x["responses"]
    ]
    assert 0 < sum(len(ids) > 60 for ids in rows) < len(rows)
    expected = scores_of(place / "skywork", [ids[-60:] for ids in rows])[:, 0]
    finished = np.array([f for x in found for f in x["finished"]])
    rewards = np.array([r for x in found for r in x["rewards"]])
    np.testing.assert_allclose(rewards, expected - 5.0 * ~finished, rtol=0, atol=0.1)


def test_chat_trains_adapters_and_exports_the_merged_model(chat, place):
    metrics = assert_trained(chat[0], "missing_eos", "reward_truncated")
    assert all(m["reward_truncated"] > 0 for m in metrics)
    assert_exported(chat[0], place / "qwen")
    assert_evaluated(chat[0], (0.7,))


def test_chat_exports_adapters_that_peft_loads_and_evaluates_them(chat, place):
    """In the same workdir: export and evaluate are done again in another form."""
    workdir, flags = chat
    shutil.copytree(workdir, place / "adapter")
    merged = json.loads((workdir / "evaluation.json").read_text())["rows"]
    workdir, flags = place / "adapter", [*flags, "--config.export.form=adapter"]
    for stage in ("export", "evaluate"):
        assert vbon(stage, workdir, "chat.py", *flags) == 0
    assert (workdir / "policy" / "adapter_config.json").exists()
    assert not (workdir / "policy" / "model.safetensors").exists()
    rows = assert_evaluated(workdir, (0.7,))["rows"]
    assert rows[2]["kl_ref"] == pytest.approx(merged[2]["kl_ref"], rel=0.5)
    config, base = hf.load_decoder(place / "qwen")
    own, alpha = peft.load(workdir / "policy", config, base=place / "qwen")
    tokens = np.array([p["tokens"][-8:] for p in prompts_of(workdir, "test")], np.int32)
    ours = our_log_probs(
        dataclasses.replace(config, lora_alpha=alpha), trainable.join(base, own), tokens
    )
    theirs = their_log_probs(workdir / "policy", tokens)  # transformers asks peft, by itself
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert np.abs(theirs - their_log_probs(place / "qwen", tokens)).max() > 1e-5


def test_chat_with_several_rewards(chat, place, capfd):
    """A config of one's own, derived from the one given: a function beside the model."""
    workdir, flags = chat
    config = place / "mine.py"
    config.write_text(f'''"""chat.py with a price on length."""
import runpy


def get_config():
    config = runpy.run_path({str(ROOT / "configs" / "chat.py")!r})["get_config"]()
    config.reward.weight = 2.0
    config.reward.others = {{
        "short": {{
            "path": "", "function": "tests.standins:short", "label": "", "score": "scalar",
            "template": "chat", "max_tokens": 0, "weight": 0.125,
        }},
    }}
    return config
''')
    begun(workdir, place / "others", "sft", "reward")
    (place / "others" / "samples" / "train.jsonl").unlink()
    for stage in ("sample", "train"):
        assert vbon(stage, place / "others", config, *flags) == 0
    metrics = assert_trained(place / "others", "reward/main", "reward/short", "missing_eos")
    for m in metrics:
        total = 2 * m["reward/main"] + m["reward/short"] / 8 - 5 * m["missing_eos"]
        assert m["reward"] == pytest.approx(total, abs=1e-4)
    alone = lines(workdir / "samples" / "train.jsonl")
    for a, b in zip(alone, lines(place / "others" / "samples" / "train.jsonl")):
        assert a["responses"] == b["responses"]
        fined = 5.0 * ~np.array(a["finished"])
        length = np.array([len(r) for r in a["responses"]])
        expected = 2 * (np.array(a["rewards"]) + fined) - length / 8 - fined
        np.testing.assert_allclose(b["rewards"], expected, rtol=0, atol=1e-4)
    # Without the other reward it is another run, and is refused as one.
    capfd.readouterr()
    assert vbon("sample", place / "others", "chat.py", *flags, "--config.reward.weight=2.0") == 2
    error = capfd.readouterr().err
    assert (
        "reward.others.short.path='', now it is None (and 7 more keys changed): use another"
        in error
    )
