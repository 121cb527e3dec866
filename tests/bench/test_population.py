"""A population measured at a small size: it trains what single runs train."""

import io

import pytest
from rich.console import Console

from vbon_jax.bench import population


def test_a_population_does_what_its_single_runs_do():
    times = population.population_times(
        members=2, iterations=2, batch_size=16, layers=1, width=16, vocabulary=64, new_tokens=6
    )
    assert times["difference"] < 1e-4
    assert times["ratio"] == pytest.approx(times["singles_s"] / times["population_s"])
    assert all(times[f"{of}_compile_s"] > times[f"{of}_s"] for of in ("singles", "population"))
    out = io.StringIO()
    Console(file=out, width=100).print(population.table(times, members=2))
    assert all(name in out.getvalue() for name in times)


def test_the_table_shows_every_figure():
    out = io.StringIO()
    shown = population.table({"ratio": 1.234, "population_compile_s": 20.0}, members=3)
    Console(file=out, width=100).print(shown)
    for words in ("3 policies against 3 single runs", "1.23", "population_compile_s", "20"):
        assert words in out.getvalue()
