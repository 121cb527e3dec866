"""Tokenizers: trained on a corpus, or loaded from a Hugging Face directory."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vbon_jax.errors import InputError
from vbon_jax.models.hf.tokenizers import eos_id, load, same, save

__all__ = ["build", "encode", "eos_id", "load", "same", "save"]

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
