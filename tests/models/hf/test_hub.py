"""Names of models, with a hub that only pretends."""

import types

import huggingface_hub
import pytest
from huggingface_hub import errors

from vbon_jax.models import hf
from vbon_jax.models.hf import hub


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the hub was asked for, call by call."""
    calls = []

    def snapshot_download(repository, **settings):
        calls.append((repository, settings))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_directory_is_itself(asked, tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub.resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert str(hub.resolve("owner/name")) == "owner/name"
    assert not asked


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("gpt2", "gpt2", None),
        ("EleutherAI/pythia-2.8b", "EleutherAI/pythia-2.8b", None),
        ("Qwen/Qwen3-0.6B@main", "Qwen/Qwen3-0.6B", "main"),
        ("gpt2@refs/pr/7", "gpt2", "refs/pr/7"),
    ],
)
def test_a_name_is_fetched(asked, tmp_path, name, repository, revision):
    assert hub.resolve(name) == tmp_path / "cache"
    ((got, settings),) = asked
    assert (got, settings["revision"]) == (repository, revision)


def test_a_process_asks_once(monkeypatch, tmp_path):
    """Its stages are of one snapshot, whatever is pushed meanwhile, and wait for no network."""
    calls = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: calls.append(a) or str(tmp_path)
    )
    assert hub.resolve("owner/name") == hub.resolve("owner/name") == tmp_path
    hub.resolve("owner/name@v2")
    assert calls == [("owner/name",)] * 2


def test_the_origin_of_a_model_holds_outside_this_machine(tmp_path, monkeypatch):
    """The commit of the cache for a name on the hub, an absolute path for a directory."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(snapshot))
    assert hub.origin("owner/name") == ("owner/name", "0123456789" * 4)
    assert hub.origin("owner/name@main") == ("owner/name", "0123456789" * 4)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert hub.origin("mine") == (str(tmp_path / "mine"), None)


def test_only_what_can_be_read_is_fetched(asked):
    hub.resolve("owner/name")
    ((_, settings),) = asked
    files = [
        "config.json", "model-00001-of-00002.safetensors", "merges.txt", "tokenizer.model",
        "chat_template.jinja", "pytorch_model.bin", "model.h5", "consolidated.safetensors",
        "onnx/model.onnx", "original/params.json",
    ]  # fmt: skip
    kept = huggingface_hub.utils.filter_repo_objects(
        files,
        allow_patterns=settings["allow_patterns"],
        ignore_patterns=settings["ignore_patterns"],
    )
    assert list(kept) == files[:5]


@pytest.mark.parametrize(
    "name",
    ["./gpt2", "../gpt2", "/models/gpt2", "~/gpt2", "gpt2/", "a/b/c", "", "two words", "gpt2@",
     "@main"],
)  # fmt: skip
def test_what_looks_like_a_path_is_not_fetched(asked, name):
    with pytest.raises(hf.CheckpointError, match="is no directory") as caught:
        hub.resolve(name)
    assert repr(name) in str(caught.value)
    assert not asked


def test_a_file_is_no_directory(asked, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(hf.CheckpointError, match=r"config\.json is a file: give the directory"):
        hub.resolve(str(tmp_path / "config.json"))
    assert not asked


def http_error(kind):
    response = types.SimpleNamespace(headers={}, request=None)
    return kind("the first line\nthe second", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(errors.GatedRepoError), "is gated: accept .* huggingface-cli login"),
        (http_error(errors.RepositoryNotFoundError), "is not on the hub, or is private: check the"),
        (http_error(errors.RevisionNotFoundError), "has no revision 'v9': check the spelling"),
        (errors.OfflineModeIsEnabled("the first line"), "not in the cache .* HF_HUB_OFFLINE"),
        (errors.LocalEntryNotFoundError("the first line"), "check the network .* give a directory"),
        (http_error(errors.HfHubHTTPError), "could not be fetched: check the name and the network"),
        (OSError("the first line"), "could not be fetched"),
        (errors.HFValidationError("the first line"), "could not be fetched"),
        (RuntimeError("the first line"), "could not be fetched"),  # an HTTP client's own errors
    ],
)
def test_what_the_hub_says_is_explained(monkeypatch, error, message):
    def snapshot_download(*args, **settings):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(hf.CheckpointError, match=message) as caught:
        hub.resolve("owner/name@v9")
    assert "'owner/name@v9'" in str(caught.value)
    assert "(the first line)" in str(caught.value)
