"""What settings must obey together, checked once at the start with the keys themselves."""

import math
from collections.abc import Callable
from typing import Any

from vbon_jax.config import HOTTEST, OFFLINE, STAGES, Settings, Sweep, template_arguments
from vbon_jax.errors import InputError
from vbon_jax.models import trainable


def check(s: Settings) -> None:
    """Raises InputError on what no single key can tell, naming the keys and their values."""

    def refuse(unless: bool, text: str) -> None:
        if not unless:
            raise InputError(text)

    for stage in s.stages:
        refuse(stage in STAGES, f"stages names {stage!r}: choose from {', '.join(STAGES)}")
    t, p, m = s.train, s.prompts, s.method
    refuse(
        t.batch_size % t.minibatch_size == 0,
        f"train.batch_size={t.batch_size} is not a multiple of "
        f"train.minibatch_size={t.minibatch_size}",
    )
    refuse(
        p.min_tokens <= p.max_tokens,
        f"prompts.min_tokens={p.min_tokens} is more than prompts.max_tokens={p.max_tokens}",
    )
    refuse(
        m.estimator not in ("strict", "interval") or m.objective == "exact",
        f"method.estimator={m.estimator} gives no finite log F for "
        f"method.objective={m.objective}: choose smoothed, harmonic or exponential",
    )
    _check_methods(s, refuse)
    _check_large(s, refuse)
    refuse(len(s.stages) > 0, f"stages is empty: choose from {', '.join(STAGES)}")
    temperatures = s.evaluate.temperatures
    refuse(len(temperatures) > 0, "evaluate.temperatures is empty: give at least one")
    refuse(
        len(set(temperatures)) == len(temperatures),
        f"evaluate.temperatures={temperatures} names one twice",
    )
    for temperature in s.evaluate.temperatures:
        number = float(temperature) if isinstance(temperature, float) else math.nan
        refuse(
            0 < number <= HOTTEST,
            f"evaluate.temperatures has {temperature!r}: each must be a number above 0, "
            f"at most {HOTTEST:g}",
        )
    for name, model in (
        ("reference", s.reference.model),
        ("reward", s.reward.model),
        ("evaluator", s.evaluator.model),
    ):
        refuse(
            model.width % model.heads == 0,
            f"{name}.model.width={model.width} is not a multiple of "
            f"{name}.model.heads={model.heads}",
        )
    others = {f"reward.others.{name}": part for name, part in s.reward.others.items()}
    scores: dict[str, Any] = {"reward": s.reward, "evaluator": s.evaluator, **others}
    for name, r in scores.items():
        refuse(
            not (r.path and r.function),
            f"{name}.path={r.path!r} and {name}.function={r.function!r}: set one of them",
        )
    for name, part in others.items():
        refuse(bool(part.path or part.function), f"{name}.path and .function are empty: set one")
    refuse(
        not (s.data.path and s.data.tfds),
        f"data.path={s.data.path!r} and data.tfds={s.data.tfds!r}: set one of them",
    )
    refuse(
        p.format == "text" or bool(p.path and p.test_path),
        f"prompts.format={p.format}: set prompts.path and prompts.test_path to files of it",
    )
    refuse(
        p.format != "tldr" or bool(p.subreddits),
        "prompts.subreddits is empty: name what is in distribution for prompts.format=tldr",
    )
    template_arguments(p.template_arguments)
    refuse(
        not s.data.test_path or bool(s.data.path),
        f"data.test_path={s.data.test_path!r} is set but data.path is empty: set both",
    )


def _check_methods(s: Settings, refuse: Callable[[bool, str], None]) -> None:
    """What the methods, and a sweep over them, cannot do."""
    m, o, w = s.method, s.offline, s.sweep
    if m.name in ("bon_sft", "bonbon"):
        refuse(
            m.n.is_integer() and m.n <= s.samples.m,
            f"method.n={m.n:g}: {m.name} takes the best of a whole number n of the samples.m="
            f"{s.samples.m} stored ones",
        )
    for name, n in (("method.n", m.n if m.name == "bonbon" else 2), *_named("sweep.bonbon", w)):
        refuse(n >= 2, f"{name}={n:g}: bonbon needs a best and a worst, n of at least 2")
    for name, n in (("method.n", m.n if m.name == "bond" else 2), *_named("sweep.bond", w)):
        refuse(n > 1, f"{name}={n:g}: bond has the KL coefficient 1/(n-1), so n must be above 1")
    for key in ("sweep.bonbon", "sweep.bon_sft"):
        for name, n in _named(key, w):
            refuse(n <= s.samples.m, f"{name} has {n}, more than samples.m={s.samples.m}")
    for name, n in _named("sweep.bon", w):
        refuse(n <= s.evaluate.m, f"{name} has {n}, more than evaluate.m={s.evaluate.m}")
    for key in ("sweep.bon", "sweep.vbon", "sweep.lower_bound", "sweep.bon_sft", "sweep.m"):
        for name, n in _named(key, w):
            refuse(n >= 1, f"{name} has {n}: it must be at least 1")
    for name, m_less in _named("sweep.m", w):
        refuse(m_less <= s.samples.m, f"{name} has {m_less}, more than samples.m={s.samples.m}")
    for key in ("sweep.ppo", "sweep.dpo", "sweep.temperatures"):
        for name, value in _named(key, w):
            refuse(value > 0, f"{name} has {value}: it must be above 0")
    most = o.responses * (o.responses - 1) // 2
    no_dpo = m.name != "dpo" and not w.dpo
    refuse(
        o.pairs <= most or no_dpo,
        f"offline.pairs={o.pairs} is more than the {most} pairs of offline.responses={o.responses}",
    )
    refuse(
        o.responses <= s.samples.m or no_dpo,
        f"offline.responses={o.responses} is more than samples.m={s.samples.m}",
    )
    offline = m.name in OFFLINE or w.dpo or w.bonbon or w.bon_sft
    # Samples made elsewhere bring their own number of prompts.
    examples = o.pairs * s.prompts.train
    refuse(
        not offline or bool(s.samples.path or s.prompts.path) or examples >= o.batch_size,
        f"offline.batch_size={o.batch_size} is more than the {examples} examples of "
        f"prompts.train={s.prompts.train} x offline.pairs={o.pairs}: lower it",
    )
    for m_less in s.convergence.m:
        refuse(
            1 <= m_less < s.convergence.m_full,
            f"convergence.m has {m_less}: each must be at least 1 and below "
            f"convergence.m_full={s.convergence.m_full}",
        )


def _check_large(s: Settings, refuse: Callable[[bool, str], None]) -> None:
    """What does not go together of the ways to fit large models."""
    t, method = s.train, s.method.name
    refuse(t.num_layers_unfrozen != 0, "train.num_layers_unfrozen=0 trains nothing: -1 trains all")
    refuse(
        not s.lora.rank or t.num_layers_unfrozen == -1,
        f"lora.rank={s.lora.rank} and train.num_layers_unfrozen={t.num_layers_unfrozen}: adapters "
        "are on every layer, so set train.num_layers_unfrozen=-1, or lora.rank=0",
    )
    for target in s.lora.targets:
        refuse(
            target in trainable.TARGETS,
            f"lora.targets names {target!r}: choose from {', '.join(trainable.TARGETS)}",
        )
    refuse(not s.lora.rank or bool(s.lora.targets), "lora.targets is empty: name at least one")
    refuse(
        s.export.form == "model" or s.lora.rank > 0,
        f"export.form=adapter needs adapters: set lora.rank, which is {s.lora.rank}",
    )
    refuse(
        t.minibatch_size % s.memory.accumulate == 0,
        f"memory.accumulate={s.memory.accumulate} does not divide "
        f"train.minibatch_size={t.minibatch_size}",
    )
    online = method in ("vbon", "ppo") or (method == "bond" and s.bond.form == "backward")
    refuse(
        s.memory.accumulate == 1 or online,
        f"memory.accumulate={s.memory.accumulate}: {method} is trained without microbatches; set 1",
    )
    refuse(
        t.value_network == "head" or not s.reward.function,
        f"train.value_network=reward starts from a reward model, but reward.function="
        f"{s.reward.function!r} is none: set train.value_network=head",
    )


def _named(key: str, sweep: Sweep) -> list[tuple[str, Any]]:
    return [(key, value) for value in getattr(sweep, key.removeprefix("sweep."))]
