"""The embedded corpus as a TFDS data set.

Import it only where it is used: importing tensorflow_datasets takes seconds.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow_datasets as tfds

from vbon_jax.data.sources import reviews
from vbon_jax.data.sources.text import Example
from vbon_jax.errors import InputError


@dataclass(kw_only=True)
class ReviewsConfig(tfds.core.BuilderConfig):
    """The configuration of a corpus; TFDS keeps each in a directory of its name.

    Attributes:
      seed: seed of the reviews.
      train: number of training reviews.
      test: number of test reviews.
      ood: number of out-of-distribution reviews.
    """

    seed: int
    train: int
    test: int
    ood: int


class EmbeddedReviews(tfds.core.GeneratorBasedBuilder):
    """Reviews sampled from the grammar in `reviews`; splits train, test and ood do not overlap."""

    VERSION = tfds.core.Version("2.0.0")  # raise it when the grammar changes
    # TFDS would find this path with importlib_resources, which it does not require.
    code_path = tfds.core.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Movie reviews written by a small grammar, labelled by their sentiment.",
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=["negative", "positive"]),
                }
            ),
            supervised_keys=("text", "label"),
            disable_shuffling=True,  # the order is random already, and is kept this way
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        config = self.builder_config
        # Three seeds a corpus, so that no two splits share one, whatever the corpora's seeds.
        seed = 3 * config.seed
        train = reviews.examples(seed, config.train)
        written = {example.text for example in train}
        test = reviews.examples(seed + 1, config.test, exclude=written)
        # The held-out genres keep it apart from both.
        ood = reviews.examples(
            seed + 2, config.ood, genres=reviews.HELD_OUT_GENRES, must_name_genre=True
        )
        splits = {"train": train, "test": test, "ood": ood}
        return {name: self._generate_examples(split) for name, split in splits.items()}

    def _generate_examples(self, examples: list[Example]) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, example in enumerate(examples):
            yield index, {"text": example.text, "label": example.label}


def load(
    data_dir: str | os.PathLike[str], seed: int, train: int, test: int, ood: int
) -> tuple[list[Example], list[Example], list[Example]]:
    """Prepares the corpus under data_dir unless it is there, and reads it.

    TFDS writes to a directory named `incomplete.*` and renames it when done, so the files of an
    interrupted preparation are never read.

    Args:
      data_dir: the directory of the prepared files.
      seed: seed of the reviews, not negative.
      train: number of training reviews, at least 1.
      test: number of test reviews, at least 1.
      ood: number of out-of-distribution reviews, at least 1.

    Returns:
      (train examples, test examples, ood examples).

    Raises:
      InputError: seed, train, test or ood is out of range, or the prepared files are damaged.
    """
    if seed < 0 or min(train, test, ood) < 1:
        raise InputError(
            "the embedded reviews need seed >= 0 and train, test and ood >= 1, not "
            f"seed = {seed}, train = {train}, test = {test}, ood = {ood}"
        )
    config = ReviewsConfig(
        name=f"seed{seed}_train{train}_test{test}_ood{ood}",
        seed=seed,
        train=train,
        test=test,
        ood=ood,
    )
    tfds.disable_progress_bar()  # it takes a second
    builder = EmbeddedReviews(data_dir=data_dir, config=config)
    builder.download_and_prepare(
        download_dir=os.path.join(data_dir, "downloads"), file_format="array_record"
    )
    splits = []
    for split, count in (("train", train), ("test", test), ("ood", ood)):
        try:
            source = builder.as_data_source(split=split)
            records = [source[index] for index in range(count)]
        except Exception as error:  # the readers raise whatever their C++ side reports
            raise InputError(
                f"the prepared reviews in {builder.data_dir} are damaged ({error}); delete that "
                "directory and run again"
            ) from error
        splits.append([Example(r["text"].decode(), int(r["label"])) for r in records])
    return splits[0], splits[1], splits[2]
