"""What is exported is what was trained and what is measured, over a bfloat16 reference too."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from vbon_jax import cli, sharding
from vbon_jax.models import decoder
from vbon_jax.stages import STAGES, loading
from vbon_jax.stages.base import Run
from vbon_jax.stages.workdir import Workdir

ROOT = Path(__file__).parents[2]
FLAGS = (
    "reference.fit.epochs=1", "data.train=400", "samples.m=8", "prompts.test=4",
    "reference.model.layers=2", "reference.model.width=16", "reference.model.heads=2",
    "train.iterations=2", "train.batch_size=32", "train.minibatch_size=16", "train.ppo_epochs=1",
    "train.learning_rate=1e-3", "memory.frozen_dtype=bfloat16", "memory.compute_dtype=bfloat16",
    "stages=('sft','reward','sample','train','export')",
)  # fmt: skip
TOKENS = np.array([[1, 2, 3, 4, 5], [5, 3, 2, 1, 4]], np.int32)


def command(stage, workdir, *flags):
    return [
        stage, f"--config={ROOT / 'configs' / 'tabular.py'}:ppo", f"--workdir={workdir}",
        *(f"--config.{flag}" for flag in (*FLAGS, *flags)),
    ]  # fmt: skip


def measured(workdir, *flags):
    """The policy that the stages evaluate and generate read."""
    config = cli.parse(command("evaluate", workdir, *flags)).config
    return loading.policy(Run(config, Workdir(workdir, config, STAGES), sharding.make_mesh())).model


def log_probs(model, **changes):
    config = dataclasses.replace(model.config, **changes)
    hidden = decoder.hidden(model.params, config, TOKENS, np.ones(TOKENS.shape, bool))
    return np.asarray(jax.nn.log_softmax(decoder.logits(model.params, config, hidden)))


def of_transformers(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        return model, model(torch.tensor(TOKENS).long()).logits.log_softmax(-1).numpy()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A run with adapters in float32 over weights in bfloat16, exported as a whole model."""
    workdir = tmp_path_factory.mktemp("adapters")
    assert cli.main(command("run", workdir, "lora.rank=2")) == 0
    return workdir


def test_the_merged_model_is_the_policy_that_was_trained_and_is_measured(adapters, tmp_path):
    """In bfloat16, as weights or as arithmetic, the merged update would be rounded away."""
    flags = ("lora.rank=2",)
    merged = measured(adapters, *flags)
    model, theirs = of_transformers(adapters / "policy")
    assert model.dtype == torch.float32
    np.testing.assert_allclose(log_probs(merged), theirs, rtol=0, atol=1e-5)
    # The same adapters, over the weights that they were trained over.
    other = tmp_path / "adapter"
    shutil.copytree(adapters, other)
    assert cli.main(command("export", other, *flags, "export.form=adapter")) == 0
    trained = measured(other, *flags, "export.form=adapter")
    exact = log_probs(trained, compute_dtype="float32")
    np.testing.assert_allclose(theirs, exact, rtol=0, atol=3e-6)
    low = dataclasses.replace(
        merged, params=jax.tree.map(lambda x: x.astype("bfloat16"), merged.params)
    )
    assert np.abs(log_probs(low) - exact).max() > 3e-5  # what is lost otherwise


def test_upper_layers_over_a_bfloat16_trunk_are_written_as_they_are(adapters, tmp_path):
    workdir = tmp_path / "upper"
    shutil.copytree(adapters, workdir)
    for name in ("policy", "checkpoints/train"):
        shutil.rmtree(workdir / name)
    for name in ("metrics.jsonl", "stages/train.json", "stages/export.json"):
        (workdir / name).unlink()
    assert cli.main(command("run", workdir, "train.num_layers_unfrozen=1")) == 0
    model = measured(workdir, "train.num_layers_unfrozen=1")
    _, theirs = of_transformers(workdir / "policy")
    got = log_probs(model, compute_dtype="float32")
    np.testing.assert_allclose(got, theirs, rtol=0, atol=1e-5)
    upper = np.asarray(model.params["blocks"]["attention"]["q"]["kernel"][-1])
    assert upper.dtype == np.float32
    assert np.mean(upper == upper.astype("bfloat16").astype(np.float32)) < 0.5
