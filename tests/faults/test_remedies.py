"""What is removed, torn or edited is made again, or refused with a remedy that works.

Each ends in a complete run whose results are those of an undisturbed one.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.faults import flips, run
from vbon_jax.stages import notes

EVALUATED = (*flips.STAGES, "evaluate")


@pytest.fixture
def workdir(starts, tmp_path):
    shutil.copytree(starts["evaluate"], tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture
def equal(starts, workdir):
    """Runs all stages: how it ended; where it ended well, results must be those of no fault."""

    def runs():
        code, lines = flips.vbon(workdir, EVALUATED)
        if code == 0:
            wanted = run.digest_of(starts["evaluate"])
            assert run.differing(run.digest_of(workdir), wanted) == []
            again = flips.vbon(workdir, EVALUATED)[1]
            assert [line for line in again if "complete already" not in line] == []
        return code, "\n".join(lines)

    return runs


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def followed(line: str) -> None:
    """Removes what a line says to remove."""
    paths = re.findall(r"(/\S+?)(?=[\s,:;]|$)", line.partition("after removing ")[2])
    assert paths, line
    for path in map(Path, paths):
        if path.exists():
            remove(path)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("samples/train.jsonl", "sample"), ("prompts", "sample"), ("policy", "export"),
        ("evaluation.json", "evaluate"), ("reference", "sft"), ("tokenizer", "sft"),
        ("checkpoints/train", "train"), ("checkpoints/train/12", "train"),
    ],
)  # fmt: skip
def test_removed_results_are_made_again(workdir, equal, name, stage):
    remove(workdir / name)
    code, lines = equal()
    assert code == 0, lines
    assert (
        f"{stage}: {workdir / name.removesuffix('/12')}" in lines
        and "doing the stage again" in lines
    )
    assert lines.count(": done in") == 1  # what follows from equal results stays


def test_a_removed_log_is_told_and_made_again_by_the_remedy_of_the_line(workdir, equal):
    remove(workdir / "metrics.jsonl")
    code, lines = flips.vbon(workdir, EVALUATED)
    assert code == 0 and not any(": done in" in line for line in lines)
    (told,) = [line for line in lines if "metrics.jsonl is missing since; no result" in line]
    remove(Path(re.search(r"remove (/\S+) and run `vbon train`", told)[1]))
    assert flips.vbon(workdir, EVALUATED, stage="train")[0] == 0
    assert equal()[0] == 0  # the metrics too


@pytest.mark.parametrize("stage", EVALUATED)
def test_a_removed_note_is_made_again(workdir, equal, stage):
    remove(workdir / "stages" / f"{stage}.json")
    code, lines = equal()
    assert code == 0
    assert "is there without a note" in lines and "is set aside as" in lines


@pytest.mark.parametrize("text", [b"", b"[]"])  # more of them in tests/stages/test_notes.py
def test_a_damaged_note_is_refused_and_its_remedy_works(workdir, equal, text):
    path = workdir / "stages" / "export.json"
    path.write_bytes(text)
    code, lines = equal()
    assert code == 2 and f"{path} is damaged or was edited" in lines
    assert "remove it and run the same command again" in lines
    remove(path)
    assert equal()[0] == 0


def test_a_torn_last_line_is_sampled_again(workdir, equal):
    path = workdir / "samples/train.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    code, lines = equal()
    assert code == 0 and "was changed since" in lines and "the last line was torn" in lines


def test_an_edited_file_is_kept_and_sampled_again(workdir, equal):
    path = workdir / "samples/train.jsonl"
    edited = path.read_bytes().replace(b"0.", b"1.", 1)
    path.write_bytes(edited)
    code, lines = equal()
    assert code == 0 and "those after it are sampled again" in lines
    assert (workdir / "samples/train.jsonl.damaged").read_bytes() == edited


@pytest.mark.parametrize(
    ("name", "stage", "asking"),
    [
        ("reference/model.safetensors", "sft", "sample"),
        ("policy/config.json", "export", "evaluate"),
        ("prompts/train.jsonl", "sample", "train"),
    ],
)  # fmt: skip
def test_a_stage_alone_says_which_to_run(workdir, equal, name, stage, asking):
    """Its input is damaged: the stage that is named makes it again."""
    remove(workdir / "stages" / f"{asking}.json")
    (workdir / name).write_bytes(b"x" + (workdir / name).read_bytes())
    code, lines = flips.vbon(workdir, EVALUATED, stage=asking)
    assert code == 2 and f"run `vbon {stage}`" in lines[-1]
    assert flips.vbon(workdir, EVALUATED, stage=stage)[0] == 0
    assert flips.vbon(workdir, EVALUATED, stage=asking)[0] == 0
    assert equal()[0] == 0


@pytest.mark.parametrize("text", ['{"rows": 5}', '{"rows": [{"policy": "bon", "n": "x"}]}', "[]"])
def test_a_report_of_damaged_results_says_to_measure_again(workdir, text):
    (workdir / "evaluation.json").write_text(text)
    code, lines = flips.vbon(workdir, EVALUATED, stage="report")
    assert code == 2 and "evaluation.json was changed since stage evaluate" in lines[-1]
    assert "run `vbon evaluate`" in lines[-1]
    if text == "[]":  # once is enough
        assert flips.vbon(workdir, EVALUATED, stage="evaluate")[0] == 0
        assert flips.vbon(workdir, EVALUATED, stage="report")[0] == 0


def test_a_stage_that_is_missing_is_named(workdir, equal):
    remove(workdir / "stages" / "train.json")
    remove(workdir / "checkpoints")
    code, lines = flips.vbon(workdir, EVALUATED, stage="export")
    assert code == 2 and "run `vbon train`" in lines[-1]
    assert flips.vbon(workdir, EVALUATED, stage="train")[0] == 0
    assert equal()[0] == 0


def last_damaged(workdir):
    for path in (workdir / "checkpoints/train/12/state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    remove(workdir / "policy")


def test_export_from_a_damaged_checkpoint_goes_back_to_train(workdir, equal):
    """In a process of its own, to see what readers that orbax leaves behind would print."""
    last_damaged(workdir)
    line = run.command(workdir, *flips.FLAGS, f"--config.stages={EVALUATED!r}")
    ended = run.done(line)
    said = "\n".join(ended.lines)
    assert ended.code == 0 and not ended.traceback, said
    assert "12 is damaged" in said and "going on from checkpoint 10" in said
    assert "goes on from what there is; doing so" in said
    assert equal()[0] == 0


def test_export_alone_says_to_train(workdir, equal):
    last_damaged(workdir)
    code, lines = flips.vbon(workdir, EVALUATED, stage="export")
    assert code == 2 and "run `vbon train`" in lines[-1]
    assert flips.vbon(workdir, EVALUATED, stage="train")[0] == 0
    assert flips.vbon(workdir, EVALUATED, stage="export")[0] == 0
    assert equal()[0] == 0


def test_another_setting_is_refused_and_removing_what_is_named_does(workdir, starts):
    """And back again: results are those of the first settings."""
    flag = "--config.samples.m=31"
    code, lines = flips.vbon(workdir, EVALUATED, flag)
    assert code == 2 and f"stage sample in {workdir} was done with" in lines[-1]
    followed(lines[-1])
    assert flips.vbon(workdir, EVALUATED, flag)[0] == 0
    code, lines = flips.vbon(workdir, EVALUATED)
    assert code == 2
    followed(lines[-1])
    assert flips.vbon(workdir, EVALUATED)[0] == 0
    found, wanted = run.digest_of(workdir), run.digest_of(starts["evaluate"])
    assert [k for k in run.differing(found, wanted) if k in wanted] == []


def test_other_results_before_are_refused_and_removing_what_is_named_does(workdir, equal):
    """As where another machine makes samples again, with other bits."""
    note = workdir / "stages" / "train.json"
    value = json.loads(note.read_bytes())
    value["read"]["sample"] = "0" * 64
    del value["sha256"]
    note.write_text(json.dumps(notes.as_json(notes.Note(**value))))
    code, lines = equal()
    assert code == 2 and "was done with other results of stage sample" in lines
    followed(lines.splitlines()[-1])
    assert equal()[0] == 0
