"""What a stage is: a record that the command line, the config and the workdir read."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of a run. Its work is the function ``run`` of ``vbon_jax/stages/<name>.py``.

    Attributes:
      name: on the command line and in the config key ``stages``.
      help: one line of ``vbon --help``.
      depends: config keys, or groups of keys, that its results follow from.
      after: stages whose results it reads; their keys count as well.
      leaves: paths in the workdir that hold its results, known by digests in its note.
      scratch: paths of what it goes on from when it is cut, of no use once it is complete.
      logs: files that tell of it and that no result follows from; a damaged one is not made again.
      redo: when a complete stage is done again: "never"; when "asked" for by name; or "always",
        since it leaves alone what is done.
    """

    name: str
    help: str
    depends: tuple[str, ...]
    after: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    logs: tuple[str, ...] = ()
    redo: Literal["never", "asked", "always"] = "never"

    @property
    def run(self) -> Callable[[Any], str | None]:
        """(run) -> None, or words for what is left to other processes.

        It is imported when it is asked for, as that takes seconds.
        """
        return importlib.import_module(f"vbon_jax.stages.{self.name}").run

    def follows(self, stages: "Mapping[str, Stage]") -> tuple[str, ...]:
        """The config keys that its results follow from, those of the stages before included."""
        before = (key for name in self.after for key in stages[name].follows(stages))
        return tuple(dict.fromkeys([*before, *self.depends]))
