"""Ceilings and times of a machine whose clock is made up."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from vbon_jax.bench import machine


def clock(monkeypatch, *seconds):
    """A clock under which calls take these seconds, one after another."""
    ticks = [0.0, *itertools.accumulate(itertools.chain(*((x, 0.0) for x in seconds)))]
    monkeypatch.setattr(machine.time, "perf_counter", iter(ticks).__next__)


def test_a_ceiling_is_the_best_of_five(monkeypatch):
    clock(monkeypatch, 4.0, 2.0, 3.0, 3.0, 3.0)
    assert machine.matrix_rate(size=8) == 2 * 8**3 / 2.0
    clock(monkeypatch, 4.0, 5.0, 3.0, 0.5, 3.0)
    assert machine.copy_rate(size=10) == 2 * 4 * 10 / 0.5


def test_cases_take_turns_and_the_median_counts(monkeypatch):
    called = []
    cases = {name: lambda n=name: called.append(n) or len(called) for name in ("a", "b")}
    clock(monkeypatch, 100.0, 100.0, 1.0, 10.0, 5.0, 20.0, 2.0, 70.0)
    found = machine.interleaved(cases, 3)
    assert called == ["a", "b"] * 4
    assert found == {"a": (2.0, 7), "b": (20.0, 8)}


@pytest.fixture
def no_cache():
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def test_compilation_is_counted(no_cache):
    watch = machine.CompileClock()
    program = jax.jit(lambda x: jnp.tanh(x) @ x + 7.25)
    program(jnp.ones((3, 3))).block_until_ready()
    first = watch.seconds
    assert 0 < first < 60
    program(jnp.ones((3, 3))).block_until_ready()
    assert watch.seconds == first


def test_the_description_names_devices_and_versions():
    found = machine.description()
    assert found["devices"] == [str(device) for device in jax.devices()]
    assert found["versions"]["jax"] == jax.__version__ and "vllm" not in found["versions"]
