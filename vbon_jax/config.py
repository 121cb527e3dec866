"""Every configuration key, its type and what it means; checked once, at the start.

A config file (``configs/*.py``) is data: it must give each key below, and no other. The command
line turns it into these frozen dataclasses, and nothing below the stages sees the config itself.
"""

import dataclasses
import json
import math
from typing import Any

from vbon_jax.bon.log_f import ESTIMATORS, TIES
from vbon_jax.data import tokenizer
from vbon_jax.errors import InputError
from vbon_jax.models import trainable
from vbon_jax.models.config import DTYPES, REMAT
from vbon_jax.rewards import classifier

STAGES = (
    "sft", "reward", "evaluator", "sample", "train", "export", "evaluate", "convergence", "sweep",
    "report",
)  # fmt: skip
ONLINE = ("vbon", "ppo", "bond")
OFFLINE = ("bon_sft", "dpo", "bonbon")
METHODS = ("bon", *ONLINE, *OFFLINE)
CORPORA = ("reviews", "tabular")
FORMATS = ("text", "tldr", "chat")
MISSING_EOS = ("none", "replace", "subtract")
HOTTEST = 100.0  # temperature: beyond it a model's distribution is as good as uniform


def key(doc: str, **rules: Any) -> Any:
    """A config key: its meaning, and rules its value obeys.

    Rules: ``least`` and ``most`` (inclusive), ``above`` and ``below`` (exclusive), ``choices``.
    """
    return dataclasses.field(metadata={"doc": doc, **rules})


def named(cls: type, doc: str) -> Any:
    """Any number of groups of keys, each under a name the user chooses."""
    return dataclasses.field(metadata={"doc": doc, "of": cls})


def group() -> Any:
    """A group of keys below a name of its own."""
    return dataclasses.field()


@dataclasses.dataclass(frozen=True)
class Data:
    corpus: str = key("embedded corpus used when `data.path` is empty", choices=CORPORA)
    path: str = key('labelled text, one `{"text", "label"}` a line; empty for the corpus')
    tfds: str = key("or a TensorFlow Datasets name with features text and label: imdb_reviews")
    tfds_dir: str = key("where it is prepared, as array_record; empty for the library's default")
    test_path: str = key("held-out text of the same form; empty holds out a tenth of `data.path`")
    train: int = key("texts the corpus writes for training", least=1)
    test: int = key("texts the corpus writes for the held-out split", least=1)
    ood: int = key("reviews of film genres that no other split has; 0 for none", least=0)


@dataclasses.dataclass(frozen=True)
class PromptSet:
    format: str = key('of the files: text, `{"prompt"}` a line; tldr, the public TL;DR layout; '
                      'chat, `{"messages"}` or `{"prompt"}`, by the tokenizer\'s template',
                      choices=FORMATS)  # fmt: skip
    path: str = key("training prompts; empty takes prefixes of the texts")
    test_path: str = key("held-out prompts of the same form; empty takes prefixes of held-out text")
    ood_path: str = key("out-of-distribution prompts of the same form; empty takes prefixes that "
                        "name a genre no training text has")  # fmt: skip
    train: int = key("number of training prompts", least=1)
    test: int = key("number of held-out prompts", least=2)
    ood: int = key("number of out-of-distribution prompts; 0 for none", least=0)
    min_tokens: int = key("shortest prefix, tokens", least=1)
    max_tokens: int = key("longest prefix, tokens", least=1)
    longest: int = key("longest prompt of a tldr file (cut, as in the data set's own code) or of a "
                       "chat file (refused), tokens", least=1)  # fmt: skip
    subreddits: tuple[str, ...] = key("of tldr: what is in distribution; all other is not")
    gap: str = key(
        "of tldr: what stands between subreddit, title, post and TL;DR, a newline or two"
    )
    template_arguments: str = key("of chat: arguments of the template, as JSON: "
                                  '`{"enable_thinking": false}`')  # fmt: skip


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
    path: str = key("Hugging Face directory or hub name; empty trains a GPT-2 on the texts")
    model: Model = group()
    fit: Fit = group()


@dataclasses.dataclass(frozen=True)
class RewardPart:
    path: str = key("Hugging Face sequence classifier: directory or hub name")
    function: str = key('or a Python callable "module:function"')
    label: str = key("the label whose score it gives; any for `scalar`")
    score: str = key("as `reward.score`", choices=classifier.KINDS)
    template: str = key("as `reward.template`")
    max_tokens: int = key("as `reward.max_tokens`", least=0)
    weight: float = key("of its score in the sum")


@dataclasses.dataclass(frozen=True)
class Reward:
    path: str = key("Hugging Face sequence classifier, directory or hub name; empty trains one on "
                    "the labels")  # fmt: skip
    function: str = key('a Python callable "module:function"; empty for a classifier')
    label: str = key("the label whose score is the reward; any for `scalar`")
    score: str = key("the label's probability, log odds or logit; scalar: a model's only output",
                     choices=classifier.KINDS)  # fmt: skip
    template: str = key("how it reads prompt and response; chat: its tokenizer's template")
    max_tokens: int = key("longer texts lose their beginning; 0 for what it can read", least=0)
    weight: float = key("of this reward in the sum with `others`")
    others: dict[str, RewardPart] = named(RewardPart, "further rewards, each under a name")
    missing_eos: str = key("a response without EOS: the reward is replaced by the value, or the "
                           "value subtracted", choices=MISSING_EOS)  # fmt: skip
    missing_eos_value: float = key("the value")
    model: Model = group()
    fit: Fit = group()


@dataclasses.dataclass(frozen=True)
class Evaluator:
    train: bool = key("train one, on texts and a seed of its own; without path or function, False "
                      "means none")  # fmt: skip
    path: str = key("a second reward that only measures: Hugging Face classifier or hub name")
    function: str = key('or a Python callable "module:function"')
    label: str = key("the label whose score it gives; any for `scalar`")
    score: str = key("as `reward.score`", choices=classifier.KINDS)
    template: str = key("as `reward.template`")
    max_tokens: int = key("as `reward.max_tokens`", least=0)
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
    num_layers_unfrozen: int = key("upper blocks that are trained, above a frozen trunk that "
                                   "policy and reference share; -1: all", least=-1)  # fmt: skip
    value_network: str = key("values by a head on the policy, or by a network of their own that "
                             "starts as the reward model", choices=("head", "reward"))  # fmt: skip
    checkpoint_every: int = key("iterations between checkpoints", least=1)
    keep: int = key("checkpoints kept", least=1)


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: int = key("of adapters on every block, in place of training it; 0 for none", least=0)
    alpha: float = key("they are added with the factor alpha / rank", above=0)
    targets: tuple[str, ...] = key(f"the projections that have one: {', '.join(trainable.TARGETS)}")


@dataclasses.dataclass(frozen=True)
class Memory:
    compute_dtype: str = key("of activations and caches", choices=DTYPES)
    param_dtype: str = key("of what is trained", choices=DTYPES)
    frozen_dtype: str = key("of what is not: reference, trunk, rewards", choices=DTYPES)
    optimizer_dtype: str = key("of AdamW's moments", choices=DTYPES)
    remat: str = key("what the backward pass finds stored of a block: all, its products with "
                     "weights, its input only", choices=tuple(REMAT))  # fmt: skip
    accumulate: int = key("microbatches a gradient step; divides train.minibatch_size", least=1)
    chunk: int = key("tokens whose logits are held at once", least=1)
    device_gib: float = key("of `vbon plan`: GiB a device has; 0 asks this machine", least=0)


@dataclasses.dataclass(frozen=True)
class Export:
    form: str = key("of the policy: a whole model, or a PEFT adapter directory (LoRA)",
                    choices=("model", "adapter"))  # fmt: skip


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
    lora: Lora = group()
    memory: Memory = group()
    offline: Offline = group()
    export: Export = group()
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
    from vbon_jax import config_constraints as constraints  # which needs the classes above

    constraints.check(settings)
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
    return cls(**{name: _field(f, values[name], prefix + name) for name, f in fields.items()})


def _field(f: dataclasses.Field, value: Any, where: str) -> Any:
    if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
        return _build(f.type, value, where)
    if "of" in f.metadata:
        if not isinstance(value, dict):
            raise InputError(f"{where}={value!r}: must be groups of keys, each under a name")
        return {name: _build(f.metadata["of"], v, f"{where}.{name}") for name, v in value.items()}
    return _value(f, value, where)


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


def template_arguments(text: str) -> dict[str, Any]:
    """What `prompts.template_arguments` says. Raises InputError where it is no JSON object."""
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise InputError(f"prompts.template_arguments={text!r}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"prompts.template_arguments={text!r}: must be a JSON object")
    return value


def as_dict(settings: Any) -> dict[str, Any]:
    """Settings, or a part of them, as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; a group without any key stays as it is."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inside = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{name}.") if inside else {prefix + name: value}
    return flat


def reference_rows() -> list[tuple[str, str]]:
    """(key, meaning) of every config key, in order: what the README's table shows."""

    def rows(cls: type, prefix: str) -> list[tuple[str, str]]:
        out: list[tuple[str, str]] = []
        for f in dataclasses.fields(cls):
            if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
                out += rows(f.type, f"{prefix}{f.name}.")
            elif "of" in f.metadata:
                out.append((prefix + f.name, f.metadata["doc"]))
                out += rows(f.metadata["of"], f"{prefix}{f.name}.NAME.")
            else:
                out.append((prefix + f.name, f.metadata["doc"]))
        return out

    return rows(Settings, "")
