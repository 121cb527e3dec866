"""Config files and the keys they set."""

import ast
import copy
import importlib.util
from pathlib import Path

import pytest

from vbon_jax import settings as st
from vbon_jax.errors import InputError

ROOT = Path(__file__).parents[1]


def load(name, *variant):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*variant).to_dict()


@pytest.fixture
def values():
    return load("tabular")


def change(values, key, value):
    values = copy.deepcopy(values)
    *groups, name = key.split(".")
    group = values
    for g in groups:
        group = group[g]
    group[name] = value
    return values


@pytest.mark.parametrize(
    "config", [("tabular",), ("reviews",), ("reviews", "text")], ids=lambda c: ":".join(c)
)
def test_every_config_file_parses(config):
    parsed = st.parse(load(*config))
    assert st.flatten(st.as_dict(parsed)).keys() == {key for key, _ in st.reference_rows()}


def test_every_config_file_is_tested():
    assert {p.stem for p in (ROOT / "configs").glob("*.py")} == {"tabular", "reviews"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method.n", 0.5, "method.n=0.5: must be at least 1"),
        ("method.n", float("nan"), "method.n=nan: must be a finite number"),
        ("method.estimator", "magic", "method.estimator='magic': choose one of smoothed, strict"),
        ("samples.m", 0, "samples.m=0: must be at least 1"),
        ("samples.m", 2.5, "samples.m=2.5: must be int"),
        ("samples.m", True, "samples.m=True: must be int"),
        ("train.whiten", 1, "train.whiten=1: must be bool"),
        ("train.minibatch_size", 100, "train.batch_size=512 is not a multiple"),
        ("train.clip_policy", 1.0, "train.clip_policy=1.0: must be below 1"),
        ("train.learning_rate", 0.0, "train.learning_rate=0.0: must be above 0"),
        ("sampling.temperature", 0.0, "sampling.temperature=0.0: must be above 0"),
        ("evaluate.temperatures", (), "evaluate.temperatures is empty"),
        ("evaluate.temperatures", (0.0,), "evaluate.temperatures has 0.0"),
        ("stages", ("sft", "dance"), "stages names 'dance'"),
        ("reference.model.heads", 3, "reference.model.width=64 is not a multiple"),
        ("prompts.min_tokens", 5, "prompts.min_tokens=5 is more than"),
        ("reward.path", "somewhere", "set one of them"),
        ("data.test_path", "x.jsonl", "data.path is empty"),
        ("data", 3, "data=3: must be a group of keys"),
    ],
)
def test_bad_values_are_named(values, key, value, message):
    with pytest.raises(InputError) as error:
        st.parse(change(values, key, value))
    assert message in str(error.value)


@pytest.mark.parametrize("estimator", ["strict", "interval"])
@pytest.mark.parametrize("objective", ["lower_bound", "jensen_bound"])
def test_estimators_without_a_finite_log_f_are_refused_for_the_bounds(values, estimator, objective):
    values = change(values, "method.estimator", estimator)
    st.parse(values)
    with pytest.raises(InputError, match=f"method.estimator={estimator}"):
        st.parse(change(values, "method.objective", objective))


def test_unknown_and_missing_keys_are_named(values):
    with pytest.raises(InputError, match=r"unknown config key method\.nn: allowed here are"):
        st.parse(change(values, "method.nn", 1))
    del values["train"]["lam"]
    with pytest.raises(InputError, match=r"config key train\.lam is missing"):
        st.parse(values)


def test_ints_are_read_as_floats_where_floats_are_meant(values):
    assert st.parse(change(values, "method.n", 4)).method.n == 4.0


def test_every_key_is_read_somewhere():
    """A key that only ``settings.py`` mentions is one that nothing reads."""
    read = set()
    for path in (ROOT / "vbon_jax").rglob("*.py"):
        if path.name != "settings.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    read.add(node.attr)
    unread = [key for key, _ in st.reference_rows() if key.split(".")[-1] not in read]
    assert not unread


def test_readme_has_every_key():
    text = (ROOT / "README.md").read_text()
    missing = [key for key, doc in st.reference_rows() if f"| `{key}` | {doc} |" not in text]
    assert not missing
