"""The embedded corpus: labelled movie reviews sampled from a small grammar.

A review is a mostly neutral opening, two to four clauses that each praise or blame to some degree,
and sometimes a verdict. The label is drawn with log odds proportional to the sum of the degrees, so
that sentiment is graded and no single word determines the label.
"""

import math
import os
import random
from collections.abc import Collection, Sequence
from typing import TypeVar

from vbon_jax.data.sources.text import Example

MIN_WORDS, MAX_WORDS = 8, 28

T = TypeVar("T")


def _list(phrases: str) -> list[str]:
    return phrases.split("|")


GENRES = _list(
    "comedy|drama|thriller|western|musical|sequel|remake|mystery|romance|documentary|picture|movie|"
    "film|horror film|crime story|war film|road movie|love story|fairy tale"
)
# Genres that only the out-of-distribution split names; no other phrase has these words.
HELD_OUT_GENRES = ("western", "musical", "documentary")
SEEN_GENRES = tuple(genre for genre in GENRES if genre not in HELD_OUT_GENRES)

PLACES = _list(
    "a small fishing town|the streets of new york|a boarding school|an old hotel|the last days of "
    "the war|a lonely farm|the near future|postwar london|a crowded hospital|the mountains"
)

TOPICS = _list(
    "two brothers on the run|a retired detective|a lost child|a family in trouble|a young painter|"
    "an ageing boxer|three friends and a robbery|a teacher and her students|a ghost in the attic|"
    "a wedding gone wrong|a soldier coming home|a stolen violin|a pair of lonely neighbors|"
    "a country doctor"
)

COMPANY = _list("my sister|my father|a friend|my kids|a full house|two colleagues|my wife")

TIMES = _list("last night|on opening day|on a long flight|at a festival|on a rainy sunday")

# (lean of what follows, template): most openings lean nowhere.
OPENINGS = (
    (0, "set in {place} ,"),
    (0, "set in {place} , this {genre} follows {topic} ."),
    (0, "in this {genre} about {topic} ,"),
    (0, "i saw this {genre} with {company} {time} , and"),
    (0, "i watched the {genre} {time} , and"),
    (0, "this {genre} follows {topic} , and"),
    (0, "it is a {genre} about {topic} , and"),
    (0, "the new {genre} is based on a true story ;"),
    (0, "the director has made a {genre} about {topic} ."),
    (0, "years after the first {genre} ,"),
    (0, "as far as i can tell ,"),
    (1, "against all expectations ,"),
    (1, "right from the first scene ,"),
    (1, "if you love a good {genre} ,"),
    (-1, "despite the big budget ,"),
    (-1, "after all the hype ,"),
    (-1, "sadly for {company} ,"),
)

# What may be judged, by kind; {kind: nouns}.
ASPECTS = {
    "people": _list("cast|lead actor|lead actress|supporting cast|villain|young star|narrator"),
    "writing": _list("script|plot|dialogue|story|humor|ending|first half|second half"),
    "craft": _list("music|camera work|editing|photography|score|set design|lighting|pacing"),
}

# {kind: {degree: adjectives}}; those of "any" go with every kind.
ADJECTIVES = {
    "any": {
        2: _list("wonderful|superb|brilliant|magnificent|unforgettable|outstanding"),
        1: _list("good|fine|solid|charming|engaging|fresh|impressive"),
        0: _list("familiar|unusual|modest|old-fashioned|strange"),
        -1: _list("dull|weak|bland|tired|uneven|forced|disappointing"),
        -2: _list("awful|terrible|dreadful|horrible|unbearable|atrocious"),
    },
    "people": {
        2: _list("magnetic|extraordinary"),
        1: _list("likable|believable|warm|funny"),
        0: _list("quiet|restless|serious"),
        -1: _list("wooden|stiff|miscast|irritating"),
        -2: _list("hopeless|lifeless"),
    },
    "writing": {
        2: _list("ingenious|masterful|profound"),
        1: _list("clever|witty|touching|sharp|honest"),
        0: _list("simple|complicated|talky"),
        -1: _list("predictable|thin|clumsy|shallow|confusing|stale"),
        -2: _list("idiotic|insulting|ludicrous"),
    },
    "craft": {
        2: _list("gorgeous|breathtaking|dazzling"),
        1: _list("elegant|crisp|lovely|inventive"),
        0: _list("loud|restrained|dark"),
        -1: _list("sloppy|choppy|murky|distracting"),
        -2: _list("hideous|amateurish"),
    },
}

ADVERBS = _list("really|truly|mostly|often|quite|simply|rather|always")
NEGATIONS = ("never", "hardly", "far from", "not at all", "anything but")

# {kind: {degree: what an aspect does}}.
DEEDS = {
    "people": {
        2: _list("carries every scene|steals the show|lights up the screen"),
        1: _list("gives the role real depth|finds the right tone|has great timing"),
        0: _list("plays against type|says very little|wears a mask"),
        -1: _list("shouts every line|looks lost|seems to be somewhere else"),
        -2: _list("sleepwalks through the role|ruins every scene"),
    },
    "writing": {
        2: _list("stays with you for days|builds to a perfect finish"),
        1: _list("keeps you guessing|earns its tears|never loses its way|trusts the audience"),
        0: _list("takes its time|jumps back and forth|leaves much open"),
        -1: _list("goes nowhere|drags on and on|repeats itself|runs out of ideas"),
        -2: _list("makes no sense at all|collapses into nonsense"),
    },
    "craft": {
        2: _list("is a joy to behold|turns every shot into art"),
        1: _list("sets the right mood|pulls you in|gives each scene a glow"),
        0: _list("stays in the background|recalls the seventies|calls for attention"),
        -1: _list("gets in the way|looks cheap|wears you down"),
        -2: _list("gave me a headache|is a mess from start to finish"),
    },
}

# {degree: what the viewer says}.
VIEWER = {
    2: _list("i loved every minute|i was moved to tears|it is one of the best of the year"),
    1: _list("i laughed a lot|i cared about these people|time flew by|it works"),
    0: _list("i had read the book|it runs for two hours|there is a dog in it"),
    -1: _list("i checked my watch twice|i lost interest|i expected more|it falls flat"),
    -2: _list("i wanted my money back|i nearly walked out|it is one of the worst of the year"),
}

VERDICTS = {
    2: _list("a masterpiece|highly recommended|do not miss it"),
    1: _list("worth a look|recommended|see it"),
    -1: _list("skip it|not worth the ticket|wait for something better"),
    -2: _list("a complete waste of time|avoid it at all costs|a disaster"),
}


def _pick(rng: random.Random, options: Collection[T]) -> T:
    # Only random() is promised to give the same numbers in every version of Python.
    return list(options)[int(rng.random() * len(options))]


def _degree(rng: random.Random, taste: float) -> int:
    """Draws -2 to 2; taste is the log odds of praise, shared by the clauses of a review."""
    if rng.random() < 0.12:
        return 0
    sign = 1 if rng.random() < 1 / (1 + math.exp(-taste)) else -1
    return sign * (2 if rng.random() < 0.3 else 1)


def _adjective(rng: random.Random, kind: str, degree: int) -> str:
    return _pick(rng, ADJECTIVES["any"][degree] + ADJECTIVES[kind][degree])


def _clause(rng: random.Random, degree: int, unused: list[str]) -> str:
    """Writes a clause that praises or blames to the degree; takes its subject out of `unused`."""
    form = rng.random()
    if form < 0.2 and "i" in unused:
        unused.remove("i")
        return _pick(rng, VIEWER[degree])
    aspect = _pick(rng, [subject for subject in unused if subject != "i"])
    unused.remove(aspect)
    kind = next(kind for kind, nouns in ASPECTS.items() if aspect in nouns)
    if form < 0.45:
        return f"the {aspect} {_pick(rng, DEEDS[kind][degree])}"
    if form < 0.57 and abs(degree) == 1:
        return f"the {aspect} is {_pick(rng, NEGATIONS)} {_adjective(rng, kind, -degree)}"
    adverb = f"{_pick(rng, ADVERBS)} " if rng.random() < 0.3 else ""
    return f"the {aspect} is {adverb}{_adjective(rng, kind, degree)}"


def _join(rng: random.Random, clauses: list[str], degrees: list[int]) -> str:
    """Joins clauses by "and" or "but" as their degrees agree or not, or by a full stop."""
    text = clauses[0]
    for index in range(1, len(clauses)):
        agree = degrees[index - 1] * degrees[index]
        if rng.random() < 0.25:
            joint = " ."
        elif agree < 0:
            joint = _pick(rng, (" , but", " , but", " , yet", " , even though"))
        else:
            joint = _pick(rng, (" , and", " , and", " , while", " and"))
        text += f"{joint} {clauses[index]}"
    return text


def _review(rng: random.Random, genres: Sequence[str]) -> tuple[str, int]:
    """Writes one review of any length; returns it with the sum of its degrees."""
    lean, opening = 0, ""
    if rng.random() < 0.75:
        lean, template = _pick(rng, OPENINGS)
        opening = template.format(
            place=_pick(rng, PLACES),
            genre=_pick(rng, genres),
            topic=_pick(rng, TOPICS),
            company=_pick(rng, COMPANY),
            time=_pick(rng, TIMES),
        )
        opening += " "
    taste = 0.6 * lean + 3.0 * (rng.random() - 0.5)
    degrees = [_degree(rng, taste) for _ in range(2 + int(rng.random() * 3))]
    unused = ["i"] + [aspect for nouns in ASPECTS.values() for aspect in nouns]
    clauses = [_clause(rng, degree, unused) for degree in degrees]
    text = opening + _join(rng, clauses, degrees) + " ."
    total = sum(degrees)
    if rng.random() < 0.3:
        verdict = _degree(rng, float(total))
        if verdict:
            text += f" {_pick(rng, VERDICTS[verdict])} ."
            total += verdict
    return text, total


def _names_one(text: str, genres: Collection[str]) -> bool:
    return any(f" {genre} " in text for genre in genres)  # no review begins or ends with one


def examples(
    seed: int,
    count: int,
    exclude: Collection[str] = (),
    genres: Sequence[str] = SEEN_GENRES,
    must_name_genre: bool = False,
) -> list[Example]:
    """Samples labelled reviews, all different.

    The label is 1 with probability 1 / (1 + exp(-2 s)), where s is the sum of the degrees of the
    clauses and the verdict.

    Args:
      seed: seed of the reviews; the first k do not depend on count.
      count: number of reviews.
      exclude: texts to leave out.
      genres: the film genres to name; their order matters.
      must_name_genre: keep only reviews that name one of the genres; else about a third do.

    Returns:
      Lower-case reviews of 8 to 28 words, punctuation separated by spaces.
    """
    rng = random.Random(f"reviews {seed}")  # a string is hashed by SHA-512, the same everywhere
    seen = set(exclude)
    written: list[Example] = []
    while len(written) < count:
        text, total = _review(rng, genres)
        label = int(rng.random() < 1 / (1 + math.exp(-2.0 * total)))
        words = sum(word[0].isalpha() for word in text.split())
        if must_name_genre and not _names_one(text, genres):
            continue
        if MIN_WORDS <= words <= MAX_WORDS and text not in seen:
            seen.add(text)
            written.append(Example(text, label))
    return written


def load(
    data_dir: str | os.PathLike[str], seed: int, train: int, test: int, ood: int
) -> tuple[list[Example], list[Example], list[Example]]:
    """Loads the three splits of the corpus, prepared with TFDS unless they are on disk.

    Args:
      data_dir: the directory of the prepared files.
      seed: seed of the reviews.
      train: number of training reviews.
      test: number of test reviews.
      ood: number of out-of-distribution reviews: each of them, and none of the others, names one of
        HELD_OUT_GENRES.

    Returns:
      (train examples, test examples, ood examples); no text is in two splits.

    Raises:
      InputError: as `reviews_builder.load`.
    """
    from vbon_jax.data.sources import reviews_builder  # imports tensorflow_datasets, which is slow

    return reviews_builder.load(data_dir, seed, train, test, ood)
