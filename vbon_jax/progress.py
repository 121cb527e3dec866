"""What long work shows: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG_SECONDS = 10.0  # between plain lines where there is no terminal
_silent = False  # in a process of a run that is not its first


def silence() -> None:
    """From now on this process shows no progress: the first of its run does."""
    global _silent
    _silent = True


def log(text: str) -> None:
    """A line to standard error."""
    if not _silent:
        print(text, file=sys.stderr, flush=True)


class Reporter:
    """Progress of one long piece of work: a bar on a terminal, a line now and then in a log."""

    def __init__(self, title: str, total: int, done: int, console: Console):
        self._title, self._total, self._done, self._console = title, total, done, console
        self._first, self._start, self._last = done, time.monotonic(), time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal and not console.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, note="", rate="")
            self._bar.start()

    def update(self, done: int, note: str = "") -> None:
        """``done`` of the total is done; ``note`` is shown beside it."""
        self._done = done
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._start, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note, rate=f"{rate:.1f}/s")
        elif now - self._last >= LOG_SECONDS or done == self._total:
            self._last = now
            left = (self._total - done) / rate if rate > 0 else float("nan")
            self._console.print(
                f"{self._title} {done}/{self._total}  {rate:.1f}/s  "
                f"{now - self._start:.0f} s, {left:.0f} s left  {note}",
                highlight=False,
                soft_wrap=True,
            )

    def say(self, text: str) -> None:
        """A line above the bar, or in the log."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def reporting(title: str, total: int, done: int = 0) -> Iterator[Reporter]:
    """A Reporter on standard error, closed on the way out."""
    reporter = Reporter(title, total, done, Console(file=sys.stderr, quiet=_silent))
    try:
        yield reporter
    finally:
        reporter.close()
