"""Stage ``export``: the trained policy as a Hugging Face directory."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vbon_jax import methods, processes
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.evaluation import budget
from vbon_jax.models.hf import peft
from vbon_jax.progress import log
from vbon_jax.sampling.family import Family
from vbon_jax.sampling.sampler import Sampler
from vbon_jax.stages import loading
from vbon_jax.stages.base import Run, Undone
from vbon_jax.training import policies
from vbon_jax.training.checkpoint import Checkpointer


def run(run: Run) -> None:
    """Writes ``policy/``, the newest checkpoint as a directory that transformers or peft loads.

    Of a family of policies this is the one for the n, the KL or the reward that is asked for, the
    largest n by default; ``family/`` holds all of them.

    Where the policy is an average of weights, ``last_iterate/`` holds the last ones, to compare.
    """
    s = run.config
    if s.method.name == methods.BEST_OF_N:
        log("export: best-of-n itself (method.name=bon) has no policy to export")
        return
    run.workdir.require("train", "a trained policy")
    reference = loading.reference(run)
    prompts = len(loading.prompts(run, "train"))
    job = loading.job(run, reference.model.config, prompts)
    like = job.first_state(reference.model.params, run.key("train"))
    checkpointer = Checkpointer(run.workdir.checkpoints("train"), s.train.keep)
    try:
        restored = checkpointer.restore(like)
    finally:
        checkpointer.close()
    if restored is None or checkpointer.latest_step != job.iterations:
        run.workdir.reopen("train")
        raise Undone(
            f"{checkpointer.directory} holds no whole checkpoint of iteration {job.iterations}, "
            "the last: run `vbon train` with the same --config and --workdir, which goes on from "
            "what there is",
            "train",
        )
    params = restored[0].params
    folders = run.workdir.policy, run.workdir.last_iterate, run.workdir.family
    if isinstance(s.method.n, tuple):
        of_all = Family(reference, policies.policy(params), s.method.n, s.lora.alpha)
        n = _wanted(run, of_all)
        processes.by_first(lambda: _clear(*folders))
        of_all.save(run.workdir.family)
        of_all.at(n).save(run.workdir.policy)
        if policies.AVERAGE in params:
            last = dataclasses.replace(of_all, own=params["decoder"])
            last.save(run.workdir.last_iterate)
        log(f"export: {run.workdir.policy} is the policy for n={n:.6g}")
        return
    processes.by_first(lambda: _clear(*folders))
    _save(run, reference, policies.policy(params), run.workdir.policy)
    if s.export.form == "adapter":
        _say_dtype(s.memory.frozen_dtype, reference.model.source or {})
    if policies.AVERAGE in params:
        _save(run, reference, params["decoder"], run.workdir.last_iterate)


def _wanted(run: Run, of_all: Family) -> float:
    """The n that is asked for, by itself or by what its policy has on held-out prompts."""
    s, wanted = run.config, run.wanted
    if wanted.kl is None and wanted.reward is None:
        return of_all.n[1] if wanted.n is None else wanted.n
    means = budget.HeldOutMeans(
        of_all.reference, loading.prompts(run, "test"),
        loading.reward(run, of_all.reference.tokenizer), s.evaluate.samples_per_prompt,
        s.sampling.batch_size, run.key("budget"),
    )  # fmt: skip
    if wanted.kl is not None:
        return budget.n_for(of_all, means, "kl", wanted.kl)
    assert wanted.reward is not None
    return budget.n_for(of_all, means, "reward", wanted.reward)


def _clear(*folders: Path) -> None:
    """Removes what an earlier export left, perhaps of another form."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _save(run: Run, reference: Sampler, own: Any, folder: Path) -> None:
    """Writes what was trained of the reference in the form that ``export.form`` says."""
    s = run.config
    if s.export.form == "model":
        loading.policy_of(reference, own).save(folder)
        return
    peft.save(
        folder, own, s.lora.alpha, base=s.reference.path or str(run.workdir.reference),
        config=reference.model.config,
    )  # fmt: skip
    tokenizers.save(reference.tokenizer, folder)


def _say_dtype(used: str, base: Mapping[str, Any]) -> None:
    """Tells where the base's own dtype is not the one that the adapters were trained over."""
    own = base.get("dtype") or base.get("torch_dtype") or "float32"
    if own != used:
        log(
            f"export: the adapters were trained over the base in {used} (memory.frozen_dtype), "
            f"whose config.json says {own}: load it with dtype=torch.{used} for the policy that is "
            "evaluated here"
        )
