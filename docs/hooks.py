"""Pages of the site that are made from the code when it is built: mkdocs calls `on_files`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vbon_jax"
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"

CONFIG_HEAD = """# Config reference

A config file starts from these defaults and changes what differs,

```python
from vbon_jax import config as vbon_config


def get_config():
    config = vbon_config.default()
    config.method.n = 16.0
    return config
```

and `--config.KEY=VALUE` on the command line changes one more. The files in `configs/` are such
files. A key that is not listed here is refused. `NAME` stands for a name of your choice.
"""


def config_page() -> str:
    """The Markdown page with every config key, its default and its meaning."""
    from vbon_jax import config, keys

    groups = {field.name: field.type for field in dataclasses.fields(config.Config)}
    lines, section = [CONFIG_HEAD], None
    for key, doc, default in keys.rows(config.Config):
        group = key.partition(".")[0] if "." in key else ""
        if group != section:
            section = group
            about = groups[group].__doc__ if group else "What the run does."
            lines.append(f"\n## {group or 'The run'}\n\n{about}\n")
            lines.append("| key | default | meaning |\n| --- | --- | --- |")
        lines.append(f"| `{key}` | {_shown(default)} | {_cell(doc)} |")
    return "\n".join(lines) + "\n"


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
