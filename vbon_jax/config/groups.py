"""The groups of config keys: the type, default, documentation and rules of each key."""

import dataclasses
from typing import TYPE_CHECKING, Any

from vbon_jax import methods, stages
from vbon_jax.bon.correction import BOUND
from vbon_jax.data import tokenizer
from vbon_jax.keys import Size, group, key, named
from vbon_jax.methods.base import beta_key
from vbon_jax.methods.vbon import objective_key
from vbon_jax.rewards import classifier
from vbon_jax.rewards.combined import MISSING_EOS
from vbon_jax.training.options import (
    MOST_ROWS,
    MOST_TOKENS,
    MOST_WIDTH,
    Fit,
    Lora,
    Memory,
    Offline,
    Train,
)

MOST_TEXTS = Size(100_000_000)  # and prompts; as `MOST_ROWS`


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
    train: int = key(
        6_000, "Training texts that the embedded corpus generates.", least=1, most=MOST_TEXTS
    )
    test: int = key(
        1_000, "Held-out texts that the embedded corpus generates.", least=1, most=MOST_TEXTS
    )
    ood: int = key(600, "Out-of-distribution reviews that it generates, of film genres no other "
                   "split has; 0 for none.", least=0, most=MOST_TEXTS)  # fmt: skip


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
                     "prompts of other files are all used.", least=1, most=MOST_TEXTS)  # fmt: skip
    test: int = key(128, "Number of held-out prompts, likewise.", least=2, most=MOST_TEXTS)
    ood: int = key(
        0, "Number of out-of-distribution prompts, likewise; 0 for none.", least=0, most=MOST_TEXTS
    )
    min_tokens: int = key(2, "Shortest prefix of a text, in tokens.", least=1, most=MOST_TOKENS)
    max_tokens: int = key(8, "Longest prefix of a text, in tokens.", least=1, most=MOST_TOKENS)
    longest: int = key(512, "Longest prompt in tokens: longer posts of format tldr are shortened "
                       "as in the data set's own code, longer chats refused.", least=1,
                       most=MOST_TOKENS)  # fmt: skip
    subreddits: tuple[str, ...] = key((), "Of format tldr: subreddits that are in distribution; "
                                      "posts of all others are out of distribution.")  # fmt: skip
    gap: str = key("\n", "Of format tldr: separator between subreddit, title, post and TL;DR.")
    template_arguments: str = key("", "Of format chat: arguments of the chat template as a JSON "
                                  'object: `{"enable_thinking": false}`.')  # fmt: skip
    date: str = key("", "Date that chat templates, the reward's too, take for today, "
                    "`YYYY-MM-DD`; empty for the day on which the workdir was begun.")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of reference and policy."""

    path: str = key("", "Hugging Face directory or hub name; empty takes the reference model's "
                    "own, or trains one where that is trained.")  # fmt: skip
    kind: str = key("bpe", "Tokenizer to train: bpe, byte-level byte-pair encoding; characters, "
                    "one token per character.", choices=tokenizer.KINDS)  # fmt: skip
    vocab_size: int = key(
        2_048, "Largest vocabulary of a trained tokenizer.", least=1, most=MOST_ROWS
    )
    add_bos: str = key("auto", "Whether a text begins with the BOS token: auto, as the tokenizer "
                       "does it itself; always; never. Chat templates write their own.",
                       choices=("auto", "always", "never"))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a model that is trained from scratch."""

    layers: int = key(3, "Number of transformer blocks.", least=1, most=Size(1_000))
    width: int = key(128, "Model dimension.", least=1, most=MOST_WIDTH)
    heads: int = key(
        4, "Number of attention heads; must divide the width.", least=1, most=MOST_WIDTH
    )
    positions: int = key(64, "Longest sequence, in tokens.", least=2, most=MOST_TOKENS)


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
                          "context length.", least=0, most=MOST_TOKENS)  # fmt: skip
    template_arguments: str = key("", "Arguments of its chat template as a JSON object.")


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
    max_new_tokens: int = key(
        64, "Longest response in tokens, EOS included.", least=1, most=MOST_TOKENS
    )
    stop_at_eos: bool = key(True, "End a response at EOS; False: every response has exactly "
                            "`sampling.max_new_tokens` tokens.")  # fmt: skip
    end_tokens: tuple[str, ...] = key((), "Tokens that end a response: `('</s>',)`; empty "
                                      "for the `eos_token_id` of generation_config.json and the "
                                      "tokenizer's EOS.")  # fmt: skip
    batch_size: int = key(
        64, "Responses sampled at once outside training; where one ends, the next takes its row.",
        least=1, most=MOST_ROWS,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Samples:
    """Scored responses of the reference model, from which log F is estimated."""

    m: int = key(64, "Number of reference responses per training prompt.", least=1, most=MOST_ROWS)
    path: str = key("", "File of scored responses made elsewhere, used in place of sampling.")
    adaptive: float = key(0.0, "Nats: a prompt has samples enough, at most `samples.m`, when half "
                          "the 95% band of log(pi_bon / pi_ref) is no wider; 0 draws "
                          "`samples.m` of each.", least=0)  # fmt: skip
    adaptive_n: float = key(8.0, "The n of that band, at least the one that is trained for.",
                            least=1)  # fmt: skip
    prompts: int = key(0, "Training prompts that are sampled, the first; log F of the others is "
                       "that of the head of `samples.amortised`. 0 samples all.", least=0,
                       most=MOST_TEXTS)  # fmt: skip
    amortised: bool = key(False, "Log F by a head that learns the reward's distribution from the "
                          "samples of all prompts, with the prompt's own as evidence; refused "
                          "where it is not calibrated. generate.model=corrected then needs no "
                          "reference samples.")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    m: int = key(
        100,
        "Fresh reference responses per held-out prompt, twice: opponents, and the pool that "
        "best-of-n is read off; a policy is held against both.",
        least=1,
        most=MOST_ROWS,
    )
    samples_per_prompt: int = key(4, "Responses per held-out prompt of the policy and of "
                                  "best-of-n.", least=1, most=MOST_ROWS)  # fmt: skip
    n: tuple[float, ...] = key((), "Of a family of policies (`method.n` of two numbers), those "
                                   "it is measured at; empty for 2, 4, 8, ... up to its "
                                   "largest.")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Convergence:
    """How many reference samples the estimate of log F needs (Section 5.1 of the paper)."""

    prompts: int = key(128, "Number of held-out prompts.", least=1, most=MOST_TEXTS)
    m: tuple[int, ...] = key((5, 20, 50, 100, 200, 250, 400), "Numbers of samples per prompt that "
                             "are compared with `convergence.m_full`.")  # fmt: skip
    m_full: int = key(
        600, "Samples per prompt that stand for the true distribution.", least=2, most=MOST_ROWS
    )
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
                             least=1, most=MOST_ROWS)  # fmt: skip
    seeds: int = key(1, "Number of seeds per setting.", least=1, most=10_000)
    at_once: int = key(1, "Policies that are vmapped on a device, the others following in the same "
                       "program; 0 for all: best on GPU and TPU, 1 on CPU.", least=0)  # fmt: skip


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

    model: str = key("policy", "Model to sample from; bon is best-of-n of the reference; corrected "
                     "is best-of-n by the policy, whose responses are kept or drawn again by what "
                     "`samples.m` reference samples of each prompt, or the head of "
                     "`samples.amortised`, say of them.",
                     choices=("policy", "reference", "bon", "corrected"))  # fmt: skip
    count: int = key(1, "Responses per prompt.", least=1, most=MOST_ROWS)
    bound: float = key(BOUND, "Of generate.model=corrected: a proposal y is kept with probability "
                       "min(1, pi_bon(y) / policy(y) / bound). Larger: nearer best-of-n, and about "
                       "this many proposals a response.", least=1)  # fmt: skip
    tries: int = key(32, "Of generate.model=corrected: proposals after which one is taken of those "
                     "that were not kept.", least=1, most=10_000)  # fmt: skip
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
