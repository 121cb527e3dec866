"""What a stage is, and the run it belongs to."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Literal

import jax
from jax.sharding import Mesh

from vbon_jax.config import Config, as_dict
from vbon_jax.errors import InputError
from vbon_jax.models.hf import CheckpointError
from vbon_jax.progress import log
from vbon_jax.sampling.sampler import named_key
from vbon_jax.stages.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a stage is given.

    Attributes:
      config: the run's configuration.
      workdir: its folder.
      mesh: the device mesh.
    """

    config: Config
    workdir: Workdir
    mesh: Mesh

    def key(self, name: str) -> jax.Array:
        """The random key of a piece of work: a function of the run's seed and the name."""
        return named_key(self.config.seed, name)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of a run.

    Attributes:
      name: on the command line and in the config key ``stages``.
      help: one line of ``vbon --help``.
      run: does it.
      depends: config keys, or groups of keys, that its results follow from.
      after: stages whose results it reads; their keys count as well.
      leaves: paths in the workdir that hold its results, removed to do it again.
      redo: when a complete stage is done again: "never"; when "asked" for by name; or "always",
        since it leaves alone what is done.
    """

    name: str
    help: str
    run: Callable[[Run], None]
    depends: tuple[str, ...]
    after: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    redo: Literal["never", "asked", "always"] = "never"

    def follows(self, stages: "Mapping[str, Stage]") -> tuple[str, ...]:
        """The config keys that its results follow from, those of the stages before included."""
        before = (key for name in self.after for key in stages[name].follows(stages))
        return tuple(dict.fromkeys([*before, *self.depends]))


def perform(run: Run, stage: Stage, again: bool) -> None:
    """Runs one stage unless it is complete under the same settings.

    Args:
      run: the run.
      stage: of it.
      again: the stage was asked for by name: one to be redone when "asked" runs even if it is
        complete, or was completed under other settings.
    """
    workdir = run.workdir
    if stage.redo == "always" or (stage.redo == "asked" and again):
        workdir.forget(stage.name)
    if workdir.begin(stage.name):
        log(f"{stage.name}: complete already in {workdir.root}")
        return
    workdir.write_json(workdir.root / "config.json", as_dict(run.config))
    began = time.monotonic()
    try:
        with jax.set_mesh(run.mesh):
            stage.run(run)
    except (InputError, CheckpointError):
        workdir.abandon(stage.name)
        raise
    workdir.complete(stage.name)
    log(f"{stage.name}: done in {time.monotonic() - began:.1f} s")
