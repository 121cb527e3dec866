import json
import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from vbon_jax.errors import InputError
from vbon_jax.report import front_figures, results, style, sweep_figures, training_figures
from vbon_jax.report.front_figures import REWARD, WIN_RATE


def row(method: str, kl: float, win: float, **changed) -> dict:
    return {
        "method": method, "n": 8.0, "beta": None, "m": 64, "seed": 0, "temperature": 1.0,
        "split": "test", "study": "front", "kl_ref": kl, "kl_ref_ci95": [kl - 0.1, kl + 0.2],
        "win_rate": win, "win_rate_ci95": [win - 0.01, win + 0.03], "reward": 4 * win,
        "reward_ci95": None, "evaluator_win_rate": win, "evaluator_reward": win,
        "sample_seconds": 90.0,
    } | changed  # fmt: skip


POLICIES = [
    row("vbon", 1.0, 0.80),
    row("vbon", 2.0, 0.90),
    row("ppo", 1.5, 0.78),  # beaten by the first
    row("ppo", 0.5, 0.70),
]
BON = [row("bon", 0.0, 0.5, n=1.0, kl_bound=0.0), row("bon", 1.2, 0.88, n=8.0, kl_bound=1.204)]


def by_label(ax, label: str):
    return next(one for one in ax.lines if one.get_label().startswith(label))


def points(ax) -> dict[tuple[float, float], tuple[str, str, float]]:
    """Color, marker and opacity of every point that is drawn."""
    return {
        (float(x), float(y)): (to_hex(one.get_color()), one.get_marker(), one.get_alpha())
        for one in ax.lines
        if one.get_marker() in "osD^vPX" and one.get_label().startswith("_")
        for x, y in one.get_xydata()
    }


# --- Front -------------------------------------------------------------------------------------


def test_points_off_the_front_are_faint_and_shares_are_in_the_legend(looks):
    figure = front_figures.draw_front(POLICIES, BON, 0.5, WIN_RATE, looks)
    ax = figure.axes[0]
    blue, green = looks["vbon"], looks["ppo"]
    assert points(ax) == {
        (1.0, 0.80): (blue.color, "o", 1.0),
        (2.0, 0.90): (blue.color, "o", 1.0),
        (1.5, 0.78): (green.color, "s", front_figures.FADED),
        (0.5, 0.70): (green.color, "s", 1.0),
    }
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "vBoN: 67% of the front (2/2)" in legend
    assert "PPO: 33% of the front (1/2)" in legend
    assert not ax.get_xlabel().endswith("axis)")


def test_error_bars_are_the_intervals(looks):
    ax = front_figures.draw_front(POLICIES[:1], [], None, WIN_RATE, looks).axes[0]
    segments = [bars.get_segments()[0] for bars in ax.collections]
    np.testing.assert_allclose(segments[0], [[0.9, 0.8], [1.2, 0.8]])
    np.testing.assert_allclose(segments[1], [[1.0, 0.79], [1.0, 0.83]])


def test_best_of_n_is_a_labelled_curve_and_does_not_join_the_front(looks):
    ax = front_figures.draw_front(POLICIES, BON, 0.5, WIN_RATE, looks).axes[0]
    np.testing.assert_array_equal(by_label(ax, "BoN, KL").get_xydata(), [[0, 0.5], [1.2, 0.88]])
    theory = by_label(ax, "BoN in theory")
    np.testing.assert_allclose(theory.get_xydata()[0], [0, 0.5])
    np.testing.assert_allclose(theory.get_xydata()[-1], [math.log(8) - 7 / 8, 8 / 9], rtol=1e-5)
    assert {text.get_text() for text in ax.texts} == {"n=1", "n=8"}
    assert by_label(ax, "reference").get_ydata()[0] == 0.5

    ax = front_figures.draw_front(POLICIES, BON, None, REWARD, looks).axes[0]
    np.testing.assert_array_equal(by_label(ax, "BoN at the bound").get_xdata(), [0, 1.204])


def test_a_policy_far_off_is_shown_on_a_root_axis(looks):
    figure = front_figures.draw_front(
        [*POLICIES, row("dpo", 30.0, 0.95)], BON, 0.5, WIN_RATE, looks
    )
    ax = figure.axes[0]
    assert ax.get_xlabel().endswith("(square-root axis)")
    at = ax.transData.transform([[0, 0.5], [7.5, 0.5], [30, 0.5]])[:, 0]
    assert (at[1] - at[0]) / (at[2] - at[0]) == pytest.approx(0.5)


def test_policies_far_off_the_front_do_not_squeeze_the_others(looks):
    far = [row("dpo", 100.0, 0.55), row("dpo", 231.0, 0.52)]
    ax = front_figures.draw_front([*POLICIES, *far], BON, 0.5, WIN_RATE, looks).axes[0]
    assert not ax.get_xlabel().endswith("(square-root axis)")
    left, right = ax.get_xlim()
    assert -0.2 < left < 0 and 1.2 < right < 10
    texts = {text.get_text() for text in ax.texts}
    assert "2 off the front beyond the right edge, up to 231 nats" in texts


def test_each_figure_has_its_methods(sweep, looks):
    def methods(which):
        return {row["method"] for row in front_figures.front_rows(sweep, which, looks)}

    main = {"vbon", "ppo", "dpo", "bonbon", "bond"}
    assert methods("front") == main
    assert methods("bound") == {"vbon", "lower_bound"}
    assert methods("sft") == main | {"bon_sft"}
    rows = front_figures.front_rows(sweep, "front", looks)
    assert len(rows) == 5 * 6 * 2 and {r["split"] for r in rows} == {"test"}
    assert [r["n"] for r in front_figures.bon_rows(sweep)] == [1, 2, 3, 4, 8, 16, 32, 64, 128]


def test_a_look_decides_who_is_in_the_main_figure_and_an_unknown_label_is(sweep, looks):
    rows = [row(method, 1.0, 0.8) for method in ("vbon", "ppo", "mine", "bon", "reference")]

    def methods(which, known):
        return [row["method"] for row in front_figures.front_rows(rows, which, known)]

    assert methods("front", looks) == ["vbon", "ppo", "mine"]
    assert methods("front", {}) == ["vbon", "ppo", "mine"]
    without = looks | {"ppo": looks["ppo"]._replace(in_front=False)}
    assert methods("front", without) == methods("sft", without) == ["vbon", "mine"]


def test_every_method_has_its_own_look_and_an_unknown_one_gets_a_spare(looks):
    shown = style.method_looks(["mine", "bon", "vbon", *looks, "other", "reference"], looks)
    assert list(shown) == ["reference", "bon", *looks, "mine", "other"]
    assert len({look.color for look in shown.values()}) == len(shown)
    assert len({look.marker for look in shown.values()}) == len(shown)
    assert style.method_looks(["ppo"], looks)["ppo"] is looks["ppo"]
    turned = dict(reversed(looks.items()))
    assert list(style.method_looks(looks, turned)) == list(turned)
    assert style.method_name("mine", looks) == "mine"
    assert style.method_name("bond", looks) == "BOND"
    assert style.method_name("bon", {"bon": looks["ppo"]}) == "BoN"


def test_no_policy_is_an_error(looks):
    with pytest.raises(InputError, match=r"no fine-tuned policy.*vbon sweep"):
        front_figures.draw_front([], BON, 0.5, WIN_RATE, looks)


# --- m, temperature, log F ---------------------------------------------------------------------


def test_sample_size_shows_mean_deviation_and_minutes(looks):
    rows = [
        row("vbon", 1.0, win, m=m, seed=seed, study="m", sample_seconds=60.0 * m)
        for m, wins in ((4, (0.7, 0.8)), (16, (0.85, 0.87)), (64, (0.9,)))
        for seed, win in enumerate(wins)
    ]
    ax = sweep_figures.draw_sample_size(rows, 0.889, WIN_RATE, looks).axes[0]
    marker, _, (bars,) = ax.containers[0]
    np.testing.assert_allclose(marker.get_xydata(), [[4, 0.75], [16, 0.86], [64, 0.9]])
    # The standard deviation of two values is their distance over the square root of 2.
    lengths = [np.ptp(segment[:, 1]) / 2 for segment in bars.get_segments()]
    np.testing.assert_allclose(lengths, [0.1 / 2**0.5, 0.02 / 2**0.5, 0.0], atol=1e-12)
    ticks = [text.get_text() for text in ax.get_xticklabels()]
    assert ticks == ["4\n4.00 min", "16\n16 min", "64\n64 min"]
    assert by_label(ax, "BoN, n = 8").get_ydata()[0] == 0.889


def test_temperature_lines_are_means_solid_in_and_dashed_out_of_distribution(looks):
    rows = [
        row("vbon", 1.0, 0.0, temperature=t, split=split, seed=seed, study="temperature",
            evaluator_win_rate=win + 0.02 * seed)
        for t, win in ((0.5, 0.9), (1.0, 0.8))
        for split in ("test", "ood")
        for seed in (0, 1)
    ]  # fmt: skip
    rows.append(row("ppo", 1.0, 0.0, study="temperature", evaluator_win_rate=None))
    figure = sweep_figures.draw_temperature(rows, sweep_figures.EVALUATOR_WIN_RATE, looks)
    lines = [container[0] for container in figure.axes[0].containers]
    assert [line.get_linestyle() for line in lines] == ["-", "--"]
    for line in lines:
        np.testing.assert_allclose(line.get_ydata(), [0.91, 0.81])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["vBoN", "in distribution", "out of distribution"]


def test_temperature_rows_take_what_only_the_front_measured():
    rows = [
        row("vbon", 1.0, 0.8, study="temperature", temperature=0.5),
        row("vbon", 1.0, 0.8),  # the same setting at T = 1
        row("vbon", 1.0, 0.8, n=4.0),  # another setting
        row("bon", 1.0, 0.8),
        row("bon", 1.0, 0.8, study="temperature"),  # measured twice: the study's own row counts
    ]
    assert sweep_figures.temperature_rows(rows) == [rows[0], rows[4], rows[1]]


def test_without_an_evaluator_there_is_nothing_to_draw(looks):
    rows = [row("vbon", 1.0, 0.8, study="temperature", evaluator_win_rate=None)]
    with pytest.raises(InputError, match=r"evaluator_win_rate.*evaluator reward"):
        sweep_figures.draw_temperature(rows, sweep_figures.EVALUATOR_WIN_RATE, looks)


def test_log_f_has_a_panel_a_prompt_and_a_line_for_each_m():
    curves = [
        {"m": 600, "rewards": [1.0, 0.0, 2.0], "log_f": [-1.0, -3.0, 0.0]},
        {"m": 10, "rewards": [0.0, 1.0], "log_f": [None, -1.5]},
    ]
    examples = [
        {"prompt": "costs $5 or $6 " + "long " * 20, "kind": "low", "curves": curves},
        {"prompt": "plain", "kind": "high", "curves": curves[:1]},
    ]
    figure = sweep_figures.draw_log_f(examples)
    assert [len(ax.lines) for ax in figure.axes] == [2, 1]
    few, many = figure.axes[0].lines
    np.testing.assert_array_equal(few.get_ydata(), [np.nan, -1.5])
    np.testing.assert_array_equal(many.get_xydata(), [[0, -3], [1, -1], [2, 0]])
    assert few.get_color() is not many.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["m = 10", "m = 600"]
    title = figure.axes[0].get_title(loc="left")
    assert title.startswith("low-reward prompt\n“costs $5 or $6 long") and title.endswith("…”")
    figure.canvas.draw()  # "$5 or $" would be a formula, and "$5 or $6 _" an error
    with pytest.raises(InputError, match="no example"):
        sweep_figures.draw_log_f([])


def test_a_prompt_that_would_be_a_broken_formula_is_drawn():
    example = {"prompt": r"$\frac{ $", "kind": "low",
               "curves": [{"m": 5, "rewards": [0.0, 1.0], "log_f": [-1.0, 0.0]}]}  # fmt: skip
    sweep_figures.draw_log_f([example]).canvas.draw()


def test_columns_of_any_method_are_drawn():
    metrics = {
        "step": np.arange(3.0),
        "loss": np.array([3.0, 2.0, 1.0]),
        "empty": np.full(3, np.nan),
    }
    axes = training_figures.draw_columns(metrics).axes
    assert [ax.get_title(loc="left") for ax in axes] == ["loss"]
    np.testing.assert_array_equal(axes[0].lines[0].get_ydata(), [3, 2, 1])
    with pytest.raises(InputError, match="'step'"):
        training_figures.draw_columns({"step": np.arange(3.0)})


def test_all_figures_are_written_and_none_is_cut(full_workdir, looks):
    paths = [front_figures.front_figure(full_workdir, "sft", WIN_RATE, looks)]
    paths += [front_figures.front_figure(full_workdir, "bound", REWARD, looks)]
    paths += [sweep_figures.sample_size(full_workdir, REWARD, looks)]
    paths += [sweep_figures.temperature(full_workdir, sweep_figures.EVALUATOR_REWARD, looks)]
    paths += [sweep_figures.log_f_curves(full_workdir)]
    names = ["sft_win_rate", "bound_reward", "m_reward", "temperature_evaluator_reward"]
    assert [path.stem for path in paths] == [*names, "log_f_curves"]
    for path in paths:
        pixels = imread(path)
        assert pixels[..., :3].std() > 0.02
        for border in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert np.all(border == 1.0), path


# --- Reading the sweep -------------------------------------------------------------------------


def test_faults_of_the_sweep_are_named(full_workdir, sweep):
    path = full_workdir / "sweep.jsonl"

    def refused(changed: dict, match: str, base: int = 0) -> None:
        lines = [{k: v for k, v in (sweep[base] | changed).items() if v is not ...}]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(InputError, match=match):
            results.read_sweep(full_workdir)

    refused({"kl_ref": None}, r"sweep\.jsonl:1: kl_ref is None")
    refused({"win_rate": float("nan")}, r"sweep\.jsonl:1: win_rate is nan")
    refused({"study": ...}, "key 'study' is missing")
    refused({"reward_ci95": ...}, "key 'reward_ci95' is missing")
    refused({"seconds": "3"}, "seconds is '3'")
    bon = next(at for at, row in enumerate(sweep) if row["method"] == "bon")
    refused({"n": None}, "n is None", bon)
    refused({"kl_direct": ...}, "key 'kl_direct' is missing", bon)
    path.write_text("\n")
    with pytest.raises(InputError, match=r"no row; run `vbon sweep`"):
        results.read_sweep(full_workdir)
    path.unlink()
    with pytest.raises(InputError, match=r"does not exist; `vbon sweep` makes it"):
        results.read_sweep(full_workdir)


def test_faults_of_the_other_files_are_named(full_workdir):
    (full_workdir / "convergence.json").write_text('{"rows": [{"m": 5}], "m_full": 6}')
    with pytest.raises(InputError, match=r"convergence\.json: key 'prompts' is missing"):
        results.read_convergence(full_workdir)
    (full_workdir / "tabular.json").write_text('{"rows": [{"method": "vbon"}]}')
    with pytest.raises(InputError, match=r"row 0 of .*tabular\.json: key 'n' is missing"):
        results.read_tabular(full_workdir)
    (full_workdir / "config.json").write_text("[")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        results.read_config(full_workdir)


def test_the_setting_nearest_to_n_is_matched():
    rows = [
        row("vbon", 1.0, 0.8, n=7.0, seed=0),
        row("vbon", 1.0, 0.8, n=7.0, seed=1),
        row("vbon", 1.0, 0.8, n=32.0),
        row("ppo", 0.4, 0.8, n=None, beta=0.5),
        row("ppo", 1.0, 0.8, n=None, beta=0.1, seed=0),
        row("ppo", 1.6, 0.8, n=None, beta=0.1, seed=1),
        row("ppo", 1.1, 0.8, n=None, beta=0.2, seed=0),  # nearer, but its seeds' mean is not
        row("ppo", 3.0, 0.8, n=None, beta=0.2, seed=1),
    ]
    # Best-of-8's bound is 1.204 nats; beta = 0.1 has 1.3 on average.
    assert results.matched(rows, 8.0) == {"vbon": rows[:2], "ppo": rows[4:6]}


def test_spread_over_seeds_by_hand():
    got = results.over_seeds([{"x": 1.0}, {"x": 3.0}, {"x": None}], "x")
    assert got == (2.0, pytest.approx(2**0.5), 2)
    one = results.over_seeds([{"x": 1.0}], "x")
    assert one.mean == 1.0 and math.isnan(one.sd)
    assert results.over_seeds([{"x": None}], "x") is None
