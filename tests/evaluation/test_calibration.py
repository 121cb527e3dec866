import numpy as np
import pytest

from vbon_jax.errors import InputError
from vbon_jax.evaluation.calibration import Calibration, calibration, pits


def prompts(rng, count, m, slope=0.0):
    """PITs of density 1 + slope (2u - 1), whose CDF is u + slope (u^2 - u)."""
    v = rng.random((count, m))
    if not slope:
        return list(v)
    b = 1 - slope
    return list((-b + np.sqrt(b**2 + 4 * slope * v)) / (2 * slope))


@pytest.mark.parametrize("m", [2, 8, 64])
def test_a_head_that_is_right_is_believed(m):
    found = calibration(prompts(np.random.default_rng(0), 2_000, m))
    assert found.holds and found.error < 0.03
    assert found.prompt_ks == pytest.approx(found.expected_ks, rel=0.03)
    assert found.rejected == pytest.approx(0.05, abs=0.02)
    np.testing.assert_allclose(found.histogram, 0.1, atol=0.02)
    found.refuse()


@pytest.mark.parametrize("m", [2, 8, 64])
def test_the_error_is_right_for_any_number_of_samples(m):
    """Half of the prompts lean up and half down: together they are uniform."""
    rng, slope = np.random.default_rng(1), 0.8
    found = calibration(prompts(rng, 10_000, m, slope) + prompts(rng, 10_000, m, -slope))
    assert found.error == pytest.approx(slope / np.sqrt(30), rel=0.06)  # of u^2 - u
    assert found.pooled_ks < 0.02
    assert found.prompt_ks > found.expected_ks


def test_a_head_that_knows_nothing_of_a_prompt_is_refused_though_all_together_fit():
    rng = np.random.default_rng(2)
    centre = rng.random((400, 1))
    of = list(np.clip(centre + 0.05 * rng.normal(size=(400, 8)), 0, 1))
    found = calibration(of)
    assert found.pooled_ks <= found.pooled_limit and found.error > 0.2 and found.rejected > 0.8
    with pytest.raises(InputError, match=r"the head does not know the rewards.*at most 0\.1.*set"):
        found.refuse()


def test_a_head_that_leans_everywhere_is_refused():
    found = calibration(prompts(np.random.default_rng(3), 400, 8, 0.4))
    assert found.error < 0.1 and found.pooled_ks > found.pooled_limit
    assert not found.holds


def test_a_golden_error():
    """Two samples at 1/4 and 3/4: 1/48 + 0 less (2 * (1/4 + 9/4) / 8 ... ) by hand."""
    found = calibration([np.array([0.25, 0.75])] * 3)
    # integral of (G_2 - u)^2 = 1/48; of G_2 (1 - G_2) = (1 * 1/4 + 3 * 3/4) / 4 - 1/2 = 1/8
    assert found.error == 0.0  # 1/48 - 1/8 is below 0: more even than chance
    assert found.prompt_ks == 0.25
    steep = calibration([np.array([0.0, 0.0])] * 3)
    assert steep.error == pytest.approx(np.sqrt(1 / 3))  # F0 below all there is


def test_ties_are_broken_at_random_and_figures_travel():
    found = pits(np.array([0.2, 0.9]), np.array([0.5, 0.2]), np.array([0.5, 0.9]))
    np.testing.assert_allclose(found, [0.45, 1.0])
    one = calibration(prompts(np.random.default_rng(4), 50, 4))
    assert Calibration.of_json(one.as_json() | {"concentration": 3.0}) == one
    with pytest.raises(InputError, match="no prompt has 2 samples"):
        calibration([np.array([0.5])])
