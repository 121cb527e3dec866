"""Tokenizers: trained on a corpus, or loaded from a Hugging Face directory."""

from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vbon_jax.errors import InputError
from vbon_jax.models.hf.tokenizers import begin_ids, end_ids, load, same, save, set_bos

__all__ = [
    "begin_ids", "begun", "build", "continuation_ids", "continuations", "encode", "end_ids", "load",
    "same", "save", "set_bos",
]  # fmt: skip

EOS = "<|endoftext|>"
PAD = "<|pad|>"  # not EOS: padding must never look like a sampled end
KINDS = ("bpe", "characters")


def _byte_level_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size = {vocab_size} is too small for byte-level BPE: {len(alphabet)} bytes and "
            f"2 special tokens need at least {smallest}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS, PAD],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def _characters(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    alphabet = sorted(set().union(*texts))
    if len(alphabet) > vocab_size:
        raise InputError(
            f"vocab_size = {vocab_size} is too small: the texts hold {len(alphabet)} distinct "
            "characters, and each is a token"
        )
    # WordLevel without an unknown token refuses a character it has not seen; BPE would drop it.
    tokenizer = Tokenizer(models.WordLevel({char: i for i, char in enumerate(alphabet)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def build(texts: Iterable[str], kind: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on texts; the result is deterministic.

    Args:
      texts: the corpus.
      kind: "bpe", byte-level BPE over all 256 bytes, so that any text round-trips exactly, with
        `<|endoftext|>` as BOS and EOS and a separate `<|pad|>`; or "characters", one token for each
        distinct character of the texts, in sorted order, without special tokens.
      vocab_size: the greatest size of the vocabulary. BPE stops earlier when no pair occurs twice;
        the vocabulary is never padded.

    Returns:
      The tokenizer.

    Raises:
      InputError: the kind is unknown, there is no text, or vocab_size is too small for the kind.
    """
    texts = list(texts)
    if not any(texts):
        raise InputError(f"a tokenizer needs text to be built from; {len(texts)} texts, all empty")
    if kind == "bpe":
        return _byte_level_bpe(texts, vocab_size)
    if kind == "characters":
        return _characters(texts, vocab_size)
    raise InputError(f"tokenizer kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    """Tokenizes a text without adding special tokens.

    Args:
      tokenizer: the tokenizer.
      text: the text.

    Returns:
      The token ids.

    Raises:
      InputError: the tokenizer has no token for a character of the text.
    """
    try:
        return tuple(tokenizer.encode(text, add_special_tokens=False))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"text {text!r} cannot be tokenized: {error}") from error


def begun(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> tuple[int, ...]:
    """Puts in front of a text's ids what the tokenizer begins a text with, unless it is there.

    Args:
      tokenizer: the tokenizer.
      tokens: ids of the text.

    Returns:
      The ids, BOS in front where the tokenizer puts it.
    """
    begin = begin_ids(tokenizer)
    return tuple(tokens) if tuple(tokens[: len(begin)]) == begin else (*begin, *tokens)


def continuations(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
) -> list[str]:
    """Decodes responses in their context: decode(prompt + response) minus decode(prompt).

    Decoded alone, a response would lose its first space under SentencePiece's decoders, and a
    character whose bytes are divided between the two would be lost under any.

    Args:
      tokenizer: the tokenizer.
      prompts: ids of the prompt of each response.
      responses: ids of each response, without its end.

    Returns:
      The texts.
    """
    contexts = [tuple(prompt) for prompt in prompts]
    base = {
        context: tokenizer.decode(list(context), skip_special_tokens=False)
        for context in set(contexts)
    }
    whole = tokenizer.batch_decode(
        [[*context, *response] for context, response in zip(contexts, responses, strict=True)],
        skip_special_tokens=False,
    )
    return [_without(base[context], text) for context, text in zip(contexts, whole)]


def _without(prompt: str, text: str) -> str:
    """The text after the prompt's. A prompt may end in half a character, which then differs."""
    if text.startswith(prompt):
        return text[len(prompt) :]
    differs = (i for i, (one, other) in enumerate(zip(prompt, text)) if one != other)
    return text[next(differs, len(text)) :]


def continuation_ids(
    tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], text: str
) -> tuple[int, ...]:
    """Tokenizes a response in its context, the inverse of `continuations`.

    Args:
      tokenizer: the tokenizer.
      prompt: ids of the prompt.
      text: the response.

    Returns:
      Ids that say `text` after the prompt. Where the tokenizer cannot say it exactly (it lowercases
      or normalizes), those of the whole text after the prompt's, or else of the response alone.

    Raises:
      InputError: the tokenizer has no token for a character of the text.
    """
    prompt = tuple(prompt)
    begin = begin_ids(tokenizer)
    context = prompt[len(begin) :] if prompt[: len(begin)] == begin else prompt
    whole = encode(tokenizer, tokenizer.decode(list(context), skip_special_tokens=False) + text)
    candidates = [whole[len(context) :]] if whole[: len(context)] == context else []
    candidates.append(encode(tokenizer, text))
    # After a newline nothing is merged, and the space that SentencePiece adds stands before it.
    line = _encode_or_none(tokenizer, "\n")
    after_line = _encode_or_none(tokenizer, "\n" + text)
    if line and after_line and after_line[: len(line)] == line:
        candidates.append(after_line[len(line) :])
    for ids in candidates:
        if continuations(tokenizer, [prompt], [ids])[0] == text:
            return ids
    return candidates[0]


def _encode_or_none(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...] | None:
    """As `encode`; None where the tokenizer has no token for a character of the text."""
    try:
        return encode(tokenizer, text)
    except InputError:
        return None
