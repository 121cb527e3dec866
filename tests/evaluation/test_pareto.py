import numpy as np
import pytest

from vbon_jax.evaluation import pareto


def slow_front(x, y) -> np.ndarray:
    """The definition, point by point."""
    return np.array(
        [
            not any(
                (x[j] <= x[i] and y[j] >= y[i]) and (x[j] < x[i] or y[j] > y[i])
                for j in range(len(x))
            )
            for i in range(len(x))
        ],
        dtype=bool,
    )


def test_a_front_by_hand():
    x = [0.0, 1.0, 1.0, 2.0, 3.0, 3.0]
    y = [0.5, 0.8, 0.7, 0.8, 0.9, 0.9]
    # (1, .7) and (2, .8) are beaten by (1, .8); the two at (3, .9) are equal and both stay.
    assert pareto.front(x, y).tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize("levels", [4, 12, 0])
def test_the_front_is_its_definition_on_random_points(levels):
    random = np.random.default_rng(levels)
    for _ in range(40):
        size = int(random.integers(1, 40))
        if levels:  # few levels make many ties
            x, y = random.integers(0, levels, (2, size))
        else:
            x, y = random.normal(size=(2, size))
        np.testing.assert_array_equal(pareto.front(x, y), slow_front(x, y))


def test_the_front_does_not_depend_on_order_and_is_invariant_to_increasing_transforms():
    random = np.random.default_rng(1)
    x, y = random.normal(size=(2, 200))
    order = random.permutation(200)
    np.testing.assert_array_equal(pareto.front(x[order], y[order]), pareto.front(x, y)[order])
    np.testing.assert_array_equal(pareto.front(np.exp(x), y**3), pareto.front(x, y))


def test_limits_of_the_front():
    assert pareto.front([], []).shape == (0,)
    assert pareto.front([1.0], [-np.inf]).tolist() == [True]
    assert pareto.front([0.0, 1.0], [-np.inf, -np.inf]).tolist() == [True, False]
    with pytest.raises(ValueError, match="NaN"):
        pareto.front([0.0, np.nan], [1.0, 1.0])
    with pytest.raises(ValueError, match="same length"):
        pareto.front([0.0, 1.0], [1.0])


def test_a_large_front_takes_no_time_squared():
    x = np.random.default_rng(2).normal(size=200_000)
    on_front = pareto.front(x, x)  # every point is on it
    assert on_front.all()


def test_shares_by_hand():
    methods = ["ppo", "vbon", "ppo", "vbon", "dpo"]
    got = pareto.shares(methods, [True, True, False, True, False])
    assert got == {"ppo": pytest.approx(1 / 3), "vbon": pytest.approx(2 / 3), "dpo": 0.0}
    assert list(got) == ["ppo", "vbon", "dpo"]
    assert pareto.shares([], np.zeros(0, bool)) == {}
    with pytest.raises(ValueError, match="one a point"):
        pareto.shares(["ppo"], [True, False])


def test_shortfall_is_measured_at_the_points_own_x():
    got = pareto.shortfall([0.5, 1.0, 1.5, 3.0, -1.0], [1.0, 1.0, 5.0, 0.0, 0.0],
                           [2.0, 0.0, 1.0], [4.0, 0.0, 3.0])  # fmt: skip
    # Through (0, 0), (1, 3), (2, 4): 1.5 - 1, 3 - 1, 3.5 - 5, and off the curve at 3 and -1.
    np.testing.assert_allclose(got, [0.5, 2.0, -1.5, np.nan, np.nan])
    with pytest.raises(ValueError, match="no point"):
        pareto.shortfall([0.0], [0.0], [], [])
