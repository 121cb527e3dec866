"""The kinds of tokenizers that real checkpoints have: ids, texts, rewards, log-probs and exports.

Each is held against transformers on the same directory, through the Python API.
"""

import json

import numpy as np
import pytest
import torch
import transformers

import vbon_jax as vbon
from tests import tokenizer_kinds
from tests.tokenizer_kinds import CAUSAL
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.samples import PromptSamples
from vbon_jax.data.sources import chat
from vbon_jax.errors import InputError

PROMPTS = ["The film is", "I loved the acting , but", "hello"]
CHATS = [name for name in CAUSAL if CAUSAL[name][0]().chat_template]
VOCABULARY, M, NEW = 640, 6, 8
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "initializer_range": 0.4, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def kind(request, tmp_path_factory):
    """(name, directory of a model, of a reward model, the directory's tokenizer)."""
    make, ends = CAUSAL[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make()
    assert len(tokenizer) <= VOCABULARY
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, bos_token_id=tokenizer.bos_token_id)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():  # rows that no token has are never sampled; ends come often
        model.lm_head.weight[len(tokenizer) :] = -model.lm_head.weight[:1]
    ids = tokenizer.convert_tokens_to_ids(ends)
    model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
    model.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    config.num_labels, config.pad_token_id = 1, None
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    loaded = transformers.AutoTokenizer.from_pretrained(folder / "lm")
    return request.param, folder / "lm", folder / "rm", loaded


@pytest.fixture(scope="module")
def model(kind):
    return vbon.load_model(kind[1], max_new_tokens=NEW)


@pytest.fixture(scope="module")
def drawn(kind, model):
    """Samples of plain prompts, rewarded by a model that reads the text."""
    reward = vbon.load_reward(kind[2], score="scalar")
    return vbon.sample(model, vbon.prompts(PROMPTS, model), m=M, reward=reward)


def responses(samples):
    """(prompt, text, ids, log_prob, reward, finished) of each sample."""
    for p in samples.samples:
        for row in zip(p.responses, p.response_tokens, p.log_probs, p.rewards, p.finished):
            yield p, *row


every_kind = pytest.mark.parametrize("kind", CAUSAL, indirect=True)


@every_kind
def test_prompts_begin_as_the_tokenizer_begins_a_text(kind, model):
    name, _, _, tokenizer = kind
    for prompt, text in zip(vbon.prompts(PROMPTS, model), PROMPTS, strict=True):
        assert list(prompt.tokens) == tokenizer(text)["input_ids"]
        assert prompt.text == text
    has_bos = tokenizer.bos_token is not None and prompt.tokens[0] == tokenizer.bos_token_id
    assert has_bos == (name not in ("gpt2", "qwen3"))


@every_kind
def test_a_response_is_what_the_ids_say_after_the_prompt(kind, drawn):
    tokenizer, ends = kind[3], set(tokenizers.end_ids(kind[3], kind[1]))
    for p, text, ids, *_ in responses(drawn):
        prompt, body = list(p.prompt_tokens), [t for t in ids if t not in ends]
        assert tokenizer.decode(prompt + body) == tokenizer.decode(prompt) + text


@every_kind
def test_a_text_is_encoded_in_its_context(kind, model):
    """So that it is the same text when it is decoded there; spaces in front make other texts."""
    prompt, model = vbon.prompts(PROMPTS[:1], model)[0], model.at(max_new_tokens=40)
    for text in (" long .", "ly good", "  two spaces", "\nA line", " naïve café 映画 .", "."):
        ids = model.stored_ids(PromptSamples(prompt.text, (text,), (0.0,)), 0, prompt.tokens)
        assert ids.pop() == model.tokenizer.eos_token_id
        assert model.texts([prompt.tokens], [ids]) == [text]


@every_kind
def test_log_probs_are_those_of_transformers(kind, drawn):
    lm = transformers.AutoModelForCausalLM.from_pretrained(kind[1]).eval()
    for p, _, ids, log_prob, *_ in responses(drawn):
        with torch.no_grad():
            logits = lm(torch.tensor([[*p.prompt_tokens, *ids]])).logits[0].double()
        of_ids = torch.log_softmax(logits, -1)[len(p.prompt_tokens) - 1 : -1]
        want = of_ids.gather(1, torch.tensor(ids)[:, None]).sum().item()
        assert log_prob == pytest.approx(want, abs=1e-4)


@every_kind
def test_rewards_are_those_of_transformers_on_the_text(kind, drawn):
    tokenizer = kind[3]
    rm = transformers.AutoModelForSequenceClassification.from_pretrained(kind[2]).eval()
    for p, text, _, _, reward, _ in responses(drawn):
        with torch.no_grad():
            want = rm(**tokenizer(p.prompt + text, return_tensors="pt")).logits.item()
        assert reward == pytest.approx(want, abs=1e-4)


@every_kind
def test_every_id_of_the_list_ends_a_response(kind, model, drawn):
    ends = tokenizers.end_ids(kind[3], kind[1])
    wanted = kind[3].convert_tokens_to_ids(CAUSAL[kind[0]][1])
    assert set(ends) == {*wanted, kind[3].eos_token_id}
    for _, text, ids, _, _, finished in responses(drawn):
        assert finished == (ids[-1] in ends)
        assert not any(i in ends for i in ids[:-1])
        assert not any(token in text for token in CAUSAL[kind[0]][1])


@every_kind
def test_an_export_is_the_directory_again(kind, model, tmp_path):
    _, folder, _, tokenizer = kind
    model.save(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in PROMPTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    read = [json.loads((d / "generation_config.json").read_text()) for d in (folder, tmp_path)]
    assert read[0]["eos_token_id"] == read[1]["eos_token_id"]
    ids = torch.tensor([tokenizer(PROMPTS[1])["input_ids"]])
    with torch.no_grad():
        one, other = (
            transformers.AutoModelForCausalLM.from_pretrained(d).eval()(ids).logits
            for d in (folder, tmp_path)
        )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", CHATS, indirect=True)
def test_a_chat_has_the_templates_own_bos_and_no_other(kind, model):
    """In the policy, and in a reward model that reads its text."""
    tokenizer = kind[3]
    messages = [{"role": "user", "content": "hello"}]
    (prompt,) = vbon.prompts([messages], model)
    want = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(prompt.tokens) == want and prompt.messages == (("user", "hello"),)
    reward = vbon.load_reward(kind[2], score="scalar").reward(model)
    (ids,) = reward.tokenized([prompt], [" a story"])
    assert tokenizer.decode(ids) == tokenizer.decode(want) + " a story"
    if tokenizer.bos_token:
        assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("kind", ["qwen3"], indirect=True)
def test_generate_takes_conversations(kind, model):
    messages = [{"role": "user", "content": "hello"}]
    asked = kind[3].apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # Qwen's tokenizer adds no BOS: the rendered text is the same prompt.
    assert model.generate([messages], count=2) == model.generate([asked], count=2)
    assert vbon.prompts(["hello"], model, chat=True) == vbon.prompts([messages], model)
    with pytest.raises(InputError, match="1 texts among 1 conversations"):
        model.generate(["hello", messages])


@pytest.mark.parametrize("kind", CHATS, indirect=True)
def test_a_text_answer_ends_as_the_chat_template_ends_it(kind, model):
    ends = model.settings.end_ids
    want = {"llama3": "<|eot_id|>", "gemma3": "<end_of_turn>", "qwen3": "<|im_end|>"}[kind[0]]
    assert chat.closing_id(kind[3], ends, True) == kind[3].convert_tokens_to_ids(want)
    # A text that has its end already gets no second one.
    stored = PromptSamples("hello", (f"a{want}",), (0.0,), messages=(("user", "hello"),))
    ids = model.stored_ids(stored, 0, vbon.prompts(["hello"], model)[0].tokens)
    assert sum(i in ends for i in ids) == 1


def test_a_bert_reads_what_another_tokenizer_says(tmp_path):
    tokenizer, ends = tokenizer_kinds.bert(), "[SEP]"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, initializer_range=0.4, num_labels=1,
    )  # fmt: skip
    bert = transformers.BertForSequenceClassification(config).eval()
    bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = [" naïve café .", " a long story"]
    found = vbon.score(vbon.load_reward(tmp_path, score="scalar"), PROMPTS[:2], texts)
    for prompt, text, value in zip(PROMPTS, texts, found):
        ids = tokenizer(prompt + text, return_tensors="pt")
        assert tokenizer.decode(ids["input_ids"][0]).endswith(ends)
        with torch.no_grad():
            assert value == pytest.approx(bert(**ids).logits.item(), abs=1e-4)
