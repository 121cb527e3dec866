"""The units of a sweep: which there are, whose each is, where it lies, and the table of all.

A unit is a population: all values and seeds of one method, trained in one program. It has a folder
of its own, and is done when that holds ``rows.jsonl``, the last thing its work writes. Which share
of a sweep a unit is in follows from the config alone, so shares need not talk to each other: each
writes into the folders of its own units, and the table is read off the folders.
"""

import dataclasses
import fcntl
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vbon_jax import methods
from vbon_jax.config import Config
from vbon_jax.data import jsonl
from vbon_jax.errors import writing
from vbon_jax.methods import Method, Series
from vbon_jax.progress import log
from vbon_jax.stages.base import Run
from vbon_jax.training.learner import Member


class Unit(NamedTuple):
    """A population of the sweep.

    Attributes:
      name: of its folder.
      series: the method under the options that all members share.
      study: "front", or "m" for one n at several numbers of reference samples.
      options: of the method.
      members: their values and seeds.
    """

    name: str
    method: Method
    series: Series
    study: str
    options: Any
    members: tuple[Member, ...]

    @property
    def label(self) -> str:
        """What its rows have for "method"."""
        return self.series.label

    @property
    def by_beta(self) -> bool:
        """Whether the members differ in beta, not in n."""
        return self.series.varies == "beta"


def of(s: Config) -> list[Unit]:
    """The units of a sweep, the longest first."""
    m = s.samples.m
    seeds = [s.seed + i for i in range(s.sweep.seeds)]
    found = []
    for label, (method, series) in methods.SERIES.items():
        values = getattr(s.sweep, label)
        if series.varies == "beta":
            # The n that beta stands for, as far as one does: only for KL(policy || bon) in the log.
            pairs = [(1 / beta + 1, float(beta)) for beta in values]
        else:
            pairs = [(float(n), s.method.beta) for n in values]
        members = tuple(Member(n, beta, seed, m) for n, beta in pairs for seed in seeds)
        found.append(Unit(label, method, series, "front", _options(s, method, series), members))
    method, series = methods.SERIES["vbon"]
    trained = getattr(s.sweep, series.label)
    others = [value for value in s.sweep.m if value != m or s.method.top not in trained]
    members = tuple(Member(s.method.top, s.method.beta, seed, v) for v in others for seed in seeds)
    found.append(Unit("m", method, series, "m", _options(s, method, series), members))
    return sorted((u for u in found if u.members), key=lambda u: -len(u.members))


def _options(s: Config, method: Method, series: Series) -> Any:
    """The options of a curve: the run's own, but for what the series fixes.

    A method of several forms, such as bond, is swept in the form of its series.
    """
    given = {
        f.name: getattr(s.method, f.name)
        for f in dataclasses.fields(method.options)
        if hasattr(s.method, f.name)
    }
    if series.estimators:
        given["estimator"] = getattr(s.sweep, f"{series.label}_estimator")
    return method.options(**given | series.fixed)


def folder(run: Run, unit: Unit) -> Path:
    """Where a unit's files lie: named for all that its results follow from."""
    s = run.config
    follows = run.workdir.settled(
        {
            key: value
            for key, value in run.workdir.relevant("sweep").items()
            if not key.startswith(("method.", "sweep."))
        }
    )
    follows |= run.workdir.contents(follows)
    spec = [unit.method.name, unit.series.variant, unit.options.estimator]
    digest = run.workdir.digest(
        {
            "settings": follows,
            "method": [s.method.estimator, s.method.ties, s.method.top],
            "unit": [*spec, *[list(m) for m in map(_values, unit.members)]],
            "temperatures": [*s.sweep.temperatures, s.sweep.temperature_m],
        }
    )
    return run.workdir.root / "sweep" / f"{unit.name}-{digest}"


def _values(m: Member) -> tuple[float, float, int, int]:
    return m.n, m.beta, m.seed, m.m


def share(all_units: Sequence[Unit], i: int, count: int) -> list[Unit]:
    """One of ``count`` shares of the units of a sweep.

    In order, each unit goes to the share that has the fewest members by then: with the longest
    first, as `of` gives them, the shares come out about as long. A unit is in one share exactly.

    Args:
      all_units: every unit, also those that are done: what is done changes while shares work.
      i: which share, from 0.
      count: how many there are; those beyond the number of units are empty.

    Returns:
      The units of share i, in order.
    """
    members = [0] * min(count, len(all_units))  # the shares beyond get none
    found = []
    for unit in all_units:
        least = members.index(min(members))
        members[least] += len(unit.members)
        if least == i:
            found.append(unit)
    return found


def done(run: Run, unit: Unit) -> bool:
    """Whether a unit was trained and measured."""
    return (folder(run, unit) / "rows.jsonl").exists()


@contextmanager
def held(place: Path) -> Iterator[None]:
    """Holds the folder of a unit for this process, and makes it where it is missing.

    Waits while another process is at work there: the same share started twice, a whole sweep beside
    shares, or shares of another N. The kernel frees the lock of a process that was killed. Where a
    file system does not show the locks of other hosts, nothing but the shares keeps two apart.
    """
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        file = (place / ".lock").open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"sweep: waiting for another vbon at work in {place}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_table(run: Run) -> None:
    """``sweep.jsonl``, ``sweep_samples.jsonl`` and ``tabular.json`` of the units that are done."""
    root, s = run.workdir.root, run.config
    rows = [r for _, r in jsonl.read(root / "sweep" / "yardsticks.jsonl")]
    lines: list[dict[str, Any]] = []
    exact: list[dict[str, Any]] = []
    for unit in of(s):
        if not done(run, unit):
            continue
        place = folder(run, unit)
        own = [r for _, r in jsonl.read(place / "rows.jsonl")]
        rows += own
        if (place / "exact.jsonl").stat().st_size and unit.study == "front":
            exact += [r for _, r in jsonl.read(place / "exact.jsonl")]
        if unit.name == "vbon":  # at method.n these belong to the study of m as well
            rows += [
                r | {"study": "m"}
                for r in own
                if r["study"] == "front" and r["n"] == s.method.top and r["m"] in s.sweep.m
                and r["split"] == "test"
            ]  # fmt: skip
        if (place / "samples.jsonl").stat().st_size:
            lines += [r for _, r in jsonl.read(place / "samples.jsonl")]
    write_lines(root / "sweep.jsonl", rows)
    write_lines(root / "sweep_samples.jsonl", lines)
    if exact:
        run.workdir.write_json(root / "tabular.json", {"rows": exact})


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes JSON lines so that the file is whole or not there, also beside other shares."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # pids of hosts may agree
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for record in records:
                file.write(jsonl.dump_line(record))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
