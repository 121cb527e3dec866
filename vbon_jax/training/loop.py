"""The training loop of every method: iterate, write metrics, save."""

import dataclasses
import functools
import math
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vbon_jax import processes
from vbon_jax.bon.references import References
from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError, writing
from vbon_jax.progress import Reporter, log, reporting
from vbon_jax.rewards.base import Reward
from vbon_jax.sampling.requests import Request
from vbon_jax.sampling.sampler import Sampler
from vbon_jax.signals import Interrupted, Stopped, StopSignal
from vbon_jax.training.checkpoint import Checkpointer
from vbon_jax.training.metrics import MetricsWriter


@dataclasses.dataclass(frozen=True)
class Task:
    """What training reads and never changes.

    Attributes:
      prompts: P training prompts.
      references: their reference rewards; row i belongs to ``prompts[i]``.
      reward: scores responses.
      sampler: the reference model under the sampling settings of training.
    """

    prompts: Sequence[Prompt]
    references: References
    reward: Reward
    sampler: Sampler

    @property
    def reference(self) -> dict[str, Any]:
        """The reference's parameters, {"decoder": ...}."""
        return {"decoder": self.sampler.model.params}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long a loop runs, and when it saves.

    Attributes:
      title: of the progress line.
      iterations: passes of the loop.
      checkpoint_every: iterations between checkpoints.
      profile: iterations to trace, (first, last), counted from 1; None for none.
      whole: whether what was learned so far is no result: without a record, Ctrl-C is then an
        error.
    """

    title: str
    iterations: int
    checkpoint_every: int = 1
    profile: tuple[int, int] | None = None
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Record:
    """Where a loop leaves what it does; without one it leaves nothing.

    Attributes:
      checkpointer: saves the state.
      writer: writes the metrics of each iteration; None in a process that is not the first.
      metadata: JSON saved with every checkpoint.
      folder: where a profiler trace goes.
    """

    checkpointer: Checkpointer
    writer: MetricsWriter | None
    metadata: dict[str, Any]
    folder: Path = Path()


@dataclasses.dataclass(frozen=True)
class Place:
    """Folders of a loop that goes on after it was cut.

    Attributes:
      checkpoints: folder of its checkpoints.
      metrics: folder of ``metrics.jsonl`` and of what else tells of its course.
      keep: newest checkpoints that stay.
      metadata: JSON saved with every checkpoint.
      wandb: arguments of ``wandb.init``; None for no Weights & Biases.
    """

    checkpoints: Path
    metrics: Path
    keep: int
    metadata: dict[str, Any]
    wandb: dict[str, Any] | None = None


# (state, step) -> (state one step on, what to write, a few words for the progress line). "ended"
# among what to write, which then is not written, says that no further step is to be taken.
Step = Callable[[Any, int], tuple[Any, dict[str, Any], str]]


def run(state: Any, start: int, one: Step, schedule: Schedule, record: Record | None = None) -> Any:
    """The one loop of every method: from ``start`` to ``schedule.iterations``.

    Args:
      state: at ``start``; may be donated.
      start: iterations done already.
      one: does an iteration. What it writes are numbers, or lists of numbers where several policies
        are trained at once.
      schedule: how long.
      record: where metrics and checkpoints go; None keeps the state in memory alone.

    Returns:
      The final state, which is also the newest checkpoint.

    Raises:
      Stopped: after a signal, once the state is saved. (Ctrl-C without a ``record``, as in a
        notebook, returns the state so far instead.)
      InputError: a loss or gradient is not finite; names the step and the last good checkpoint. Of
        a population ("refused" is written) only where no member's step was accepted: one that
        diverges must not stop the others.
    """
    trace = _Trace(schedule.profile, Path() if record is None else record.folder)
    with (
        reporting(schedule.title, schedule.iterations, start) as report,
        StopSignal() as stop,
        ExitStack() as stack,
    ):
        stack.callback(trace.end)
        for step in range(start, schedule.iterations):
            trace.begin(step + 1)
            try:
                state, values, words = one(state, step)
            except Interrupted as error:  # inside a reward function that does not return
                stop.take()
                return _End(schedule, record, report, error.signum).inside(state, step, start)
            trace.end(step + 1)
            ended = bool(values.pop("ended", False))
            if record is not None and record.writer is not None:
                record.writer.write(step + 1, values)
            _refuse_not_finite(values, step + 1, record, restored=step == start > 0)
            report.update(step + 1, words)
            # What has ended is saved as the last iteration: a run that goes on finds it complete.
            done = schedule.iterations if ended else step + 1
            last = done == schedule.iterations
            signum = processes.signal(stop)
            due = last or done % schedule.checkpoint_every == 0 or signum is not None
            if record is not None and due:
                record.checkpointer.save(done, state, {**record.metadata, "step": done})
            if signum is not None:
                stop.take()
                return _End(schedule, record, report, signum).after(state, step + 1)
            if ended:
                break
        if record is not None:
            record.checkpointer.wait()
    return state


def resume(
    state: Any,
    one: Step,
    schedule: Schedule,
    place: Place,
    begin: Callable[[Any], Any] = lambda state: state,
) -> Any:
    """`run` from the newest whole checkpoint in ``place``, or from the first state.

    Args:
      state: the first one; its layout is that of the checkpoints. Used up, not to be held twice.
      one: as for `run`.
      schedule: likewise.
      place: where checkpoints and metrics lie.
      begin: what ``state`` becomes where there is no checkpoint; of the same layout.

    Returns:
      The final state.

    Raises:
      Stopped: as `run`.
      InputError: as `run`; or a checkpoint is of another shape.
    """
    checkpointer = Checkpointer(place.checkpoints, place.keep)
    try:
        restored = checkpointer.restore(state)
        start = checkpointer.latest_step or 0  # now that what is damaged is set aside
        if restored is None:
            state = begin(state)
        else:
            for x in jax.tree.leaves(state):
                if isinstance(x, jax.Array):
                    x.delete()
            state = restored[0]
            if start < schedule.iterations:
                log(f"{schedule.title}: going on after iteration {start} of {schedule.iterations}")
        writer = None
        if processes.first():
            with writing(place.metrics):
                place.metrics.mkdir(parents=True, exist_ok=True)
            writer = MetricsWriter(place.metrics, start, place.wandb)
        try:
            record = Record(checkpointer, writer, place.metadata, place.metrics)
            return run(state, start, one, schedule, record)
        finally:
            if writer is not None:
                writer.close()
    finally:
        checkpointer.close()


class _Trace:
    """A JAX profiler trace of some iterations, written below ``folder``."""

    def __init__(self, profile: tuple[int, int] | None, folder: Path):
        self._profile, self._folder, self._active = profile, folder / "profile", False

    def begin(self, iteration: int) -> None:
        """Starts the trace when ``iteration`` is the first of those asked for that is done here."""
        if self._profile is None or self._active:
            return
        first, last = self._profile
        if first <= iteration <= last:
            jax.profiler.start_trace(str(self._folder))
            self._active = True

    def end(self, iteration: int | None = None) -> None:
        """Stops it after the last; after whichever is done where ``iteration`` is None."""
        if not self._active or self._profile is None:
            return
        if iteration is None or iteration >= self._profile[1]:
            jax.profiler.stop_trace()
            self._active, self._profile = False, None
            log(f"profile: the trace is in {self._folder}; tensorboard or xprof shows it")


@dataclasses.dataclass(frozen=True)
class _End:
    """How a loop that a signal came to ends.

    Attributes:
      schedule: of the loop.
      record: where it leaves its state.
      report: its progress line.
      signum: the signal.
    """

    schedule: Schedule
    record: Record | None
    report: Reporter
    signum: int

    def after(self, state: Any, step: int) -> Any:
        """Ends after ``step``, whose state is saved: raises Stopped, or returns the state."""
        total = self.schedule.iterations
        if self.record is None and self.signum == signal.SIGINT and not self.schedule.whole:
            self.report.say(
                f"{self.schedule.title}: stopped after iteration {step} of {total}; the result is "
                "what was learned so far"
            )
            return state
        if self.record is None:
            raise Stopped(self.signum, f"iteration {step} of {total} was the last")
        self.record.checkpointer.wait()
        raise Stopped(
            self.signum,
            f"the state after iteration {step} of {total} is saved in "
            f"{self.record.checkpointer.directory}; the same command goes on from it",
        )

    def inside(self, state: Any, step: int, start: int) -> Any:
        """Ends inside iteration ``step`` + 1, of which nothing is kept."""
        if any(x.is_deleted() for x in jax.tree.leaves(state) if isinstance(x, jax.Array)):
            where = "there is no checkpoint yet"  # it was donated to the step that was cut
            if self.record is not None and (good := self.record.checkpointer.latest_step):
                where = f"checkpoint {good} is the last; the same command goes on from it"
            raise Stopped(self.signum, f"inside iteration {step + 1}: {where}")
        if step == 0 and self.record is not None:
            raise Stopped(self.signum, "inside iteration 1: nothing was learned yet")
        if self.record is not None and step > start:
            metadata = {**self.record.metadata, "step": step}
            self.record.checkpointer.save(step, state, metadata)
        return self.after(state, step)


def batch_requests(
    prompts: Sequence[Prompt], batch_size: int, step: int, seed: int, group: int = 1
) -> list[Request]:
    """The prompts of iteration ``step``, each ``group`` times in a row.

    They are those at positions step * batch_size / group and on in an endless sequence of shuffled
    passes over the prompts. The sample index of a request tells its pass and its place in the group
    apart, so a prompt met twice in a batch is drawn twice differently. A pure function of (step,
    seed): resuming needs no stored order.

    Args:
      prompts: to choose from.
      batch_size: requests, a multiple of ``group``.
      step: the iteration.
      seed: of the order.
      group: responses to each prompt.
    """
    requests: list[Request] = []
    count = batch_size // group
    position = step * count
    while len(requests) < batch_size:
        epoch, start = divmod(position + len(requests) // group, len(prompts))
        order = _order(seed, epoch, len(prompts))
        for i in order[start : start + count - len(requests) // group]:
            prompt = prompts[i]
            requests += [Request(prompt.id, epoch * group + j, prompt.tokens) for j in range(group)]
    return requests


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The prompts' order in a pass; one prompt needs none, and passes over it are many."""
    if count == 1:
        return np.zeros(1, np.int64)
    return np.random.default_rng((seed, epoch)).permutation(count)


def note(values: dict[str, Any]) -> str:
    """The words of the progress line; of several policies, the means."""

    def mean(name: str) -> float:
        return float(np.mean(values[name]))

    text = f"reward {mean('reward'):.3f}  KL to ref {mean('kl_ref'):.3f}"
    return f"{text}  to BoN {mean('kl_bon'):.3f} nats" if "kl_bon" in values else f"{text} nats"


def _refuse_not_finite(
    values: dict[str, Any], step: int, record: Record | None, restored: bool
) -> None:
    """Raises InputError for a loss that is not finite; ``restored``: right after a checkpoint."""
    if "refused" in values and not all(values["refused"]):
        return
    for name in ("loss", "grad_norm"):
        bad = [v for v in np.atleast_1d(values[name]).tolist() if not math.isfinite(v)]
        if bad:
            where = "there is no checkpoint yet"
            if record is not None:
                record.checkpointer.wait()
                good = record.checkpointer.latest_step
                if good is not None:
                    path = record.checkpointer.directory / str(good)
                    where = f"the last good checkpoint is {path}"
                    if restored:
                        where = (
                            f"it is the first after checkpoint {path} was restored: if it was "
                            "finite before, remove that to go on from the one before or anew. Else"
                        )
            raise InputError(
                f"{name} is {bad[0]} at iteration {step}; {where}: lower the learning rate or "
                "train.max_grad_norm and train anew, or scale the rewards down if they are large "
                f"(mean reward {np.mean(values.get('reward', math.nan)):.3g})"
            )
