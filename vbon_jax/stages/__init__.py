"""The stages of a run; they alone know config and workdir.

A stage is a record here and a file with its ``run``. What lists stages reads this tuple.
"""

from vbon_jax.stages.record import Stage

_STAGES = (
    Stage(
        "sft",
        "tokenizer and reference model",
        depends=(
            "seed", "data", "tokenizer", "reference", "sampling.stop_at_eos",
            "sampling.end_tokens", "memory.frozen_dtype",
        ),
        leaves=("tokenizer", "reference"),
        scratch=("checkpoints/sft",),
    ),
    Stage(
        "reward",
        "reward model",
        depends=("reward.path", "reward.function", "reward.model", "reward.fit"),
        after=("sft",),
        leaves=("reward",),
        scratch=("checkpoints/reward",),
    ),
    Stage(
        "evaluator",
        "a second reward model, which only measures",
        depends=(
            "evaluator.train", "evaluator.path", "evaluator.function", "evaluator.model",
            "evaluator.fit",
        ),
        after=("sft",),
        leaves=("evaluator",),
        scratch=("checkpoints/evaluator",),
    ),
    Stage(
        "sample",
        "prompts and scored reference samples",
        depends=(
            "reward", "prompts", "sampling", "samples.m", "samples.path", "samples.adaptive",
            "samples.adaptive_n", "samples.prompts", "memory.compute_dtype",
        ),
        after=("reward",),
        leaves=("samples/train.jsonl", "prompts"),
    ),
    Stage(
        "train",
        "the policy, by the chosen method",
        depends=(
            "method", "train", "offline", "lora", "memory.param_dtype", "memory.optimizer_dtype",
            "samples.amortised",
        ),
        after=("sample",),
        leaves=("checkpoints/train",),
        scratch=("checkpoints/start",),
        logs=("metrics.jsonl", "start/metrics.jsonl"),
    ),
    Stage(
        "export",
        "the trained policy as a Hugging Face directory",
        depends=("export",),
        after=("train",),
        leaves=("policy", "family"),
        redo="asked",
    ),
    Stage(
        "evaluate",
        "reference, best-of-n and policy on held-out prompts: table and figures",
        depends=("evaluate", "evaluator"),
        after=("train",),
        leaves=(
            "evaluation.json", "evaluation.md", "evaluation_samples.jsonl",
            "evaluation_samples_ood.jsonl",
        ),
        redo="asked",
    ),
    Stage(
        "convergence",
        "how many reference samples this task needs",
        depends=("convergence",),
        after=("sample",),
        leaves=("convergence.json",),
        redo="asked",
    ),
    Stage(
        "choose",
        "which n of best-of-n a separate evaluator trusts",
        depends=("method.n", "method.ties", "evaluate.m", "evaluator"),
        after=("sample",),
        leaves=("choose.json",),
        redo="asked",
    ),
    Stage(
        "sweep",
        "every method over its grid, or a share of them (--shard)",
        depends=("evaluate", "evaluator", "sweep"),
        after=("train",),
        leaves=("sweep", "sweep.jsonl"),
        redo="always",
    ),
    Stage(
        "report",
        "report.html: all that is there on one page",
        depends=("evaluate", "evaluator", "sweep", "convergence"),
        after=("train",),
        leaves=("report.html",),
        redo="always",
    ),
)  # fmt: skip
STAGES: dict[str, Stage] = {stage.name: stage for stage in _STAGES}

# What ``vbon`` does beside the stages: none of it leaves anything in the workdir.
COMMANDS = {
    "run": "every stage the config lists, in order; what is complete is skipped",
    "plan": "memory each device will need, before anything is allocated",
    "generate": "responses to --prompt on standard output",
    "bench": "sampling and training on this machine, timed (vbon bench --help); needs no --config",
}

__all__ = ["COMMANDS", "STAGES", "Stage"]
