"""What config keys must obey together, checked once, at the start."""

import datetime
import json
from collections.abc import Iterable
from typing import Any

from vbon_jax import methods, stages
from vbon_jax.config.groups import Config
from vbon_jax.errors import InputError
from vbon_jax.methods.base import Online
from vbon_jax.training import options

HOTTEST = 100.0  # temperature: beyond it a model's distribution is as good as uniform


def check(config: Config) -> None:
    """Checks what keys must obey together.

    Args:
      config: Whose keys each obey their own rules.

    Raises:
      InputError: Names the keys, their values and what is allowed.
    """
    for of_part in (
        _check_stages, _check_data, _check_models, _check_family, _check_training,
        _check_evaluation, _check_sweep,
    ):  # fmt: skip
        of_part(config)
    for method in methods.METHODS:
        _check_method(config, method)


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise InputError(text)


def _at_most_one_of(values: dict[str, str]) -> None:
    given = [f"{name}={value!r}" for name, value in values.items() if value]
    _require(len(given) <= 1, f"{' and '.join(given)}: set one of them")


def _at_least_1(name: str, values: Iterable[float]) -> None:
    for n in values:
        _require(n >= 1, f"{name} has {n}: it must be at least 1")


def _above_0(name: str, values: Iterable[float]) -> None:
    for value in values:
        _require(value > 0, f"{name} has {value}: it must be above 0")


def _at_most(name: str, values: Iterable[float], most: int, of: str) -> None:
    for n in values:
        _require(n <= most, f"{name} has {n}, more than {of}={most}")


def _check_stages(c: Config) -> None:
    _require(len(c.stages) > 0, f"stages is empty: choose from {', '.join(stages.STAGES)}")
    for stage in c.stages:
        _require(
            stage in stages.STAGES,
            f"stages names {stage!r}: choose from {', '.join(stages.STAGES)}",
        )


def _check_data(c: Config) -> None:
    d, p = c.data, c.prompts
    _at_most_one_of({"data.path": d.path, "data.tfds": d.tfds, "data.hub": d.hub})
    _at_most_one_of({"prompts.path": p.path, "prompts.hub": p.hub})
    _require(
        not d.test_path or bool(d.path),
        f"data.test_path={d.test_path!r} is set but data.path is empty: set both",
    )
    _require(
        p.min_tokens <= p.max_tokens,
        f"prompts.min_tokens={p.min_tokens} is more than prompts.max_tokens={p.max_tokens}",
    )
    _require(
        not (p.hub and p.test_path),
        f"prompts.hub={p.hub!r} and prompts.test_path={p.test_path!r}: held-out prompts are "
        "prompts.test_split of the data set; set one of them",
    )
    from_hub = bool(p.hub) and p.format == "chat"
    _require(
        p.format == "text" or from_hub or bool(p.path and p.test_path),
        f"prompts.format={p.format}: set prompts.path and prompts.test_path to files of it",
    )
    _require(
        p.format != "tldr" or bool(p.subreddits),
        "prompts.subreddits is empty: name what is in distribution for prompts.format=tldr",
    )
    template_arguments(p.template_arguments, "prompts")
    try:
        datetime.date.fromisoformat(p.date or "2000-01-01")
    except ValueError as error:
        raise InputError(f"prompts.date={p.date!r}: write it as YYYY-MM-DD, or leave it out") from (
            error
        )


def _check_models(c: Config) -> None:
    for name, part in (
        ("reference", c.reference),
        ("reward", c.reward),
        ("evaluator", c.evaluator),
    ):
        width, heads = part.model.width, part.model.heads
        _require(
            width % heads == 0,
            f"{name}.model.width={width} is not a multiple of {name}.model.heads={heads}",
        )
    others = {f"reward.others.{name}": other for name, other in c.reward.others.items()}
    for name, score in {"reward": c.reward, "evaluator": c.evaluator, **others}.items():
        _at_most_one_of({f"{name}.path": score.path, f"{name}.function": score.function})
        template_arguments(score.template_arguments, name)
    for name, other in others.items():
        _require(
            bool(other.path or other.function), f"{name}.path and .function are empty: set one"
        )


def _check_family(c: Config) -> None:
    """Checks what a family of policies over n needs, and which n it is measured at."""
    _require(
        c.method.is_family or not c.evaluate.n,
        f"evaluate.n={c.evaluate.n}: method.n={c.method.n} is of one policy; leave it empty, or "
        "set method.n to two numbers",
    )
    if not isinstance(c.method.n, tuple):
        return
    options.check_family(c.method.n, c.method.name, c.train, c.lora, c.memory)
    grids = [s.label for m in methods.METHODS for s in m.series if getattr(c.sweep, s.label)]
    _require(
        not (grids or c.sweep.m or "sweep" in c.stages),
        f"method.n={c.method.n} is of one policy for every n, and a sweep trains one for each: "
        "leave the sweep out, or set method.n to a number",
    )
    for n in c.evaluate.n:
        _require(
            1 <= n <= c.method.top,
            f"evaluate.n has {n:g}: it must be from 1 to {c.method.top:g}, as method.n="
            f"{c.method.n} is trained",
        )
    _require(
        c.export.form == "model",
        "export.form=adapter: the policies of a family are whole models, one for each --n; set "
        "export.form=model",
    )


def _check_training(c: Config) -> None:
    _require(
        c.samples.amortised or not c.samples.prompts,
        f"samples.prompts={c.samples.prompts} leaves prompts without samples: set "
        "samples.amortised=True, whose head knows their log F, or samples.prompts=0",
    )
    options.check(c.train, c.lora, c.memory)
    options.check_lookahead(c.train, c.method.ties)
    if c.method.name == "vbon":
        options.check_forward(c.train, c.method.objective)
    _require(
        c.export.form == "model" or c.lora.rank > 0,
        f"export.form=adapter needs adapters: set lora.rank, which is {c.lora.rank}",
    )
    name = c.method.name
    _require(
        c.memory.accumulate == 1
        or (name != methods.BEST_OF_N and methods.of_config(c).microbatches),
        f"memory.accumulate={c.memory.accumulate}: {name} is trained without microbatches; set 1",
    )
    _require(
        c.train.value_network != "reward" or not c.reward.function,
        f"train.value_network=reward starts from a reward model, but reward.function="
        f"{c.reward.function!r} is none: set train.value_network=head",
    )


def _check_evaluation(c: Config) -> None:
    temperatures = c.evaluate.temperatures
    _require(len(temperatures) > 0, "evaluate.temperatures is empty: give at least one")
    _require(
        len(set(temperatures)) == len(temperatures),
        f"evaluate.temperatures={temperatures} names one twice",
    )
    for temperature in temperatures:
        _require(
            0 < temperature <= HOTTEST,
            f"evaluate.temperatures has {temperature!r}: each must be a number above 0, "
            f"at most {HOTTEST:g}",
        )
    _above_0("sweep.temperatures", c.sweep.temperatures)
    for m in c.convergence.m:
        _require(
            1 <= m < c.convergence.m_full,
            f"convergence.m has {m}: each must be at least 1 and below "
            f"convergence.m_full={c.convergence.m_full}",
        )


def _check_sweep(c: Config) -> None:
    _at_least_1("sweep.bon", c.sweep.bon)
    _at_most("sweep.bon", c.sweep.bon, c.evaluate.m, "evaluate.m")
    _at_least_1("sweep.m", c.sweep.m)
    _at_most("sweep.m", c.sweep.m, c.samples.m, "samples.m")


def _check_method(c: Config, method: methods.Method) -> None:
    """Checks what a method cannot do, alone or in a sweep."""
    chosen = c.method.name == method.name and method.when(c)
    grids = [(s, v) for s in method.series if (v := getattr(c.sweep, s.label))]
    if chosen:
        n, m = c.method.top, c.samples.m
        _require(
            not method.whole_n or (n.is_integer() and n <= m),
            f"method.n={n:g}: {method.name} takes the best of a whole number n of the samples.m="
            f"{m} stored ones",
        )
        _require(not method.check_n(n), f"method.n={n:g}: {method.check_n(n)}")
        _require(not (wrong := method.check(method.from_config(c))), wrong)
        if isinstance(method.learns, Online):
            objective = method.learns.objective(method.from_config(c))
            options.check_stored(c.train, objective, method.name)
    for series, values in grids:
        key = f"sweep.{series.label}"
        if series.varies == "beta":
            _above_0(key, values)
            continue
        for n in values:
            _require(not method.check_n(n), f"{key}={n:g}: {method.check_n(n)}")
        _at_least_1(key, values)
        if method.whole_n:
            _at_most(key, values, c.samples.m, "samples.m")
    if (chosen or grids) and not method.online:
        _require(not (wrong := method.check_samples(c.offline, c.samples.m)), wrong)
    if (chosen or grids) and not (method.online and c.train.start == options.REFERENCE):
        _check_offline(c)
    if (chosen or grids) and c.samples.adaptive:
        _check_adaptive(c, method, grids)
    if (chosen or grids) and c.samples.amortised:
        _check_amortised(c, method, grids)


def _check_adaptive(c: Config, method: methods.Method, grids: list[tuple[Any, Any]]) -> None:
    """Checks that nothing asks for samples.m samples of every prompt, and the n of the band."""
    estimators = {getattr(c.sweep, f"{series.label}_estimator", "") for series, _ in grids}
    for key, wrong in (
        ("samples.path", c.samples.path != ""),
        ("train.start", c.train.start != options.REFERENCE),
        ("train.replay", c.train.replay > 0),
        ("sweep.m", c.sweep.m != ()),
        ("method.name", not method.online),
        ("method.estimator", c.method.estimator == "exponential"),
        ("its estimator in the sweep", "exponential" in estimators),
    ):
        _require(
            not wrong,
            f"samples.adaptive={c.samples.adaptive:g} leaves prompts with fewer than samples.m="
            f"{c.samples.m} samples, and {key} needs all: set samples.adaptive=0, or leave {key} "
            "as it is by default",
        )
    of_grids = [v for series, values in grids if series.varies == "n" for v in values]
    for n in (c.method.top, *of_grids):
        _require(
            n <= c.samples.adaptive_n,
            f"samples.adaptive_n={c.samples.adaptive_n:g}: n={n:g} is trained for, whose band is "
            f"wider: give at least {n:g}",
        )


def _check_amortised(c: Config, method: methods.Method, grids: list[tuple[Any, Any]]) -> None:
    """Checks that log F is read, by ranks, and samples only of prompts that have them."""
    s = c.samples
    estimators = {getattr(c.sweep, f"{series.label}_estimator", "") for series, _ in grids}
    for key, value, wrong in (
        ("samples.m", s.m, s.m < 2),
        ("method.ties", c.method.ties, c.method.ties != "random"),
        ("method.estimator", c.method.estimator, c.method.estimator == "exponential"),
        ("its estimator in the sweep", "exponential", "exponential" in estimators),
        ("sweep.m", c.sweep.m, c.sweep.m != ()),
        ("method.name", method.name, not method.online),
    ):
        _require(
            not wrong,
            f"samples.amortised=True does not go with {key}={value}: its log F needs 2 samples of "
            "a prompt to be held against, ties at random and an estimator of ranks, and a method "
            "that reads it; set samples.amortised=False, or change that key",
        )
    for key, value, wrong in (
        ("samples.path", s.path, s.path != ""),
        ("train.start", c.train.start, c.train.start != options.REFERENCE),
        ("train.replay", c.train.replay, c.train.replay > 0),
    ):
        _require(
            not (s.prompts and wrong),
            f"samples.prompts={s.prompts} leaves prompts without samples, and {key}={value} needs "
            f"some of all: set samples.prompts=0, or leave {key} as it is by default",
        )


def _check_offline(c: Config) -> None:
    """Checks what the methods that learn from stored samples share."""
    o = c.offline
    if c.samples.path or c.prompts.path or c.prompts.hub:
        return  # which bring their own number of prompts
    examples = o.pairs * c.prompts.train
    _require(
        examples >= o.batch_size,
        f"offline.batch_size={o.batch_size} is more than the {examples} examples of "
        f"prompts.train={c.prompts.train} x offline.pairs={o.pairs}: lower it",
    )


def template_arguments(text: str, group: str) -> dict[str, Any]:
    """Reads the key ``template_arguments`` of a group.

    Args:
      text: A JSON object; empty for none.
      group: The group, for the message: "prompts".

    Returns:
      Arguments of the chat template by name.

    Raises:
      InputError: The text is no JSON object.
    """
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise InputError(f"{group}.template_arguments={text!r}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{group}.template_arguments={text!r}: must be a JSON object")
    return value
