"""Every configuration key, its type and what it means; checked once, at the start.

A config file (``configs/*.py``) is data: it must give each key below, and no other. The command
line turns it into these frozen dataclasses, and nothing below the stages sees the config itself.
"""

import dataclasses
import json
import math
from typing import Any

from vbon_jax.bon.distribution import OBJECTIVES
from vbon_jax.bon.log_f import ESTIMATORS
from vbon_jax.data import tokenizer
from vbon_jax.errors import InputError
from vbon_jax.rewards import classifier

STAGES = ("sft", "reward", "sample", "train", "export", "evaluate")
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


@dataclasses.dataclass(frozen=True)
class PromptSet:
    path: str = key('training prompts, one `{"prompt"}` a line; empty takes prefixes of the texts')
    test_path: str = key("held-out prompts of the same form; empty takes prefixes of held-out text")
    train: int = key("number of training prompts", least=1)
    test: int = key("number of held-out prompts", least=2)
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
    name: str = key("name of the trained policy in tables and figures")
    objective: str = key("exact, lower_bound, jensen_bound or reward", choices=OBJECTIVES)
    n: float = key("n of best-of-n; any real number at least 1", least=1)
    beta: float = key("KL coefficient of the `reward` objective; 1/(n-1) matches n", above=0)
    estimator: str = key("of log F, or for `interval` of the density ratio itself",
                         choices=ESTIMATORS)  # fmt: skip


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
    sampling: Sampling = group()
    samples: Samples = group()
    method: Method = group()
    train: Train = group()
    evaluate: Evaluate = group()
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
        m.estimator not in ("strict", "interval") or m.objective in ("exact", "reward"),
        f"method.estimator={m.estimator} gives no finite log F for "
        f"method.objective={m.objective}: choose smoothed or harmonic",
    )
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
    for name, model in (("reference", s.reference.model), ("reward", s.reward.model)):
        refuse(
            model.width % model.heads == 0,
            f"{name}.model.width={model.width} is not a multiple of "
            f"{name}.model.heads={model.heads}",
        )
    refuse(
        not (s.reward.path and s.reward.function),
        f"reward.path={s.reward.path!r} and reward.function={s.reward.function!r}: set one of them",
    )
    refuse(
        not s.data.test_path or bool(s.data.path),
        f"data.test_path={s.data.test_path!r} is set but data.path is empty: set both",
    )


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
