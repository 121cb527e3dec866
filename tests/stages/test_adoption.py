"""Samples made elsewhere, and chat runs: what comes back, what is refused, what generate reads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from tests import tokenizer_kinds
from vbon_jax import cli
from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import tokenizer as tokenizers

CONFIG = Path(__file__).parents[2] / "configs" / "reviews.py"
ASKED = ["hello", "tell me a story", "what is a film"]
VOCABULARY, M = 640, 4
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "initializer_range": 0.4, "pad_token_id": None,
}  # fmt: skip
SMALL = {
    "sampling.max_new_tokens": 6, "sampling.batch_size": 12, "samples.m": M, "method.n": 2.0,
    "train.iterations": 1, "train.batch_size": 4, "train.minibatch_size": 4, "train.ppo_epochs": 1,
    "prompts.format": "chat", "reward.score": "scalar", "reward.template": "chat",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A chat model and a reward model with a dated template, and a file of prompts."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = tokenizer_kinds.llama3()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "lm")
    config.num_labels = 1
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder / "rm")
    for name in ("lm", "rm"):
        tokenizer.save_pretrained(folder / name)
    write(folder / "p.jsonl", [{"prompt": text} for text in ASKED])
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path):
    """Its lines, without the checksum that an edited one would not have."""
    found = [json.loads(line) for line in path.open()]
    return [{k: v for k, v in line.items() if k != "vbon_crc32"} for line in found]


def vbon(place, stage, workdir, **changes):
    """Runs a stage; a key's dots are written as two underscores."""
    own = {
        "reference.path": place / "lm", "reward.path": place / "rm",
        "prompts.path": place / "p.jsonl", "prompts.test_path": place / "p.jsonl",
    }  # fmt: skip
    values = SMALL | own | {k.replace("__", "."): v for k, v in changes.items() if k != "flags"}
    return cli.main(
        [stage, f"--config={CONFIG}", f"--workdir={workdir}", *changes.get("flags", ())]
        + [f"--config.{k}={v}" for k, v in values.items()]
    )


@pytest.fixture(scope="module")
def first(place):
    """A chat run of another day, up to its samples."""
    workdir = place / "first"
    stages = {"stages": "('sft','reward','sample')", "prompts__date": "2024-02-29"}
    assert vbon(place, "run", workdir, **stages) == 0
    return workdir


def test_samples_carry_their_messages_and_temperature(first):
    for line, text in zip(lines(first / "samples" / "train.jsonl"), ASKED, strict=True):
        assert line["messages"] == [{"role": "user", "content": text}]
        assert line["temperature"] == 1.0 and "top_k" not in line
        assert "Today is 29 Feb 2024.\n" in line["prompt"]


def test_a_run_that_reads_its_samples_back_is_the_same_run(place, first, tmp_path):
    """To the byte, log-probs and ids included."""
    samples = first / "samples" / "train.jsonl"
    same = {"stages": "('sft','reward','sample')", "prompts__date": "2024-02-29"}
    assert vbon(place, "run", tmp_path, samples__path=samples, **same) == 0
    for name in ("samples/train.jsonl", "prompts/train.jsonl"):
        assert (tmp_path / name).read_bytes() == (first / name).read_bytes(), name


def test_rewards_are_of_the_rewards_own_template_with_the_runs_date(place, first):
    tokenizer = tokenizers.load(place / "rm")
    rm = transformers.AutoModelForSequenceClassification.from_pretrained(place / "rm").eval()
    line = lines(first / "samples" / "train.jsonl")[0]
    for text, reward in zip(line["responses"], line["rewards"]):
        said = [*line["messages"], {"role": "assistant", "content": text}]
        written = tokenizer.apply_chat_template(said, tokenize=False)
        written = written.replace(written.split("Today is ")[1].split(".\n")[0], "29 Feb 2024")
        ids = tokenizer(written, add_special_tokens=False, return_tensors="pt")
        assert ids["input_ids"][0].tolist().count(tokenizer.bos_token_id) == 1
        with torch.no_grad():
            assert reward == pytest.approx(rm(**ids).logits.item(), abs=1e-4)


def test_the_date_of_a_run_stays(place, tmp_path, monkeypatch):
    """It is the day on which the run was begun; another needs ``prompts.date``."""
    assert vbon(place, "run", tmp_path, stages="('sft','reward')") == 0
    written = (tmp_path / "date").read_text()
    (tmp_path / "date").write_text("2025-07-31\n")
    assert vbon(place, "sample", tmp_path) == 0
    assert "Today is 31 Jul 2025." in lines(tmp_path / "prompts" / "train.jsonl")[0]["prompt"]
    assert len(written.strip()) == 10


def test_generate_asks_by_the_template_of_the_run(place, first, tmp_path, capfd):
    workdir = tmp_path / "w"
    shutil.copytree(first, workdir)
    same = {"prompts__date": "2024-02-29", "generate__model": "reference"}
    capfd.readouterr()
    assert vbon(place, "generate", workdir, flags=["--prompt=hello"], **same) == 0
    (line,) = map(json.loads, capfd.readouterr().out.splitlines())
    assert line["prompt"] == "hello"
    # The reward reads the same message as in training: both are of the same template.
    tokenizer = tokenizers.load(place / "lm")
    prompt = prompt_files.read_jsonl(workdir / "prompts" / "train.jsonl")[0]
    assert prompt.messages == (("user", "hello"),)
    assert tokenizer.decode(list(prompt.tokens)) == prompt.text


def test_another_date_is_another_reward(place, first, tmp_path, capfd):
    """Where the reward's template writes it: the file's rewards are not those of this run."""
    samples = first / "samples" / "train.jsonl"
    later = {"stages": "('sft','reward','sample')", "prompts__date": "2024-03-01"}
    assert vbon(place, "run", tmp_path, samples__path=samples, **later) == 2
    assert "prompts.date too" in capfd.readouterr().err


def adopted(place, workdir, rows, **changes):
    write(workdir / "s.jsonl", rows)
    stages = "('sft','reward','sample')"
    return vbon(
        place, "run", workdir / "w", samples__path=workdir / "s.jsonl", stages=stages,
        prompts__date="2024-02-29", **changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.7}, "were drawn at temperature 0.7, sampling.temperature is 1"),
        ({"top_p": 0.9}, "were drawn with top_p=0.9"),
        ({"top_k": 50}, "were drawn with top_k=50"),
        ({"rewards": [9.0] * M}, "is 9 in the file, the configured reward gives"),
        ({"log_probs": [-1.0] * M}, "is -1 nats in the file, the reference gives"),
        ({"messages": None}, "prompt 0 has no 'messages'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_samples_of_something_else_are_refused(place, first, tmp_path, capfd, change, message):
    rows = [row | change for row in lines(first / "samples" / "train.jsonl")]
    assert adopted(place, tmp_path, rows) == 2
    assert message in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "w" / "samples" / "train.jsonl").exists()


def test_ids_of_another_tokenizer_give_way_to_the_text(place, first, tmp_path, capfd):
    """Texts and messages are what both tokenizers share; it is said."""
    rows = lines(first / "samples" / "train.jsonl")
    other = [
        {k: row[k] for k in ("messages", "responses", "rewards", "temperature")}
        | {"prompt": row["messages"], "response_tokens": [[VOCABULARY + 9]] * M}
        for row in rows
    ]
    # As a text, an answer ends as the template ends it; the rewards are of the text alone.
    assert adopted(place, tmp_path, other) == 0
    assert "the token ids of 3 of 3 prompts do not say their texts" in capfd.readouterr().err
    found = lines(tmp_path / "w" / "samples" / "train.jsonl")
    for line, row in zip(found, rows, strict=True):
        assert line["prompt_tokens"] == row["prompt_tokens"] and line["prompt"] == row["prompt"]
        assert line["responses"] == row["responses"]
        assert "response_tokens" not in line and "log_probs" not in line


def test_given_prompt_ids_are_kept(place, tmp_path):
    """Those with a BOS that the text does not show, and those without it."""
    tokenizer = tokenizers.load(place / "lm")
    begun = tokenizer("The film is")["input_ids"]
    rows = [
        {"prompt": "The film is", "responses": [" a", " b"], "rewards": [2.0, 2.0],
         "prompt_tokens": ids}
        for ids in (begun, begun[1:])
    ]  # fmt: skip
    changes = {
        "prompts__format": "text", "samples__m": 2, "reward__path": "", "reward__template": "chat",
        "reward__function": "tests.standins:short", "reward__score": "logit",
    }  # fmt: skip
    for row in rows:
        row["rewards"] = [float(x) for x in short(row["responses"])]
    assert adopted(place, tmp_path, rows, **changes) == 0
    found = prompt_files.read_jsonl(tmp_path / "w" / "prompts" / "train.jsonl")
    assert [list(p.tokens) for p in found] == [begun, begun[1:]]
    assert [p.text for p in found] == ["The film is"] * 2


def short(responses):
    from tests import standins

    return standins.short([""] * len(responses), responses)


@pytest.mark.parametrize(
    ("add_bos", "begins"), [("auto", True), ("never", False), ("always", True)]
)
def test_bos_by_a_config_key(place, tmp_path, add_bos, begins):
    """The choice is the tokenizer's own from then on: that of the run, and of an export."""
    changes = {"prompts__format": "text", "stages": "('sft',)", "tokenizer__add_bos": add_bos}
    assert vbon(place, "run", tmp_path, **changes) == 0
    for tokenizer in (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
        tokenizers.load(tmp_path / "tokenizer"),
    ):
        ids = tokenizer("The film")["input_ids"]
        assert (ids[0] == tokenizer.bos_token_id) == begins
    assert tokenizers.begin_ids(tokenizer) == ((tokenizer.bos_token_id,) if begins else ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling__end_tokens": "('<|im_end|>',)"}, "sampling.end_tokens has '<|im_end|>'"),
        ({"prompts__date": "today"}, "prompts.date='today': write it as YYYY-MM-DD"),
        ({"reward__template_arguments": "[1]"}, "reward.template_arguments='[1]': must be a JSON"),
        ({"reward__template_arguments": '{"tokenize":false}'}, "'tokenize' is not one of the temp"),
    ],
)
def test_wrong_values_are_refused(place, tmp_path, capfd, change, message):
    stages = "('sft','reward')"
    assert vbon(place, "run", tmp_path, stages=stages, **change) == 2
    assert message in capfd.readouterr().err.strip().splitlines()[-1]
