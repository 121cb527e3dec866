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
            # "from a import b" may import the module a.b: of a package of ours, it says which room.
            inside = (ROOT / (node.module or "").replace(".", "/")).is_dir()
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            names |= set() if inside else {node.module}
    return names


def sources(where: str) -> list[Path]:
    path = PACKAGE / where
    found = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
    assert found, f"{where} has no source: the rule names nothing"
    return found


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


ANY = ("vbon_jax",)
LEAVES = (
    "vbon_jax.errors",
    "vbon_jax.keys",
    "vbon_jax.processes",
    "vbon_jax.progress",
    "vbon_jax.sharding",
    "vbon_jax.signals",
)
CONFIG = ("vbon_jax.config", "vbon_jax.stages", "vbon_jax.cli", "vbon_jax.api")


@pytest.mark.parametrize(
    ("where", "forbidden", "allowed"),
    [
        (".", ("configs", "launch", "tests"), ()),
        ("errors.py", ANY, ()),
        ("keys.py", ANY, ("vbon_jax.errors",)),
        ("progress.py", ANY, ()),
        ("sharding.py", ANY, ("vbon_jax.errors",)),
        ("exits.py", ANY, ("vbon_jax.errors", "vbon_jax.signals")),
        (
            "processes.py",
            ANY,
            ("vbon_jax.errors", "vbon_jax.exits", "vbon_jax.progress", "vbon_jax.signals"),
        ),
        ("bon", ANY, ("vbon_jax.bon",)),
        ("rl", ANY, ("vbon_jax.rl",)),
        (
            "models",
            ANY,
            (
                "vbon_jax.models", "vbon_jax.rl.next_token", "vbon_jax.rl.chunked",
                "vbon_jax.errors", "vbon_jax.processes", "vbon_jax.sharding",
            ),
        ),
        (
            "data",
            ANY,
            (
                "vbon_jax.data", "vbon_jax.errors", "vbon_jax.processes",
                "vbon_jax.models.hf.tokenizers",
            ),
        ),
        ("rewards", ANY, ("vbon_jax.rewards", "vbon_jax.models", "vbon_jax.data", *LEAVES)),
        (
            "sampling",
            ANY,
            (
                "vbon_jax.sampling", "vbon_jax.rewards.base", "vbon_jax.models", "vbon_jax.data",
                "vbon_jax.rl.next_token", *LEAVES,
            ),
        ),
        (
            "training",
            ("vbon_jax.methods", "vbon_jax.evaluation", "vbon_jax.report", *CONFIG),
            (),
        ),
        ("methods", ("vbon_jax.evaluation", "vbon_jax.report", *CONFIG), ()),
        ("evaluation", ("vbon_jax.methods", "vbon_jax.report", *CONFIG), ()),
        ("report", ("vbon_jax.models", "vbon_jax.training", "vbon_jax.methods", *CONFIG), ()),
        ("api.py", ("vbon_jax.config", "vbon_jax.stages", "vbon_jax.cli"), ()),
        ("config", ("vbon_jax.cli", "vbon_jax.api", "vbon_jax.report"), ()),
    ],
)  # fmt: skip
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
        ("ml_collections", ("cli.py", "config/")),
        ("absl", ("cli.py",)),
        ("tensorflow_datasets", ("data/",)),
        ("datasets", ("data/",)),
        ("pyarrow", ("data/",)),
        ("wandb", ("training/",)),
        ("tensorflow", ()),
        ("torch", ("bench/engines.py",)),  # what vbon bench compares with, where it is
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


def functions(path: Path) -> list[tuple[str, ast.FunctionDef]]:
    found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    return [(f"{path.relative_to(PACKAGE)}:{node.name}", node) for node in found]


def test_parameter_lists_above_the_losses_are_short():
    """Eight at most, `self` not counted. `rl` and `bon` hold the losses and the maths."""
    for path in sources("."):
        if path.relative_to(PACKAGE).parts[0] in ("rl", "bon"):
            continue
        for name, node in functions(path):
            a = node.args
            names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg != "self"]
            if node.name != "token_loss":  # a loss itself, inside the update of PPO
                assert len(names) <= 8, f"{name} has {len(names)} parameters: {names}"
