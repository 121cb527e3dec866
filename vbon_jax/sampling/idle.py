"""How long a device waits for the host between the draws it is given."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


class Idle:
    """A clock of the gaps between draws: from when one is ready to when the next is dispatched.

    Other programs that run in a gap, such as a reward's, count as idle too.
    """

    def __init__(self) -> None:
        self._watcher = ThreadPoolExecutor(1, "vbon-idle")  # one draw is waited for at a time
        self._dispatched: list[float] = []
        self._ready: list[Any] = []

    def dispatched(self, draw: Any) -> None:
        """A draw was dispatched just now, whose arrays are given."""
        self._dispatched.append(time.monotonic())
        self._ready.append(self._watcher.submit(_ready_at, draw))

    def share(self) -> float:
        """Waits for the last draw; the share of the time since the first dispatch that was idle."""
        self._watcher.shutdown()
        ready = [future.result() for future in self._ready]
        whole = ready[-1] - self._dispatched[0] if ready else 0.0
        gaps = (max(d - r, 0.0) for d, r in zip(self._dispatched[1:], ready))
        return sum(gaps) / whole if whole > 0 else 0.0

    @property
    def draws(self) -> int:
        """How many were dispatched."""
        return len(self._dispatched)


def _ready_at(draw: Any) -> float:
    jax.block_until_ready(draw)
    return time.monotonic()
