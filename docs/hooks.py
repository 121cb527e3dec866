"""Pages of the site that are made from the code when it is built: mkdocs calls `on_files`."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vbon_jax"
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"

CONFIG_HEAD = """# Config reference

Made from `vbon_jax/config.py`. A config file starts from these defaults,

```
import vbon_jax.config


def get_config():
    config = vbon_jax.config.default()
    config.method.n = 16.0
    return config
```

and `--config.KEY=VALUE` on the command line changes one more. The files of `configs/` are such
files. A key that is not in these tables is an error.
"""
SECTIONS = {
    "": "The run",
    "data": "Labelled text",
    "prompts": "Prompts",
    "tokenizer": "Tokenizer",
    "reference": "Reference model",
    "reward": "Reward",
    "evaluator": "Evaluator, a second reward model that only measures",
    "sampling": "Sampling",
    "samples": "Reference samples",
    "method": "Method",
    "bond": "Options of BOND",
    "train": "Training by rollouts",
    "lora": "LoRA",
    "memory": "Precision and memory",
    "offline": "Training on stored samples",
    "export": "Export",
    "evaluate": "Evaluation",
    "convergence": "Study of the number of samples",
    "sweep": "Sweeps",
    "generate": "Generation",
    "mesh": "Devices",
    "log": "Logging",
}


def config_page() -> str:
    """The Markdown page with every config key, its default and its meaning."""
    lines, section = [CONFIG_HEAD], None
    for key, doc, default in _rows():
        group = key.partition(".")[0] if "." in key else ""
        if group != section:
            section = group
            title = SECTIONS.get(group, group)
            heading = f"{title}: `{group}`" if group else title
            lines.append(f"\n## {heading}\n\n| key | default | meaning |\n| --- | --- | --- |")
        lines.append(f"| `{key}` | {_shown(default)} | {_cell(doc)} |")
    return "\n".join(lines) + "\n"


def _rows() -> list[tuple[str, str, Any]]:
    from vbon_jax import config

    try:
        from vbon_jax import keys
    except ImportError:
        return [(key, doc, "") for key, doc in config.reference_rows()]
    return keys.rows(config.Config)


def _shown(default: Any) -> str:
    text = json.dumps(default, ensure_ascii=False) if isinstance(default, str) else repr(default)
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "\\n")


def api_pages() -> dict[str, str]:
    """The API reference: the package itself, and a page for each of its subpackages."""
    pages = {"api/index.md": _api_page("vbon_jax", [])}
    for room in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in _files(room)]
        pages[f"api/{room.name}.md"] = _api_page(f"vbon_jax.{room.name}", modules)
    return pages


def _files(room: Path) -> list[Path]:
    return [path for path in sorted(room.rglob("*.py")) if path.name != "__init__.py"]


def _api_page(package: str, modules: list[str]) -> str:
    own = f"# {package}\n\n::: {package}\n    options:\n      show_root_heading: false\n"
    own += "      show_root_toc_entry: false\n      show_submodules: false\n"
    return own + "".join(f"\n::: {module}\n" for module in modules)


def notebook_page(path: Path = NOTEBOOK) -> str:
    """A notebook's cells as Markdown."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages to those of docs/pages."""
    from mkdocs.structure.files import File

    pages = {"config.md": config_page(), "quickstart.md": notebook_page(), **api_pages()}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files
