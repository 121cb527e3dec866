"""A file of the public TL;DR layout with posts made up here."""

import json
import os
import random

RELATIONSHIPS = ("relationships", "relationship_advice")
SUBREDDITS = (
    *RELATIONSHIPS, "AskReddit", "tifu", "legaladvice", "personalfinance", "jobs", "college",
    "dogs", "loseit", "travel", "Parenting",
)  # fmt: skip

WHO = ("my girlfriend", "my brother", "a coworker", "my landlord", "an old friend", "my boss")
WHAT = (
    "forgot the plans we made in spring", "sold the bike I had lent out",
    "wants to move to another city", "has not answered for two weeks",
    "keeps borrowing money", "told everyone about my new job",
)  # fmt: skip
SINCE = ("Last night", "For a month now", "Since the holidays", "Two days ago", "Again")
FEEL = (
    "I am not angry, only tired of it.",
    "Everyone says I should let it go, but it's hard.",
    "We talked for an hour and nothing changed.",
    "I wrote a long message and deleted it; maybe that was a mistake.",
    "It's the third time (I counted).",
)
ASK = ("How would you bring it up?", "Am I wrong here?", "What should I do?", "Any ideas?")


def record(index: int, rng: random.Random) -> dict[str, str]:
    """One post. Every other one is of RELATIONSHIPS; lengths are 1 to 6 paragraphs."""
    of = RELATIONSHIPS if index % 2 == 0 else SUBREDDITS[len(RELATIONSHIPS) :]
    who, what = rng.choice(WHO), rng.choice(WHAT)
    paragraphs = [f"{rng.choice(SINCE)} {who} did something: {who} {what}."]
    for _ in range(rng.randrange(6)):
        paragraphs.append(" ".join(rng.sample(FEEL, rng.randint(1, 3))))
    return {
        "id": f"t3_{index:05x}",
        "subreddit": of[rng.randrange(len(of))],
        "title": f"{who.capitalize()} {what}. {rng.choice(ASK)}",
        "post": "\n\n".join([*paragraphs, rng.choice(ASK)]),
        "summary": f"{who} {what}, {rng.choice(ASK).lower()}",
    }


def write(path: str | os.PathLike[str], count: int, seed: int) -> list[dict[str, str]]:
    """Writes `count` posts, all different ids, one JSON object a line; returns them."""
    rng = random.Random(seed)
    records = [record(index, rng) for index in range(count)]
    with open(path, "w") as file:
        file.writelines(json.dumps(made) + "\n" for made in records)
    return records
