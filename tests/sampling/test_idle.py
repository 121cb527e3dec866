"""The gaps between draws, by a clock that is made up."""

import itertools

import pytest

from vbon_jax.sampling import idle


def test_gaps_are_counted_and_overlap_is_not(monkeypatch):
    """Draws 0 to 4, 5 to 9 dispatched at 5, 10 to 12 dispatched at 7: idle from 4 to 5 only."""
    ready = iter([4.0, 9.0, 12.0])
    monkeypatch.setattr(idle, "_ready_at", lambda draw: next(ready))
    monkeypatch.setattr(idle.time, "monotonic", iter([0.0, 5.0, 7.0]).__next__)
    watch = idle.Idle()
    for draw in range(3):
        watch.dispatched(draw)
    assert watch.draws == 3
    assert watch.share() == pytest.approx(1.0 / 12.0)


def test_a_draw_is_ready_when_its_arrays_are(monkeypatch):
    waited = []
    monkeypatch.setattr(idle.jax, "block_until_ready", waited.append)
    monkeypatch.setattr(idle.time, "monotonic", itertools.count().__next__)
    watch = idle.Idle()
    watch.dispatched("a draw")
    assert watch.share() == 0.0 and waited == ["a draw"]


def test_without_a_draw_nothing_was_idle():
    assert idle.Idle().share() == 0.0
