"""Labelled text of TensorFlow Datasets, read without TensorFlow.

A data set must have the features text and label, and be prepared as array_record, the one format
with random access that can be read without TensorFlow. Import this module only where it is used:
importing tensorflow_datasets takes seconds.
"""

import os
import tarfile
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from vbon_jax.data.sources.text import Example
from vbon_jax.errors import InputError

IMDB = ("imdb_reviews", "imdb_reviews/plain_text")
IMDB_URL = "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
# As TFDS has them on record: the download is checked against them.
IMDB_BYTES = 84_125_825
IMDB_SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"

with tfds.core.registered.skip_registration():  # tfds.builder keeps giving its own

    class ImdbReviews(tfds.core.GeneratorBasedBuilder):
        """`imdb_reviews/plain_text` of TFDS, prepared without TensorFlow.

        The builder of TFDS reads the archive with TensorFlow; this one writes the same examples
        with the same keys to the same directory. Maas et al. 2011: 25,000 reviews in train, 25,000
        in test, 50,000 without a label in unsupervised. Markup (`<br />`) is part of the text.
        """

        name = "imdb_reviews"
        BUILDER_CONFIGS = [  # noqa: RUF012
            tfds.core.BuilderConfig(
                name="plain_text", version=tfds.core.Version("1.0.0"), description="Plain text"
            )
        ]
        # TFDS would find this path with importlib_resources, which it does not require.
        code_path = tfds.core.Path(__file__)

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description="Movie reviews, labelled by their sentiment.",
                homepage="http://ai.stanford.edu/~amaas/data/sentiment/",
                features=tfds.features.FeaturesDict(
                    {
                        "text": tfds.features.Text(),
                        "label": tfds.features.ClassLabel(names=["neg", "pos"]),
                    }
                ),
                supervised_keys=("text", "label"),
            )

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
            archive = dl_manager.download(IMDB_URL)
            return {
                "train": self._generate_examples(archive, {"train/neg": 0, "train/pos": 1}),
                "test": self._generate_examples(archive, {"test/neg": 0, "test/pos": 1}),
                "unsupervised": self._generate_examples(archive, {"train/unsup": -1}),
            }

        def _generate_examples(
            self, archive: os.PathLike[str], labels: dict[str, int]
        ) -> Iterator[tuple[str, dict[str, Any]]]:
            with tarfile.open(archive, "r|gz") as files:
                for member in files:
                    folder = member.name.removeprefix("aclImdb/").rpartition("/")[0]
                    if member.isfile() and folder in labels:
                        text = files.extractfile(member).read().strip()  # type: ignore[union-attr]
                        yield member.name, {"text": text, "label": labels[folder]}


ImdbReviews.url_infos = {
    IMDB_URL: tfds.download.checksums.UrlInfo(IMDB_BYTES, IMDB_SHA256, "aclImdb_v1.tar.gz")
}


_ELSEWHERE = (
    "or prepare it once where TensorFlow is installed, with tfds.builder({name!r}, data_dir=DIR)"
    '.download_and_prepare(file_format="array_record"), and give that directory'
)


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _prepared(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """Returns the builder of a data set, downloaded and prepared unless it is on disk."""
    place = data_dir or "the default directory of TensorFlow Datasets"
    try:
        if name in IMDB:
            builder = ImdbReviews(data_dir=data_dir)
        else:
            builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # whatever the data set's own code raises
        raise InputError(
            f"data set {name!r} is not in {place}, and TensorFlow Datasets cannot make it "
            f"({_first_line(error)}); check the name and the directory"
        ) from error
    try:
        builder.download_and_prepare(
            download_dir=os.path.join(builder.data_dir_root, "downloads"),
            file_format="array_record",
        )
    except Exception as error:
        raise InputError(
            f"data set {name!r} is not prepared in {builder.data_dir}, and preparing it failed "
            f"({_first_line(error)}); give a directory that has it, try again with the network, "
            + _ELSEWHERE.format(name=name)
        ) from error
    return builder


def load(name: str, data_dir: str | os.PathLike[str] | None, split: str) -> list[Example]:
    """Loads one split of a data set, which is downloaded and prepared unless it is on disk.

    Args:
      name: the name in TFDS, such as "imdb_reviews", or "name/config" or "name/config:version". The
        data set has the features text (Text) and label (ClassLabel of 2 classes, of which the
        second is preferred).
      data_dir: where TFDS keeps it (`data_dir/name/config/version`); None or "" for the default
        of TFDS, `~/tensorflow_datasets`.
      split: "train", or any slice that TFDS can read, such as "train[:1000]".

    Returns:
      The examples in the order on disk, texts as they are; both labels occur.

    Raises:
      InputError: the data set is not there and cannot be made, was prepared in another format, has
        other features, has no such split, or its files are damaged; names it and its directory.
    """
    builder = _prepared(name, os.fspath(data_dir) if data_dir else None)
    what = f"data set {name!r} in {builder.data_dir}"
    features = dict(builder.info.features)
    label = features.get("label")
    if not (
        isinstance(features.get("text"), tfds.features.Text)
        and isinstance(label, tfds.features.ClassLabel)
        and label.num_classes == 2
    ):
        raise InputError(
            f"{what} has the features {features}; it needs text, a Text, and label, a ClassLabel "
            "of 2 classes"
        )
    try:
        source = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise InputError(
            f"{what} was prepared as {builder.info.file_format.value}, which cannot be read at "
            'random; prepare it with file_format="array_record" in another directory'
        ) from error
    except ValueError as error:
        raise InputError(
            f"{what} has no split {split!r} ({_first_line(error)}); "
            f"it has {', '.join(builder.info.splits)}"
        ) from error
    except Exception as error:  # the readers raise whatever their C++ side reports
        raise InputError(_damaged(what, error)) from error
    try:
        records = [source[index] for index in range(len(source))]
        examples = [Example(r["text"].decode("utf-8"), int(r["label"])) for r in records]
    except Exception as error:
        raise InputError(_damaged(what, error)) from error
    labels = {example.label for example in examples}
    if labels != {0, 1}:
        raise InputError(
            f"{what}: the {len(examples)} examples of split {split!r} have the labels "
            f"{sorted(labels)}; a reward model needs examples of both 0 and 1"
        )
    return examples


def _damaged(what: str, error: Exception) -> str:
    return f"{what} is damaged ({_first_line(error)}); delete that directory and run again"
