"""Files that settings name by path: another content is another setting."""

import os
import sys
from pathlib import Path

import pytest

from vbon_jax import cli
from vbon_jax.errors import InputError
from vbon_jax.stages import STAGES, named, results, units
from vbon_jax.stages.base import Run
from vbon_jax.stages.workdir import Workdir

TABULAR = Path(__file__).parents[2] / "configs" / "tabular.py"

# key, what it names, and the first stage whose results follow from it
CASES = [
    ("data.path", "texts.jsonl", "sft"),
    ("tokenizer.path", "model", "sft"),
    ("reference.path", "model", "sft"),
    ("reward.path", "model", "reward"),
    ("reward.function", "mine:score", "reward"),
    ("prompts.path", "p.jsonl", "sample"),
    ("prompts.test_path", "p.jsonl", "sample"),
    ("samples.path", "s.jsonl", "sample"),
    ("evaluator.function", "mine:score", "evaluator"),
]


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """A folder with one of everything, which is the current one and on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("texts.jsonl", "p.jsonl", "s.jsonl", "mine.py"):
        Path(name).write_text("x = 1\n")
    Path("model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "notes.md"):
        (Path("model") / name).write_text("{}")
    yield
    sys.modules.pop("mine", None)


def folder(*flags):
    """As a new process sees it."""
    c = cli.parse(["run", f"--config={TABULAR}:ppo", "--config.reward.function=", *flags]).config
    return Workdir("w", c, STAGES)


def of_key(key, value):
    test = ["--config.prompts.test_path=p.jsonl"] * (key in ("prompts.path", "samples.path"))
    function = ["--config.reward.function=mine:score"] * (not key.startswith("reward"))
    return [*function, *test, f"--config.{key}={value}"]


def changed(value):
    path = {"mine:score": Path("mine.py"), "model": Path("model/model.safetensors")}.get(
        value, Path(value)
    )
    path.write_text(path.read_text() + " ")
    return path


@pytest.mark.parametrize(("key", "value", "first"), CASES)
def test_another_content_is_refused_from_the_first_stage_on(key, value, first):
    flags = of_key(key, value)
    there = folder(*flags)
    for stage in ("sft", "reward", "evaluator", "sample", "train"):
        there.begin(stage)
        there.complete(stage)
        assert folder(*flags).begin(stage)
    changed(value)
    with pytest.raises(InputError) as error:
        folder(*flags).begin(first)
    said = str(error.value)
    assert f"stage {first} in {Path('w').absolute()} was done with {key}={value!r} of" in said
    assert "of another content (sha256 " in said and "do the stage again after removing" in said
    assert str(Path("w/stages").absolute() / f"{first}.json") in said


def test_what_is_beside_a_model_does_not_count():
    flags = of_key("reference.path", "model")
    there = folder(*flags)
    there.begin("sft")
    there.complete("sft")
    Path("model/notes.md").write_text("other")
    assert folder(*flags).begin("sft")


@pytest.mark.parametrize("value", ["", "vbon_jax.data.tabular:reward", "no_such_module:f", "os"])
def test_code_of_this_package_and_of_no_file_has_no_digest(value):
    found = named.content("reward.function", value, {})
    assert found is None or value == "os"


def test_a_file_whose_stat_is_known_is_not_read_again(monkeypatch):
    flags = of_key("reference.path", "model")
    there = folder(*flags)
    there.begin("sft")
    there.complete("sft")
    read = []
    monkeypatch.setattr(results, "sha256", lambda path: read.append(path) or "0" * 64)
    assert folder(*flags).begin("sft")
    assert not [p for p in read if "model" in str(p)]
    os.utime("model/config.json", ns=(1, 1))
    with pytest.raises(InputError):
        folder(*flags).begin("sft")
    assert [p.name for p in read if p.parent.name == "model"] == ["config.json"]


def test_a_model_of_the_hub_is_known_by_its_revision(monkeypatch):
    snapshots = Path("hub/snapshots")
    monkeypatch.setattr(named.hub, "resolve", lambda name: snapshots / "abc123")
    assert named.content("reward.path", "owner/name", {}) == {"sha256": "abc123", "parts": []}

    def away(name):
        raise InputError("no network")

    monkeypatch.setattr(named.hub, "resolve", away)
    assert named.content("reward.path", "owner/name", {}) is None
    assert named.content("prompts.path", "owner/name", {}) is None  # prompts are files


def test_another_reward_under_its_name_gives_other_names():
    """So that neither an evaluation nor a sweep takes samples or policies of the old one."""

    def names():
        c = cli.parse(
            ["run", f"--config={TABULAR}:sweep", "--config.reward.function=mine:score"]
        ).config
        here = Workdir("w", c, STAGES)
        found = {units.folder(Run(c, here, None), unit).name for unit in units.of(c)}
        return found | {here.held_out("pool", "test", 1.0, 200).name}

    before = names()
    assert before == names()
    changed("mine:score")
    assert not names() & before
