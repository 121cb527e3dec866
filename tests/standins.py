"""Miniature checkpoints as transformers writes them: random weights, tokenizers of their own."""

import os
from collections.abc import Sequence

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from vbon_jax.data import tokenizer as tokenizers

Path = str | os.PathLike[str]

# The ways of Qwen3's: an empty thought where thinking is switched off.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
# A reward model's own: other markers, and no system message.
REWARD_TEMPLATE = (
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)


def _saved(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Every parameter moved, as zero biases and unit scales would hide mistakes, then written."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)


def _ends_often(head: torch.Tensor, norm_bias: torch.Tensor, eos_id: int) -> None:
    """Makes EOS one of the likelier tokens, whatever came before."""
    with torch.no_grad():
        norm_bias.fill_(0.5)
        head[eos_id] += 4.0 / len(norm_bias)


def gpt2(path: Path, texts: Sequence[str], layers: int = 3) -> None:
    """A GPT-2 whose tokenizer has EOS for its only special token, as GPT-2's own."""
    tokenizer = tokenizers.build(texts, "bpe", 330)
    tokenizer.pad_token = None
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=48, n_embd=24, n_layer=layers, n_head=3,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    _saved(path, model, tokenizer, 1)


def _wordpiece(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """BERT's: lower case, no accents, ## inside words, [CLS] and [SEP] around a text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def distilbert(path: Path, texts: Sequence[str]) -> None:
    """A sentiment classifier of NEGATIVE and POSITIVE that reads at most 40 tokens."""
    tokenizer = _wordpiece(texts)
    torch.manual_seed(0)
    model = DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=len(tokenizer), dim=20, n_layers=2, n_heads=2, hidden_dim=28,
            max_position_embeddings=40, id2label={0: "NEGATIVE", 1: "POSITIVE"},
            label2id={"NEGATIVE": 0, "POSITIVE": 1},
        )
    )  # fmt: skip
    _saved(path, model, tokenizer, 2)


def _pythia(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> GPTNeoXConfig:
    """Sizes of a Pythia: untied, parallel residual, more embeddings than the tokenizer has ids."""
    return GPTNeoXConfig(
        vocab_size=len(tokenizer) + 7, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 8, intermediate_size=2 * width, rotary_pct=0.5,
        max_position_embeddings=160, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, num_labels=1,
    )  # fmt: skip


def _pythia_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """As Huang et al. have it: a [PAD] added behind the vocabulary."""
    tokenizer = tokenizers.build(texts, "bpe", 500)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def neox(path: Path, texts: Sequence[str]) -> None:
    """A policy of 3 layers, bfloat16 on disk."""
    tokenizer = _pythia_tokenizer(texts)
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(_pythia(tokenizer, 16, 3))
    head = model.get_output_embeddings().weight
    _ends_often(head, model.gpt_neox.final_layer_norm.bias, tokenizer.eos_token_id)
    _saved(path, model, tokenizer, 3, torch.bfloat16)


def neox_reward(path: Path, texts: Sequence[str], width: int, layers: int) -> None:
    """A scalar reward with the policy's vocabulary, float32 on disk."""
    tokenizer = _pythia_tokenizer(texts)
    torch.manual_seed(width)
    model = GPTNeoXForSequenceClassification(_pythia(tokenizer, width, layers))
    _saved(path, model, tokenizer, width)


def _qwen3(tokenizer: PreTrainedTokenizerFast, width: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer) + 5, hidden_size=width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, intermediate_size=2 * width,
        max_position_embeddings=256, tie_word_embeddings=True, num_labels=1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _chat_tokenizer(texts: Sequence[str], size: int, template: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose EOS ends a turn, as in ChatML."""
    tokenizer = tokenizers.build(texts, "bpe", size)
    tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "pad_token": tokenizers.EOS,
         "extra_special_tokens": ["<|im_start|>"]}
    )  # fmt: skip
    tokenizer.bos_token = None
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


def qwen3(path: Path, texts: Sequence[str]) -> None:
    """A policy with tied embeddings and a chat template."""
    tokenizer = _chat_tokenizer(texts, 300, CHAT_TEMPLATE)
    torch.manual_seed(0)
    _saved(path, Qwen3ForCausalLM(_qwen3(tokenizer, 20)), tokenizer, 4)


def qwen3_reward(path: Path, texts: Sequence[str]) -> None:
    """A scalar reward with a vocabulary and a chat template of its own."""
    tokenizer = _chat_tokenizer(texts, 340, REWARD_TEMPLATE)
    torch.manual_seed(0)
    _saved(path, Qwen3ForSequenceClassification(_qwen3(tokenizer, 28)), tokenizer, 5)


def short(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A reward for few characters."""
    return [-float(len(response)) for response in responses]
