"""Every configuration key: its type, default, documentation and rules; checked once, at the start.

A config file (``configs/*.py``) is data: ``default()`` and what differs from it. The command line
turns it into these frozen dataclasses by ``parse``, and nothing below the stages sees the config.
"""

import dataclasses
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vbon_jax import keys, methods, stages
from vbon_jax.data import tokenizer
from vbon_jax.errors import InputError
from vbon_jax.keys import as_dict, flatten, group, key, named
from vbon_jax.methods.base import beta_key
from vbon_jax.methods.vbon import objective_key
from vbon_jax.rewards import classifier
from vbon_jax.rewards.combined import MISSING_EOS
from vbon_jax.training import options
from vbon_jax.training.options import Fit, Lora, Memory, Offline, Train

# Keys that the first workdirs were written without: the digests in their file names lack them.
ADDED = frozenset({
    "data.hub", "data.text_column", "data.label_column", "data.train_split", "data.test_split",
    "prompts.hub", "prompts.column", "prompts.train_split", "prompts.test_split",
})  # fmt: skip
HOTTEST = 100.0  # temperature: beyond it a model's distribution is as good as uniform


@dataclasses.dataclass(frozen=True)
class Data:
    """Labelled texts: what the reference, reward and evaluator models are trained on."""

    corpus: str = key("reviews", "Embedded corpus, used where no other source is given.",
                      choices=("reviews", "tabular"))  # fmt: skip
    path: str = key("", "File of labelled training texts: JSON lines, CSV or Parquet.")
    test_path: str = key("", "File of held-out texts; empty holds out a tenth of `data.path`.")
    tfds: str = key("", "TensorFlow Datasets name with features text and label: imdb_reviews.")
    tfds_dir: str = key("", "Directory of its prepared files; empty for the library's default.")
    hub: str = key("", "Hugging Face data set: `owner/name` or `owner/name:config`.")
    text_column: str = key("text", "Column of `data.path` or `data.hub` that holds the text.")
    label_column: str = key("label", "Column that holds the label.")
    train_split: str = key("train", "Training split of `data.hub`.")
    test_split: str = key("test", "Held-out split of `data.hub`.")
    train: int = key(6_000, "Training texts that the embedded corpus generates.", least=1)
    test: int = key(1_000, "Held-out texts that the embedded corpus generates.", least=1)
    ood: int = key(600, "Out-of-distribution reviews that it generates, of film genres no other "
                   "split has; 0 for none.", least=0)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts to train on and to evaluate on."""

    format: str = key("text", "Layout of the prompts: text, one prompt string per record; tldr, "
                      "the public TL;DR layout; chat, records of `messages` or `prompt`, rendered "
                      "by the tokenizer's chat template.",
                      choices=("text", "tldr", "chat"))  # fmt: skip
    path: str = key("", "File of training prompts; empty takes prefixes of the training texts.")
    test_path: str = key("", "File of held-out prompts; empty takes prefixes of held-out texts.")
    ood_path: str = key(
        "", "File of out-of-distribution prompts; empty takes prefixes of such texts."
    )
    hub: str = key("", "Hugging Face data set of prompts: `owner/name` or `owner/name:config`.")
    column: str = key("", "Column of the files or of `prompts.hub` that holds the prompt; empty "
                      "for `prompt`, or of format chat `messages` or else `prompt`.")  # fmt: skip
    train_split: str = key("train", "Training split of `prompts.hub`.")
    test_split: str = key("test", "Held-out split of `prompts.hub`.")
    train: int = key(800, "Number of training prompts that are made of texts or TL;DR posts; "
                     "prompts of other files are all used.", least=1)  # fmt: skip
    test: int = key(128, "Number of held-out prompts, likewise.", least=2)
    ood: int = key(0, "Number of out-of-distribution prompts, likewise; 0 for none.", least=0)
    min_tokens: int = key(2, "Shortest prefix of a text, in tokens.", least=1)
    max_tokens: int = key(8, "Longest prefix of a text, in tokens.", least=1)
    longest: int = key(512, "Longest prompt in tokens: longer posts of format tldr are shortened "
                       "as in the data set's own code, longer chats refused.", least=1)  # fmt: skip
    subreddits: tuple[str, ...] = key((), "Of format tldr: subreddits that are in distribution; "
                                      "posts of all others are out of distribution.")  # fmt: skip
    gap: str = key("\n", "Of format tldr: separator between subreddit, title, post and TL;DR.")
    template_arguments: str = key("", "Of format chat: arguments of the chat template as a JSON "
                                  'object: `{"enable_thinking": false}`.')  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of reference and policy."""

    path: str = key("", "Hugging Face directory or hub name; empty takes the reference model's "
                    "own, or trains one where that is trained.")  # fmt: skip
    kind: str = key("bpe", "Tokenizer to train: bpe, byte-level byte-pair encoding; characters, "
                    "one token per character.", choices=tokenizer.KINDS)  # fmt: skip
    vocab_size: int = key(2_048, "Largest vocabulary of a trained tokenizer.", least=1)


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a model that is trained from scratch."""

    layers: int = key(3, "Number of transformer blocks.", least=1)
    width: int = key(128, "Model dimension.", least=1)
    heads: int = key(4, "Number of attention heads; must divide the width.", least=1)
    positions: int = key(64, "Longest sequence, in tokens.", least=2)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference model, from which the policy starts."""

    path: str = key("", "Hugging Face directory or hub name; empty trains a GPT-2 on the texts.")
    model: Model = group(Model)
    fit: Fit = group(Fit)


@dataclasses.dataclass(frozen=True)
class Score:
    """A score of responses: a sequence classifier or a callable."""

    path: str = key("", "Hugging Face sequence classifier: directory or hub name. `reward` without "
                    "path and function trains one on the labels.")  # fmt: skip
    function: str = key("", 'Python callable in place of a classifier: "module:function".')
    label: str = key("POSITIVE", "Label whose score is taken; ignored for score scalar.")
    score: str = key("logit", "The label's probability (prob), log_odds or logit; scalar: the only "
                     "output of the model.", choices=classifier.KINDS)  # fmt: skip
    template: str = key("{prompt}{response}", "Text that the classifier of `path` reads; chat: its "
                        "tokenizer's chat template.")  # fmt: skip
    max_tokens: int = key(0, "Longer texts are truncated at their beginning; 0 for the model's "
                          "context length.", least=0)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RewardPart(Score):
    """A further reward that is added to the first."""

    weight: float = key(1.0, "Weight of this reward in the sum.")


@dataclasses.dataclass(frozen=True)
class Reward(RewardPart):
    """The reward of a response."""

    others: dict[str, RewardPart] = named(RewardPart, "Further rewards, each under a name.")
    missing_eos: str = key("none", "What becomes of the reward of a response without EOS: "
                           "`missing_eos_value` replaces it or is subtracted.",
                           choices=MISSING_EOS)  # fmt: skip
    missing_eos_value: float = key(0.0, "Replacement or penalty of `missing_eos`.")
    model: Model = group(Model, layers=2, width=64)
    fit: Fit = group(Fit, epochs=3, learning_rate=1e-3)


@dataclasses.dataclass(frozen=True)
class Evaluator(Score):
    """A second score that is reported in evaluation and never trained on."""

    train: bool = key(False, "Train an evaluator, on texts and a seed of its own. False, and no "
                      "path or function: no evaluator.")  # fmt: skip
    model: Model = group(Model, width=96)
    fit: Fit = group(Fit, epochs=3, learning_rate=1e-3)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are sampled, in training and evaluation."""

    temperature: float = key(1.0, "Sampling temperature of rollouts and reference samples; every "
                             "log-probability is taken at it.", above=0)  # fmt: skip
    max_new_tokens: int = key(64, "Longest response in tokens, EOS included.", least=1)
    stop_at_eos: bool = key(True, "End a response at EOS; False: every response has exactly "
                            "`sampling.max_new_tokens` tokens.")  # fmt: skip
    batch_size: int = key(64, "Responses sampled at once outside training.", least=1)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Scored responses of the reference model, from which log F is estimated."""

    m: int = key(64, "Number of reference responses per training prompt.", least=1)
    path: str = key("", "File of scored responses made elsewhere, used in place of sampling.")


@dataclasses.dataclass(frozen=True)
class Method(methods.Options):
    """The training method and the best-of-n it aims at."""

    name: str = key("vbon", "Training method; bon is best-of-n itself, without training.",
                    choices=methods.NAMES)  # fmt: skip
    objective: str = objective_key()
    beta: float = beta_key()


@dataclasses.dataclass(frozen=True)
class Export:
    """What `vbon export` writes."""

    form: str = key("model", "Exported directory: model, a whole Hugging Face model with adapters "
                    "merged; adapter, a PEFT adapter (with `lora.rank`).",
                    choices=("model", "adapter"))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluation on held-out prompts."""

    temperatures: tuple[float, ...] = key((1.0,), "Sampling temperatures; each has its own rows.")
    m: int = key(100, "Fresh reference responses per held-out prompt, from which win rates and "
                 "best-of-n are computed.", least=1)  # fmt: skip
    samples_per_prompt: int = key(4, "Responses per held-out prompt of the policy and of "
                                  "best-of-n.", least=1)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Convergence:
    """How many reference samples the estimate of log F needs (Section 5.1 of the paper)."""

    prompts: int = key(128, "Number of held-out prompts.", least=1)
    m: tuple[int, ...] = key((5, 20, 50, 100, 200, 250, 400), "Numbers of samples per prompt that "
                             "are compared with `convergence.m_full`.")  # fmt: skip
    m_full: int = key(600, "Samples per prompt that stand for the true distribution.", least=2)
    level: float = key(0.05, "Level of the Kolmogorov-Smirnov test.", above=0, below=1)


@dataclasses.dataclass(frozen=True)
class SweepBase:
    """Keys of `vbon sweep` beside the methods' grids."""

    bon: tuple[int, ...] = key((), "Values of n of best-of-n itself, computed from the "
                               "`evaluate.m` fresh reference responses.")  # fmt: skip
    m: tuple[int, ...] = key((), "Numbers of reference samples to train vbon with at `method.n`.")
    temperatures: tuple[float, ...] = key((), "Sampling temperatures at which each method is also "
                                          "evaluated, at its match of `method.n`.")  # fmt: skip
    temperature_m: int = key(64, "As `evaluate.m`, at these temperatures and out of distribution.",
                             least=1)  # fmt: skip
    seeds: int = key(1, "Number of seeds per setting.", least=1)
    at_once: int = key(1, "Policies that are vmapped on a device, the others following in the same "
                       "program; 0 for all: best on GPU and TPU, 1 on CPU.", least=0)  # fmt: skip
    stale_seconds: float = key(60.0, "Seconds without a heartbeat after which a worker's share is "
                               "taken over by another worker.", above=0)  # fmt: skip


def _grids() -> list[tuple[str, Any, Any]]:
    """The keys of the methods' series: a grid of values, and an estimator where one is chosen."""
    fields: list[tuple[str, Any, Any]] = []
    for label, (method, series) in methods.SERIES.items():
        kind = tuple[int, ...] if method.whole_n else tuple[float, ...]
        fields.append((label, kind, key((), series.doc)))
        if series.estimators:
            doc = f"Estimator of log F for `sweep.{label}`, which must be finite."
            chosen = key(series.estimators[0], doc, choices=series.estimators)
            fields.append((f"{label}_estimator", str, chosen))
    return fields


# An empty grid leaves its series out.
if TYPE_CHECKING:
    Sweep = SweepBase
else:
    Sweep = dataclasses.make_dataclass("Sweep", _grids(), bases=(SweepBase,), frozen=True)
    Sweep.__doc__ = "Grids of `vbon sweep`; an empty grid leaves its method out."


@dataclasses.dataclass(frozen=True)
class Generate:
    """What `vbon generate` prints."""

    model: str = key("policy", "Model to sample from; bon is best-of-n of the reference.",
                     choices=("policy", "reference", "bon"))  # fmt: skip
    count: int = key(1, "Responses per prompt.", least=1)
    temperature: float = key(1.0, "Sampling temperature.", above=0)
    top_k: int = key(0, "Sample among the k likeliest tokens; 0 for all.", least=0)
    top_p: float = key(1.0, "Sample from the smallest set of tokens with this probability mass; 1 "
                       "for all.", above=0, most=1)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Numbers of devices along the axes of the mesh."""

    data: int = key(1, "Devices that share the batch; -1 for all that remain.")
    fsdp: int = key(1, "Devices that share the batch and the parameters; -1 for all that remain.")
    tensor: int = key(1, "Devices that share attention heads, MLP columns and vocabulary; -1 for "
                      "all that remain.")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Log:
    """Where metrics are logged beside metrics.jsonl and TensorBoard."""

    wandb: bool = key(False, "Log metrics to Weights & Biases.")
    wandb_project: str = key("vbon_jax", "Its project.")


@dataclasses.dataclass(frozen=True)
class ConfigBase:
    """The configuration of a run but for the groups of their own that methods have."""

    seed: int = key(0, "Seed of every random number of the run.", least=0, most=2**32 - 1)
    stages: tuple[str, ...] = key(
        ("sft", "reward", "sample", "train", "export", "evaluate", "report"),
        f"Stages of `vbon run`, in order, among {', '.join(stages.STAGES)}.",
    )
    data: Data = group(Data)
    prompts: PromptSet = group(PromptSet)
    tokenizer: Tokenizer = group(Tokenizer)
    reference: Reference = group(Reference)
    reward: Reward = group(Reward)
    evaluator: Evaluator = group(Evaluator)
    sampling: Sampling = group(Sampling)
    samples: Samples = group(Samples)
    method: Method = group(Method)
    train: Train = group(Train)
    lora: Lora = group(Lora)
    memory: Memory = group(Memory)
    offline: Offline = group(Offline)
    export: Export = group(Export)
    evaluate: Evaluate = group(Evaluate)
    convergence: Convergence = group(Convergence)
    sweep: Sweep = group(Sweep)
    generate: Generate = group(Generate)
    mesh: MeshShape = group(MeshShape)
    log: Log = group(Log)


METHOD_GROUPS: dict[str, type] = dict(m.group for m in methods.METHODS if m.group)
if TYPE_CHECKING:
    Config = ConfigBase
else:
    Config = dataclasses.make_dataclass(
        "Config",
        [(name, cls, group(cls)) for name, cls in METHOD_GROUPS.items()],
        bases=(ConfigBase,),
        frozen=True,
    )
    Config.__doc__ = "The whole configuration of a run."


def default() -> Any:
    """Returns the defaults as what a config file starts from.

    Returns:
      An ``ml_collections.ConfigDict``, locked: a misspelt key raises where it is set. Only
      ``reward.others`` takes names of the user's own.
    """
    import ml_collections  # the Python API needs no config file

    values = ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()
    values.reward.others.unlock()
    return values


def parse(values: dict[str, Any]) -> Config:
    """Builds and checks a configuration.

    Args:
      values: Nested dicts of a config; a key that is missing takes its default.

    Returns:
      The configuration.

    Raises:
      InputError: Names the key, its value and what is allowed.
    """
    config = keys.build(Config, values)
    check(config)
    return config


def added() -> dict[str, Any]:
    """Returns the defaults of the keys that the first workdirs were written without."""
    return {name: value for name, value in defaults_flat().items() if name in ADDED}


def defaults_flat() -> dict[str, Any]:
    """Returns the default of every key as a JSON value, by dotted key."""
    return flatten(as_dict(Config()))


def template_arguments(text: str) -> dict[str, Any]:
    """Reads ``prompts.template_arguments``.

    Args:
      text: A JSON object; empty for none.

    Returns:
      Arguments of the chat template by name.

    Raises:
      InputError: The text is no JSON object.
    """
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise InputError(f"prompts.template_arguments={text!r}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"prompts.template_arguments={text!r}: must be a JSON object")
    return value


def check(config: Config) -> None:
    """Checks what keys must obey together.

    Args:
      config: Whose keys each obey their own rules.

    Raises:
      InputError: Names the keys, their values and what is allowed.
    """
    for of_part in (
        _check_stages, _check_data, _check_models, _check_training, _check_evaluation, _check_sweep
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
        p.format == "text" or bool(p.hub) or bool(p.path and p.test_path),
        f"prompts.format={p.format}: set prompts.path and prompts.test_path to files of it",
    )
    _require(
        p.format != "tldr" or bool(p.subreddits),
        "prompts.subreddits is empty: name what is in distribution for prompts.format=tldr",
    )
    template_arguments(p.template_arguments)


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
    for name, other in others.items():
        _require(
            bool(other.path or other.function), f"{name}.path and .function are empty: set one"
        )


def _check_training(c: Config) -> None:
    options.check(c.train, c.lora, c.memory)
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
        c.train.value_network == "head" or not c.reward.function,
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
        n, m = c.method.n, c.samples.m
        _require(
            not method.whole_n or (n.is_integer() and n <= m),
            f"method.n={n:g}: {method.name} takes the best of a whole number n of the samples.m="
            f"{m} stored ones",
        )
        _require(not method.check_n(n), f"method.n={n:g}: {method.check_n(n)}")
        _require(not (wrong := method.check(method.from_config(c))), wrong)
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
        _check_offline(c)


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
