"""Stage ``export``: the trained policy as a Hugging Face directory."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vbon_jax import methods, processes
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.models.hf import peft
from vbon_jax.progress import log
from vbon_jax.sampling.sampler import Sampler
from vbon_jax.stages import loading
from vbon_jax.stages.base import Run, Undone
from vbon_jax.training import policies
from vbon_jax.training.checkpoint import Checkpointer


def run(run: Run) -> None:
    """Writes ``policy/``, the newest checkpoint as a directory that transformers or peft loads.

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
    processes.by_first(lambda: _clear(run.workdir.policy, run.workdir.last_iterate))
    _save(run, reference, policies.policy(params), run.workdir.policy)
    if s.export.form == "adapter":
        _say_dtype(s.memory.frozen_dtype, reference.model.source or {})
    if policies.AVERAGE in params:
        _save(run, reference, params["decoder"], run.workdir.last_iterate)


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
