"""What rewards count on the way: under the names of the metrics, and in words."""

from vbon_jax.sampling import responses


class Counting:
    def __init__(self, counts):
        self.counts = counts

    def take_counts(self):
        counts, self.counts = self.counts, {}
        return counts


def counts():
    return {
        "responses": 40.0, "reward_truncated": 0.125, "reward_truncated/reward": 0.5,
        "missing_eos": 0.25, "reward/reward": 1.5,
    }  # fmt: skip


def test_counts_are_named_after_the_role_and_gone_once_taken():
    reward = Counting(counts())
    assert responses.counts_of(reward) == {k: v for k, v in counts().items() if k != "responses"}
    assert responses.counts_of(reward) == {}
    assert responses.counts_of(Counting(counts()), "evaluator") == {
        "evaluator_truncated": 0.125, "evaluator_truncated/reward": 0.5,
        "evaluator_missing_eos": 0.25, "evaluator/reward": 1.5,
    }  # fmt: skip
    assert responses.counts_of(lambda *rows: None) == responses.counts_of(None) == {}


def test_shares_and_means_in_words():
    assert responses.counts_line(responses.counts_of(Counting(counts()))) == (
        "reward_truncated 12.5%, reward_truncated/reward 50.0%, missing_eos 25.0%, "
        "reward/reward 1.500"
    )
