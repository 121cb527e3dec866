"""The n of a family that has a KL or a reward."""

import math

import pytest

from vbon_jax.bon import theory
from vbon_jax.errors import InputError
from vbon_jax.evaluation import budget


def test_the_crossing_of_a_curve_that_is_known():
    """KL of best-of-n itself, log n - (n-1)/n."""
    looks = []

    def kl(n):
        looks.append(n)
        return float(theory.kl_upper_bound(n))

    for n in (1.5, 8.0, 40.0):
        looks.clear()
        assert budget.crossing(kl, kl(n), 64.0, "kl") == pytest.approx(n, rel=1e-3)
        assert len(looks) < 14
    assert budget.crossing(kl, kl(64.0), 64.0, "kl") == pytest.approx(64.0, rel=1e-6)
    assert budget.crossing(kl, 0.0, 64.0, "kl") == pytest.approx(1.0, abs=1e-6)


def test_a_step_is_found_between_its_sides():
    found = budget.crossing(lambda n: 0.0 if n < 5 else 1.0, 0.5, 64.0, "reward")
    assert abs(math.log(found / 5)) < budget.CLOSE


@pytest.mark.parametrize("target", [-0.1, 3.5])
def test_what_no_n_has_is_refused(target):
    with pytest.raises(InputError, match=rf"--kl={target}: the family has 0 at n=1 and 3.17 at"):
        budget.crossing(lambda n: float(theory.kl_upper_bound(n)), target, 64.0, "kl")
