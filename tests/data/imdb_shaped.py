"""A data set of the shape of TFDS's `imdb_reviews`, prepared locally: 25 reviews and 10."""

import os

import tensorflow_datasets as tfds

from vbon_jax.data.sources import reviews
from vbon_jax.data.sources.text import Example

TRAIN, TEST = 25, 10


def examples(train: int = TRAIN, test: int = TEST) -> dict[str, list[Example]]:
    """What is prepared: grammar reviews with the markup, capitals and accents that IMDB has."""
    splits = {"train": reviews.examples(100, train), "test": reviews.examples(101, test)}
    return {
        split: [
            Example(f"{e.text.capitalize()}<br /><br />Caf\u00e9 no. {i}.", e.label)
            for i, e in enumerate(written)
        ]
        for split, written in splits.items()
    }


def prepare_imdb(
    data_dir: str | os.PathLike[str], train: int = TRAIN, test: int = TEST
) -> dict[str, list[Example]]:
    """Prepares it as array_record under data_dir, where `imdb_reviews` would be.

    Returns the examples of train and test, in the order in which they were written; TFDS shuffles.
    """
    written = examples(train, test)

    with tfds.core.registered.skip_registration():

        class ImdbShaped(tfds.core.GeneratorBasedBuilder):
            name = "imdb_reviews"
            BUILDER_CONFIGS = [  # noqa: RUF012
                tfds.core.BuilderConfig(name="plain_text", version=tfds.core.Version("1.0.0"))
            ]
            code_path = tfds.core.Path(__file__)

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(
                        {
                            "text": tfds.features.Text(),
                            "label": tfds.features.ClassLabel(names=["neg", "pos"]),
                        }
                    ),
                    supervised_keys=("text", "label"),
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in written}

            def _generate_examples(self, split):
                for index, example in enumerate(written[split]):
                    yield f"{split}/{index}", {"text": example.text, "label": example.label}

    builder = ImdbShaped(data_dir=os.fspath(data_dir))
    builder.download_and_prepare(
        download_dir=os.path.join(data_dir, "downloads"), file_format="array_record"
    )
    return written
