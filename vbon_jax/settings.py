"""Every configuration key, its type and what it means; checked once, at the start.

A config file (``configs/*.py``) is data: it must give each key below, and no other. The command
line turns it into these frozen dataclasses, and nothing below the stages sees the config itself.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from vbon_jax.bon.log_f import ESTIMATORS, TIES
from vbon_jax.data import tokenizer
from vbon_jax.errors import InputError
from vbon_jax.rewards import classifier

STAGES = (
    "sft", "reward", "evaluator", "sample", "train", "export", "evaluate", "convergence", "sweep",
    "report",
)  # fmt: skip
ONLINE = ("vbon", "ppo", "bond")
OFFLINE = ("bon_sft", "dpo", "bonbon")
METHODS = ("bon", *ONLINE, *OFFLINE)
CORPORA = ("reviews", "tabular")
HOTTEST = 100.0  # temperature: beyond it a model's distribution is as good as uniform


def key(doc: str, **rules: Any) -> Any:
    """A config key: its meaning, and rules its value obeys.

    Rules: ``least`` and ``most`` (inclusive), ``above`` and ``below`` (exclusive), ``choices``.
    """
    return dataclasses.field(metadata={"doc": doc, **rules})


def group() -> Any:
    """A group of keys below a name of its own."""
    return dataclasses.field()


@dataclasses.dataclass(frozen=True)
class Data:
    corpus: str = key("embedded corpus used when `data.path` is empty", choices=CORPORA)
    path: str = key('labelled text, one `{"text", "label"}` a line; empty for the corpus')
    test_path: str = key("held-out text of the same form; empty holds out a tenth of `data.path`")
    train: int = key("texts the corpus writes for training", least=1)
    test: int = key("texts the corpus writes for the held-out split", least=1)
    ood: int = key("reviews of film genres that no other split has; 0 for none", least=0)


@dataclasses.dataclass(frozen=True)
class PromptSet:
    path: str = key('training prompts, one `{"prompt"}` a line; empty takes prefixes of the texts')
    test_path: str = key("held-out prompts of the same form; empty takes prefixes of held-out text")
    ood_path: str = key("out-of-distribution prompts of the same form; empty takes prefixes that "
                        "name a genre no training text has")  # fmt: skip
    train: int = key("number of training prompts", least=1)
    test: int = key("number of held-out prompts", least=2)
    ood: int = key("number of out-of-distribution prompts; 0 for none", least=0)
    min_tokens: int = key("shortest prefix, tokens", least=1)
    max_tokens: int = key("longest prefix, tokens", least=1)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    path: str = key("Hugging Face directory; empty learns one, or takes the reference model's own")
    kind: str = key("what is learned: byte-level BPE, or one token a character",
                    choices=tokenizer.KINDS)  # fmt: skip
    vocab_size: int = key("largest vocabulary learned, entries", least=1)


@dataclasses.dataclass(frozen=True)
class Model:
    layers: int = key("transformer blocks", least=1)
    width: int = key("model dimension", least=1)
    heads: int = key("attention heads; divides the width", least=1)
    positions: int = key("longest sequence, tokens", least=2)


@dataclasses.dataclass(frozen=True)
class Fit:
    epochs: int = key("passes over the texts", least=1)
    batch_size: int = key("texts an update", least=1)
    learning_rate: float = key("AdamW peak rate; linear warm-up over 5%, then cosine to 0", above=0)
    weight_decay: float = key("AdamW decay", least=0)
    max_tokens: int = key("texts are cut to this length, EOS included", least=2)


@dataclasses.dataclass(frozen=True)
class Reference:
    path: str = key("Hugging Face GPT-2 directory; empty trains one on the texts")
    model: Model = group()
    fit: Fit = group()


@dataclasses.dataclass(frozen=True)
class Reward:
    path: str = key("Hugging Face GPT-2 sequence classifier; empty trains one on the labels")
    function: str = key('a Python callable "module:function"; empty for a classifier')
    label: str = key("the label whose score is the reward")
    score: str = key("the score: the label's logit, its log odds, or its probability",
                     choices=classifier.KINDS)  # fmt: skip
    model: Model = group()
    fit: Fit = group()


@dataclasses.dataclass(frozen=True)
class Evaluator:
    train: bool = key("train one, on texts and a seed of its own; without path or function, False "
                      "means none")  # fmt: skip
    path: str = key("a second reward that only measures: Hugging Face GPT-2 sequence classifier")
    function: str = key('or a Python callable "module:function"')
    label: str = key("the label whose score it gives")
    score: str = key("as `reward.score`", choices=classifier.KINDS)
    model: Model = group()
    fit: Fit = group()


@dataclasses.dataclass(frozen=True)
class Sampling:
    temperature: float = key("of rollouts and reference samples, and so of every log-prob", above=0)
    max_new_tokens: int = key("longest response, tokens, EOS included", least=1)
    stop_at_eos: bool = key("False: no EOS, every response has exactly max_new_tokens tokens")
    batch_size: int = key("responses drawn at once outside training", least=1)


@dataclasses.dataclass(frozen=True)
class Samples:
    m: int = key("reference responses a prompt behind log F", least=1)
    path: str = key("a samples file made elsewhere, in place of drawing the training samples")


@dataclasses.dataclass(frozen=True)
class Method:
    name: str = key("vbon, ppo, bond, bon_sft, dpo or bonbon; bon trains nothing", choices=METHODS)
    objective: str = key("of vbon: the exact one or one of its bounds",
                         choices=("exact", "lower_bound", "jensen_bound"))  # fmt: skip
    n: float = key("n of best-of-n; any real number at least 1 (whole for bon_sft and bonbon)",
                   least=1)  # fmt: skip
    beta: float = key("KL coefficient of ppo and dpo; 1/(n-1) matches n", above=0)
    estimator: str = key("of log F, or for `interval` of the density ratio itself",
                         choices=ESTIMATORS)  # fmt: skip
    ties: str = key("how best-of-n chooses among equal rewards: at random, or by a fixed order "
                    "(pairs of dpo and bonbon: at random)",
                    choices=TIES)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Bond:
    form: str = key("jeffreys: iterated, with a moving anchor; backward: against the reference",
                    choices=("jeffreys", "backward"))  # fmt: skip
    jeffreys: float = key("weight of the forward KL; the backward KL has the rest", least=0, most=1)
    anchor_rate: float = key("the anchor moves this share of the way to the policy, each iteration",
                             least=0, most=1)  # fmt: skip
    beta: float = key("extra KL coefficient towards the anchor, in the backward part", least=0)


@dataclasses.dataclass(frozen=True)
class Offline:
    responses: int = key("of dpo: responses a prompt that its pairs are made of", least=2)
    pairs: int = key("pairs (of bon_sft: winners) a prompt and pass over them", least=1)
    labels: str = key("of dpo: hard, or soft with sigmoid(reward difference)",
                      choices=("hard", "soft"))  # fmt: skip
    epochs: int = key("passes over the pairs", least=1)
    batch_size: int = key("pairs a gradient step", least=1)
    learning_rate: float = key("AdamW rate, falling linearly to 0", above=0)


@dataclasses.dataclass(frozen=True)
class Train:
    iterations: int = key("rollout batches; episodes = iterations x batch_size", least=1)
    batch_size: int = key("responses a rollout", least=1)
    minibatch_size: int = key("responses a gradient step; divides batch_size", least=1)
    ppo_epochs: int = key("passes over a rollout", least=1)
    learning_rate: float = key("AdamW rate, falling linearly to 0", above=0)
    adam_eps: float = key("AdamW epsilon", above=0)
    weight_decay: float = key("AdamW decay", least=0)
    max_grad_norm: float = key("gradients are clipped to this global norm", above=0)
    clip_policy: float = key("PPO's clip of the probability ratio", above=0, below=1)
    clip_value: float = key("clip of the value's move", above=0)
    value_coef: float = key("weight of the value loss", least=0)
    gamma: float = key("discount", least=0, most=1)
    lam: float = key("lambda of GAE", least=0, most=1)
    whiten: bool = key("advantages to zero mean and unit variance over a rollout")
    penalty: str = key("KL penalty by the sampled token's log-ratio, or by the full distribution",
                       choices=("sampled", "full"))  # fmt: skip
    checkpoint_every: int = key("iterations between checkpoints", least=1)
    keep: int = key("checkpoints kept", least=1)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    temperatures: tuple[float, ...] = key("each gets its own rows")
    m: int = key("fresh reference rewards a held-out prompt", least=1)
    samples_per_prompt: int = key("responses a held-out prompt from policy and best-of-n", least=1)


@dataclasses.dataclass(frozen=True)
class Convergence:
    prompts: int = key("held-out prompts that are looked at", least=1)
    m: tuple[int, ...] = key("numbers of samples held against `convergence.m_full`")
    m_full: int = key("samples a prompt that stand for the truth", least=2)
    level: float = key("level of the Kolmogorov-Smirnov test", above=0, below=1)


@dataclasses.dataclass(frozen=True)
class Sweep:
    bon: tuple[int, ...] = key("n of best-of-n itself, read off the pool of fresh samples")
    vbon: tuple[float, ...] = key("n of vbon, exact objective; empty leaves a method out")
    lower_bound: tuple[float, ...] = key("n of vbon, lower bound")
    lower_bound_estimator: str = key("of its log F, which must be finite",
                                     choices=("smoothed", "harmonic", "exponential"))  # fmt: skip
    ppo: tuple[float, ...] = key("beta of ppo")
    dpo: tuple[float, ...] = key("beta of dpo")
    bonbon: tuple[int, ...] = key("n of bonbon")
    bon_sft: tuple[int, ...] = key("n of bon_sft")
    bond: tuple[float, ...] = key("n of bond, in its backward form")
    m: tuple[int, ...] = key("m of vbon at `method.n`, all but `samples.m` trained once more")
    temperatures: tuple[float, ...] = key(
        "each method, matched to `method.n`, is measured at these"
    )
    temperature_m: int = key("as `evaluate.m`, at these temperatures and out of distribution",
                             least=1)  # fmt: skip
    seeds: int = key("seeds of each setting", least=1)
    at_once: int = key("policies vmapped on a device, the others following in the same program; "
                       "0 for all: best on GPU and TPU, 1 on CPU", least=0)  # fmt: skip
    stale_seconds: float = key("a worker unheard of for so long has lost its piece", above=0)


@dataclasses.dataclass(frozen=True)
class Generate:
    model: str = key(
        "policy, reference or bon (true best-of-n)", choices=("policy", "reference", "bon")
    )
    count: int = key("responses a prompt", least=1)
    temperature: float = key("of generation", above=0)
    top_k: int = key("keep the k likeliest tokens; 0 keeps all", least=0)
    top_p: float = key("keep the smallest set of this mass; 1 keeps all", above=0, most=1)


@dataclasses.dataclass(frozen=True)
class MeshShape:
    data: int = key("devices that split the batch; -1 takes all that remain")
    fsdp: int = key("devices that split batch and parameters; -1 likewise")
    tensor: int = key("devices that split heads, MLP columns and vocabulary; -1 likewise")


@dataclasses.dataclass(frozen=True)
class Settings:
    seed: int = key("every random number of the run follows from it", least=0, most=2**32 - 1)
    stages: tuple[str, ...] = key(f"what `vbon run` does, in order: {', '.join(STAGES)}")
    data: Data = group()
    prompts: PromptSet = group()
    tokenizer: Tokenizer = group()
    reference: Reference = group()
    reward: Reward = group()
    evaluator: Evaluator = group()
    sampling: Sampling = group()
    samples: Samples = group()
    method: Method = group()
    bond: Bond = group()
    train: Train = group()
    offline: Offline = group()
    evaluate: Evaluate = group()
    convergence: Convergence = group()
    sweep: Sweep = group()
    generate: Generate = group()
    mesh: MeshShape = group()


def parse(values: dict[str, Any]) -> Settings:
    """Settings from the plain dict of a config.

    Raises InputError naming the key, its value and what is allowed.
    """
    settings = _build(Settings, values, "config")
    _check_across(settings)
    return settings


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where}={values!r}: must be a group of keys")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = "" if where == "config" else f"{where}."
    unknown, missing = set(values) - set(fields), set(fields) - set(values)
    if unknown:
        raise InputError(
            f"unknown config key {prefix}{sorted(unknown)[0]}: allowed here are "
            + ", ".join(f"{prefix}{name}" for name in fields)
        )
    if missing:
        raise InputError(
            f"config key {prefix}{sorted(missing)[0]} is missing: the file must set it"
        )
    built = {
        name: _build(f.type, values[name], prefix + name)
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type)
        else _value(f, values[name], prefix + name)
        for name, f in fields.items()
    }
    return cls(**built)


def _value(f: dataclasses.Field, value: Any, where: str) -> Any:
    rules = f.metadata
    value = _coerced(f, value)
    if f.type in (tuple[int, ...], tuple[float, ...]) and isinstance(value, tuple):
        for entry in value:
            right = _is_int(entry) if f.type == tuple[int, ...] else isinstance(entry, float)
            if not right or not math.isfinite(entry):
                kind = "whole numbers" if f.type == tuple[int, ...] else "finite numbers"
                raise InputError(f"{where} has {entry!r}: it must hold {kind}")
    expected = f.type if isinstance(f.type, type) else tuple
    if not isinstance(value, expected) or (expected is int and not _is_int(value)):
        raise InputError(f"{where}={value!r}: must be {getattr(expected, '__name__', expected)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}={value!r}: must be a finite number")
    for rule, holds, text in (
        ("least", lambda a: value >= a, "at least"),
        ("most", lambda a: value <= a, "at most"),
        ("above", lambda a: value > a, "above"),
        ("below", lambda a: value < a, "below"),
    ):
        if rule in rules and not holds(rules[rule]):
            raise InputError(f"{where}={value!r}: must be {text} {rules[rule]}")
    if "choices" in rules and value not in rules["choices"]:
        raise InputError(f"{where}={value!r}: choose one of {', '.join(rules['choices'])}")
    return value


def _coerced(f: dataclasses.Field, value: Any) -> Any:
    """Whole numbers as floats where floats are meant, lists as tuples."""
    if f.type is float and _is_int(value):
        return float(value)
    if isinstance(value, list | tuple):
        floats = f.type == tuple[float, ...]
        return tuple(float(v) if floats and _is_int(v) else v for v in value)
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_across(s: Settings) -> None:
    """What no single key can tell."""

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
    for name, r in (("reward", s.reward), ("evaluator", s.evaluator)):
        refuse(
            not (r.path and r.function),
            f"{name}.path={r.path!r} and {name}.function={r.function!r}: set one of them",
        )
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


def _named(key: str, sweep: Sweep) -> list[tuple[str, Any]]:
    return [(key, value) for value in getattr(sweep, key.removeprefix("sweep."))]


def as_dict(settings: Any) -> dict[str, Any]:
    """Settings, or a part of them, as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat


def reference_rows() -> list[tuple[str, str]]:
    """(key, meaning) of every config key, in order: what the README's table shows."""

    def rows(cls: type, prefix: str) -> list[tuple[str, str]]:
        out: list[tuple[str, str]] = []
        for f in dataclasses.fields(cls):
            if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
                out += rows(f.type, f"{prefix}{f.name}.")
            else:
                out.append((prefix + f.name, f.metadata["doc"]))
        return out

    return rows(Settings, "")
