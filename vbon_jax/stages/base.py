"""A run of stages, and how one is performed."""

import dataclasses
import time
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from vbon_jax import processes, sharding
from vbon_jax.config import Config, as_dict
from vbon_jax.errors import InputError
from vbon_jax.progress import log
from vbon_jax.sampling.sampler import named_key
from vbon_jax.stages.record import Stage
from vbon_jax.stages.workdir import Workdir
from vbon_jax.training.options import microbatches


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which policy of a family is asked for, by one of these at most.

    Attributes:
      n: its n.
      kl: KL(policy || reference) on held-out prompts, nats a response.
      reward: its mean reward there.
    """

    n: float | None = None
    kl: float | None = None
    reward: float | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a stage is given.

    Attributes:
      config: the run's configuration.
      workdir: its folder.
      mesh: the device mesh.
      profile: iterations of training to trace, (first, last), counted from 1; None for none.
      shard: which share of a sweep's units this process does, from 0, and how many there are.
      wanted: of a family of policies, the one to export or to generate from.
    """

    config: Config
    workdir: Workdir
    mesh: Mesh
    profile: tuple[int, int] | None = None
    shard: tuple[int, int] = (0, 1)
    wanted: Wanted = Wanted()

    def key(self, name: str) -> jax.Array:
        """The random key of a piece of work: a function of the run's seed and the name."""
        return named_key(self.config.seed, name)


class Undone(InputError):
    """What a stage left, complete by its note, turns out not to be whole.

    Attributes:
      stage: its name.
    """

    def __init__(self, message: str, stage: str):
        """The line to print where nothing does ``stage`` again."""
        super().__init__(message)
        self.stage = stage


def perform_all(run: Run, stages: Sequence[Stage]) -> None:
    """Runs stages in order, each unless it is complete; again one that turns out not to be."""
    for i, stage in enumerate(stages):
        try:
            perform(run, stage, again=False)
        except Undone as error:
            before = [s for s in stages[:i] if s.name == error.stage]
            if not before:
                raise
            log(f"{error}; doing so")
            perform(run, before[0], again=False)
            perform(run, stage, again=False)


def perform(run: Run, stage: Stage, again: bool) -> None:
    """Runs one stage unless it is complete under the same settings.

    Args:
      run: the run.
      stage: of it.
      again: the stage was asked for by name: one to be redone when "asked" runs even if it is
        complete, or was completed under other settings.
    """
    workdir = run.workdir
    due = stage.redo == "always" or (stage.redo == "asked" and again)
    if processes.by_first(lambda: workdir.begin(stage.name, due)):
        log(f"{stage.name}: complete already in {workdir.root}")
        return
    workdir.write_json(workdir.root / "config.json", as_dict(run.config))
    began = time.monotonic()
    try:
        with jax.set_mesh(run.mesh):
            left = stage.run(run)
    except InputError:
        if processes.first():
            workdir.abandon(stage.name)
        raise
    if not left:
        processes.by_first(lambda: workdir.complete(stage.name))
    log(f"{stage.name}: done in {time.monotonic() - began:.1f} s" + (f"; {left}" if left else ""))


def refuse_uneven(config: Config, mesh: Mesh) -> None:
    """Raises InputError for a batch that the devices cannot share: each would do all of it."""
    ways = sharding.ways(mesh)
    train = config.train
    for key, rows in (
        ("sampling.batch_size", config.sampling.batch_size),
        ("train.batch_size", train.batch_size),
        ("memory.rollout_rows", config.memory.rollout_rows),
        ("train.minibatch_size", train.minibatch_size),
        (
            "train.minibatch_size / memory.accumulate (or memory.lengths)",
            train.minibatch_size // microbatches(train, config.memory),
        ),
    ):
        if rows % ways:
            raise InputError(
                f"{key}={rows} does not divide among mesh.data x mesh.fsdp = {ways} devices: "
                f"make it a multiple of {ways}"
            )
