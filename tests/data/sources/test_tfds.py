import collections
import functools
import hashlib
import http.server
import io
import shutil
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data import imdb_shaped
from vbon_jax.data.sources import tfds as tfds_text
from vbon_jax.data.sources.text import Example
from vbon_jax.errors import InputError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    return data_dir, imdb_shaped.prepare_imdb(data_dir)


def test_reads_both_splits_whole_and_text_as_it_is(prepared):
    data_dir, written = prepared
    for name in tfds_text.IMDB:
        for split, count in (("train", 25), ("test", 10)):
            found = tfds_text.load(name, data_dir, split)
            assert len(found) == count
            assert collections.Counter(found) == collections.Counter(written[split])
            assert all(type(e.text) is str and type(e.label) is int for e in found)
            assert all("<br /><br />Caf\u00e9" in e.text for e in found)
    # The order is the one on disk, each time the same.
    assert tfds_text.load("imdb_reviews", str(data_dir), "train") == tfds_text.load(
        "imdb_reviews", data_dir, "train"
    )
    slices = [tfds_text.load("imdb_reviews", data_dir, f"train[{s}]") for s in (":10", "10:")]
    assert slices[0] + slices[1] == tfds_text.load("imdb_reviews", data_dir, "train")


def test_a_data_set_without_code_is_read_from_its_directory(prepared, tmp_path):
    shutil.copytree(prepared[0] / "imdb_reviews" / "plain_text", tmp_path / "my_films")
    info = tmp_path / "my_films" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"imdb_reviews"', '"my_films"'))
    for file in info.parent.glob("imdb_reviews-*"):
        file.rename(info.parent / file.name.replace("imdb_reviews", "my_films"))
    found = tfds_text.load("my_films", tmp_path, "test")
    assert sorted(e.text for e in found) == sorted(e.text for e in prepared[1]["test"])


ARCHIVE = {
    "train/neg/0_3.txt": b"Bad.<br /><br />Very bad. ",
    "train/pos/0_9.txt": "Caf\u00e9 of joy".encode(),
    "train/unsup/0_0.txt": b"Who knows",
    "test/neg/1_1.txt": b"Dull",
    "test/pos/1_8.txt": b"Fine",
    "test/urls_pos.txt": b"http://",
    "imdb.vocab": b"the",
}


@pytest.fixture
def served(tmp_path, monkeypatch):
    """An archive of the layout of aclImdb_v1.tar.gz where the builder looks for the real one."""
    folder = tmp_path / "www"
    folder.mkdir()
    with tarfile.open(folder / "acl.tar.gz", "w:gz") as files:
        for name, data in ARCHIVE.items():
            member = tarfile.TarInfo(f"aclImdb/{name}")
            member.size = len(data)
            files.addfile(member, io.BytesIO(data))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/acl.tar.gz"
    data = (folder / "acl.tar.gz").read_bytes()
    digest = hashlib.sha256(data).hexdigest()

    def record(digest):
        info = tfds.download.checksums.UrlInfo(len(data), digest, "acl.tar.gz")
        monkeypatch.setattr(tfds_text.ImdbReviews, "url_infos", {url: info})

    monkeypatch.setattr(tfds_text, "IMDB_URL", url)
    record(digest)
    yield record
    server.shutdown()


def test_imdb_is_made_from_its_archive_without_tensorflow(served, tmp_path):
    train = tfds_text.load("imdb_reviews", tmp_path, "train")
    test = tfds_text.load("imdb_reviews", tmp_path, "test")
    assert set(train) == {Example("Bad.<br /><br />Very bad.", 0), Example("Caf\u00e9 of joy", 1)}
    assert set(test) == {Example("Dull", 0), Example("Fine", 1)}
    # TFDS's own code finds it in its place, and what it holds is what that code would hold.
    theirs = tfds.builder("imdb_reviews", data_dir=tmp_path)
    assert type(theirs) is not tfds_text.ImdbReviews
    assert {k: v.num_examples for k, v in theirs.info.splits.items()} == {
        "train": 2, "test": 2, "unsupervised": 1,
    }  # fmt: skip
    assert len(theirs.as_data_source(split="train")) == 2
    with pytest.raises(InputError, match=r"1 examples of split 'unsupervised' .* labels \[-1\]"):
        tfds_text.load("imdb_reviews", tmp_path, "unsupervised")


def test_a_download_that_is_not_the_archive_is_refused(served, tmp_path):
    served("0" * 64)
    with pytest.raises(InputError, match=r"'imdb_reviews' is not prepared in .*Checksum"):
        tfds_text.load("imdb_reviews", tmp_path, "train")


def test_the_record_of_the_archive_is_the_one_of_tfds():
    folder = tfds.core.Path(tfds.__file__).parent / "datasets" / "imdb_reviews"
    url, size, digest, name = (folder / "checksums.tsv").read_text().strip().split("\t")
    info = tfds_text.ImdbReviews.url_infos[url]
    assert (url, info.size, info.checksum) == (tfds_text.IMDB_URL, int(size), digest)
    assert info.filename == name


def test_what_cannot_be_made_names_set_directory_cause_and_remedy(served, tmp_path, monkeypatch):
    # Not found, since TFDS would try an unreachable server again for minutes.
    monkeypatch.setattr(tfds_text, "IMDB_URL", tfds_text.IMDB_URL + ".moved")
    with pytest.raises(InputError) as error:
        tfds_text.load("imdb_reviews", tmp_path, "train")
    for part in (
        f"'imdb_reviews' is not prepared in {tmp_path}/imdb_reviews/plain_text/1.0.0",
        "acl.tar.gz.moved. HTTP code: 404",
        "try again with the network",
        "tfds.builder('imdb_reviews', data_dir=DIR).download_and_prepare(",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=rf"'no_such_set' is not in {tmp_path}.*not found"):
        tfds_text.load("no_such_set", tmp_path, "train")


def test_splits_formats_features_and_damage_are_named(prepared, tmp_path):
    shutil.copytree(prepared[0], tmp_path, dirs_exist_ok=True)
    home = tmp_path / "imdb_reviews" / "plain_text" / "1.0.0"

    def refused(message, split="train"):
        with pytest.raises(InputError, match=message) as error:
            tfds_text.load("imdb_reviews", tmp_path, split)
        assert str(home) in str(error.value)

    refused(r"has no split 'valid' .*; it has (train, test|test, train)$", split="valid")
    refused(r"has no split 'train\[:900%\]'", split="train[:900%]")

    info = home / "dataset_info.json"
    whole = info.read_text()
    info.write_text(whole.replace("array_record", "tfrecord"))
    refused(r"was prepared as tfrecord.*in another directory")
    info.write_text(whole)

    (file,) = home.glob("*-train.array_record*")
    file.write_bytes(file.read_bytes()[:100])
    refused("is damaged .*delete that directory")
    file.unlink()
    refused("is damaged .*delete that directory")


def test_other_features_are_refused(tmp_path):
    def prepare(name, features, record):
        class Other(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            code_path = tfds.core.Path(__file__)

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                yield 0, record

        Other.name = name
        Other(data_dir=tmp_path).download_and_prepare(
            download_dir=tmp_path / "downloads", file_format="array_record"
        )

    text, two = tfds.features.Text(), tfds.features.ClassLabel(num_classes=2)
    with tfds.core.registered.skip_registration():
        prepare("three", {"text": text, "label": tfds.features.ClassLabel(num_classes=3)},
                {"text": "a", "label": 2})  # fmt: skip
        prepare("unnamed", {"sentence": text, "label": two}, {"sentence": "a", "label": 1})
        prepare("numbers", {"text": text, "label": tfds.features.Scalar(np.int64)},
                {"text": "a", "label": 1})  # fmt: skip
        prepare("broken", {"text": text, "label": two}, {"text": b"\xff", "label": 1})
        prepare("single", {"text": text, "label": two}, {"text": "a", "label": 1})
    for name in ("three", "unnamed", "numbers"):
        with pytest.raises(InputError, match=rf"'{name}' in .* has the features .* 2 classes"):
            tfds_text.load(name, tmp_path, "train")
    with pytest.raises(InputError, match=r"'broken' .*is damaged \(UnicodeDecodeError"):
        tfds_text.load("broken", tmp_path, "train")
    with pytest.raises(InputError, match=r"split 'train' have the labels \[1\]"):
        tfds_text.load("single", tmp_path, "train")


def test_tensorflow_is_not_imported(prepared):
    code = (
        "import sys\nfrom vbon_jax.data.sources import tfds as tfds_text\n"
        "print(len(tfds_text.load('imdb_reviews', sys.argv[1], 'train')), "
        "'tensorflow' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, prepared[0]], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["25", "False"]
