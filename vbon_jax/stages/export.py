"""Stage ``export``: the trained policy as a Hugging Face directory."""

import shutil

from vbon_jax import methods
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.models.hf import peft
from vbon_jax.progress import log
from vbon_jax.stages import loading
from vbon_jax.stages.base import Run, Undone
from vbon_jax.training.checkpoint import Checkpointer


def run(run: Run) -> None:
    """Writes ``policy/``, the newest checkpoint as a directory that transformers or peft loads."""
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
    own = restored[0].params["decoder"]
    shutil.rmtree(run.workdir.policy, ignore_errors=True)  # perhaps of another form
    if s.export.form == "adapter":
        peft.save(
            run.workdir.policy, own, s.lora.alpha, base=str(loading.reference_path(run)),
            config=reference.model.config,
        )  # fmt: skip
        tokenizers.save(reference.tokenizer, run.workdir.policy)
        return
    loading.policy_of(reference, own).save(run.workdir.policy)
