"""Many methods, values and seeds, each once: the grids of a sweep and the work on them.

A unit is a population: all values and seeds of one method, trained in one program. Workers (several
processes or hosts on one workdir) claim units; each is done by exactly one, and goes on from its
checkpoint when its worker dies.
"""

import dataclasses
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax import methods
from vbon_jax.bon import theory
from vbon_jax.config import Config
from vbon_jax.data import jsonl
from vbon_jax.data.samples import PromptSamples
from vbon_jax.errors import writing
from vbon_jax.evaluation import exact, heldout
from vbon_jax.methods import Method, Series, learning, starting
from vbon_jax.progress import log
from vbon_jax.stages import claims, evaluate, loading
from vbon_jax.stages.base import Run
from vbon_jax.training import loop, policies, population
from vbon_jax.training.learner import Member
from vbon_jax.training.loop import Task
from vbon_jax.training.references import references

POLL_SECONDS = 5.0  # between looks at units that other workers hold


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


def _training(s: Config, series: Series) -> learning.Training:
    """How the members of a curve are trained: as the run says, but for what the series fixes."""
    training = loading.training(s)
    offline = dataclasses.replace(training.offline, **series.offline)
    memory = training.memory
    if s.sweep.at_once != 1:  # vmapped, each member would compute every length
        memory = dataclasses.replace(memory, lengths=1)
    return dataclasses.replace(training, offline=offline, memory=memory)


def units(s: Config) -> list[Unit]:
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
    others = [value for value in s.sweep.m if value != m or s.method.n not in trained]
    members = tuple(Member(s.method.n, s.method.beta, seed, v) for v in others for seed in seeds)
    found.append(Unit("m", method, series, "m", _options(s, method, series), members))
    return sorted((u for u in found if u.members), key=lambda u: -len(u.members))


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
            "method": [s.method.estimator, s.method.ties, s.method.n],
            "unit": [*spec, *[list(m) for m in map(_values, unit.members)]],
            "temperatures": [*s.sweep.temperatures, s.sweep.temperature_m],
        }
    )
    return run.workdir.root / "sweep" / f"{unit.name}-{digest}"


def _values(m: Member) -> tuple[float, float, int, int]:
    return m.n, m.beta, m.seed, m.m


class Splits:
    """The held-out splits of a sweep at its temperatures, each opened when first asked for."""

    def __init__(self, run: Run):
        self.run = run
        self.models = loading.models(run)
        self._open: dict[tuple[str, float], heldout.HeldOut] = {}

    def get(self, split: str, temperature: float) -> heldout.HeldOut:
        """One split at one temperature."""
        at = split, temperature
        if at not in self._open:
            s = self.run.config
            front = at == ("test", s.sampling.temperature)
            m = s.evaluate.m if front else s.sweep.temperature_m
            self._open[at] = evaluate.open_split(self.run, self.models, split, temperature, m)
        return self._open[at]

    def all(self) -> Iterator[heldout.HeldOut]:
        """Every split and temperature the sweep measures at."""
        s = self.run.config
        own = s.sampling.temperature
        for split in evaluate.splits(s):
            for temperature in dict.fromkeys((own, *s.sweep.temperatures)):
                if split == "test" or s.sweep.temperatures:
                    yield self.get(split, temperature)


def run(run: Run) -> None:
    """``sweep.jsonl``: every unit trained and measured, by as many workers as come."""
    splits = Splits(run)
    todo = units(run.config)
    if not todo:
        log("sweep: the grids are empty (sweep.vbon, sweep.ppo, ...): only best-of-n is measured")
    yardsticks(run, splits)
    tasks = _Tasks(run)
    told = ""
    with run.workdir.shared():
        while todo:
            waiting = []
            for unit in todo:
                place = folder(run, unit)
                if claims.done(place):
                    continue
                claim = claims.try_claim(place, run.config.sweep.stale_seconds)
                if claim is None:
                    waiting.append(unit)
                    continue
                with claim:
                    try:
                        _work(run, unit, place, tasks, splits, claim)
                        finished = claim.finish()
                    except _TakenOver:
                        finished = False
                    if not finished:
                        log(f"sweep: {unit.name} was taken over by another worker; it finishes it")
                        waiting.append(unit)
                write_table(run)
            if waiting:
                names = ", ".join(u.name for u in waiting)
                if names != told:
                    log(f"sweep: waiting for {names}, held by other workers")
                told = names
                time.sleep(POLL_SECONDS)
            todo = waiting
    write_table(run)


def yardsticks(run: Run, splits: Splits) -> None:
    """``sweep/yardsticks.jsonl``: reference and best-of-n at every split and temperature."""
    s = run.config
    whole = s.method.n.is_integer() and s.method.n <= s.sweep.temperature_m
    n = int(s.method.n) if whole else None
    rows = []
    for held in splits.all():
        study = "front" if held.temperature == s.sampling.temperature else "temperature"
        common = {
            "split": held.split,
            "seed": s.seed,
            "m": held.pool.rewards.shape[1],
            "beta": None,
            "seconds": 0.0,
            "sample_seconds": 0.0,
            "unit": "yardsticks",
        }
        found = [("reference", study, held.reference())]
        for size in s.sweep.bon if held.split == "test" and study == "front" else ():
            found.append(("bon", study, held.bon(size)))
        if held.temperature in s.sweep.temperatures:
            found.append(("reference", "temperature", held.reference()))
            if n is not None:
                found.append(("bon", "temperature", held.bon(n)))
        rows += [_row(row, method, study, common) for method, study, row in found]
    _write_lines(run.workdir.root / "sweep" / "yardsticks.jsonl", _once(rows))


def _once(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without those that repeat a study's method, n, split and temperature."""
    kept = {(r["study"], r["method"], r["n"], r["split"], r["temperature"]): r for r in rows}
    return list(kept.values())


def _row(row: dict[str, Any], method: str, study: str, common: dict[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in row.items() if k != "policy"}
    return {"method": method, "study": study} | rest | common


class _TakenOver(Exception):
    """The claim was lost: the unit's files are another worker's now."""


def _while_held(one: loop.Step, claim: claims.Claim) -> loop.Step:
    """``one``, which raises _TakenOver instead of an iteration once the claim is lost."""

    def held(state: Any, step: int) -> tuple[Any, dict[str, Any], str]:
        if not claim.held():
            raise _TakenOver
        return one(state, step)

    return held


class _Tasks:
    """What units learn from, read once an estimator."""

    def __init__(self, run: Run):
        self._run = run
        self._found: dict[str, tuple[Task, list[PromptSamples]]] = {}

    def of(self, unit: Unit) -> tuple[Task, list[PromptSamples]]:
        """The task of a unit, with references of each member's own m where they differ."""
        estimator = unit.options.estimator
        if estimator not in self._found:
            self._found[estimator] = loading.task(self._run, estimator)
        task, samples = self._found[estimator]
        if unit.study != "m":
            return task, samples
        ties, full = self._run.config.method.ties, task.references

        def table(m: int) -> Any:
            found = references(samples, m, estimator, ties, task.sampler)
            wide = full.rewards_PxM.shape[1] - m
            return found._replace(
                rewards_PxM=jnp.pad(
                    found.rewards_PxM, ((0, 0), (0, wide)), constant_values=jnp.inf
                ),
                order_PxM=None
                if found.order_PxM is None
                else jnp.pad(found.order_PxM, ((0, 0), (0, wide))),
            )

        tables = [table(m.m) for m in population.padded(unit.members, self._run.mesh)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *tables)
        return dataclasses.replace(task, references=stacked), samples


def _work(
    run: Run, unit: Unit, place: Path, tasks: _Tasks, splits: Splits, claim: claims.Claim
) -> None:
    """Trains a unit, from its checkpoint if there is one, and measures its members.

    Raises:
      _TakenOver: the claim is lost before the end of training.
    """
    s = run.config
    task, samples = tasks.of(unit)
    config = task.sampler.model.config
    value = loading.value_network(run, config) if unit.method.values else None
    job = learning.Job(
        unit.method, unit.options, _training(s, unit.series), config, len(task.prompts), value
    )
    members = population.padded(unit.members, run.mesh)
    title = f"{unit.name} x{len(unit.members)}"

    def fit(of: learning.Job, who: Sequence[Member], own: Any) -> Any:
        is_last, total = of is job, of.iterations
        folder = place if is_last else place / "start"
        state, step = learning.many(of, task, who, samples, s.sweep.at_once)
        if own is not None:
            state = starting.begun(state, own)
        return loop.resume(
            state,
            _while_held(step, claim),
            loop.Schedule(
                title if is_last else f"start of {title}", total,
                min(s.train.checkpoint_every, total),
            ),
            loop.Place(folder / "checkpoints", folder, 1, {"unit": unit.name}),
            lambda fresh: starting.valued(fresh, of, task, who, samples),
        )  # fmt: skip

    state = starting.trained(job, members, fit)
    _measure(run, unit, place, task, state, splits)


def _measure(run: Run, unit: Unit, place: Path, task: Task, state: Any, splits: Splits) -> None:
    """Measures each member at the training temperature, the matched ones elsewhere too.

    ``rows.jsonl`` has a row of each; ``samples.jsonl`` responses of a matched one, ``exact.jsonl``
    the exact figures where the world can be enumerated.
    """
    s = run.config
    seconds, refused = _training_figures(unit, place)
    reference = task.sampler
    test = splits.get("test", s.sampling.temperature)
    rate = test.speed(splits.models.reference, 1, True)[0]

    def policy(i: int) -> Any:
        return loading.policy_of(reference, population.member(policies.policy(state.params), i))

    def row(i: int, held: heldout.HeldOut, study: str) -> tuple[dict[str, Any], Any]:
        member = unit.members[i]
        at = f"{unit.name} {i + 1}/{len(unit.members)} {held.split} T={held.temperature:g}"
        found, drawn = held.policy(unit.label, member.n, policy(i), at, member.seed)
        common = {
            "unit": unit.name, "split": held.split, "seed": member.seed, "m": member.m,
            "n": None if unit.by_beta else member.n, "beta": member.beta if unit.by_beta else None,
            "seconds": seconds, "sample_seconds": len(task.prompts) * member.m / rate,
            "refused_steps": int(refused[i]),
        }  # fmt: skip
        return _row(found, unit.label, study, common), drawn

    rows, drawn_of = [], {}
    for i in range(len(unit.members)):
        found, drawn_of[i] = row(i, test, unit.study)
        rows.append(found)
    matched = _matched(s, unit, rows) if unit.study == "front" else []
    for i in matched:
        for held in splits.all():
            if held is test:
                if held.temperature in s.sweep.temperatures:
                    rows.append(rows[i] | {"study": "temperature"})
            elif held.temperature in s.sweep.temperatures:
                rows.append(row(i, held, "temperature")[0])
    lines: list[dict[str, Any]] = []
    for i in matched[:1]:
        texts = {unit.label: [[(r.text, r.reward) for r in g] for g in drawn_of[i]]}
        lines = heldout.sample_lines(test, texts)
    _write_lines(place / "samples.jsonl", lines)
    exact_rows = []
    if evaluate.enumerable(s):
        world = evaluate.enumerated(run, splits.models.reference)
        for i, member in enumerate(unit.members):
            optimum = _optimum(s, unit, member)
            found = exact.fixed_point(
                policy(i).model, splits.models.reference.model, world, optimum
            )
            exact_rows.append(found | {"seed": member.seed, "m": member.m})
    _write_lines(place / "exact.jsonl", exact_rows)
    _write_lines(place / "rows.jsonl", rows)


def _training_figures(unit: Unit, place: Path) -> tuple[float, Any]:
    """Seconds of training a member, and each member's refused steps."""
    steps = [record for _, record in jsonl.read(place / "metrics.jsonl")]
    names = ("seconds_rollout", "seconds_reward", "seconds_update")
    seconds = sum(step.get(name, 0.0) for step in steps for name in names) / len(unit.members)
    refused = np.sum([step["refused"] for step in steps], axis=0)
    if refused.any():
        log(
            f"sweep: {unit.name}: {int(np.sum(refused > 0))} of {len(unit.members)} policies had "
            "steps refused because the loss or gradient was not finite (refused_steps in the table)"
        )
    return seconds, refused


def _optimum(s: Config, unit: Unit, member: Member) -> exact.Optimum:
    """What a member is held against in an enumerable world."""
    n = round(member.n, 6)  # of a beta: 1 / beta + 1
    beta = member.beta if unit.by_beta else None
    series = unit.series
    return exact.Optimum(
        series.label, series.formula,
        lambda log_ref, rewards: series.optimum(
            log_ref, rewards, n, 0.0 if beta is None else beta, s.offline
        ),
        n, beta,
    )  # fmt: skip


def _matched(s: Config, unit: Unit, rows: Sequence[dict[str, Any]]) -> list[int]:
    """The members that stand for ``method.n``, all seeds.

    Those of that n, or of the beta whose KL to the reference comes nearest to best-of-n's.
    """
    n = s.method.n
    if not unit.by_beta:
        return [i for i, m in enumerate(unit.members) if m.n == n]
    target = float(theory.kl_upper_bound(n))
    betas = sorted({m.beta for m in unit.members})

    def distance(beta: float) -> float:
        own = [r["kl_ref"] for m, r in zip(unit.members, rows) if m.beta == beta]
        return abs(float(np.mean(own)) - target)

    best = min(betas, key=distance)
    return [i for i, m in enumerate(unit.members) if m.beta == best]


def write_table(run: Run) -> None:
    """``sweep.jsonl`` and ``sweep_samples.jsonl`` from the units that are done."""
    root, s = run.workdir.root, run.config
    rows = [r for _, r in jsonl.read(root / "sweep" / "yardsticks.jsonl")]
    lines: list[dict[str, Any]] = []
    exact: list[dict[str, Any]] = []
    for unit in units(s):
        place = folder(run, unit)
        if not claims.done(place):
            continue
        own = [r for _, r in jsonl.read(place / "rows.jsonl")]
        rows += own
        if (place / "exact.jsonl").stat().st_size and unit.study == "front":
            exact += [r for _, r in jsonl.read(place / "exact.jsonl")]
        if unit.name == "vbon":  # at method.n these belong to the study of m as well
            rows += [
                r | {"study": "m"}
                for r in own
                if r["study"] == "front" and r["n"] == s.method.n and r["m"] in s.sweep.m
                and r["split"] == "test"
            ]  # fmt: skip
        if (place / "samples.jsonl").stat().st_size:
            lines += [r for _, r in jsonl.read(place / "samples.jsonl")]
    _write_lines(root / "sweep.jsonl", rows)
    _write_lines(root / "sweep_samples.jsonl", lines)
    if exact:
        run.workdir.write_json(root / "tabular.json", {"rows": exact})


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes JSON lines so that the file is whole or not there, also beside other workers."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # pids of hosts may agree
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for record in records:
                file.write(jsonl.dump_line(record))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
