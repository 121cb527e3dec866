"""The arrows between packages that must never exist, read off the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vbon_jax"


def modules_imported(path: Path) -> set[str]:
    """Full names of every module a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # "from a import b" may import the module a.b.
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources(where: str) -> list[Path]:
    path = PACKAGE / where
    found = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
    assert found, f"{where} has no source: the rule names nothing"
    return found


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(
    ("where", "forbidden", "allowed"),
    [
        (".", ("configs", "launch", "tests"), ()),
        ("bon", ("vbon_jax",), ("vbon_jax.bon",)),
        ("rl", ("vbon_jax",), ("vbon_jax.rl",)),
        ("models", ("vbon_jax",), ("vbon_jax.models",)),
        ("sampling", ("vbon_jax.rewards", "vbon_jax.bon", "vbon_jax.training"), ()),
        ("rewards", ("vbon_jax.sampling", "vbon_jax.training"), ()),
        *(
            (f"evaluation/{name}.py", ("vbon_jax.models", "vbon_jax.training"), ())
            for name in ("figures", "front_figures", "sweep_figures", "style", "report", "pareto")
        ),
    ],
)
def test_no_forbidden_arrow(where, forbidden, allowed):
    for path in sources(where):
        for name in modules_imported(path):
            if name == "vbon_jax" or any(is_below(name, a) for a in allowed):
                continue
            assert not any(is_below(name, f) for f in forbidden), f"{path} imports {name}"


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("flax.linen", ("models/",)),
        ("ml_collections", ("cli.py", "stages.py")),
        ("absl", ("cli.py", "stages.py")),
        ("tensorflow_datasets", ("data/",)),
        ("tensorflow", ()),
        ("torch", ()),
        ("clu", ()),
    ],
)
def test_libraries_stay_at_home(library, homes):
    for path in sources("."):
        if str(path.relative_to(PACKAGE)).startswith(homes or ("\0",)):
            continue
        found = [n for n in modules_imported(path) if is_below(n, library)]
        assert not found, f"{path} imports {found}"


def test_there_is_no_utils():
    assert not list(PACKAGE.rglob("util*.py"))


def test_a_forbidden_import_is_seen(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("def f():\n    from vbon_jax import rewards\n    import flax.linen as nn\n")
    assert {"vbon_jax.rewards", "flax.linen"} <= modules_imported(path)
