"""Sums of rewards by hand, on the device and on the host; the penalty; what is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.rewards import combined
from vbon_jax.rewards.combined import WeightedReward

EOS = 9
# Row 0 ends; row 1 was cut; row 2 holds an EOS id only where nothing is real; row 3 ends at once.
TOKENS = np.array([[1, 2, EOS, 0], [1, 2, 3, 4], [1, 2, EOS, EOS], [EOS, 0, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
ENDED = [True, False, False, True]
PROMPTS = [Prompt(i, f"p{i}", (1,)) for i in range(4)]
A = np.float32([0.1, 0.2, 0.3, 0.7])
B = np.float32([5.0, -1.0, 2.0, 1e-3])


def on_device(values):
    return lambda prompts, *rows: jnp.asarray(values)


def on_host(values):
    """As a FunctionReward: only the real rows."""
    return lambda prompts, *rows: np.asarray(values)[: len(prompts)]


def score(reward, count=4):
    return reward(PROMPTS[:count], None, None, jnp.asarray(TOKENS), jnp.asarray(MASK))


def one(make=on_device, missing_eos="none", value=0.0, end_ids=(EOS,), weight=1.0):
    return WeightedReward([("main", weight, make(A))], missing_eos, value, end_ids)


@pytest.mark.parametrize("end_ids", [(EOS,), ()])
@pytest.mark.parametrize("make", [on_device, on_host])
def test_one_part_alone_is_itself(make, end_ids):
    given = make(A)(PROMPTS)
    reward = WeightedReward([("main", 1.0, lambda *_: given)], "none", 5.0, end_ids)
    assert score(reward) is given
    assert reward.take_counts() == {}


def test_nothing_is_fetched_where_there_is_nothing_to_count(monkeypatch):
    reward = one()
    monkeypatch.setattr(jax, "device_get", lambda x: pytest.fail("a sync") if x else x)
    score(reward)
    assert reward.take_counts() == {}


@pytest.mark.parametrize("make", [on_device, on_host])
@pytest.mark.parametrize(
    ("missing_eos", "value", "want"),
    [("replace", -3.5, [0.1, -3.5, -3.5, 0.7]), ("subtract", 1.5, [0.1, -1.3, -1.2, 0.7])],
)
def test_a_response_without_an_end_pays(make, missing_eos, value, want):
    reward = one(make, missing_eos, value)
    got = score(reward)
    assert got.dtype == np.float32 and isinstance(got, jax.Array) == (make is on_device)
    np.testing.assert_allclose(got, np.float32(want), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(got)[ENDED], A[ENDED])  # to the bit
    assert reward.take_counts() == {"responses": 4, "missing_eos": 0.5}
    assert reward.take_counts() == {}
    # Where responses have a fixed length none can lack its end.
    np.testing.assert_array_equal(score(one(make, missing_eos, value, end_ids=())), A)


@pytest.mark.parametrize(
    ("first", "second"), [(on_device, on_device), (on_host, on_host), (on_device, on_host)]
)
def test_a_weighted_sum(first, second):
    reward = WeightedReward(
        [("main", 2.0, first(A)), ("length", -0.5, second(B))], "none", 0, (EOS,)
    )
    got = score(reward)
    assert got.dtype == np.float32
    assert isinstance(got, jax.Array) == (first is second is on_device)
    np.testing.assert_array_equal(got, np.float32(2) * A + np.float32(-0.5) * B)
    counts = reward.take_counts()
    assert counts.keys() == {"responses", "reward/main", "reward/length"}
    assert counts["reward/main"] == pytest.approx(1.3 / 4)
    assert counts["reward/length"] == pytest.approx(6.001 / 4)


def test_the_penalty_is_on_the_sum():
    parts = [("main", 1.0, on_device(A)), ("other", 1.0, on_host(B))]
    np.testing.assert_array_equal(
        score(WeightedReward(parts, "replace", -1.0, (EOS,))), [A[0] + B[0], -1, -1, A[3] + B[3]]
    )
    np.testing.assert_array_equal(score(one(weight=3.0)), np.float32(3) * A)


@pytest.mark.parametrize("second", [on_device, on_host])
def test_rows_that_only_fill_the_batch_are_not_counted(second):
    parts = [("main", 1.0, on_device(A)), ("other", 1.0, second(B))]
    reward = WeightedReward(parts, "subtract", 1.0, (EOS,))
    np.testing.assert_allclose(np.asarray(score(reward, 3))[:3], [5.1, -1.8, 1.3], rtol=1e-6)
    score(reward, 1)
    counts = reward.take_counts()
    assert counts["responses"] == 4 and counts["missing_eos"] == 0.5
    assert counts["reward/main"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.1) / 4)


def test_counts_that_nobody_takes_do_not_pile_up():
    reward = one(missing_eos="subtract", value=1.0)
    for _ in range(combined.FOLD + 3):
        score(reward, 3)
    assert len(reward._calls) == 3
    counts = reward.take_counts()
    assert counts == {
        "responses": 3 * (combined.FOLD + 3), "missing_eos": pytest.approx(2 / 3)
    }  # fmt: skip


class Cutter:
    """A reward that cuts texts and reads so many positions."""

    def __init__(self, share, positions):
        self.share, self.positions = share, positions

    def __call__(self, prompts, *rows):
        return np.zeros(len(prompts), np.float32)

    def take_counts(self):
        return {"responses": 4.0, "reward_truncated": self.share}


def test_what_was_cut_is_passed_on():
    alone = WeightedReward([("main", 1.0, Cutter(0.25, 7))], "none", 0, (EOS,))
    score(alone)
    assert alone.take_counts() == {"responses": 4, "reward_truncated": 0.25}
    both = WeightedReward(
        [("main", 1.0, Cutter(0.25, 7)), ("other", 1.0, Cutter(0.5, None)), ("f", 1, on_host(A))],
        "none", 0, (EOS,),
    )  # fmt: skip
    score(both)
    counts = both.take_counts()
    assert counts["reward_truncated/main"] == 0.25 and counts["reward_truncated/other"] == 0.5
    assert both.positions == alone.positions == 7 and one().positions is None


@pytest.mark.parametrize(
    ("parts", "missing_eos", "value", "message"),
    [
        ([], "none", 0, "reward has no part"),
        ([("a", 1, 0), ("a", 1, 0)], "none", 0, "reward.others: the names a, a must differ"),
        ([("a", float("nan"), 0)], "none", 0, "reward.weight=nan: give a finite number"),
        ([("a", 1, 0), ("b", float("inf"), 0)], "none", 0, "reward.others.b.weight=inf"),
        ([("a", 1, 0)], "drop", 0, "reward.missing_eos='drop': choose one of none, replace"),
        ([("a", 1, 0)], "replace", float("nan"), "reward.missing_eos_value=nan: give a finite"),
        ([("a", 1, 0)], "subtract", -1.0, "reward.missing_eos_value=-1.0: it is taken away"),
    ],
)
def test_bad_settings_are_named(parts, missing_eos, value, message):
    with pytest.raises(InputError, match=message):
        WeightedReward(parts, missing_eos, value, (EOS,))
    with pytest.raises(InputError, match=message.replace("reward", "evaluator")):
        WeightedReward(parts, missing_eos, value, (EOS,), "evaluator")


class Both:
    """A reward, and what it gives for prefixes at once."""

    def __init__(self, prefixes):
        self.prefixes = prefixes

    def __call__(self, prompts, *rows):
        return jnp.asarray(A)

    def of_prefixes(self, prompts, *rows):
        assert len(rows) == 4
        return self.prefixes

    def of_candidates(self, prompts, *rows):
        assert len(rows) == 5
        return None if self.prefixes is None else self.prefixes[..., None] + np.arange(2)


def test_prefixes_are_summed_where_every_part_knows_them_at_once():
    rows = (None, None, jnp.asarray(TOKENS), jnp.asarray(MASK))
    ids = jnp.asarray(TOKENS)[..., None]
    first, second = np.arange(16.0).reshape(4, 4), np.ones((4, 4))
    parts = [("a", 2.0, Both(jnp.asarray(first))), ("b", -1.0, Both(jnp.asarray(second)))]
    both = WeightedReward(parts, "none", 0.0, (EOS,))
    np.testing.assert_allclose(both.of_prefixes(PROMPTS, *rows), 2 * first - 1)
    found = both.of_candidates(PROMPTS, *rows, ids)
    np.testing.assert_allclose(found, (2 * first - 1)[..., None] + np.arange(2))
    for other in (on_device(A), Both(None)):
        some = WeightedReward([parts[0], ("b", 1.0, other)], "none", 0.0, (EOS,))
        assert some.of_prefixes(PROMPTS, *rows) is None
        assert some.of_candidates(PROMPTS, *rows, ids) is None
    # A prefix has no EOS: where that is penalised, each is scored as any response.
    penalised = WeightedReward(parts, "replace", -1.0, (EOS,))
    assert penalised.of_prefixes(PROMPTS, *rows) is None
    assert penalised.of_candidates(PROMPTS, *rows, ids) is None
