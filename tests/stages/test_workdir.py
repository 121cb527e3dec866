"""What a stage was done under: the notes and names of workdirs written before some keys existed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from vbon_jax import cli, config
from vbon_jax.errors import InputError
from vbon_jax.stages import STAGES, units
from vbon_jax.stages.base import Run
from vbon_jax.stages.workdir import Workdir

ROOT = Path(__file__).parents[2]
TABULAR = ROOT / "configs" / "tabular.py"

# Written by the version that had none of the keys of ``config.ADDED``.
GOLDEN_SAMPLES = {"": "5af10f02", ":sweep": "ec2ee393"}
GOLDEN_FOLDERS = {
    "vbon-245fe844", "lower_bound-5e9f22ea", "bond-78f65476", "bonbon-a40dc43b",
    "bon_sft-1a05cf18", "ppo-8206289f", "dpo-794904da",
}  # fmt: skip
GOLDEN_SETTINGS = {
    "sft": "9232890c", "reward": "1d8ccbb6", "evaluator": "3afa1a50", "sample": "05822800",
    "train": "3d4c672d", "export": "230ec7cc", "evaluate": "57f6cdfd", "convergence": "12b4a2d3",
    "choose": "a2ff7dca",
    "sweep": "43d5f08a", "report": "079e0f3f",
}  # fmt: skip
OTHERS = {
    "data.hub": "owner/texts", "data.text_column": "review", "data.label_column": "liked",
    "data.train_split": "train[:9]", "data.test_split": "validation", "prompts.hub": "owner/asked",
    "prompts.column": "question", "prompts.train_split": "train[:9]",
    "prompts.test_split": "validation", "prompts.date": "2024-02-29",
    "tokenizer.add_bos": "never", "sampling.end_tokens": ["a"],
    "reward.template_arguments": "{}", "evaluator.template_arguments": "{}",
    "offline.transform": "identity", "train.average_half_life": 20.0, "train.baseline": "both",
    "train.group": 2, "train.kl_target": 0.5, "train.start": "weighted", "train.warmup": 3,
    "train.optimizer": "muon", "train.replay": 1, "train.lookahead": 2,
    "samples.adaptive": 0.5, "samples.adaptive_n": 16.0, "evaluate.n": [2.0],
    "samples.prompts": 3, "samples.amortised": True,
}  # fmt: skip
# Those beside them need another key with them: `train.group`, `method.n` and so on.
BESIDE = {"train.baseline", "train.lookahead", "samples.prompts", "evaluate.n"}
ALONE = sorted(config.ADDED - BESIDE)


def parsed(variant=":ppo", *flags):
    return cli.parse(["run", f"--config={TABULAR}{variant}", *flags]).config


def folder(root, variant=":ppo", *flags):
    return Workdir(root, parsed(variant, *flags), STAGES)


def another(key):
    """Flags that give a new key another value, and what it needs beside it."""
    value = OTHERS[key]
    also = {
        "train.baseline": "train.group=2", "train.lookahead": "train.value_network=prefix",
        "samples.prompts": "samples.amortised=True",
    }  # fmt: skip
    flags = [f"{key}={tuple(value) if isinstance(value, list) else value}"]
    return [f"--config.{flag}" for flag in flags + [also[x] for x in also if x == key]]


def stage_of(key):
    """The first stage whose results follow from a key."""
    if key.startswith("evaluator."):
        return "evaluate"
    if key.startswith(("offline.", "train.", "samples.amortised")):
        return "train"
    return "sft" if key.startswith(("data.", "tokenizer.", "sampling.end")) else "sample"


def note(root, stage):
    return root / "stages" / f"{stage}.json"


@pytest.fixture
def old(tmp_path):
    """A workdir in which every stage is complete, and no note has any of the new keys."""
    now = folder(tmp_path)
    for stage in STAGES:
        assert not now.begin(stage)
        now.complete(stage)
        written = json.loads(note(tmp_path, stage).read_text())
        settings = {k: v for k, v in written["settings"].items() if k not in config.ADDED}
        note(tmp_path, stage).write_text(json.dumps({"settings": settings, "complete": True}))
    return tmp_path


def test_notes_without_the_new_keys_are_not_refused(old):
    here = folder(old)
    for stage in STAGES:
        assert here.begin(stage), stage
        here.require(stage, "its results")


@pytest.mark.parametrize("key", ALONE)
def test_notes_without_a_new_key_are_refused_where_it_has_another_value(old, key):
    default = config.defaults_flat()[key]
    words = f"was done with {key}={default!r}, now it is {OTHERS[key]!r}: use another --workdir"
    here = folder(old, ":ppo", *another(key))
    with pytest.raises(InputError) as error:
        here.begin(stage_of(key))
    assert words in str(error.value)
    with pytest.raises(InputError, match=key):
        here.require("report", "the page")  # what comes after follows from it too


@pytest.mark.parametrize("key", ALONE)
def test_a_note_in_which_a_new_key_has_another_value_is_refused(tmp_path, key):
    stage = stage_of(key)
    there = folder(tmp_path, ":ppo", *another(key))
    there.begin(stage)
    there.complete(stage)
    assert there.begin(stage)
    default = config.defaults_flat()[key]
    with pytest.raises(InputError) as error:
        folder(tmp_path).begin(stage)
    assert f"done with {key}={OTHERS[key]!r}, now it is {default!r}" in str(error.value)


@pytest.mark.parametrize("variant", ["", ":sweep"])
@pytest.mark.parametrize("role", ["pool", "opponents"])
def test_held_out_samples_have_the_names_they_had(variant, role):
    digest = GOLDEN_SAMPLES[variant]
    found = folder("/w", variant or ":ppo").held_out(role, "test", 1.0, 200)
    assert found == Path(f"/w/samples/test_{role}_t1_m200_{digest}.jsonl")


def folders(*flags):
    s = parsed(":sweep", *flags)
    run = Run(s, Workdir("/w", s, STAGES), None)
    return {units.folder(run, unit).name for unit in units.of(s)}


def test_folders_of_a_sweep_have_the_names_they_had():
    found = folders()
    assert found > GOLDEN_FOLDERS  # and those of the methods added since
    assert {name.split("-")[0] for name in found - GOLDEN_FOLDERS} == {"qrpo", "qrpo_identity"}


# With these no offline method may be in a sweep, and evaluate.n is of what none trains.
ONLINE = {"samples.adaptive", "samples.amortised", "samples.prompts", "evaluate.n"}


@pytest.mark.parametrize("key", sorted(config.ADDED - ONLINE))
def test_another_value_of_a_new_key_gives_other_names(key):
    assert not folders(*another(key)) & GOLDEN_FOLDERS
    found = folder("/w", ":ppo", *another(key)).held_out("pool", "test", 1.0, 200)
    follows = stage_of(key) != "train"  # held-out samples are the reference's
    assert (GOLDEN_SAMPLES[""] not in found.name) == follows


def test_each_stage_follows_from_the_settings_it_followed_from():
    """The notes of an old workdir have these keys and values, the new ones apart."""
    here = folder("/w", ":sweep")
    for stage in STAGES:
        follows = here.settled(here.relevant(stage))
        old = {k: v for k, v in follows.items() if not k.startswith("sweep.qrpo")}  # grids added
        assert here.digest(old) == GOLDEN_SETTINGS[stage], stage


def test_the_new_keys_are_keys_and_what_was_there_before_is_none_of_them():
    assert set(config.added()) == config.ADDED == OTHERS.keys()
    assert all(config.added()[key] != value for key, value in OTHERS.items())


def test_a_whole_old_workdir_is_run_again_without_work(old, capfd):
    shutil.copy(note(old, "sft"), old / "as_it_was")
    assert cli.main(["run", f"--config={TABULAR}:ppo", f"--workdir={old}",
                     "--config.stages=('sft','reward','sample','train')"]) == 0  # fmt: skip
    assert capfd.readouterr().err.count("complete already") == 4
    assert note(old, "sft").read_bytes() == (old / "as_it_was").read_bytes()


def test_a_lock_never_follows_a_link_and_cuts_nothing(tmp_path):
    (tmp_path / "precious").write_text("all")
    run = folder(tmp_path / "w")
    run.root.mkdir()
    (run.root / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match=r"\.lock is a link: remove it"), run.locked():
        pass
    assert (tmp_path / "precious").read_text() == "all"
    (run.root / ".lock").unlink()
    (run.root / ".lock").write_text("old")
    with run.locked():
        assert (run.root / ".lock").read_text() == "old"


@pytest.mark.parametrize("mark", ["[", "*", "?"])
def test_a_pattern_in_the_path_is_refused_before_any_work(tmp_path, mark):
    run = folder(tmp_path / f"a{mark}b")
    with pytest.raises(InputError, match=r"is a pattern to the library"), run.locked():
        pass
    assert not run.root.exists()


LEFT = (
    "prompts/train.jsonl.partial", "policy/.model.safetensors.12.tmp", "evaluation.json.ab.tmp",
    "metrics.tmp", "checkpoints/train/4.orbax-checkpoint-tmp-1/state/x", "stages/sft.json.ab.tmp",
)  # fmt: skip
KEPT = ("notes.tmp", "mine/x.tmp", "policy/model.safetensors", "checkpoints/train/2/state/x")


def test_temporary_files_are_swept_at_the_next_start(tmp_path):
    run = folder(tmp_path)
    for name in (*LEFT, *KEPT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with run.locked():
        assert not [name for name in LEFT if (tmp_path / name).exists()]
        assert all((tmp_path / name).exists() for name in KEPT)


def test_of_a_sweep_only_old_ones_are_swept_since_others_may_be_at_work(tmp_path):
    run = folder(tmp_path)
    new, old = tmp_path / "sweep/u/new.tmp", tmp_path / "sweep/u/old.tmp"
    new.parent.mkdir(parents=True)
    for path in (new, old):
        path.write_text("x")
    os.utime(old, (1e9, 1e9))
    with run.locked():
        assert new.exists() and not old.exists()
