"""The texts and prompts of a run, from where its config says."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from vbon_jax import processes
from vbon_jax.config import Config, template_arguments
from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import tabular
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.sources import chat, text, tldr
from vbon_jax.data.sources import hub as hub_data
from vbon_jax.data.sources.text import Example
from vbon_jax.errors import InputError
from vbon_jax.models.hf import hub
from vbon_jax.progress import log
from vbon_jax.stages import loading
from vbon_jax.stages.base import Run
from vbon_jax.stages.workdir import Workdir

HELD_OUT = 10  # without a test file, every tenth text is held out


class Texts(NamedTuple):
    """Labelled texts: of training, held out, out of distribution (empty where there are none)."""

    train: list[Example]
    test: list[Example]
    ood: list[Example]


def texts(run: Run, seed: int | None = None) -> Texts:
    """The user's labelled texts, or the embedded corpus of the run's seed or another."""
    data = run.config.data
    if processes.count() > 1 and not (data.path or data.hub):
        processes.by_first(lambda: bool(_texts(run, seed)))  # it prepares what all then read
    return _texts(run, seed)


def _texts(run: Run, seed: int | None) -> Texts:
    data, seed = run.config.data, run.config.seed if seed is None else seed
    columns = data.text_column, data.label_column
    if data.path and data.test_path:
        return Texts(text.read(data.path, *columns), text.read(data.test_path, *columns), [])
    if data.path:
        examples = text.read(data.path, *columns)
        held_out = examples[::HELD_OUT]
        return Texts([e for i, e in enumerate(examples) if i % HELD_OUT], held_out, [])
    if data.hub:
        splits = (data.train_split, data.test_split)
        train, test = (hub_data.load(data.hub, x, *columns) for x in splits)
        return Texts(train, test, [])
    if data.tfds:
        from vbon_jax.data.sources import tfds  # imports tensorflow_datasets: seconds

        train, test = (tfds.load(data.tfds, data.tfds_dir, x) for x in ("train", "test"))
        return Texts(train, test, [])
    if data.corpus == "tabular":
        return Texts(tabular.corpus(seed, data.train), tabular.corpus(seed + 1, data.test), [])
    from vbon_jax.data.sources import reviews  # imports tensorflow_datasets: seconds

    return Texts(*reviews.load(run.workdir.data, seed, data.train, data.test, data.ood))


def make_tokenizer(run: Run, train: Sequence[Example]) -> PreTrainedTokenizerFast:
    """The run's tokenizer: the one named, the reference model's own, or one learned here."""
    s = run.config
    if s.tokenizer.path or s.reference.path:
        found = tokenizers.load(hub.resolve(s.tokenizer.path or s.reference.path))
    else:
        found = tokenizers.build([e.text for e in train], s.tokenizer.kind, s.tokenizer.vocab_size)
    return tokenizers.set_bos(found, s.tokenizer.add_bos)


def encode_texts(
    run: Run, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], max_tokens: int
) -> list[tuple[int, ...]]:
    """Token ids of each text, BOS in front where the tokenizer begins a text so.

    EOS is at the end unless the text was cut at ``max_tokens`` or ends so itself.

    The one rule for what a text is to the reference; a classifier reads the same without the EOS.
    """
    ends = loading.end_ids(run, tokenizer)
    closing = chat.closing_id(tokenizer, ends, is_chat=False)
    rows = []
    for example in examples:
        ids = tokenizers.begun(tokenizer, tokenizers.encode(tokenizer, example.text))
        tail = () if closing is None or (ids and ids[-1] in ends) else (closing,)
        rows.append((*ids, *tail)[:max_tokens])
    return rows


def make_prompts(
    run: Run, tokenizer: PreTrainedTokenizerFast, adopted: list[Prompt] | None
) -> dict[str, list[Prompt]]:
    """The prompts of the run by split, with ids of their own in each.

    Args:
      run: the run.
      tokenizer: of the policy.
      adopted: prompts that samples made elsewhere bring along; they stand in for those to train on.

    Returns:
      "train", "test" and, where asked for, "ood".

    Raises:
      InputError: fewer than two held-out prompts, or a file at fault.
    """
    p = run.config.prompts
    if p.format == "tldr":
        prompts = _tldr_prompts(run, tokenizer)
    elif p.format == "chat":
        prompts = _chat_prompts(run, tokenizer)
    else:
        prompts = _text_prompts(run, tokenizer, adopted)
    if adopted:
        prompts["train"] = adopted
    if len(prompts["test"]) < 2:
        source = f"prompts.hub={p.hub!r}" if p.hub else f"prompts.test_path={p.test_path!r}"
        raise InputError(
            f"{source} has {len(prompts['test'])} prompt: intervals are over prompts and need at "
            "least 2"
        )
    return prompts


def _text_prompts(
    run: Run, tokenizer: PreTrainedTokenizerFast, adopted: list[Prompt] | None
) -> dict[str, list[Prompt]]:
    """Prompts of files, or prefixes of the run's texts, which are read only where needed."""
    s, p = run.config, run.config.prompts
    given = bool(p.path or p.hub or adopted) and bool(p.test_path or p.hub)
    own = given and (bool(p.ood_path) or not p.ood)
    found = Texts([], [], []) if own else texts(run)
    tabular_world = s.data.corpus == "tabular" and not (s.data.path or s.data.tfds or s.data.hub)

    def of(
        path: str, examples: Sequence[Example], count: int, seed: int, naming: Sequence[str] = ()
    ) -> list[Prompt]:
        if path:
            return prompt_files.read_texts(path, tokenizer, p.column or "prompt")
        if tabular_world:  # its few prompts are all there are: held out means drawn anew
            letters = tabular.ALPHABET[: p.train]
            return prompt_files.from_texts(
                [letters[i % len(letters)] for i in range(count)], tokenizer
            )
        return prompt_files.prefix_prompts(
            [e.text for e in examples], tokenizer, count, p.min_tokens, p.max_tokens, seed, naming
        )

    if p.hub:
        prompts = {
            name: prompt_files.from_texts(
                hub_data.load_prompts(p.hub, split, p.column or "prompt"), tokenizer
            )
            for name, split in (("train", p.train_split), ("test", p.test_split))
        }
    else:
        prompts = {
            "train": adopted or of(p.path, found.train, p.train, s.seed),
            "test": of(p.test_path, found.test, p.test, s.seed + 1),
        }
    if p.ood_path or p.ood:
        if not p.ood_path and not found.ood:
            raise InputError(
                f"prompts.ood={p.ood}, but there are no out-of-distribution texts: give "
                "prompts.ood_path, or of the embedded reviews data.ood of them"
            )
        from vbon_jax.data.sources import reviews

        prompts["ood"] = of(p.ood_path, found.ood, p.ood, s.seed + 2, reviews.HELD_OUT_GENRES)
    return prompts


def _tldr_prompts(run: Run, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[Prompt]]:
    """Posts of ``prompts.subreddits`` from the files.

    Out of distribution are those of all others: of the test file, unless there is a file for them.
    """
    p, seed = run.config.prompts, run.config.seed
    test, others = tldr.split(tldr.read(p.test_path), p.subreddits)
    posts = {"train": (tldr.split(tldr.read(p.path), p.subreddits)[0], p.train)}
    posts["test"] = (test, p.test)
    if p.ood or p.ood_path:
        posts["ood"] = (tldr.read(p.ood_path) if p.ood_path else others, p.ood)
    prompts = {}
    for i, (split, (found, count)) in enumerate(posts.items()):
        prompts[split], cut = tldr.prompts(found, tokenizer, p.longest, count, seed + i, p.gap)
        log(
            f"sample: {len(prompts[split])} of {len(found)} posts are the {split} prompts, {cut} "
            f"cut to {p.longest} tokens"
        )
    return prompts


def _chat_prompts(run: Run, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[Prompt]]:
    """Conversations of the files, by the tokenizer's own chat template."""
    p = run.config.prompts
    if p.hub:
        splits = {"train": p.train_split, "test": p.test_split}
        found = {x: hub_data.load_conversations(p.hub, y, p.column) for x, y in splits.items()}
    else:
        paths = {"train": p.path, "test": p.test_path}
        found = {split: chat.read(path, p.column) for split, path in paths.items()}
    if p.ood_path:
        found["ood"] = chat.read(p.ood_path, p.column)
    how = rendering(run.config, run.workdir)
    return {
        split: chat.prompts(conversations, tokenizer, how, p.longest)
        for split, conversations in found.items()
    }


def rendering(config: Config, workdir: Workdir) -> chat.Rendering:
    """How the policy's chat template is rendered, on the run's date."""
    arguments = template_arguments(config.prompts.template_arguments, "prompts")
    return chat.Rendering(arguments, workdir.date())
