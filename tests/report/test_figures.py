import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from vbon_jax.errors import InputError
from vbon_jax.report import figures, results, training_figures

N = 8
BOUND = math.log(8) - 7 / 8


def metric(step: int, **changed: float) -> dict[str, float]:
    return {
        "step": step,
        "objective": -0.5 + 0.01 * step,
        "kl_ref": 0.1 * step,
        "kl_bon": 4.9 - 0.1 * step,
        "reward": float(step),
        "response_length": 20.0,
        "eos_rate": 0.9,
        "entropy": 2.0,
        "policy_clip_fraction": 0.1,
        "value_clip_fraction": 0.05,
        "explained_variance": 0.5,
        "seconds_rollout": 1.0,
        "seconds_reward": 0.5,
        "seconds_update": 2.5,
    } | changed


def row(policy: str, temperature: float, kl: float, win: float) -> dict:
    return {
        "policy": policy,
        "n": float(N),
        "temperature": temperature,
        "kl_ref": kl,
        "kl_ref_ci95": [kl - 0.04, kl + 0.06],
        "win_rate": win,
        "win_rate_ci95": [win - 0.02, win + 0.01],
    }


ROWS = [
    row(policy, temperature, kl, win)
    for temperature in (0.7, 1.0)
    for policy, kl, win in (("reference", 0.0, 0.5), ("vbon", 1.1, 0.86), ("bon", 1.18, 0.885))
]


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def sample(policy: str, temperature: float, prompt_id: int, reward: float) -> dict:
    return {
        "policy": policy,
        "temperature": temperature,
        "prompt_id": prompt_id,
        "prompt": "the film",
        "response": "is fine",
        "reward": reward,
    }


SAMPLES = [
    sample(policy, temperature, prompt_id, mean + 0.1 * prompt_id)
    for temperature in (0.7, 1.0)
    for policy, mean in (("bon", 3.0), ("reference", 0.0), ("vbon", 2.5))
    for prompt_id in range(11)
]


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    write_lines(tmp_path / "metrics.jsonl", [metric(step) for step in range(1, 61)])
    (tmp_path / "evaluation.json").write_text(json.dumps({"rows": ROWS}))
    write_lines(tmp_path / "evaluation_samples.jsonl", SAMPLES)
    return tmp_path


def columns(records: list[dict]) -> dict[str, np.ndarray]:
    return {name: np.array([r[name] for r in records], float) for name in records[0]}


def panel(figure, title: str):
    return next(ax for ax in figure.axes if ax.get_title(loc="left") == title)


def line(ax, label: str):
    return next(one for one in ax.lines if one.get_label().startswith(label))


def test_all_figures_are_written(workdir, looks):
    paths = figures.all_figures(workdir, looks)
    names = ["training_curves.png", "reward_histograms.png", "win_rate_vs_kl.png"]
    assert paths == [workdir / "figures" / name for name in names]
    for path in paths:
        pixels = imread(path)
        assert pixels.shape[0] > 500 and pixels.shape[1] > 900
        # Something is drawn, and nothing touches the border, where it would be cut.
        assert pixels[..., :3].std() > 0.02
        for border in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert np.all(border == 1.0), path


@pytest.mark.parametrize(
    "columns",
    [
        ("loss", "nll", "grad_norm"),  # bon_sft
        ("loss", "grad_norm", "reward", "jbond_reward", "kl_ref", "kl_anchor", "kl_bon"),  # bond
    ],
    ids=["offline", "bond"],
)
def test_a_method_without_ppo_has_its_own_curves(workdir, monkeypatch, columns, looks):
    """Each of its columns on a panel, in the file that PPO's panels would be in."""
    drawn = []
    draw = training_figures.draw_columns
    monkeypatch.setattr(
        training_figures, "draw_columns", lambda m: drawn.append(draw(m)) or drawn[0]
    )
    metrics = [{"step": step} | dict.fromkeys(columns, 0.1 * step) for step in (1, 2, 3)]
    write_lines(workdir / "metrics.jsonl", metrics)
    paths = figures.all_figures(workdir, looks)
    assert paths[0].name == "training_curves.png" and len(paths) == 3
    titles = [ax.get_title(loc="left") for ax in drawn[0].axes]
    assert titles == list(columns)
    np.testing.assert_allclose(drawn[0].axes[0].lines[0].get_ydata(), [0.1, 0.2, 0.3])


def test_nothing_heavy_is_imported_and_no_global_state_is_made(workdir):
    script = (
        "import sys; from pathlib import Path; from vbon_jax.report import figures, style\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"figures.win_rate_vs_kl(Path({str(workdir)!r}), {{}})\n"
        "banned = {'matplotlib.pyplot', 'vbon_jax.models', 'vbon_jax.training'}\n"
        "assert not banned & set(sys.modules), banned & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    tree = ast.parse(Path(figures.__file__).read_text())
    sources = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert not [s for s in sources if s.startswith(("vbon_jax.models", "vbon_jax.training"))]


def test_running_mean_by_hand():
    nan, inf = float("nan"), float("inf")
    values = np.array([1.0, 2.0, nan, 4.0, inf, 9.0])
    got = training_figures.running_mean(values, 3)
    np.testing.assert_allclose(got, [1.5, 1.5, 3.0, 4.0, 6.5, 9.0])
    np.testing.assert_array_equal(
        training_figures.running_mean(np.array([nan, nan, nan, 1.0]), 3)[:2], nan
    )
    np.testing.assert_allclose(training_figures.running_mean(values, 99), np.full(6, 4.0))


def test_training_panels_show_the_columns_and_the_bound():
    records = [metric(step) for step in range(1, 61)]
    records[6]["kl_ref"] = float("nan")
    figure = training_figures.draw_training_curves(columns(records), N)
    left = [ax.get_title(loc="left") for ax in figure.axes]
    assert [title for title in left if title] == [
        "Objective",
        "KL divergence from the reference",
        "Estimated KL divergence from BoN",
        "Reward",
        "Response length and EOS rate",
        "Entropy",
        "Clipped by PPO",
        "Explained variance of the value",
        "Time a step",
    ]
    assert all(ax.get_ylabel() for ax in figure.axes)
    assert {ax.get_xlabel() for ax in figure.axes if ax.get_title(loc="left")} == {"training step"}

    ax = panel(figure, "KL divergence from the reference")
    raw = np.asarray(ax.lines[0].get_ydata())
    np.testing.assert_array_equal(raw, [r["kl_ref"] for r in records])
    assert ax.lines[0].get_alpha() < 0.5
    smooth = line(ax, "KL(policy")
    # A straight line is its own centred mean away from the ends and from the NaN.
    np.testing.assert_allclose(smooth.get_ydata()[10:-3], raw[10:-3], rtol=1e-12)
    assert np.isfinite(smooth.get_ydata()).all()
    assert smooth.get_color() == training_figures.FIRST_COLOR
    bound = line(ax, "BoN bound, n = 8: 1.20")
    np.testing.assert_allclose(bound.get_ydata(), [BOUND, BOUND], rtol=1e-6)
    assert bound.get_color() == figures.BON_COLOR


def test_seconds_are_stacked_and_the_compiling_step_is_off_scale():
    records = [metric(1, seconds_update=40.0), *(metric(step) for step in range(2, 12))]
    ax = panel(training_figures.draw_training_curves(columns(records), N), "Time a step")
    rollout, reward, update = (patch.get_data() for patch in ax.patches)
    np.testing.assert_allclose(rollout.values[1:], 1.0)
    np.testing.assert_allclose(reward.baseline[1:], 1.0)
    np.testing.assert_allclose(reward.values[1:], 1.5)
    np.testing.assert_allclose(update.values, [41.5] + [4.0] * 10)
    np.testing.assert_allclose(update.edges[:3], [0.5, 1.5, 2.5])
    labels = [patch.get_label() for patch in ax.patches]
    # 11 steps: 11 s of rollouts, 5.5 s of rewards, 65 s of updates.
    assert labels == ["rollout (13%)", "reward (7%)", "update (80%)"]
    assert ax.get_ylim()[1] == pytest.approx(12.0)
    assert "41.5 s" in ax.texts[0].get_text()


def test_a_wild_explained_variance_does_not_flatten_the_rest():
    records = [metric(1, explained_variance=-300.0), *(metric(step) for step in range(2, 5))]
    ax = panel(
        training_figures.draw_training_curves(columns(records), N),
        "Explained variance of the value",
    )
    assert ax.get_ylim()[0] > -1.2
    np.testing.assert_allclose(line(ax, "explained").get_ydata(), [-1.0, 0.5, 0.5, 0.5])
    assert "-300" in ax.texts[0].get_text()


def test_one_step_and_a_column_without_numbers_still_draw():
    records = [metric(1, kl_bon=float("nan"))]
    figure = training_figures.draw_training_curves(columns(records), 1.0)
    ax = panel(figure, "Estimated KL divergence from BoN")
    assert ax.texts[0].get_text() == "no finite value"
    assert line(panel(figure, "Reward"), "reward").get_marker() == "o"


def test_n_of_the_bound_is_taken_from_the_evaluation_when_not_given(workdir):
    assert results.run_n(ROWS) == N
    assert results.run_n([row("vbon", 1.0, 1.0, 0.8) | {"n": 4.5}]) == 4.5
    with pytest.raises(InputError, match="reference only"):
        results.run_n(ROWS[:1])
    (workdir / "evaluation.json").unlink()
    with pytest.raises(InputError, match=r"evaluation\.json.*vbon evaluate"):
        training_figures.training_curves(workdir)
    assert training_figures.training_curves(workdir, n=4.0).exists()


def test_reward_densities_have_unit_area_shared_bins_and_marked_means(looks):
    figure = figures.draw_reward_histograms(SAMPLES, looks)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["T = 0.7", "T = 1"]
    edges = figure.axes[0].patches[0].get_data().edges
    assert edges[0] == 0.0 and edges[-1] == pytest.approx(4.0)
    for ax in figure.axes:
        labels = [patch.get_label() for patch in ax.patches]
        assert labels == ["reference, mean 0.50", "vBoN, mean 3.00", "BoN, mean 3.50"]
        for patch in ax.patches:
            data = patch.get_data()
            np.testing.assert_array_equal(data.edges, edges)
            assert np.sum(data.values * np.diff(data.edges)) == pytest.approx(1.0)
        np.testing.assert_allclose([one.get_xdata()[0] for one in ax.lines], [0.5, 3.0, 3.5])
        colors = [one.get_color() for one in ax.lines]
        assert colors == [
            figures.REFERENCE_COLOR,
            training_figures.FIRST_COLOR,
            figures.BON_COLOR,
        ]


def test_a_constant_reward_and_four_temperatures_draw(looks):
    same = [sample("vbon", t, 0, 1.0) for t in (0.25, 0.5, 0.75, 1.0)]
    figure = figures.draw_reward_histograms(same, looks)
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "T = 0.25",
        "T = 0.5",
        "T = 0.75",
        "T = 1",
    ]


def test_the_curve_is_the_theory_of_best_of_n(looks):
    ax = figures.draw_win_rate_vs_kl(ROWS, looks).axes[0]
    kl, win = line(ax, "BoN in theory").get_data()
    # The curve by its own parameter: n = w / (1 - w), and KL = log n - (n - 1) / n.
    n = win / (1 - win)
    assert n[0] == pytest.approx(1) and n[-1] == pytest.approx(4 * N, rel=1e-4)
    np.testing.assert_allclose(kl, np.log(n) - (n - 1) / n, atol=2e-6)
    ticks = next(one for one in ax.lines if one.get_marker() == "|")
    np.testing.assert_allclose(ticks.get_ydata(), [1 / 2, 2 / 3, 4 / 5, 8 / 9, 16 / 17, 32 / 33])
    labels = [text.get_text() for text in ax.texts]
    assert labels[:6] == ["n=1", "n=2", "n=4", "n=8", "n=16", "n=32"]
    assert labels[6:] == ["reference", "vBoN", "BoN n=8"]
    baseline = line(ax, "no better")
    np.testing.assert_array_equal(baseline.get_ydata(), [0.5, 0.5])


def test_points_carry_their_intervals_color_and_shape(looks):
    figure = figures.draw_win_rate_vs_kl(ROWS, looks)
    ax = figure.axes[0]
    assert len(ax.containers) == len(ROWS)
    expected = {
        "reference": figures.REFERENCE_COLOR,
        "vbon": training_figures.FIRST_COLOR,
        "bon": figures.BON_COLOR,
    }
    for given, (marker, _, bars) in zip(ROWS, ax.containers, strict=True):
        assert (marker.get_xdata()[0], marker.get_ydata()[0]) == (
            given["kl_ref"],
            given["win_rate"],
        )
        assert marker.get_color() == expected[given["policy"]]
        assert marker.get_marker() == {0.7: "o", 1.0: "s"}[given["temperature"]]
        across, upright = (bar.get_segments()[0] for bar in bars)
        np.testing.assert_allclose(across[:, 0], given["kl_ref_ci95"], atol=1e-12)
        np.testing.assert_allclose(upright[:, 1], given["win_rate_ci95"], atol=1e-12)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[2:] == ["T = 0.7", "T = 1"]


@pytest.mark.parametrize("shift", [0.0, 0.05, 12.0])
def test_labels_stay_inside_and_off_each_other_the_points_and_the_curve(shift, looks):
    rows = [r | {"kl_ref": r["kl_ref"] + shift * (r["policy"] == "vbon")} for r in ROWS]
    rows = [r | {"kl_ref_ci95": None, "win_rate_ci95": None} for r in rows]
    rows.append(rows[1] | {"policy": "ppo", "win_rate": 0.855})
    figure = figures.draw_win_rate_vs_kl(rows, looks)
    ax = figure.axes[0]
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 6 + 4
    frame = ax.get_window_extent()
    marks = [*line(ax, "BoN in theory").get_xydata(), *((r["kl_ref"], r["win_rate"]) for r in rows)]
    points = ax.transData.transform(marks)
    for at, box in enumerate(boxes):
        assert frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
        assert not any(box.overlaps(other) for other in boxes[:at]), ax.texts[at]
        assert not any(box.contains(*point) for point in points), ax.texts[at]


def test_a_policy_has_its_color_and_name_whatever_else_is_there(looks):
    rows = [row("ppo", 1.0, 1.0, 0.8), row("bond", 1.0, 1.1, 0.8), row("mine", 1.0, 0.5, 0.7)]
    for shown in (rows, rows[:1], rows[::-1]):
        ax = figures.draw_win_rate_vs_kl(shown, looks).axes[0]
        colors = [marker.get_color() for marker, _, _ in ax.containers]
        known = {"ppo": "#009e73", "bond": "#56b4e9", "mine": "#117733"}
        assert colors == [known[one["policy"]] for one in shown]
        assert {text.get_text() for text in ax.texts} >= (
            {"PPO", "BOND", "mine"} if len(shown) > 1 else {"PPO"}
        )


@pytest.mark.parametrize(
    ("draw", "name", "stage"),
    [
        (training_figures.training_curves, "metrics.jsonl", "vbon train"),
        (figures.reward_histograms, "evaluation_samples.jsonl", "vbon evaluate"),
        (figures.win_rate_vs_kl, "evaluation.json", "vbon evaluate"),
    ],
)
def test_a_missing_or_empty_file_is_named_with_its_stage(workdir, looks, draw, name, stage):
    arguments = (workdir,) if draw is training_figures.training_curves else (workdir, looks)
    (workdir / name).write_text("{}" if name.endswith("json") else "\n")
    with pytest.raises(InputError, match=f"{name} has no .*{stage}"):
        draw(*arguments)
    (workdir / name).unlink()
    with pytest.raises(InputError, match=f"{name} does not exist; `{stage}`"):
        draw(*arguments)


def test_bad_contents_are_named(workdir, looks):
    (workdir / "evaluation.json").write_text("{")
    with pytest.raises(InputError, match=r"evaluation\.json is not JSON"):
        figures.win_rate_vs_kl(workdir, looks)
    with pytest.raises(InputError, match=r"row 1 of evaluation\.json: key 'win_rate' is missing"):
        figures.draw_win_rate_vs_kl(
            [ROWS[0], {k: v for k, v in ROWS[1].items() if k != "win_rate"}], looks
        )
    with pytest.raises(InputError, match="kl_ref of 'vbon' is nan"):
        figures.draw_win_rate_vs_kl([ROWS[1] | {"kl_ref": float("nan")}], looks)
    write_lines(workdir / "evaluation_samples.jsonl", [SAMPLES[0], {"policy": "vbon"}])
    with pytest.raises(InputError, match=r"samples\.jsonl:2: key 'temperature' is missing"):
        figures.reward_histograms(workdir, looks)
    write_lines(workdir / "evaluation_samples.jsonl", [SAMPLES[0] | {"reward": float("nan")}])
    with pytest.raises(InputError, match=r"samples\.jsonl:1: reward nan"):
        figures.reward_histograms(workdir, looks)
    without = metric(1)
    del without["entropy"]
    write_lines(workdir / "metrics.jsonl", [without])
    with pytest.raises(InputError, match="no 'entropy'"):
        training_figures.training_curves(workdir, n=N)


def test_metrics_without_a_number_are_nan(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "a": NaN}\n{"step": 2, "a": null, "b": 2}\n'
    )
    metrics = results.read_metrics(tmp_path)
    np.testing.assert_array_equal(metrics["step"], [1.0, 2.0])
    np.testing.assert_array_equal(metrics["a"], [np.nan, np.nan])
    np.testing.assert_array_equal(metrics["b"], [np.nan, 2.0])
