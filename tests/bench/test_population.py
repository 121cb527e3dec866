"""A population measured at a small size: it trains what single runs train."""

import pytest

from vbon_jax.bench import population


def test_a_population_does_what_its_single_runs_do():
    times = population.population_times(
        members=2, iterations=2, batch_size=16, layers=1, width=16, vocabulary=64, new_tokens=6
    )
    assert times["difference"] < 1e-4
    assert times["ratio"] == pytest.approx(times["singles_s"] / times["population_s"])
    assert all(times[f"{of}_compile_s"] > times[f"{of}_s"] for of in ("singles", "population"))
    found = {row.what: row for row in population.rows(times, members=2)}
    together = found["2 policies as one population"]
    assert together.value == times["population_s"] and together.against == "2 single runs"
    assert together.ratio == pytest.approx(times["population_s"] / times["singles_s"])
    assert found["compilation of a single run"].value == times["singles_compile_s"]
    assert found["compilation of the population"].value == times["population_compile_s"]
    assert found["largest difference of a log-prob"].value == times["difference"]
