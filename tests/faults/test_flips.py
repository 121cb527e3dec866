"""A few flips in each kind of file; `python -m tests.faults.flips` does more of them."""

import collections
import random

import pytest

from tests.faults import flips, run


@pytest.mark.parametrize("kind", flips.KINDS, ids=lambda kind: kind.name)
def test_a_flip_is_seen_or_harmless(starts, tmp_path, kind):
    wanted = run.digest_of(starts["evaluate"])
    rng = random.Random(kind.name)
    count = 3 if kind.name == "checkpoint" else 1
    ended = [
        flips.outcome(kind, starts[kind.after], wanted, tmp_path / "w", rng) for _ in range(count)
    ]
    found = collections.Counter(word for word, _ in ended)
    assert set(found) <= {"refused", "recovered", "harmless"}, ended
