"""Many methods, values and seeds, each once: the work on the units of a sweep.

``vbon sweep`` does all units, ``vbon sweep --shard=i/N`` one share of them, for a scheduler that
starts N processes on one workdir, on any hosts (see `units` for how they keep apart). Every process
skips what is done, and goes on from the checkpoint of a unit that was cut.

What all units are measured by, the held-out samples and the yardsticks, is made by whoever holds
the workdir's lock; the others wait for it, and find it made. Then the lock is let go, and a share
writes under its own units alone. The process that finds all units done in the end, under the lock
again, writes the table and leaves the stage complete; one that does not leaves it not complete, and
``vbon report`` shows the units that are done by then.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax.bon import theory
from vbon_jax.config import Config
from vbon_jax.data import jsonl
from vbon_jax.data.samples import PromptSamples
from vbon_jax.evaluation import exact, heldout
from vbon_jax.methods import Series, learning, starting
from vbon_jax.progress import log
from vbon_jax.stages import evaluate, loading, units
from vbon_jax.stages.base import Run
from vbon_jax.stages.units import Unit
from vbon_jax.training import loop, policies, population
from vbon_jax.training.learner import Member
from vbon_jax.training.loop import Task
from vbon_jax.training.references import references


def _training(s: Config, series: Series) -> learning.Training:
    """How the members of a curve are trained: as the run says, but for what the series fixes."""
    training = loading.training(s)
    offline = dataclasses.replace(training.offline, **series.offline)
    memory = training.memory
    if s.sweep.at_once != 1:  # vmapped, each member would compute every length
        memory = dataclasses.replace(memory, lengths=1)
    return dataclasses.replace(training, offline=offline, memory=memory)


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


def run(run: Run) -> str | None:
    """``sweep.jsonl``: every unit of this share trained and measured, and the table of all.

    Returns:
      The units that are left to other shares, in words; None where all are done.
    """
    (i, count), every = run.shard, units.of(run.config)
    own = units.share(every, i, count)
    todo = [unit for unit in own if not units.done(run, unit)]
    if count > 1:
        names = ", ".join(unit.name for unit in todo)
        log(f"sweep: share {i}/{count} is {len(own)} of {len(every)} units, to do: {names or '-'}")
    elif not every:
        log("sweep: the grids are empty (sweep.vbon, sweep.ppo, ...): only best-of-n is measured")
    left = _left(run, every)
    if todo or not left:
        splits = Splits(run)
        yardsticks(run, splits)
        tasks = _Tasks(run)
        with run.workdir.shared():
            for unit in todo:
                with units.held(units.folder(run, unit)):
                    if not units.done(run, unit):  # by whoever held it before
                        _work(run, unit, units.folder(run, unit), tasks, splits)
        left = _left(run, every)
    if left:
        return f"{len(left)} of {len(every)} units are left to other shares: {', '.join(left)}"
    units.write_table(run)
    return None


def _left(run: Run, every: Sequence[Unit]) -> list[str]:
    """The names of the units that are not done."""
    return [unit.name for unit in every if not units.done(run, unit)]


def yardsticks(run: Run, splits: Splits) -> None:
    """``sweep/yardsticks.jsonl``: reference and best-of-n at every split and temperature."""
    s = run.config
    whole = s.method.top.is_integer() and s.method.top <= s.sweep.temperature_m
    n = int(s.method.top) if whole else None
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
    units.write_lines(run.workdir.root / "sweep" / "yardsticks.jsonl", _once(rows))


def _once(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without those that repeat a study's method, n, split and temperature."""
    kept = {(r["study"], r["method"], r["n"], r["split"], r["temperature"]): r for r in rows}
    return list(kept.values())


def _row(row: dict[str, Any], method: str, study: str, common: dict[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in row.items() if k != "policy"}
    return {"method": method, "study": study} | rest | common


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


def _work(run: Run, unit: Unit, place: Path, tasks: _Tasks, splits: Splits) -> None:
    """Trains a unit, from its checkpoint if there is one, and measures its members."""
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
            step,
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
    units.write_lines(place / "samples.jsonl", lines)
    exact_rows = []
    if evaluate.enumerable(s):
        world = evaluate.enumerated(run, splits.models.reference)
        for i, member in enumerate(unit.members):
            optimum = _optimum(s, unit, member)
            found = exact.fixed_point(
                policy(i).model, splits.models.reference.model, world, optimum
            )
            exact_rows.append(found | {"seed": member.seed, "m": member.m})
    units.write_lines(place / "exact.jsonl", exact_rows)
    units.write_lines(place / "rows.jsonl", rows)


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
    n = s.method.top
    if not unit.by_beta:
        return [i for i, m in enumerate(unit.members) if m.n == n]
    target = float(theory.kl_upper_bound(n))
    betas = sorted({m.beta for m in unit.members})

    def distance(beta: float) -> float:
        own = [r["kl_ref"] for m, r in zip(unit.members, rows) if m.beta == beta]
        return abs(float(np.mean(own)) - target)

    best = min(betas, key=distance)
    return [i for i, m in enumerate(unit.members) if m.beta == best]
