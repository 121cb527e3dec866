"""The run's folder: where each thing lies, and which stage has been done under which settings."""

import json
import os
from pathlib import Path
from typing import Any

from vbon_jax import settings as st
from vbon_jax.errors import InputError

# The settings a stage's results follow from. Later stages add to those of the ones they read.
_SFT = ("seed", "data", "tokenizer", "reference")
_REWARD = (*_SFT, "reward")
_SAMPLE = (*_REWARD, "prompts", "sampling", "samples")
_TRAIN = (*_SAMPLE, "method", "train")
_DEPENDS = {
    "sft": _SFT,
    "reward": _REWARD,
    "sample": _SAMPLE,
    "train": _TRAIN,
    "export": _TRAIN,
    "evaluate": (*_TRAIN, "evaluate"),
}
# Settings that change how fast a result comes, not what it is.
_FREE = ("sampling.batch_size", "train.checkpoint_every", "train.keep")
# What holds a stage's results, to be removed to do it again.
_RESULTS = {
    "sft": ("tokenizer", "reference", "checkpoints/sft"),
    "reward": ("reward", "checkpoints/reward"),
    "sample": ("samples/train.jsonl", "prompts"),
    "train": ("checkpoints/train", "metrics.jsonl"),
    "export": ("policy",),
    "evaluate": ("evaluation.json",),
}


def relevant(stage: str, settings: st.Settings) -> dict[str, Any]:
    """The flat settings that ``stage``'s results follow from."""
    flat = st.flatten(st.as_dict(settings))
    groups = _DEPENDS[stage]
    return {k: v for k, v in flat.items() if k.split(".")[0] in groups and k not in _FREE}


class Workdir:
    """Paths below one folder, and a note a stage of what it was done with."""

    def __init__(self, root: str | os.PathLike[str]):
        """Makes the folder. Raises InputError where it cannot be made."""
        self.root = Path(root).expanduser().absolute()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--workdir={root}: cannot be made ({error.strerror})") from error
        self.tokenizer = self.root / "tokenizer"
        self.reference = self.root / "reference"
        self.reward = self.root / "reward"
        self.policy = self.root / "policy"
        self.data = self.root / "data"
        self.evaluation = self.root / "evaluation.json"

    def prompts(self, split: str) -> Path:
        return self.root / "prompts" / f"{split}.jsonl"

    def samples(self, name: str) -> Path:
        return self.root / "samples" / f"{name}.jsonl"

    def checkpoints(self, stage: str) -> Path:
        return self.root / "checkpoints" / stage

    def _note(self, stage: str) -> Path:
        return self.root / "stages" / f"{stage}.json"

    def begin(self, stage: str, settings: st.Settings) -> bool:
        """Notes that ``stage`` starts; returns True when it is complete already.

        Raises InputError when it was begun under settings that give other results: what is there
        must neither be lost nor be taken for what is asked for now.
        """
        wanted = relevant(stage, settings)
        path = self._note(stage)
        complete = False
        if path.exists():
            note = json.loads(path.read_text())
            changed = [k for k, v in wanted.items() if note["settings"].get(k) != v]
            if changed:
                first = changed[0]
                results = " ".join(str(self.root / r) for r in (*_RESULTS[stage], path.name))
                results = results.replace(str(self.root / path.name), str(path))
                raise InputError(
                    f"stage {stage} in {self.root} was begun with "
                    f"{first}={note['settings'].get(first)!r}, now it is {wanted[first]!r}"
                    + (f" (and {len(changed) - 1} more keys changed)" if changed[1:] else "")
                    + f": use another --workdir, or redo the stage after removing {results}"
                )
            complete = note["complete"]
        else:
            self._write(path, {"settings": wanted, "complete": False})
        return complete

    def forget(self, stage: str) -> None:
        """Drops the note of a stage whose results are to be overwritten."""
        self._note(stage).unlink(missing_ok=True)

    def complete(self, stage: str, settings: st.Settings) -> None:
        """Notes that all files of ``stage`` are in place."""
        self._write(self._note(stage), {"settings": relevant(stage, settings), "complete": True})

    def require(self, stage: str, what: str) -> None:
        """Raises InputError unless ``stage``, which makes ``what``, is complete."""
        path = self._note(stage)
        if not (path.exists() and json.loads(path.read_text())["complete"]):
            raise InputError(
                f"{what} is not in {self.root}: run `vbon {stage}` with the same --config and "
                "--workdir first, or `vbon run` for all stages"
            )

    def write_json(self, path: Path, value: Any) -> None:
        """Writes JSON so that the file is whole or not there."""
        self._write(path, value)

    @staticmethod
    def _write(path: Path, value: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
