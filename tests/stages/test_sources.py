"""Texts and prompts of a config from the files and data sets that it names."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from vbon_jax import cli
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.sources import chat, reviews, text
from vbon_jax.data.sources import hub as hub_data
from vbon_jax.stages import STAGES, sources
from vbon_jax.stages.base import Run
from vbon_jax.stages.workdir import Workdir

ROOT = Path(__file__).parents[2]
CONFIG = f"--config={ROOT / 'configs' / 'reviews.py'}"
ASKED = ("the film was", "an actor, who", 'so "bad"\nthat it', "I liked")
SIZES = [
    "--config.tokenizer.vocab_size=300", "--config.samples.m=2", "--config.sampling.batch_size=8",
    "--config.sampling.max_new_tokens=4", "--config.prompts.test=2", "--config.prompts.train=3",
    "--config.reference.fit.epochs=1", "--config.reference.fit.batch_size=16",
    "--config.reward.function=tests.standins:short",
    *(f"--config.reference.model.{k}={v}" for k, v in
      {"layers": 1, "width": 8, "heads": 2, "positions": 64}.items()),
]  # fmt: skip


def vbon(stage, workdir, *flags):
    return cli.main([stage, CONFIG, f"--workdir={workdir}", *SIZES, *flags])


def lines(path):
    return [json.loads(line) for line in path.open()]


@pytest.fixture(scope="module")
def labelled():
    """Labelled texts, some with what a CSV file must quote."""
    found = list(reviews.examples(0, 40))
    found[1] = text.Example('so "bad", that\nit hurts', 0)
    return found


def write_csv(path, columns, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def write_parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


WRITERS = {
    "csv": write_csv,
    "tsv": lambda path, columns: write_csv(path, columns, "\t"),
    "parquet": write_parquet,
}


@pytest.fixture(scope="module")
def learned(labelled, tmp_path_factory):
    """The reference of the texts as JSON lines, under the usual names."""
    root = tmp_path_factory.mktemp("jsonl")
    with (root / "x.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": e.text, "label": e.label}) + "\n" for e in labelled)
    assert vbon("sft", root / "w", f"--config.data.path={root / 'x.jsonl'}") == 0
    return root / "w"


@pytest.mark.parametrize(
    ("of_texts", "of_prompts"), [("csv", "parquet"), ("parquet", "csv"), ("tsv", "tsv")]
)
def test_texts_and_prompts_of_columns(labelled, learned, tmp_path, capfd, of_texts, of_prompts):
    """The same reference as of JSON lines, and prompts as they are written."""
    texts, asked = tmp_path / f"x.{of_texts}", tmp_path / f"asked.{of_prompts}"
    examples = {"review": [e.text for e in labelled], "liked": [e.label for e in labelled]}
    WRITERS[of_texts](texts, {"id": [*range(len(labelled))], **examples})
    WRITERS[of_prompts](asked, {"question": ASKED, "topic": ["film"] * len(ASKED)})
    flags = [
        f"--config.data.path={texts}", "--config.data.text_column=review",
        "--config.data.label_column=liked", f"--config.prompts.path={asked}",
        f"--config.prompts.test_path={asked}", "--config.prompts.column=question",
    ]  # fmt: skip
    workdir = tmp_path / "w"
    for stage in ("sft", "reward", "sample"):
        assert vbon(stage, workdir, *flags) == 0, stage
    for name in ("reference/model.safetensors", "tokenizer/tokenizer.json"):
        assert (workdir / name).read_bytes() == (learned / name).read_bytes()
    for split in ("train", "test"):
        found = lines(workdir / "prompts" / f"{split}.jsonl")
        assert tuple(p["prompt"] for p in found) == ASKED
    samples = lines(workdir / "samples" / "train.jsonl")
    assert tuple(s["prompt"] for s in samples) == ASKED
    assert all(len(s["responses"]) == 2 and np.isfinite(s["rewards"]).all() for s in samples)
    # The columns are part of what the results follow from.
    capfd.readouterr()
    assert vbon("sample", workdir, *flags, "--config.prompts.column=topic") == 2
    assert "prompts.column='question', now it is 'topic'" in capfd.readouterr().err


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("flag", "missing"),
    [("data.text_column", "review"), ("data.label_column", "liked")],
)
def test_a_column_that_is_not_there_is_named_with_its_key(tmp_path, capfd, kind, flag, missing):
    path = tmp_path / f"x.{kind}"
    WRITERS[kind](path, {"text": ["good", "bad"], "label": [1, 0]})
    assert vbon("sft", tmp_path / "w", f"--config.data.path={path}",
                f"--config.{flag}={missing}") == 2  # fmt: skip
    error = capfd.readouterr().err.strip()
    assert error.startswith("vbon: ") and "\n" not in error
    for word in (str(path), repr(missing), f"set {flag}", "'text', 'label'"):
        assert word in error


def run_of(tmp_path, *flags):
    c = cli.parse(["sample", CONFIG, *SIZES, *flags]).config
    return Run(c, Workdir(tmp_path, c, STAGES), None)


def test_texts_of_a_hub_data_set_come_from_its_splits_and_columns(tmp_path, monkeypatch):
    asked = []

    def load(*arguments):
        asked.append(arguments)
        return [text.Example(arguments[1], 1)]

    monkeypatch.setattr(hub_data, "load", load)
    run = run_of(
        tmp_path, "--config.data.hub=owner/texts:en", "--config.data.text_column=review",
        "--config.data.label_column=liked", "--config.data.test_split=validation",
    )  # fmt: skip
    found = sources.texts(run)
    columns = ("review", "liked")
    assert asked == [
        ("owner/texts:en", "train", *columns),
        ("owner/texts:en", "validation", *columns),
    ]
    assert found == ([text.Example("train", 1)], [text.Example("validation", 1)], [])


@pytest.fixture(scope="module")
def tokenizer(learned):
    return tokenizers.load(learned / "tokenizer")


@pytest.mark.parametrize(("column", "read"), [("", "prompt"), ("question", "question")])
def test_prompts_of_a_hub_data_set(tmp_path, monkeypatch, tokenizer, column, read):
    """No text is read where the data set brings all prompts."""
    sets = {"train": ["a film", "an actor"], "validation": ["so bad", "I liked"]}

    def load_prompts(name, split, wanted):
        assert (name, wanted) == ("owner/asked", read)
        return sets[split]

    monkeypatch.setattr(hub_data, "load_prompts", load_prompts)
    monkeypatch.setattr(sources, "texts", lambda run: pytest.fail("texts are read"))
    flags = ["--config.prompts.hub=owner/asked", "--config.prompts.test_split=validation",
             f"--config.prompts.column={column}"]  # fmt: skip
    found = sources.make_prompts(run_of(tmp_path, *flags), tokenizer, None)
    assert {split: [p.text for p in found[split]] for split in found} == {
        "train": sets["train"], "test": sets["validation"],
    }  # fmt: skip
    sets["validation"] = sets["validation"][:1]
    with pytest.raises(ValueError, match=r"prompts\.hub='owner/asked' has 1 prompt: intervals"):
        sources.make_prompts(run_of(tmp_path, *flags), tokenizer, None)


def test_conversations_of_a_hub_data_set_and_others_of_a_file(tmp_path, monkeypatch, tokenizer):
    """Out-of-distribution prompts are of a file wherever the others come from."""
    path = tmp_path / "ood.jsonl"
    path.write_text(json.dumps({"prompt": "who are you"}) + "\n")
    monkeypatch.setattr(hub_data, "load_conversations", lambda name, split, column: [split] * 2)
    monkeypatch.setattr(chat, "read", lambda file, column: [f"{Path(file).name} {column!r}"])
    monkeypatch.setattr(chat, "prompts", lambda found, *_: found)
    run = run_of(
        tmp_path, "--config.prompts.hub=owner/chats", "--config.prompts.format=chat",
        f"--config.prompts.ood_path={path}", "--config.prompts.train_split=train[:2]",
    )  # fmt: skip
    assert sources.make_prompts(run, tokenizer, None) == {
        "train": ["train[:2]"] * 2, "test": ["test"] * 2, "ood": ["ood.jsonl ''"],
    }  # fmt: skip
