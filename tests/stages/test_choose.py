"""``vbon choose`` on a miniature of the tabular world, judged by its verifier."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vbon_jax import cli
from vbon_jax.bon import pool
from vbon_jax.data import tabular
from vbon_jax.evaluation import compare
from vbon_jax.report.results import read_choose

CONFIG = Path(__file__).parents[2] / "configs" / "tabular.py"
FLAGS = [
    f"--config={CONFIG}:ppo",
    "--config.stages=('sft','reward','sample')",
    "--config.reference.fit.epochs=1",
    "--config.data.train=600",
    "--config.reference.model.layers=1",
    "--config.reference.model.width=16",
    "--config.reference.model.heads=2",
    "--config.samples.m=16",
    "--config.sampling.batch_size=64",
    "--config.evaluate.m=12",
    "--config.evaluate.samples_per_prompt=2",
    "--config.train.iterations=2",
    "--config.train.batch_size=32",
    "--config.train.minibatch_size=16",
    "--config.train.ppo_epochs=1",
]
EVALUATOR = "--config.evaluator.function=vbon_jax.data.tabular:verifier"


def vbon(stage, workdir, *flags):
    return cli.main([stage, *FLAGS, f"--workdir={workdir}", *flags])


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A run up to its samples; read only."""
    workdir = tmp_path_factory.mktemp("sampled")
    assert vbon("run", workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def chosen(sampled, tmp_path_factory):
    """The same with its n chosen; read only."""
    workdir = tmp_path_factory.mktemp("chosen")
    shutil.copytree(sampled, workdir, dirs_exist_ok=True)
    assert vbon("choose", workdir, EVALUATOR) == 0
    return workdir


def lines(workdir, role):
    (path,) = (workdir / "samples").glob(f"test_{role}_t1_m12_*.jsonl")
    return [json.loads(line) for line in path.open()]


def test_what_it_leaves_is_read_off_the_pool(chosen):
    found = read_choose(chosen)
    own, opponents = lines(chosen, "pool"), lines(chosen, "opponents")
    assert found["n_max"] == 12 and found["prompts"] == len(own) == 16
    rewards = np.array([line["rewards"] for line in own], np.float32)
    judged = np.array([tabular.verifier(["a"] * 12, line["responses"]) for line in own])
    wins = compare.win_rates(judged, np.sort([line["evaluator_rewards"] for line in opponents]))
    for row in found["rows"][:12]:
        weights = pool.winner_weights(rewards, int(row["n"]))
        assert row["family"] == "bon"
        assert row["evaluator_reward"] == pytest.approx((weights * judged).sum(1).mean(), abs=1e-6)
        assert row["evaluator_win_rate"] == pytest.approx((weights * wins).sum(1).mean(), abs=1e-6)
    assert {row["n"] for row in found["rows"] if row["family"] == "soft"} == {8.0, 12.0}
    assert (chosen / "figures" / "choose.png").stat().st_size > 10_000


def test_it_says_what_it_found_in_a_table_and_a_sentence(chosen, tmp_path, capfd):
    shutil.copytree(chosen, tmp_path, dirs_exist_ok=True)
    assert vbon("choose", tmp_path, EVALUATOR) == 0  # asked for by name: done again
    out, said = capfd.readouterr()
    found = read_choose(tmp_path)
    assert found == read_choose(chosen)
    assert f"choose: {found['why']}" in said and "figures/choose.png" in said
    first = [line.split()[1] for line in out.splitlines() if line.startswith("BoN ")]
    named = {found["peak"], found["recommended"], found["over_optimised_from"], 12, 1, 2, 4, 8}
    assert set(first) == {f"{n}" for n in named if n}
    assert "soft BoN" in out and "BoPoisson" in out


def test_run_does_it_where_the_config_lists_it_and_then_not_again(chosen, tmp_path, capfd):
    shutil.copytree(chosen, tmp_path, dirs_exist_ok=True)
    stages = "--config.stages=('sft','reward','sample','choose','report')"
    assert vbon("run", tmp_path, EVALUATOR, stages) == 0
    assert "choose: complete already" in capfd.readouterr().err
    assert "Which n to trust" in (tmp_path / "report.html").read_text()
    assert vbon("run", tmp_path, EVALUATOR, stages, "--config.evaluate.m=10") == 2
    assert "choose in" in (said := capfd.readouterr().err) and "evaluate.m=12, now it is 10" in said


def test_evaluated_policies_stand_beside_best_of_n_which_is_the_same_there(chosen, tmp_path, capfd):
    shutil.copytree(chosen, tmp_path, dirs_exist_ok=True)
    for stage in ("train", "export", "evaluate", "choose"):
        assert vbon(stage, tmp_path, EVALUATOR) == 0
    own = [line for line in capfd.readouterr().out.splitlines() if line.startswith("vBoN ")]
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    bon, policy = (next(r for r in rows if r["policy"] == name) for name in ("bon", "vbon"))
    assert own[-1].split()[1:3] == [f"{policy[key]:.3f}" for key in ("kl_ref", "evaluator_reward")]
    (same,) = [r for r in read_choose(tmp_path)["rows"] if (r["family"], r["n"]) == ("bon", 8.0)]
    for key in ("reward", "win_rate", "evaluator_reward", "evaluator_win_rate"):
        assert same[key] == pytest.approx(bon[key], abs=1e-6), key


def test_a_changed_result_is_refused_by_the_report(chosen, tmp_path, capfd):
    shutil.copytree(chosen, tmp_path, dirs_exist_ok=True)
    (tmp_path / "choose.json").write_text("{}")
    assert vbon("report", tmp_path, EVALUATOR) == 2
    assert "choose.json was changed since stage choose left it" in capfd.readouterr().err


def test_without_an_evaluator_it_says_what_to_set(sampled, capfd):
    assert vbon("choose", sampled) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert "stage choose: no evaluator (evaluator.train=False, no path, no function)" in said
    assert "set evaluator.train=True and run `vbon evaluator`" in said
    assert not (sampled / "stages" / "choose.json").exists()


def test_an_evaluator_that_was_not_trained_names_its_stage(sampled, capfd):
    assert vbon("choose", sampled, "--config.evaluator.train=True") == 2
    assert "does not hold the evaluator model yet: run `vbon evaluator`" in capfd.readouterr().err


def test_too_few_prompts_say_which_key_to_raise(sampled, tmp_path, capfd):
    shutil.copytree(sampled, tmp_path, dirs_exist_ok=True)
    for name in ("prompts", "samples", "stages/sample.json"):
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    few = "--config.prompts.test=4"
    assert vbon("run", tmp_path, few) == 0
    assert vbon("choose", tmp_path, EVALUATOR, few) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.endswith(
        "4 held-out prompts: bands over prompts need at least 10; raise prompts.test"
    )
