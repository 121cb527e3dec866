"""Data sets by name: local directories, what a cache offline lacks, and the faults of both."""

import os
import subprocess
import sys

import datasets
import pandas
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from vbon_jax.data.sources import hub
from vbon_jax.data.sources.chat import Conversation
from vbon_jax.data.sources.text import Example
from vbon_jax.errors import InputError

WANT = [Example("a ,\nb", 1), Example("c", 0), Example("d", 1)]
ROWS = {"text": [e.text for e in WANT], "label": [e.label for e in WANT], "id": [7, 8, 9]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def place(tmp_path):
    """A local data set with splits train and test, of CSV files."""
    path = tmp_path / "set"
    path.mkdir()
    for split in ("train", "test"):
        pandas.DataFrame(ROWS).to_csv(path / f"{split}.csv", index=False)
    return path


def test_a_local_directory_of_csv(place):
    assert hub.load(str(place), "train") == WANT
    assert hub.load(str(place), "test[:2]") == WANT[:2]
    assert all(type(example.label) is int for example in hub.load(str(place), "train"))


@pytest.mark.parametrize("label", [ClassLabel(names=["neg", "pos"]), Value("bool"), Value("int8")])
def test_parquet_with_labels_of_any_kind(tmp_path, label):
    features = Features({"review": Value("string"), "y": label})
    made = Dataset.from_dict({"review": ROWS["text"], "y": ROWS["label"]}, features=features)
    (tmp_path / "set").mkdir()
    made.to_parquet(tmp_path / "set" / "train.parquet")
    loaded = datasets.load_dataset(str(tmp_path / "set"), split="train")
    assert loaded.features["y"] == label  # the names went to disk and came back
    found = hub.load(str(tmp_path / "set"), "train", text_column="review", label_column="y")
    assert found == WANT and all(type(example.label) is int for example in found)


def test_a_class_label_of_three_and_one_label_alone(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    (tmp_path / "set").mkdir()
    for labels, message in (
        ([1, 2, 0], r"row index 1: 'label' must be 0 or 1, not 2"),
        ([0, 1, None], r"row index 2: 'label' must be 0 or 1, not None"),
        ([1, 1, 1], r"data set '.*set', split 'train': all 3 labels are 1"),
    ):
        made = Dataset.from_dict({"text": ROWS["text"], "label": labels}, features=features)
        made.to_parquet(tmp_path / "set" / "train.parquet")
        with pytest.raises(InputError, match=message):
            hub.load(str(tmp_path / "set"), "train")


def test_prompts_and_conversations(tmp_path):
    path = tmp_path / "set"
    path.mkdir()
    user = [{"role": "user", "content": "why?"}]
    pandas.DataFrame({"prompt": ["a", "b"], "q": ["c", ""], "messages": [user, user]}).to_parquet(
        path / "train.parquet"
    )
    name = str(path)
    assert hub.load_prompts(name, "train") == ["a", "b"]
    assert hub.load_prompts(name, "train[:1]", column="q") == ["c"]
    with pytest.raises(InputError, match=r"set', split 'train': row index 1: 'q' is empty"):
        hub.load_prompts(name, "train", "q")
    where = f"data set {name!r}, split 'train': row index"
    want = [Conversation((("user", "why?"),), f"{where} {i}") for i in range(2)]
    assert hub.load_conversations(name, "train") == want
    assert hub.load_conversations(name, "train[:1]", "q")[0].messages == (("user", "c"),)
    for load in (hub.load_prompts, hub.load_conversations):
        with pytest.raises(InputError, match=r"no column 'x' .*'prompt', 'q', 'm.*prompts\.column"):
            load(name, "train", "x")
    (path / "train.parquet").unlink()
    (path / "train.csv").write_text("prompt\n")
    with pytest.raises(InputError, match=r"with split 'train' \(.*no data!\); check"):
        hub.load_prompts(name, "train")


@pytest.mark.parametrize(
    ("split", "columns", "message"),
    [
        (
            "dev",
            (),
            r"with split 'dev' \(Unknown split \"dev\".*'t.*\); check the split and the co",
        ),
        ("train[", (), r"cannot be loaded with split 'train\['"),
        (
            "train",
            ("body",),
            r"no column 'body' \(found: 'text', 'label', 'id'\); set data\.text_c",
        ),
        ("train", ("text", "y"), r"no column 'y' .*set data\.label_column"),
        ("train", ("id", "label"), r"row index 0: 'id' must be a string, not 7"),
        ("train", ("text", "text"), r"row index 0: 'text' must be 0 or 1, not 'a ,"),
    ],
)
def test_faults_name_data_set_and_split(place, split, columns, message):
    with pytest.raises(InputError, match=rf"^data set '.*set'.*{message}"):
        hub.load(str(place), split, *columns)


def test_a_configuration_stands_behind_a_colon(place, monkeypatch):
    with pytest.raises(InputError, match=r"set:french' cannot .*'french' not found.*owner/name:c"):
        hub.load(f"{place}:french", "train")
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return Dataset.from_dict(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert hub.load("owner/name:french", "train") == WANT
    assert hub.load("owner/name", "test") == WANT
    assert asked == [
        (("owner/name", "french"), {"split": "train", "trust_remote_code": False}),
        (("owner/name", None), {"split": "test", "trust_remote_code": False}),
    ]


def test_unreachable_and_unknown(monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach 'o/n' on the Hub\n(a reason).")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        InputError,
        match=r"^data set 'o/n' is neither a local directory nor in the cache, and the Hugging "
        r"Face hub cannot be reached \(check the network: Couldn't reach 'o/n' on the Hub \(a "
        r"reason\)\); download it .*, or set data\.path to a local file \(\.jsonl, \.csv, .*\)$",
    ):
        hub.load("o/n", "train")
    with pytest.raises(InputError, match=r"or set prompts\.path to a local file"):
        hub.load_prompts("o/n", "train")

    def unknown(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(
        InputError, match=r"^data set 'o/n' .* or is private or gated \(Dataset 'o/n'"
    ):
        hub.load("o/n", "train")


def test_offline(tmp_path):
    """For real: a process to which HF_HUB_OFFLINE was set."""
    code = (
        "from vbon_jax.data.sources import hub\n"
        "from vbon_jax.errors import InputError\n"
        "try:\n    hub.load('owner/name:config', 'train')\n"
        "except InputError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert out.stdout == (
        "data set 'owner/name:config' is neither a local directory nor in the cache, and the "
        "Hugging Face hub cannot be reached (HF_HUB_OFFLINE is set); download it first, where "
        "there is a network, or set data.path to a local file (.jsonl, .csv, .tsv, .parquet)\n"
    )


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'not installed; run pip install "vbon_jax\[hub\]", or'):
        hub.load("owner/name", "train")
