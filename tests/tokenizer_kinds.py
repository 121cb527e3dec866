"""Tokenizers of the kinds real checkpoints have, in miniature, of transformers' own classes."""

import json

import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "The film is a wonderful story about hope and love .",
    "I loved the acting , but the plot is thin — a naïve café , 映画 .",
    "hello , tell me a story about a film that is long .",
] * 4
BYTES = [f"<0x{i:02X}>" for i in range(256)]

# Each writes its BOS itself, where it has one.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if loop.first %}Today is {{ strftime_now('%d %b %Y') }}.\n{% endif %}"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _trained(model, pre_tokenizer, specials, alphabet=()):
    """Vocabulary and merges of a BPE learned from TEXTS."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=560, special_tokens=specials, initial_alphabet=list(alphabet),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    made = json.loads(tokenizer.to_str())["model"]
    return {"vocab": made["vocab"], "merges": [tuple(m) for m in made["merges"]]}


def _byte_level(specials):
    space = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained(models.BPE(), space, specials, pre_tokenizers.ByteLevel.alphabet())


def _sentencepiece(specials):
    model = models.BPE(unk_token="<unk>", byte_fallback=True)
    return _trained(model, pre_tokenizers.Metaspace(), [*specials, *BYTES])


def _whole(parts, bos=None, **options):
    """A tokenizer.json without a class of its own, as Llama 3's: byte-level, BOS by a template."""
    tokenizer = Tokenizer(models.BPE(**parts))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, parts["vocab"][bos])],
        )  # fmt: skip
        options["bos_token"] = bos
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def _llama2_file():
    """As Llama 2's tokenizer.json: a normalizer writes the space in front."""
    tokenizer = Tokenizer(
        models.BPE(**_sentencepiece(["<unk>", "<s>", "</s>"]), unk_token="<unk>", fuse_unk=True,
                   byte_fallback=True)
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def gpt2():
    return transformers.GPT2Tokenizer(**_byte_level(["<|endoftext|>"]))


def qwen3():
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return transformers.Qwen2Tokenizer(
        **_byte_level(specials), eos_token="<|im_end|>", chat_template=CHATML
    )


def llama2(legacy):
    return transformers.LlamaTokenizer(
        **_sentencepiece(["<unk>", "<s>", "</s>"]), legacy=legacy, add_bos_token=True
    )


def llama3():
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>",
                "<|end_header_id|>"]  # fmt: skip
    return _whole(
        _byte_level(specials), "<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA3,
        additional_special_tokens=specials[3:],
    )  # fmt: skip


def gemma3():
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    return transformers.GemmaTokenizer(
        **_sentencepiece(specials), add_bos_token=True, chat_template=GEMMA,
        additional_special_tokens=specials[4:],
    )  # fmt: skip


def byte_level_bos():
    return _whole(_byte_level(["<bos>", "<eos>"]), "<bos>", eos_token="<eos>")


def bert():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials)
    )
    return transformers.BertTokenizer(vocab=tokenizer.get_vocab())


# Of causal models, each with the tokens of its generation_config's eos_token_id.
CAUSAL = {
    "gpt2": (gpt2, ["<|endoftext|>"]),
    "llama2": (_llama2_file, ["</s>"]),
    "llama2_legacy": (lambda: llama2(True), ["</s>"]),
    "llama2_new": (lambda: llama2(False), ["</s>"]),
    "llama3": (llama3, ["<|end_of_text|>", "<|eot_id|>"]),
    "gemma3": (gemma3, ["<eos>", "<end_of_turn>"]),
    "qwen3": (qwen3, ["<|im_end|>", "<|endoftext|>"]),
    "byte_level_bos": (byte_level_bos, ["<eos>"]),
}
