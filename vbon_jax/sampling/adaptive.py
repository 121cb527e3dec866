"""As many reference samples of each prompt as it needs, up to m."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from vbon_jax import processes
from vbon_jax.data import samples as sample_files
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples, SampleWriter
from vbon_jax.rewards.base import Reward
from vbon_jax.sampling import samples
from vbon_jax.sampling.sampler import Sampler

FIRST = 8  # samples of every prompt, at least; an eighth of m where that is more


@dataclasses.dataclass(frozen=True)
class Rule:
    """When a prompt has samples enough.

    Attributes:
      m: the most samples of a prompt.
      enough: of the rewards [P, k] of P prompts' first k samples, whether they are: bool [P].
    """

    m: int
    enough: Callable[[np.ndarray], np.ndarray]

    @property
    def rounds(self) -> list[range]:
        """The samples of each round; after each there are twice as many, up to m."""
        found = [range(min(max(FIRST, self.m // 8), self.m))]
        while found[-1].stop < self.m:
            found.append(range(found[-1].stop, min(2 * found[-1].stop, self.m)))
        return found


def write(
    path: Path,
    sampler: Sampler,
    key: jax.Array,
    prompts: Sequence[Prompt],
    rule: Rule,
    batch_size: int,
    reward: Reward,
) -> tuple[int, int]:
    """Draws responses in rounds, until each prompt has enough, and writes a line a prompt.

    They are the first of those that ``samples.write`` draws. Each round has a file of its own
    beside the path, from which a run that was cut goes on; at the end they are removed.

    Args:
      path: as of ``samples.write``.
      sampler: as of ``samples.write``.
      key: as of ``samples.write``.
      prompts: as of ``samples.write``.
      rule: when a prompt has enough.
      batch_size: responses drawn at once.
      reward: scores them.

    Returns:
      How many samples the file has, and of how many prompts not even m were enough.

    Raises:
      Stopped: after a signal; what was drawn stays.
      InputError: a reward is not finite, or a file is at fault.
    """
    whole = {p.id for p in prompts} <= set(processes.by_first(lambda: _written(path)))
    found: dict[int, list[PromptSamples]] = {p.id: [] for p in prompts}
    open_, rounds = [] if whole else list(prompts), path.parent / "rounds"
    for number, which in enumerate(rule.rounds, 1):
        if not open_:
            break
        file = rounds / f"{number}.jsonl"
        title = f"sample, {which.start} to {which.stop} of {rule.m}"
        rows = min(batch_size, len(open_) * len(which))
        samples.write(file, sampler, key, open_, which, rows, (reward, None), title)
        parts = sample_files.samples_of(file, open_, len(which))
        for prompt, part in zip(open_, parts, strict=True):
            found[prompt.id].append(part)
        rewards = [[r for part in found[p.id] for r in part.rewards] for p in open_]
        enough = rule.enough(np.array(rewards, np.float32))
        open_ = [p for p, ends in zip(open_, enough, strict=True) if not ends]

    def join() -> None:
        with SampleWriter(path) as writer:
            for prompt in prompts:
                if prompt.id not in writer.done:
                    writer.append(sample_files.joined(found[prompt.id]))
        shutil.rmtree(rounds, ignore_errors=True)  # there are none if the file was whole

    processes.by_first(join)
    stored = sample_files.samples_of(path, prompts, 1)
    count = sum(len(of.rewards) for of in stored)
    short = [of for of in stored if len(of.rewards) == rule.m]
    wide = sum(not rule.enough(np.array([of.rewards], np.float32))[0] for of in short)
    return count, wide


def _written(path: Path) -> list[int]:
    """Ids of the prompts in a samples file, which is made where it is not there."""
    with SampleWriter(path) as writer:
        return writer.done
