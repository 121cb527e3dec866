"""`vbon bench`: sections in the order asked for, one table, bench.json, and a figure."""

import json
from functools import partial

import matplotlib.image
import pytest

from vbon_jax import cli
from vbon_jax.bench import command, machine, models, sampling
from vbon_jax.bench.machine import Row
from vbon_jax.bench.sampling import Drawn
from vbon_jax.models.config import DecoderConfig
from vbon_jax.models.lm import LanguageModel

TINY = DecoderConfig(vocab_size=64, positions=64, layers=2, width=16, heads=2, mlp_width=32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(machine, "matrix_rate", lambda dtype: 2e9)
    monkeypatch.setattr(machine, "copy_rate", lambda: 3e9)
    monkeypatch.setattr(models, "load", lambda name: LanguageModel(TINY, {}, tokenizer=None))


def test_sections_are_measured_in_order_and_kept(monkeypatch, tmp_path, capsys):
    order = []

    def section(name, bench):
        order.append(name)
        yield Row(name, "it", 1.5, "s", 2.0, "x")

    for name in command.SECTIONS.keys() - {"machine"}:
        monkeypatch.setitem(command.SECTIONS, name, partial(section, name))
    argv = ["bench", "log_f", "machine", "memory", f"--out={tmp_path}/deep/er"]
    assert cli.main(argv) == 0
    assert order == ["log_f", "memory"]
    report = json.loads((tmp_path / "deep/er/bench.json").read_text())
    assert report["options"]["rows"] == 64 and "jax" in report["versions"]
    kept = {(row["section"], row["what"]): row["value"] for row in report["rows"]}
    assert kept["machine", "matrix products, float32"] == 2.0
    assert kept["log_f", "it"] == 1.5 and kept["memory", "compilation"] == 0.0
    out = capsys.readouterr().out
    assert all(words in out for words in ("matrix products", "memory, a copy", "1.5 s", "log_f"))


def test_what_was_measured_before_a_fault_is_kept(monkeypatch, tmp_path):
    def fail(bench):
        raise MemoryError("no more")
        yield

    monkeypatch.setitem(command.SECTIONS, "log_f", fail)
    assert cli.main(["bench", "machine", "log_f", f"--out={tmp_path}"]) == 2
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 3


def test_options_reach_what_is_measured(monkeypatch, tmp_path):
    asked = {}

    def draws(model, work, repeats, others):
        asked.update(work=work, repeats=repeats, others=others)
        return FOUND

    def times(config, work, *rest):
        asked.setdefault("iterations", []).append((work, *rest))
        return {"rollout": {"seconds": 2.0, "operations": 2e9, "rate": 1e9}}

    monkeypatch.setattr(sampling, "draws", draws)
    monkeypatch.setattr(command.ppo, "iteration_times", times)
    monkeypatch.setattr(command.engines, "installed", lambda: [])
    argv = ["bench", "sampling", "iteration", "--rows=16", "--prompt=5", "--new=3", "--repeats=1"]
    argv += ["--n", "2", "4", "--unfrozen", "1", "--group=4", f"--out={tmp_path}"]
    assert cli.main(argv) == 0
    assert asked["work"] == sampling.Work(16, 5, 3, (2, 4))
    assert asked["repeats"] == 1 and asked["others"] == {}
    work = command.ppo.Work(rows=16, prompt=5, new=3, minibatch=16, group=4)
    assert asked["iterations"] == [(work, 1, "sampled", 1_024, "none", "float32", 1)]
    assert matplotlib.image.imread(tmp_path / "bench.png").std() > 0


CASES = ("short", "policy", "one prompt", "prefill", "ending", "bon 2", "reward", "proposal")
FOUND = {
    sampling.OURS: dict.fromkeys(CASES, Drawn(2.0, 16, 48)) | {"naive": Drawn(2.0, 2, 48)}
}  # fmt: skip


def test_the_figure_has_a_line_for_each_way_to_answer():
    figure = command.draw(FOUND, sampling.Work(n=(2,)))
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    assert lines["naive BoN"].tolist() == [[1, 0.125], [2, 0.25], [8, 1.0]]
    assert lines["BoN, shared prefix"].tolist() == [[2, 0.125]]
    assert lines["policy, one sample"][0, 1] == lines["corrected, a proposal"][0, 1] == 0.125


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sample"], "'sample' is no section: choose any of machine, sampling"),
        (["--rows=1"], "--rows=1: must be at least 2"),
        (["--new=0"], "--new=0: must be at least 1"),
        (["--n", "4", "1"], "--n=1: must be at least 2"),
        (["--engine=tgi"], "invalid choice: 'tgi'"),
        (["--engine=vllm"], "--engine=vllm: vllm is not installed"),
    ],
)
def test_a_wrong_option_is_named(argv, said, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *argv])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_too_many_unfrozen_layers_are_refused(tmp_path, capsys):
    assert cli.main(["bench", "--unfrozen", "2", f"--out={tmp_path}"]) == 2
    assert "--unfrozen=2: gpt2 has 2 layers: give 1 to 1, or -1" in capsys.readouterr().err


def test_help_is_that_of_the_bench(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--help"])
    assert end.value.code == 0
    assert "usage: vbon bench" in capsys.readouterr().out


def test_a_model_that_is_nothing_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.undo()
    assert cli.main(["bench", "--model=gpt9", f"--out={tmp_path}"]) == 2
    assert "--model=gpt9: name one of gpt2, smollm2-135m" in capsys.readouterr().err
