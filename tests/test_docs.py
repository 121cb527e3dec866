"""README, pages and notebook: their Python runs, their links and config keys exist."""

import ast
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient
from transformers import AutoTokenizer

from vbon_jax import config, keys
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.sources import reviews
from vbon_jax.models import decoder, lm

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "pages"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(PAGES.glob("*.md"))]
HUB_MODEL, HUB_REWARD = "HuggingFaceTB/SmolLM2-135M-Instruct", "lvwerra/distilbert-imdb"


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def page_maker():
    """The module that makes pages when the site is built."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def local_models(tmp_path_factory) -> dict[str, str]:
    """Small random models in place of those of the hub, by the names of these."""
    from tests import standins  # imports torch

    folder = tmp_path_factory.mktemp("models")
    texts = [example.text for example in reviews.examples(0, 300)]
    tokenizer = tokenizers.build(texts, "bpe", 330)
    small = decoder.DecoderConfig(
        vocab_size=len(tokenizer), positions=96, layers=1, width=16, heads=2, mlp_width=32
    )
    params = decoder.init(small, jax.random.key(0))
    model = lm.LanguageModel(small, params, tokenizer)
    lm.save(model, folder / "model", temperature=1.0, end_ids=(tokenizer.eos_token_id,))
    standins.distilbert(folder / "reward", texts)
    return {HUB_MODEL: str(folder / "model"), HUB_REWARD: str(folder / "reward")}


def test_the_python_of_readme_and_api_page_runs(local_models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    readme = python_blocks((ROOT / "README.md").read_text())
    page = python_blocks((PAGES / "python-api.md").read_text())
    assert readme == page[:1], "README has the ten lines, and the page explains the same ones"
    source = "\n".join(page)
    for name, local in {**local_models, "m=64": "m=8", "iterations=150": "iterations=2"}.items():
        assert name in source
        source = source.replace(name, local)
    names: dict = {}
    exec(compile(source, "README.md", "exec"), names)
    table = capsys.readouterr().out
    assert "win rate" in table and "KL" in table
    (responses,) = names["policy"].generate(["The film was"])
    assert len(responses) == 1 and isinstance(responses[0], str)
    assert (tmp_path / "policy" / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token_id is not None
    assert names["log_ratio"].shape == (3, 3)
    assert float(names["bound"]) == pytest.approx(1.2044, abs=1e-4)


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    # What it prints needs no good policy.
    for part, less in (
        ("steps = 140", "steps = 20"), ("m=32", "m=8"), ("iterations=30", "iterations=2"),
    ):  # fmt: skip
        (cell,) = [cell for cell in notebook.cells if part in cell.source]
        cell.source = cell.source.replace(part, less)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    (evaluation,) = [text for text in printed if "win rate" in text]
    assert all(name in evaluation for name in ("reference", "BoN", "policy"))
    assert sum(text.count("policy     this comedy") for text in printed) == 3, (
        "three generated responses"
    )


def test_a_notebook_becomes_a_page():
    page = page_maker().notebook_page()
    assert page.startswith("# Quickstart")
    assert all(ast.parse(block) for block in python_blocks(page))
    assert "vbon.train(" in page


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_ci_finds_the_test_command_and_the_run_command_is_as_promised():
    """.ci/run reads the command out of README, as here."""
    assert "sed -n '/^## Test/,/^## /p' README.md | sed -n '/^```/,/^```/p' | sed '/^```/d'" in (
        (ROOT / ".ci" / "run").read_text()
    )
    found = subprocess.run(
        "sed -n '/^## Test/,/^## /p' README.md | sed -n '/^```/,/^```/p' | sed '/^```/d'",
        shell=True, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.splitlines() == [
        'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/pytest -n 2'
    ]
    assert (
        "\npython3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/vbon run "
        "--config=configs/reviews.py\n" in (ROOT / "README.md").read_text()
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_files_are_whole(path):
    """mkdocs checks the pages' links too, but not those of README, and not where a test runs."""
    generated = {"config.md", "quickstart.md", *page_maker().api_pages()}
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        target = target.partition("#")[0]
        if target and not re.match(r"https?://", target) and target not in generated:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_config_keys_that_are_named_exist(path):
    known = {key for key, _, _ in keys.rows(config.Config)}
    groups = {key.rpartition(".")[0] for key in known} - {""}
    text = path.read_text()
    named = set(re.findall(r"--config\.([a-z_.]+[a-z_])[= `]", text))
    named |= {
        name
        for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", text)
        if name.partition(".")[0] in groups and not name.endswith((".py", ".json", ".jsonl"))
    }
    wrong = {name for name in named if name not in known | groups}
    assert not wrong, f"{path.name} names config keys that do not exist: {sorted(wrong)}"


def test_files_that_are_named_exist():
    """Paths of the repository, and modules to run."""
    for path in DOCUMENTS:
        text = path.read_text()
        for name in re.findall(
            r"((?:configs|launch|tests|vbon_jax|docs)/[\w/.-]+\w\.(?:py|sh|md|ipynb|yml))", text
        ):
            assert (ROOT / name).exists() or name.endswith("my_method.py"), f"{path.name}: {name}"
        for module in re.findall(r"python -m ([\w.]+)", text):
            if module.startswith("vbon_jax"):
                assert importlib.util.find_spec(module), f"{path.name}: {module}"


def test_the_config_reference_has_every_key_with_its_default():
    page = page_maker().config_page()
    for key, doc, default in keys.rows(config.Config):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{key}` |")]
        assert doc.replace("|", "\\|").replace("\n", "\\n") in row
        assert not isinstance(default, int | float) or f"`{default!r}`" in row


def test_the_api_reference_has_every_module():
    pages = page_maker().api_pages()
    shown = set(re.findall(r"^::: (\S+)", "\n".join(pages.values()), re.MULTILINE))
    package = ROOT / "vbon_jax"
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in package.glob("*/**/*.py")
    }
    assert {name for name in modules if not name.endswith("__init__")} <= shown
    nav = (ROOT / "docs" / "mkdocs.yml").read_text()
    assert all(f"- {uri}\n" in nav for uri in pages)


def test_every_extra_that_a_page_names_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = extras["optional-dependencies"]
    for path in DOCUMENTS:
        for name in re.findall(r'-e "\.\[(\w+)\]"', path.read_text()):
            assert name in known, f"{path.name}: .[{name}]"
