"""The plan held against measured memory at a small size: what is measured, and when."""

import json
import sys

import numpy as np
import pytest

import vbon_jax as vbon
from vbon_jax.bench import plan as bench
from vbon_jax.models.config import DecoderConfig
from vbon_jax.training import loop

MODEL = DecoderConfig(vocab_size=512, positions=64, layers=1, width=32, heads=4, mlp_width=64)
DPO = (
    "method.name=dpo", "offline.responses=4", "offline.pairs=1", "offline.epochs=1",
    "offline.batch_size=16", "sampling.batch_size=32", "sampling.max_new_tokens=8",
)  # fmt: skip
KEYS = {"held", "planned", "planned_saving", "phase"}
BALLAST = 250 * 10**6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Random models, prompts and samples."""
    path = tmp_path_factory.mktemp("plan")
    bench.make_models(path, MODEL, MODEL)
    return path


def parameters():
    """Of the model: its embeddings, its block with two norms, and the last norm."""
    width, mlp = MODEL.width, MODEL.mlp_width
    embeddings = (MODEL.vocab_size + MODEL.positions) * width
    block = 4 * width * (width + 1) + width * mlp + mlp + mlp * width + width + 2 * 2 * width
    return embeddings + block + 2 * width


def test_what_is_planned_is_held_once_a_device(root):
    """Reference, policy, two moments and 64 x 4 rewards; and the largest phase but for saving."""
    line = bench.flags(root, bench.Setting(DPO))
    found = bench._plan_here(root, line)
    assert found.keys() == KEYS
    state = 3 * 4 * parameters()
    pool = (
        64 * 4 * ((8 + 8) * (4 + 1) + 8 * 1 + 4)
    )  # ids and masks of prompt and response, log-prob
    assert 0 <= found["held"] - (4 * parameters() + state + 64 * 4 * 4 + pool) < 100
    assert 0 <= found["planned_saving"] - found["held"] - state < 100
    assert found["phase"] == "gradient steps" and found["planned"] > found["held"]


def test_the_peak_while_a_checkpoint_is_saved_is_told_apart(root, monkeypatch):
    saved = []

    class Heavy(bench.Checkpointer):
        def __init__(self, *args):
            assert np.ones(2 * BALLAST // 8).all()  # before the first iteration
            super().__init__(*args)

        def save(self, step, state, metadata):
            assert np.ones(BALLAST // 8).all()
            saved.append(step)
            super().save(step, state, metadata)

    monkeypatch.setattr(bench, "Checkpointer", Heavy)
    monkeypatch.setattr(loop, "Checkpointer", loop.Checkpointer)  # put back at the end
    peaks = bench._train_here(root, bench.flags(root, bench.Setting(DPO)))
    assert saved == [1]  # in the second run, which is the measured one
    assert peaks.keys() == {"measured", "measured_saving"}
    assert 0.9 < peaks["measured_saving"] / BALLAST < 1.6, peaks
    assert 1.9 < peaks["measured"] / BALLAST < 2.6, peaks
    assert (root / "workdir" / "checkpoints" / "train" / "1").is_dir()


def test_a_setting_is_planned_and_measured_in_processes_of_its_own(root, monkeypatch):
    """The plan in a real one, with two devices; what is trained there takes too long here."""
    real, asked = bench._in_a_process, []

    def process(what, *rest):
        asked.append((what, *rest))
        return real(what, *rest) if what == "plan" else {"measured": 1, "measured_saving": 2}

    monkeypatch.setattr(bench, "_in_a_process", process)
    setting = bench.Setting((*DPO, "mesh.fsdp=2"), devices=2)
    found = bench.compare(root, setting)
    line = bench.flags(root, setting)
    assert asked == [("plan", root, line, 2), ("train", root, line, 2)]
    assert found.keys() == KEYS | {"measured", "measured_saving"}
    alone = 4 * 4 * parameters()
    assert alone < found["held"] < 2 * alone  # shared by both devices, but for what is small


def test_a_process_that_fails_is_an_error(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(RuntimeError, match="the process to plan failed: no such thing"):
        bench.compare(tmp_path, bench.Setting(()))


def test_flags_name_the_models_and_come_after_the_base(tmp_path):
    setting = bench.Setting(("samples.m=2", *bench.CLASSIFIER))
    line = bench.flags(tmp_path, setting, "some.py")
    assert line[0] == "--config=some.py"
    assert line.index("--config.samples.m=4") < line.index("--config.samples.m=2")
    assert line[-1] == f"--config.reward.path={tmp_path}/reward"


def test_function_and_classifier_give_the_rewards_of_the_samples(root):
    """Samples that the configured reward does not reproduce would be refused."""
    line = json.loads((root / "samples.jsonl").open().readline())
    asked, said = [line["prompt"]] * len(line["responses"]), line["responses"]
    model = vbon.load_reward(root / "reward", label="POSITIVE", score="logit")
    assert bench.zero(asked, said) == line["rewards"]
    np.testing.assert_array_equal(vbon.score(model, asked, said), line["rewards"])


def test_every_figure_has_a_row(tmp_path, monkeypatch):
    result = {"held": 1e6, "planned": 30e6, "measured": 20e6, "planned_saving": 12e6,
              "measured_saving": 16e6, "phase": "update"}  # fmt: skip
    monkeypatch.setattr(bench, "make_models", lambda root: None)
    monkeypatch.setattr(bench, "compare", lambda root, setting, config: result)
    assert dict(bench.results()) == dict.fromkeys(bench.SETTINGS, result)
    peak, saving = bench.rows("a setting", result)
    assert (peak.what, peak.value, peak.ratio) == ("a setting, update, planned", 30.0, 1.5)
    assert (saving.what, saving.value, saving.ratio) == ("a setting, saving, planned", 12.0, 0.75)
