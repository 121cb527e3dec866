"""Many methods, values and seeds, each once: the grids of a sweep and the work on them.

A unit is a population: all values and seeds of one method, trained in one program. Workers (several
processes or hosts on one workdir) claim units; each is done by exactly one, and goes on from its
checkpoint when its worker dies.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax.bon import theory
from vbon_jax.config import Settings
from vbon_jax.data import jsonl
from vbon_jax.data import samples as reference_files
from vbon_jax.evaluation import heldout
from vbon_jax.methods import build as methods
from vbon_jax.methods.build import Spec
from vbon_jax.progress import log
from vbon_jax.stages import claims, inputs, workdir
from vbon_jax.stages.inputs import Decoder, Run
from vbon_jax.training import loop, population
from vbon_jax.training.checkpoint import Checkpointer
from vbon_jax.training.loop import World
from vbon_jax.training.metrics import MetricsWriter
from vbon_jax.training.population import Member

POLL_SECONDS = 5.0  # between looks at units that other workers hold


class Unit(NamedTuple):
    """A population of the sweep. label: "method" in the table; study: "front", or "m" for one n at
    several numbers of reference samples."""

    name: str
    label: str
    study: str
    method: Spec
    members: tuple[Member, ...]


def units(s: Settings) -> list[Unit]:
    """The units of a sweep, the longest first."""
    w, m = s.sweep, s.samples.m
    exact = Spec("vbon", "exact", s.method.estimator)
    bound = Spec("vbon", "lower_bound", w.lower_bound_estimator)
    of_n = [
        ("vbon", exact, w.vbon),
        ("lower_bound", bound, w.lower_bound),
        ("bond", Spec("bond", "backward", s.method.estimator), w.bond),
        ("bonbon", Spec("bonbon", "exact", s.method.estimator), w.bonbon),
        ("bon_sft", Spec("bon_sft", "exact", s.method.estimator), w.bon_sft),
    ]
    of_beta = [
        (name, Spec(name, "exact", s.method.estimator), values)
        for name, values in (("ppo", w.ppo), ("dpo", w.dpo))
    ]
    seeds = [s.seed + i for i in range(w.seeds)]
    found = []
    for label, method, ns in of_n:
        members = tuple(Member(float(n), s.method.beta, seed, m) for n in ns for seed in seeds)
        found.append(Unit(label, label, "front", method, members))
    for label, method, betas in of_beta:
        # The n that beta stands for, as far as one does: only for KL(policy || bon) in the log.
        members = tuple(
            Member(1 / beta + 1, float(beta), seed, m) for beta in betas for seed in seeds
        )
        found.append(Unit(label, label, "front", method, members))
    others = [value for value in w.m if value != m or s.method.n not in w.vbon]
    members = tuple(Member(s.method.n, s.method.beta, seed, v) for v in others for seed in seeds)
    found.append(Unit("m", "vbon", "m", exact, members))
    return sorted((u for u in found if u.members), key=lambda u: -len(u.members))


def folder(run: Run, unit: Unit) -> Path:
    """Where a unit's files lie: named for all that its results follow from."""
    s = run.settings
    follows = {
        "settings": {
            key: value
            for key, value in workdir.relevant("sweep", s).items()
            if not key.startswith(("method.", "sweep."))
        },
        "method": [s.method.estimator, s.method.ties, s.method.n],
        "unit": [*unit.method, *[list(m) for m in map(_values, unit.members)]],
        "temperatures": [*s.sweep.temperatures, s.sweep.temperature_m],
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(follows, sort_keys=True).encode()).hexdigest()[:8]
    return run.workdir.root / "sweep" / f"{unit.name}-{digest}"


def _values(m: Member) -> tuple[float, float, int, int]:
    return m.n, m.beta, m.seed, m.m


class Splits:
    """The held-out splits of a sweep at its temperatures, each opened when first asked for."""

    def __init__(self, run: Run):
        self.run = run
        self.models = heldout.models(run)
        self._open: dict[tuple[str, float], heldout.HeldOut] = {}

    def get(self, split: str, temperature: float) -> heldout.HeldOut:
        at = split, temperature
        if at not in self._open:
            s = self.run.settings
            front = at == ("test", s.sampling.temperature)
            m = s.evaluate.m if front else s.sweep.temperature_m
            self._open[at] = heldout.open_split(
                self.run, self.models, split, temperature, s.method.n, m
            )
        return self._open[at]

    def all(self) -> Iterator[heldout.HeldOut]:
        """Every split and temperature the sweep measures at."""
        s = self.run.settings
        own = s.sampling.temperature
        for split in ("test", "ood") if _has_ood(s) else ("test",):
            for temperature in dict.fromkeys((own, *s.sweep.temperatures)):
                if split == "test" or s.sweep.temperatures:
                    yield self.get(split, temperature)


def _has_ood(s: Settings) -> bool:
    return bool(s.prompts.ood or s.prompts.ood_path)


def sweep(run: Run) -> None:
    """``sweep.jsonl``: every unit trained and measured, by as many workers as come."""
    splits = Splits(run)
    todo = units(run.settings)
    if not todo:
        log("sweep: the grids are empty (sweep.vbon, sweep.ppo, ...): only best-of-n is measured")
    yardsticks(run, splits)
    worlds: dict[str, World] = {}
    told = ""
    with run.workdir.shared():
        while todo:
            waiting = []
            for unit in todo:
                place = folder(run, unit)
                if claims.done(place):
                    continue
                claim = claims.try_claim(place, run.settings.sweep.stale_seconds)
                if claim is None:
                    waiting.append(unit)
                    continue
                with claim:
                    try:
                        _work(run, unit, place, worlds, splits, claim)
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
    s = run.settings
    whole = s.method.n.is_integer() and s.method.n <= s.sweep.temperature_m
    n = int(s.method.n) if whole else None
    rows = []
    for held in splits.all():
        study = "front" if held.sampling.temperature == s.sampling.temperature else "temperature"
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
        if held.sampling.temperature in s.sweep.temperatures:
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


def _work(
    run: Run, unit: Unit, place: Path, worlds: dict[str, World], splits: Splits, claim: claims.Claim
) -> None:
    """Trains a unit, from its checkpoint if there is one, and measures its members.

    Raises _TakenOver where the claim is lost before the end of training."""
    s = run.settings
    if unit.method.estimator not in worlds:
        worlds[unit.method.estimator] = methods.world(run, unit.method)
    world = _for_members(run, worlds[unit.method.estimator], unit)
    members = population.padded(unit.members, run.mesh)
    state, step = methods.many(run, world, unit.method, members, s.sweep.at_once)
    step = _while_held(step, claim)
    total = methods.iterations(s, unit.method, len(world.prompts))
    checkpointer = Checkpointer(place / "checkpoints", keep=1)
    try:
        start = checkpointer.latest_step or 0
        restored = checkpointer.restore(state)
        if restored is not None:
            state = restored[0]
            log(f"sweep: {unit.name} goes on after iteration {start} of {total}")
        writer = MetricsWriter(place, start)
        try:
            title = f"{unit.name} x{len(unit.members)}"
            every = min(s.train.checkpoint_every, total)
            state = loop.run(
                state, start, step, loop.LoopPlan(title, total, every), checkpointer, writer,
                {"unit": unit.name},
            )  # fmt: skip
        finally:
            writer.close()
    finally:
        checkpointer.close()
    _measure(run, unit, place, world, state, splits)


def _for_members(run: Run, world: World, unit: Unit) -> World:
    """The world with references of each member's own m, where they differ."""
    if unit.study != "m":
        return world
    members = population.padded(unit.members, run.mesh)
    full = world.references
    tokenizer = inputs.load_tokenizer(run)
    samples = reference_files.samples_of(
        run.workdir.train_samples, world.prompts, run.settings.samples.m
    )

    def of(m: int) -> Any:
        table = inputs.references(run, tokenizer, samples, m, unit.method.estimator)
        wide = full.rewards_PxM.shape[1] - m
        return table._replace(
            rewards_PxM=jnp.pad(table.rewards_PxM, ((0, 0), (0, wide)), constant_values=jnp.inf),
            order_PxM=None
            if table.order_PxM is None
            else jnp.pad(table.order_PxM, ((0, 0), (0, wide))),
        )

    tables = [of(m.m) for m in members]
    return world._replace(references=jax.tree.map(lambda *x: jnp.stack(x), *tables))


def _measure(run: Run, unit: Unit, place: Path, world: World, state: Any, splits: Splits) -> None:
    """``rows.jsonl`` of a unit: each member at the training temperature, the matched ones at the
    sweep's temperatures and splits; ``samples.jsonl``: responses of a matched one."""
    s = run.settings
    steps = [record for _, record in jsonl.read(place / "metrics.jsonl")]
    names = ("seconds_rollout", "seconds_reward", "seconds_update")
    seconds = sum(step.get(name, 0.0) for step in steps for name in names) / len(unit.members)
    refused = np.sum([step["refused"] for step in steps], axis=0)
    if refused.any():
        log(
            f"sweep: {unit.name}: {int(np.sum(refused > 0))} of {len(unit.members)} policies had "
            "steps refused because the loss or gradient was not finite (refused_steps in the table)"
        )
    reference = Decoder(world.config, world.reference)
    test = splits.get("test", s.sampling.temperature)
    rate = test.speed(splits.models.reference, 1, True)[0]
    by_beta = unit.label in ("ppo", "dpo")

    def row(i: int, held: heldout.HeldOut, study: str) -> tuple[dict[str, Any], Any]:
        member = unit.members[i]
        policy = inputs.policy_of(reference, population.member(state.params["decoder"], i))
        at = f"{unit.name} {i + 1}/{len(unit.members)} {held.split} T={held.sampling.temperature:g}"
        found, drawn = held.policy(unit.label, member.n, policy, at, member.seed)
        common = {
            "unit": unit.name, "split": held.split, "seed": member.seed, "m": member.m,
            "n": None if by_beta else member.n, "beta": member.beta if by_beta else None,
            "seconds": seconds, "sample_seconds": len(world.prompts) * member.m / rate,
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
                if held.sampling.temperature in s.sweep.temperatures:
                    rows.append(rows[i] | {"study": "temperature"})
            elif held.sampling.temperature in s.sweep.temperatures:
                rows.append(row(i, held, "temperature")[0])
    lines: list[dict[str, Any]] = []
    for i in matched[:1]:
        texts = {unit.label: [[(r.text, r.reward) for r in g] for g in drawn_of[i]]}
        lines = heldout.sample_lines(test, texts)
    _write_lines(place / "samples.jsonl", lines)
    exact = []
    if tabular(s):
        for i, member in enumerate(unit.members):
            policy = inputs.policy_of(reference, population.member(state.params["decoder"], i))
            beta = member.beta if by_beta else None
            n = round(member.n, 6)  # of a beta: 1 / beta + 1
            exact.append(
                heldout.fixed_point(run, splits.models, policy, unit.label, n, beta)
                | {"seed": member.seed, "m": member.m}
            )
    _write_lines(place / "exact.jsonl", exact)
    _write_lines(place / "rows.jsonl", rows)


def tabular(s: Settings) -> bool:
    """Whether the world can be enumerated."""
    return s.data.corpus == "tabular" and not s.data.path and bool(s.reward.function)


def _matched(s: Settings, unit: Unit, rows: Sequence[dict[str, Any]]) -> list[int]:
    """The members that stand for ``method.n``, all seeds: those of that n, or of the beta whose KL
    to the reference comes nearest to best-of-n's."""
    n = s.method.n
    if unit.label not in ("ppo", "dpo"):
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
    root, s = run.workdir.root, run.settings
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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # pids of hosts may agree
    with temporary.open("wb") as file:
        for record in records:
            file.write(jsonl.dump_line(record))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
