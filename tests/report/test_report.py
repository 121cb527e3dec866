import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vbon_jax.errors import InputError
from vbon_jax.report import document as report
from vbon_jax.report import figures, findings, front_figures, page, sweep_figures, training_figures
from vbon_jax.report.table import Column, Table
from vbon_jax.report.tables import with_interval

VOID = {"meta", "link", "img", "br", "hr"}
ANCHORS = ["findings", "results", "front", "convergence", "samples", "temperature", "bound", "sft",
           "training", "bon-kl", "tabular", "responses", "config"]  # fmt: skip
RUN_ANCHORS = ["run", "training", "tabular", "responses", "convergence", "config"]
SWEEP_FILES = ("sweep.jsonl", "sweep_samples.jsonl", "tabular.json")


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps what the tests ask about."""

    def __init__(self, text: str):
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}  # text by the id of its section
        self.classes: dict[str, list[str]] = {}  # of the tags, by the id of their section
        self.cells: list[list[str]] = []
        self.section = ""
        self.feed(text)
        self.close()
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section" or dict(attrs).get("id") == "missing":
            self.section = dict(attrs)["id"] or ""
        self.classes.setdefault(self.section, []).append(dict(attrs).get("class") or "")
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if data.strip():
            self.words.setdefault(self.section, []).append(data.strip())
        if self.stack and self.stack[-1] in ("td", "th"):
            self.cells[-1][-1] += data

    def text(self, section: str) -> str:
        return " ".join(self.words[section])

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def sections(self) -> list[str]:
        return [attrs["id"] or "" for attrs in self.all("section")]

    @property
    def missing(self) -> dict[str, str]:
        """What was not run, and the stage that makes it, from the line at the end."""
        text = " ".join(self.text("missing").split()) if "missing" in self.words else ""
        found = re.findall(
            r"(?:Not run:|;) (.+?) \( vbon (\w+) --config=CONFIG --workdir=DIR \)", text
        )
        assert len(found) == text.count("( vbon") == len(dict(found))
        return dict(found)


@pytest.fixture
def read(looks):
    def read(workdir: Path) -> Page:
        return Page(report.write(workdir, looks).read_text(encoding="utf-8"))

    return read


@pytest.fixture(scope="module")
def whole(tmp_path_factory, fill_workdir, looks) -> Path:
    """A workdir with every file and its page, as it should be; read only."""
    workdir = fill_workdir(tmp_path_factory.mktemp("whole"))
    report.write(workdir, looks)
    return workdir


@pytest.fixture(scope="module")
def single(tmp_path_factory, fill_workdir, looks) -> Path:
    """The workdir of a single run with two temperatures, and its page; read only."""
    workdir = fill_workdir(tmp_path_factory.mktemp("single"))
    for name in (*SWEEP_FILES, "convergence.json"):
        (workdir / name).unlink()
    path = workdir / "evaluation.json"
    rows = json.loads(path.read_text())["rows"]
    colder = [row | {"temperature": 0.5} for row in rows]
    path.write_text(json.dumps({"rows": [*rows, *colder], "ood": rows}))
    report.write(workdir, looks)
    return workdir


@pytest.fixture(scope="module")
def written(whole) -> Page:
    return Page((whole / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def one_picture(monkeypatch, whole) -> None:
    """The same picture for every figure, in tests of the text: drawing takes seconds."""
    picture = whole / "figures" / "front_reward.png"
    for module, names in (
        (front_figures, ("front_figure",)),
        (sweep_figures, ("sample_size", "temperature", "log_f_curves")),
        (figures, ("reward_histograms", "win_rate_vs_kl")),
        (training_figures, ("training_curves", "metric_columns")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *arguments: picture)


def test_the_page_is_well_formed_and_in_order(written):
    assert written.sections == ANCHORS
    links = [attrs["href"] for attrs in written.all("a")]
    assert links == [f"#{anchor}" for anchor in ANCHORS]
    ids = [attrs["id"] for _, attrs in written.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert len(written.all("h1")) == 1 and len(written.all("h2")) == 1 + len(ANCHORS)
    assert written.all("html") == [{"lang": "en"}]
    assert "missing" not in ids and "not run" not in str(written.words).lower()
    for attrs in written.all("section"):
        assert attrs["aria-labelledby"] in ids


def test_nothing_outside_the_page_is_referred_to(whole):
    text = (whole / "report.html").read_text(encoding="utf-8")
    seen = Page(text)
    images = seen.all("img")
    # Figures 2, 4, 5, 6 and 7 have two parts, Figure 3 and the training curves one.
    assert len(images) == 12
    for attrs in images:
        head, data = attrs["src"].split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
        assert len(attrs["alt"]) > 30
        assert int(attrs["width"]) > 500 and int(attrs["height"]) > 300
    for tag, attrs in seen.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base"), tag
        for name, value in attrs.items():
            assert not name.startswith("on"), name
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                assert re.match(r"data:|#", value), (tag, name, value[:80])
    styles = re.search(r"<style>(.*)</style>", text, re.S).group(1)
    assert "url(" not in styles and "@import" not in styles and "@font-face" not in styles
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    for attrs in images:
        data = base64.b64decode(attrs["src"].split(",")[1])
        assert any(data == png.read_bytes() for png in (whole / "figures").glob("*.png"))


def test_text_from_outside_is_shown_as_text(one_picture, full_workdir, looks):
    config = json.loads((full_workdir / "config.json").read_text())
    config["data"]["path"] = "</pre><script>x()</script>"
    (full_workdir / "config.json").write_text(json.dumps(config))
    text = report.write(full_workdir, looks).read_text(encoding="utf-8")
    seen = Page(text)  # balanced in spite of the "</td>" and "</pre>" in the texts
    assert "<script" not in text
    assert 'the film <script>alert(1)</script> & "more"' in seen.text("responses")
    assert "</pre><script>x()</script>" in seen.text("config")
    assert [
        "vBoN",
        "is a vbon answer </td> of some length ,\nand it goes on .",
        "2.50",
    ] in seen.cells


def test_responses_stand_beside_each_other_and_bon_comes_last(written):
    rows = [row for row in written.cells if len(row) == 3 and "answer" in row[1]]
    assert [row[0] for row in rows] == ["reference", "vBoN", "PPO", "BoN"] * 3
    assert [row[2] for row in rows[4:8]] == ["0.10", "2.60", "2.30", "3.10"]


def test_tables_hold_the_numbers_of_the_files(written, sweep):
    kl = [row for row in written.cells if row[:2] == ["8", "1.2044"]]
    assert kl == [["8", "1.2044", "1.1924", "1.180 ± 0.020", "0.887", "0.889"]]
    assert ["5", "6.10%", "0.630", "0.020", "0.330"] in written.cells
    assert ["250", "0.00%", "n/a", "n/a", "0.050"] in written.cells
    # Two seeds, at 0.0013 and 0.0015.
    exact = ["vBoN", "pi_bon", "8", "n/a", "2", "0.0014", "0.0123", "1.2044", "0.8765"]
    assert exact in written.cells
    assert sum(row[2:3] in (["test"], ["ood"]) for row in written.cells) == len(sweep)
    own = [row for row in sweep if row["method"] == "vbon" and row["n"] == 8.0
           and row["study"] == "front" and row["split"] == "test"]  # fmt: skip
    mean = sum(row["win_rate"] for row in own) / 2
    matched = next(row for row in written.cells if row[:4] == ["vBoN", "8", "n/a", "2"])
    assert matched[5] == f"{mean:.3f} ± 0.012"
    assert matched[-1] == "41.5"


def test_the_description_comes_from_the_config(written):
    text = written.text("")
    assert "Task: reviews." in text and "layers 3, width 128, heads 4" in text
    assert "vBoN with n = 8 and m = 64" in text
    # 7 methods x 6 values x 2 seeds, and 3 seeds x 6 m of which 2 are of the front already;
    # the study of the temperatures trains none that the front has not; 41.5 s each.
    assert "trained 100 policies, 69.2 minutes" in text


def test_findings_follow_the_data(looks):
    def policy(method, kl, win):
        return {"method": method, "study": "front", "split": "test", "n": 8.0, "beta": None,
                "m": 64, "seed": 0, "temperature": 1.0, "kl_ref": kl, "win_rate": win,
                "reward": win, "evaluator_win_rate": None}  # fmt: skip

    bon = [policy("bon", 0.0, 0.5), policy("bon", 2.0, 0.9)]
    good, bad = [policy("dpo", 1.0, 0.7), policy("dpo", 2.0, 0.85)], policy("vbon", 1.5, 0.6)
    texts = findings.findings([*bon, *good, bad], 8.0, looks)
    assert texts[0] == (
        "Win rate against KL: DPO holds the largest share of the front among fine-tuned methods, "
        "2 of its 2 points (100%); vBoN 0%."
    )
    # On the line through (0, .5) and (2, .9): .7 and .9 for DPO, .8 for vBoN.
    assert texts[1].endswith("least first: DPO 0.025, vBoN 0.200.")
    both = findings.findings([good[0], policy("vbon", 2.0, 0.9)], None, looks)
    assert "vBoN and DPO hold the largest share" in both[0] and "each 1 of its 2 points" in both[0]
    alone = findings.findings(good, None, looks)
    assert alone[0].endswith("only DPO was swept, so the share of the front says nothing.")
    assert findings.findings([], 8.0, looks) == []


def test_shares_and_shortfall_by_hand(looks):
    def policy(method, kl, win, reward):
        return {"method": method, "kl_ref": kl, "win_rate": win, "reward": reward}

    rows = [
        policy("ppo", 1.0, 0.6, 3.0),
        policy("vbon", 2.0, 0.7, 2.0),
        policy("vbon", 9.0, 0.8, 1),
    ]
    bon = [policy("bon", 0.0, 0.5, 0.0), policy("bon", 4.0, 0.9, 4.0)]
    vbon, ppo = findings.share_rows(rows, bon, looks)
    assert ppo == {
        "method": "ppo", "points": 1, "on_win_rate": 1, "share_win_rate": pytest.approx(1 / 3),
        "below_win_rate": pytest.approx(0.0), "on_reward": 1, "share_reward": 1.0,
        "below_reward": pytest.approx(-2.0),
    }  # fmt: skip
    # The policy at 9 nats is off best-of-n's range.
    assert vbon["on_win_rate"] == 2 and vbon["below_win_rate"] == pytest.approx(0.0)
    assert vbon["on_reward"] == 0 and vbon["share_reward"] == 0.0
    assert findings.share_rows(rows, [], looks)[0]["below_reward"] is None


# --- A single run ------------------------------------------------------------------------------


def test_a_single_run_comes_first_with_its_table_and_large_figures(single):
    seen = Page((single / "report.html").read_text(encoding="utf-8"))
    assert seen.sections == ["run", "training", "responses", "config"]
    assert [attrs["href"] for attrs in seen.all("a")] == [f"#{name}" for name in seen.sections]
    assert seen.text("").startswith(f"vBoN with n = 8: {single.name}")
    text = seen.text("run")
    assert "vBoN (n = 8) 0.875 at 1.25 nats; BoN (n = 8) 0.888 at 1.20 nats" in text
    rows = [row for row in seen.cells if len(row) == 9]
    each = ["reference", "BoN", "vBoN"]  # at two temperatures, and out of distribution
    assert [row[0] for row in rows] == ["policy", *each, *each, "policy", *each]
    assert rows[3] == ["vBoN", "8", "1", "1.750 ± 0.050", "0.875 ± 0.010", "1.250 ± 0.020", "n/a",
                       "1,100.0", "21,000"]  # fmt: skip
    assert seen.classes["run"].count("rule") == 1  # between the temperatures
    names = ["win_rate_vs_kl", "reward_histograms", "training_curves"]
    pictures = [base64.b64decode(attrs["src"].split(",")[1]) for attrs in seen.all("img")]
    assert pictures == [(single / "figures" / f"{name}.png").read_bytes() for name in names]
    assert seen.classes["run"].count("figures wide") == 1
    assert seen.classes["training"].count("figures wide") == 1
    assert "out-of-distribution prompts" in text.lower()


def test_a_run_with_the_parts_of_its_kl_to_best_of_n_shows_them(
    one_picture, full_workdir, read, kl_parts
):
    """At the first of two temperatures: rows of older evaluations have none."""
    path = full_workdir / "evaluation.json"
    result = json.loads(path.read_text())
    own = next(row for row in result["rows"] if row["policy"] == "vbon")
    assert not [row for row in read(full_workdir).cells if "lost" in row]
    own |= kl_parts(0.25)
    path.write_text(json.dumps(result))
    for sweep in (True, False):
        if not sweep:
            (full_workdir / "sweep.jsonl").unlink()
        cells = read(full_workdir).cells
        head = ["vBoN", "8", f"{own['temperature']:g}"]
        assert [*head, "KL(·‖BoN)", "0.250 ± 0.030", "", ""] in cells
        assert [*head, "excess", "0.050 ± 0.020", "", ""] in cells
        assert [*head, "lost", "0.200 ± 0.025", "", ""] in cells
        assert [*head, "lost, F 0 to 0.5", "0.050 ± 0.010", "2.0%", "0.4%"] in cells
        assert sum("lost" in " ".join(row) for row in cells) == 5
        assert "0.250 ± 0.030" in next(row for row in cells if len(row) == 9 and row[:3] == head)


def test_what_a_single_run_lacks_is_one_line_at_the_end(single):
    text = (single / "report.html").read_text(encoding="utf-8")
    seen = Page(text)
    assert seen.missing == {"sweep": "sweep", "convergence": "convergence"}
    assert text.lower().count("not run") == 1
    assert text.index('id="missing"') > text.index('id="config"')


def test_a_run_of_best_of_n_itself_lacks_no_training(one_picture, full_workdir, read):
    for name in (*SWEEP_FILES, "metrics.jsonl", "convergence.json"):
        (full_workdir / name).unlink()
    assert list(read(full_workdir).missing) == ["train", "sweep", "convergence"]
    path = full_workdir / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"method": {"name": "bon", "n": 8.0}}))
    seen = read(full_workdir)
    assert seen.sections == ["run", "responses", "config"]
    assert list(seen.missing) == ["sweep", "convergence"]
    assert seen.text("").startswith("BoN with n = 8")


def test_studies_that_a_single_run_has_are_shown(one_picture, full_workdir, read):
    (full_workdir / "sweep.jsonl").unlink()
    path = full_workdir / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"exact": {"kl_bon": 0.5}}))
    seen = read(full_workdir)
    assert seen.sections == RUN_ANCHORS
    assert seen.missing == {"sweep": "sweep"}
    assert ["KL(policy‖BoN), nats", "0.5000"] in seen.cells
    assert ["250", "0.00%", "n/a", "n/a", "0.050"] in seen.cells
    assert seen.classes["convergence"].count("strong") == 1  # the recommended m


def test_a_method_without_a_look_is_shown_by_its_label(one_picture, full_workdir):
    text = report.write(full_workdir, {}).read_text(encoding="utf-8")
    seen = Page(text)
    assert seen.sections == ANCHORS
    assert "vbon with n = 8" in seen.text("") and "vBoN with" not in seen.text("")
    rows = [row for row in seen.cells if len(row) == 3 and "answer" in row[1]]
    assert [row[0] for row in rows[:4]] == ["reference", "vbon", "ppo", "BoN"]


# --- What was not run --------------------------------------------------------------------------


def test_an_empty_workdir_says_of_everything_that_it_was_not_run(tmp_path, read):
    seen = read(tmp_path)
    assert seen.missing == {
        "evaluate": "evaluate", "train": "train", "sweep": "sweep", "convergence": "convergence",
        "config.json": "run",
    }  # fmt: skip
    assert seen.sections == [] and not seen.all("img") and not seen.all("nav")


@pytest.mark.parametrize(
    ("missing", "sections", "said"),
    [
        ("convergence.json", {"convergence"}, {"convergence": "convergence"}),
        ("tabular.json", {"tabular"}, {}),
        ("metrics.jsonl", {"training"}, {"train": "train"}),
        ("config.json", {"config"}, {"config.json": "run"}),
        ("evaluation.json", set(), {"evaluate": "evaluate"}),
    ],
)
def test_what_is_missing_in_a_sweep_is_said_at_the_end(
    one_picture, full_workdir, read, missing, sections, said
):
    (full_workdir / missing).unlink()
    seen = read(full_workdir)
    assert seen.sections == [name for name in ANCHORS if name not in sections]
    assert seen.missing == said


def test_exact_results_are_missed_where_responses_can_be_enumerated(
    one_picture, full_workdir, read
):
    (full_workdir / "tabular.json").unlink()
    path = full_workdir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": {"corpus": "tabular"}}))
    assert read(full_workdir).missing == {"exact results of the sweep (tabular.json)": "sweep"}


def test_responses_without_a_file_of_samples_are_missed(one_picture, full_workdir, read):
    for name in ("sweep_samples.jsonl", "evaluation_samples.jsonl"):
        (full_workdir / name).unlink()
    assert read(full_workdir).missing == {"sample responses": "evaluate"}


@pytest.mark.parametrize(
    ("dropped", "sections", "said"),
    [
        ({"study": "m"}, {"samples"}, "the sweep's study “m”"),
        ({"study": "temperature"}, {"temperature"}, "the sweep's study “temperature”"),
        ({"method": "lower_bound"}, {"bound"}, "vBoN, bound L in the sweep's study “front”"),
        ({"method": "bon_sft"}, {"sft"}, "BoN-SFT in the sweep's study “front”"),
        ({"method": "bon"}, {"bon-kl"}, "best-of-n in the sweep's study “front”"),
    ],
)
def test_a_part_of_the_sweep_that_was_not_run_is_said(
    one_picture, full_workdir, sweep, read, dropped, sections, said
):
    ((key, value),) = dropped.items()
    kept = [row for row in sweep if row[key] != value]
    lines = "".join(json.dumps(row) + "\n" for row in kept)
    (full_workdir / "sweep.jsonl").write_text(lines)
    seen = read(full_workdir)
    assert seen.sections == [name for name in ANCHORS if name not in sections]
    assert seen.missing == {said: "sweep"}


def test_a_sweep_without_an_evaluator_says_so(one_picture, full_workdir, sweep, read):
    null = {f"evaluator_{key}": None for key in
            ("reward", "win_rate", "reward_ci95", "win_rate_ci95")}  # fmt: skip
    lines = "".join(json.dumps(row | null) + "\n" for row in sweep)
    (full_workdir / "sweep.jsonl").write_text(lines)
    seen = read(full_workdir)
    assert "temperature" not in seen.sections
    assert "separate evaluator reward" in next(iter(seen.missing))


def test_no_m_that_is_enough_is_said(one_picture, full_workdir, read):
    found = json.loads((full_workdir / "convergence.json").read_text())
    found |= {"recommended": None, "why": "Even 250 are rejected.", "examples": []}
    (full_workdir / "convergence.json").write_text(json.dumps(found))
    seen = read(full_workdir)
    assert "None of the m tried is enough. Even 250 are rejected." in seen.text("convergence")
    assert "none of the m tried is enough" in seen.text("findings")


def test_metrics_of_an_offline_method_are_drawn(one_picture, full_workdir, read):
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 9)]
    (full_workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "over 8 training steps" in read(full_workdir).text("training")


def test_a_faulty_file_is_an_error_and_leaves_the_page_as_it_was(one_picture, full_workdir, looks):
    path = report.write(full_workdir, looks)
    before = path.read_bytes()
    (full_workdir / "sweep.jsonl").write_text('{"method": "vbon"\n')
    with pytest.raises(InputError, match=r"sweep\.jsonl:1: not a line of JSON"):
        report.write(full_workdir, looks)
    assert path.read_bytes() == before
    with pytest.raises(InputError, match="no such folder"):
        report.write(full_workdir / "nowhere", looks)


def test_nothing_of_models_or_training_is_imported(full_workdir):
    script = (
        "import sys; from pathlib import Path; from vbon_jax.report import document as report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from vbon_jax.report import style; style.DPI = 20\n"
        f"report.write(Path({str(full_workdir)!r}), {{}})\n"
        "banned = {'matplotlib.pyplot', 'vbon_jax.models', 'vbon_jax.training', "
        "'vbon_jax.methods'}\n"
        "assert not banned & set(sys.modules), banned & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_cells_are_escaped_and_numbers_are_marked():
    table = Table((Column("a", "left"), Column("b\nc")), (("<b>", "1"),), caption="x & y")
    section = page.Section("one", "<i>", (page.Tables((table,)),))
    text = page.render("t < u", "s > t", [section], [page.Missing("<m>", "train")])
    assert '<th scope="row" class="text">&lt;b&gt;</th>' in text and "<td>1</td>" in text
    assert '<th scope="col" class="text">a</th>' in text and '<th scope="col">b\nc</th>' in text
    for escaped in ("x &amp; y", "&lt;i&gt;", "t &lt; u", "s &gt; t", "&lt;m&gt; (<code>vbon"):
        assert escaped in text
    assert with_interval(1.0, [0.5, 1.5]) == "1.000 ± 0.500"
    assert with_interval(None, None) == "n/a"


# --- In a browser ------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (400, 1400)
# Loads the page in a frame of each width and writes down what the browser made of it.
FRAMES = """<!DOCTYPE html><body>%s<script>
addEventListener("load", () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const inner = frame.contentDocument, root = inner.documentElement;
    const images = [...inner.images], boxes = [...inner.querySelectorAll(".scroll")];
    const texts = [...inner.querySelectorAll("main p, figcaption, h2, #missing code")];
    const seen = {
      width: root.clientWidth,
      scrollWidth: root.scrollWidth,
      height: root.scrollHeight,
      images: images.filter(image => image.complete && image.naturalWidth > 0).length,
      cardsWidest: Math.max(...images.map(i => i.closest(".card").getBoundingClientRect().right)),
      imagesWidest: Math.max(0, ...images.filter(i => !i.closest(".wide"))
        .map(i => i.getBoundingClientRect().right)),
      boxesWidest: Math.max(...boxes.map(box => box.getBoundingClientRect().right)),
      boxesScroll: boxes.filter(box => box.scrollWidth > box.clientWidth).length,
      wideShare: Math.min(...images.filter(i => i.closest(".wide"))
        .map(i => i.getBoundingClientRect().width / inner.querySelector("main").clientWidth)),
      textWidest: Math.max(...texts.map(box => box.getBoundingClientRect().right)),
      paper: frame.contentWindow.getComputedStyle(inner.body).backgroundColor,
      loaded: frame.contentWindow.performance.getEntriesByType("resource")
        .map(entry => entry.name).filter(name => !name.startsWith("data:")),
      alerts: inner.scripts.length,
    };
    const note = document.createElement("pre");
    note.className = "seen";
    note.textContent = JSON.stringify(seen);
    document.body.append(note);
  }
});
</script></body>"""


def browser(tmp_path: Path, *arguments: str) -> str:
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
         *arguments],
        capture_output=True, text=True, timeout=120, check=True,
        env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to open the page in")
@pytest.mark.parametrize(("kind", "pictures"), [("whole", 12), ("single", 3)])
def test_a_browser_shows_the_page_at_two_widths_without_sideways_scrolling(
    request, tmp_path, kind, pictures
):
    path = request.getfixturevalue(kind) / "report.html"
    frames = "".join(
        f'<iframe src="{path.as_uri()}" style="border:0;width:{width}px;height:900px"></iframe>'
        for width in WIDTHS
    )
    wrapper = tmp_path / "frames.html"
    wrapper.write_text(FRAMES % frames)
    dom = browser(tmp_path, "--allow-file-access-from-files", "--dump-dom", wrapper.as_uri())
    found = re.findall(r'<pre class="seen">(.*?)</pre>', dom)
    shown = [json.loads(html.unescape(text)) for text in found]
    assert [one["width"] for one in shown] == list(WIDTHS)
    for one, width in zip(shown, WIDTHS):
        assert one["scrollWidth"] <= width
        for what in ("cardsWidest", "imagesWidest", "textWidest", "boxesWidest"):
            assert one[what] <= width, what
        assert one["images"] == pictures
        assert one["loaded"] == [] and one["alerts"] == 0
        assert one["paper"] == "rgb(255, 255, 255)"
        assert one["wideShare"] > 0.95  # as wide as the column; more where it scrolls in its card
    assert shown[0]["boxesScroll"] >= 2  # the tables that do not fit scroll in their own box
    assert shown[0]["height"] > shown[1]["height"] > 2500  # narrow is longer
