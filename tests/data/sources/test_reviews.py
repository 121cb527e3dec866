import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vbon_jax.data.sources import reviews
from vbon_jax.errors import InputError


@pytest.fixture(scope="module")
def corpus():
    return reviews.examples(seed=0, count=4000)


def test_examples_are_a_pure_function_of_seed_and_count(corpus):
    assert reviews.examples(0, 100) == corpus[:100]
    assert reviews.examples(1, 100) != corpus[:100]
    assert reviews.examples(0, 0) == []


def test_grammar_is_the_one_of_this_version():
    # If the grammar was changed on purpose, raise EmbeddedReviews.VERSION with this digest:
    # else prepared data of the old grammar would be read as if it were of the new one.
    written = reviews.examples(0, 1000) + ood_examples(0, 100)
    text = "\n".join(f"{e.label} {e.text}" for e in written)
    from vbon_jax.data.sources.reviews_builder import EmbeddedReviews

    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert (str(EmbeddedReviews.VERSION), digest) == ("2.0.0", "b9f478816b1fc170")


def test_shape_of_the_corpus(corpus):
    texts = [example.text for example in corpus]
    assert len(set(texts)) == len(texts)
    lengths = [sum(word[0].isalpha() for word in text.split()) for text in texts]
    assert min(lengths) == 8 and max(lengths) == 28
    vocabulary = {word for text in texts for word in text.split() if word[0].isalpha()}
    assert 250 <= len(vocabulary) <= 450
    for text in texts:
        assert text == text.lower() and text.endswith(" .") and "  " not in text
        assert "{" not in text and not text.startswith(" ")
    assert 0.47 < np.mean([example.label for example in corpus]) < 0.53


def test_excluded_texts_are_not_written(corpus):
    exclude = {example.text for example in corpus[:50]}
    assert not exclude & {example.text for example in reviews.examples(0, 100, exclude=exclude)}


def naive_bayes(train, test, length=None):
    """Accuracy on `test` of a naive Bayes classifier on the first `length` words."""
    counts = {}
    for example in train:
        for word in set(example.text.split()[:length]):
            counts.setdefault(word, [1, 1])[example.label] += 1
    labels = np.array([example.label for example in test])
    scores = np.array(
        [
            sum(
                np.subtract(*np.log(counts[w])[::-1])
                for w in set(e.text.split()[:length])
                if w in counts
            )
            for e in test
        ]
    )
    return np.mean((scores > 0) == labels)


def test_sentiment_is_graded_and_openings_leave_it_open(corpus):
    train, test = corpus[:3000], corpus[3000:]
    assert 0.8 < naive_bayes(train, test) < 0.95
    assert naive_bayes(train, test, length=4) < 0.65
    openings = [" ".join(example.text.split()[:3]) for example in corpus]
    mixed = {o: {e.label for e, p in zip(corpus, openings) if p == o} for o in set(openings[:20])}
    assert sum(len(labels) == 2 for labels in mixed.values()) >= 15


def names(text, genres):
    return any(re.search(rf"\b{genre}\b", text) for genre in genres)


def ood_examples(seed, count):
    return reviews.examples(seed, count, genres=reviews.HELD_OUT_GENRES, must_name_genre=True)


def test_held_out_genres_are_named_in_their_split_only(corpus):
    assert set(reviews.HELD_OUT_GENRES) | set(reviews.SEEN_GENRES) == set(reviews.GENRES)
    assert len(reviews.HELD_OUT_GENRES) + len(reviews.SEEN_GENRES) == len(reviews.GENRES) == 19
    assert not any(names(example.text, reviews.HELD_OUT_GENRES) for example in corpus)
    ood = ood_examples(0, 400)
    assert all(names(example.text, reviews.HELD_OUT_GENRES) for example in ood)
    for genre in reviews.HELD_OUT_GENRES:
        assert 0.2 < np.mean([names(example.text, [genre]) for example in ood]) < 0.5
    assert ood_examples(0, 50) == ood[:50]
    # The same seed with and without the demand, so that it is the demand that makes the difference.
    free = reviews.examples(0, 400, genres=reviews.HELD_OUT_GENRES)
    assert 0.2 < np.mean([names(example.text, reviews.HELD_OUT_GENRES) for example in free]) < 0.5
    # Genres are the only words that tell them from the rest.
    seen = {word for example in corpus for word in example.text.split()}
    ours = {word for example in ood for word in example.text.split()}
    assert ours - seen == set(reviews.HELD_OUT_GENRES)
    assert 0.4 < np.mean([example.label for example in ood]) < 0.6


def test_load_prepares_once_and_keeps_seeds_and_sizes_apart(tmp_path, monkeypatch):
    splits = reviews.load(tmp_path, seed=3, train=40, test=20, ood=10)
    train, test, ood = splits
    assert train == reviews.examples(9, 40)
    assert test == reviews.examples(10, 20)
    assert ood == ood_examples(11, 10)
    assert len({e.text for split in splits for e in split}) == 70

    monkeypatch.setattr(reviews, "examples", None)  # a second preparation would call it
    assert reviews.load(tmp_path, seed=3, train=40, test=20, ood=10) == splits
    with pytest.raises(TypeError, match="not callable"):
        reviews.load(tmp_path, seed=3, train=40, test=20, ood=11)
    monkeypatch.undo()

    for seed, sizes in ((4, (40, 20, 10)), (3, (30, 20, 10)), (3, (40, 10, 10)), (3, (40, 20, 5))):
        other = reviews.load(tmp_path, seed, *sizes)
        assert tuple(map(len, other)) == sizes
        assert other[0] == reviews.examples(3 * seed, sizes[0])


def test_no_text_is_in_both_splits_even_if_the_test_seed_would_write_it(tmp_path, monkeypatch):
    real = reviews.examples

    def same_seed(seed, count, exclude=(), **options):
        return real(0, count, exclude, **options)

    monkeypatch.setattr(reviews, "examples", same_seed)
    train, test, _ = reviews.load(tmp_path, seed=0, train=30, test=30, ood=1)
    assert train == real(0, 30) and test == real(0, 60)[30:]


INTERRUPTED = """
import os, signal, sys
from vbon_jax.data.sources import reviews_builder
whole = reviews_builder.EmbeddedReviews._generate_examples
def killed(self, examples):
    for index, example in whole(self, examples):
        if len(examples) == 20 and index == 10:  # train is written, test is half way
            os.kill(os.getpid(), signal.SIGKILL)
        yield index, example
reviews_builder.EmbeddedReviews._generate_examples = killed
reviews_builder.load(sys.argv[1], seed=0, train=40, test=20, ood=10)
"""


def test_a_killed_preparation_does_not_poison_the_next(tmp_path):
    run = subprocess.run([sys.executable, "-c", INTERRUPTED, tmp_path], capture_output=True)
    assert run.returncode == -9
    assert list(tmp_path.rglob("incomplete*"))  # it did leave something
    train, test, ood = reviews.load(tmp_path, seed=0, train=40, test=20, ood=10)
    assert train == reviews.examples(0, 40) and (len(test), len(ood)) == (20, 10)


def test_damaged_files_and_wrong_numbers_are_named(tmp_path):
    reviews.load(tmp_path, seed=0, train=40, test=20, ood=10)
    (file,) = Path(tmp_path).rglob("*-ood.array_record*")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(
        InputError, match=r"prepared reviews in .*seed0_train40_test20_ood10.* are damaged"
    ):
        reviews.load(tmp_path, seed=0, train=40, test=20, ood=10)
    for wrong in ((-1, 1, 1, 1), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0)):
        text = "seed = {}, train = {}, test = {}, ood = {}".format(*wrong)
        with pytest.raises(InputError, match=text):
            reviews.load(tmp_path, *wrong)


def test_importing_reviews_does_not_import_tensorflow_datasets():
    code = "import sys, vbon_jax.data.sources.reviews; print('tensorflow_datasets' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
