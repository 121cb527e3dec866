"""Reward models with tokenizers of their own, held against transformers' torch models."""

from functools import partial

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vbon_jax import sharding
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.sources import chat
from vbon_jax.errors import InputError
from vbon_jax.models import hf
from vbon_jax.rewards import classifier, text
from vbon_jax.rewards.classifier import Classifier
from vbon_jax.rewards.text import TextFormat, TextReward

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()

LABELS = ("NEGATIVE", "POSITIVE")
CORPUS = [
    "the film was a wonder from start to end", "a dull story and a slow film",
    "the actors were fine, the plot was not", "what a wonder of a plot, what actors!",
]  # fmt: skip
ASKED = ["the film was", "a dull story", "the film was", "what"]
ANSWERS = [" a wonder from start to end", " and a slow film", "", " actors! what actors! not fine"]


@pytest.fixture(scope="module")
def policy_tokenizer():
    return tokenizers.build([*CORPUS, *ANSWERS], "characters", 100)


@pytest.fixture(scope="module")
def wordpiece():
    """As BERT's: [CLS] ... [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=70, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


@pytest.fixture(scope="module")
def bpe():
    """As GPT-2's: no token of its own around a text, and no padding."""
    tokenizer = tokenizers.build(CORPUS, "bpe", 300)
    tokenizer.pad_token = None
    return tokenizer


def randomised(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def bert(tokenizer, num_labels):
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=len(tokenizer), hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=20, max_position_embeddings=48, num_labels=num_labels,
        )
    )  # fmt: skip


def gpt2(tokenizer, num_labels):
    return transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(
            vocab_size=len(tokenizer), n_positions=48, n_embd=12, n_layer=2, n_head=2,
            num_labels=num_labels,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def models_of(wordpiece, bpe, tmp_path_factory):
    """(family, number of labels) -> (tokenizer, torch model, its files read by us), made once."""
    made = {}

    def make(name, num_labels):
        if (name, num_labels) not in made:
            tokenizer, build = {"bert": (wordpiece, bert), "gpt2": (bpe, gpt2)}[name]
            model = randomised(build(tokenizer, num_labels))
            if num_labels == 2:
                model.config.id2label = dict(enumerate(LABELS))
            path = tmp_path_factory.mktemp(name)
            model.save_pretrained(path)
            made[name, num_labels] = tokenizer, model, hf.load_classifier(path)
        return made[name, num_labels]

    return make


@pytest.fixture(scope="module")
def make(models_of, policy_tokenizer, mesh):
    """make(family, kind, **options) -> (reward, tokenizer, torch model)."""

    def of(name="gpt2", kind="log_odds", **options):
        tokenizer, model, (config, params, labels) = models_of(name, 1 if kind == "scalar" else 2)
        form = {k: options.pop(k) for k in ("template", "max_tokens") if k in options}
        reward = TextReward(
            Classifier(sharding.place(params, mesh), config, labels, "POSITIVE", kind),
            TextFormat(tokenizer, **form),
            partial(tokenizers.continuations, policy_tokenizer), (len(policy_tokenizer),), mesh,
            batch_size=options.pop("batch_size", 4), **options,
        )  # fmt: skip
        return reward, tokenizer, model

    return of


def batch(policy_tokenizer, prompts, responses):
    """Arguments of a reward: responses as the policy's ids, EOS behind all but the last."""
    end = len(policy_tokenizer)
    rows = [[*tokenizers.encode(policy_tokenizer, r), end] if r else [end] for r in responses]
    rows[-1] = rows[-1][:-1]
    tokens = np.zeros((len(rows) + 1, max(map(len, rows))), np.int32)  # and a row that only fills
    mask = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    of = [Prompt(i, p, tokenizers.encode(policy_tokenizer, p)) for i, p in enumerate(prompts)]
    return of, None, None, tokens, mask


def torch_scores(model, tokenizer, texts, kind):
    """One text at a time, so that nothing is padded."""
    scores = []
    for one in texts:
        with torch.no_grad():
            logits = model(**tokenizer(one, return_tensors="pt")).logits[0].double()
        log_p = torch.log_softmax(logits, -1)
        scores.append({
            "prob": lambda x, p: p[1].exp(), "log_odds": lambda x, p: x[1] - x[0],
            "logit": lambda x, p: x[1], "scalar": lambda x, p: x[0],
        }[kind](logits, log_p))  # fmt: skip
    return np.array(scores)


@pytest.mark.parametrize("kind", classifier.KINDS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_as_transformers_scores_the_same_text(make, policy_tokenizer, name, kind):
    template = "Q: {prompt}\n{{A}}:{response}"
    reward, tokenizer, model = make(name, kind, template=template)
    assert tokenizer.get_vocab() != policy_tokenizer.get_vocab()
    texts = [f"Q: {p}\n{{A}}:{r}" for p, r in zip(ASKED, ANSWERS)]
    want = torch_scores(model, tokenizer, texts, kind)
    got = reward(*batch(policy_tokenizer, ASKED, ANSWERS))
    assert got.shape == (4,) and got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.ptp(want) > 1e-2


def test_a_decoder_is_scored_at_its_last_real_token_as_in_a_padded_torch_batch(
    make, bpe, policy_tokenizer
):
    reward, _, model = make("gpt2", "logit")
    rows = [bpe(p + r)["input_ids"] for p, r in zip(ASKED, ANSWERS)]
    pad = 1  # no text has it
    padded = torch.full((4, max(map(len, rows))), pad)
    for i, row in enumerate(rows):
        assert pad not in row
        padded[i, : len(row)] = torch.tensor(row)
    model.config.pad_token_id = pad
    with torch.no_grad():
        want = model(padded, attention_mask=padded != pad).logits[:, 1].numpy()
    np.testing.assert_allclose(reward(*batch(policy_tokenizer, ASKED, ANSWERS)), want, atol=1e-4)


def test_the_same_text_has_the_same_score_in_any_company(make, policy_tokenizer):
    """To the bit: ties between responses would otherwise be broken by the batch they came in."""
    reward, _, _ = make("bert", "prob")
    alone = reward(*batch(policy_tokenizer, ASKED[:1], ANSWERS[:1]))
    asked, answers = ["what", *ASKED, "a dull story"], [ANSWERS[3] * 2, *ANSWERS, ANSWERS[1]]
    among = reward(*batch(policy_tokenizer, asked, answers))
    assert among[1] == alone[0] and among[2] == among[5]


def test_rows_are_padded_by_their_own_length_alone(make, monkeypatch):
    reward, _, _ = make("gpt2", "logit", batch_size=2)
    real, seen = classifier.score, []

    def score(params, tokens, mask, **rest):
        seen.append((tokens.shape, np.asarray(mask).sum(axis=1).tolist()))
        return real(params, tokens, mask, **rest)

    monkeypatch.setattr(classifier, "score", score)
    reward.score_ids([[1] * 3, [1] * 40, [1] * 16, [1] * 17, [1] * 5])
    assert seen == [((2, 16), [3, 16]), ((2, 16), [5, 0]), ((2, 32), [17, 0]), ((2, 48), [40, 0])]


def test_few_shapes_are_compiled_however_long_the_texts(make, policy_tokenizer):
    reward, _, _ = make("gpt2", "prob", batch_size=3)
    before = classifier.score._cache_size()
    for count in (1, 2, 5, 7):
        for length in range(1, 45, 3):
            reward(*batch(policy_tokenizer, ["a"] * count, ["a" * length] * count))
    assert classifier.score._cache_size() - before == 3  # 16, 32, 48


def test_buckets():
    lengths = [0, 1, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 700]
    want = [16, 16, 16, 32, 32, 64, 64, 128, 128, 256, 256, 384, 768]
    assert [text.bucket(n, 10_000) for n in lengths] == want
    assert [text.bucket(n, 500) for n in (12, 200, 385, 500)] == [16, 256, 500, 500]


def test_what_a_cut_keeps():
    specials = frozenset({2, 3})
    ids = [2, 10, 11, 12, 13, 3]
    assert text.keep_end(ids, 6, specials) == ids
    assert text.keep_end(ids, 4, specials) == [2, 12, 13, 3]
    assert text.keep_end(ids, 2, specials) == [2, 3]
    assert text.keep_end(ids[1:-1], 2, specials) == [12, 13]
    assert text.keep_end([2, 2, 10, 11, 12], 4, specials) == [2, 2, 11, 12]
    assert text.keep_end([2, 2, 2, 10], 2, specials) == [2, 10]


@pytest.mark.parametrize(("name", "lead", "tail"), [("bert", 1, 1), ("gpt2", 0, 0)])
def test_long_texts_lose_the_beginning_of_the_prompt_and_are_counted(
    make, policy_tokenizer, name, lead, tail
):
    reward, tokenizer, model = make(name, "logit", max_tokens=16)
    asked = ["the film was a wonder from start to end, a dull story and a slow film", "what"]
    answers = [" a slow plot", " a"]
    whole = [tokenizer(p + r)["input_ids"] for p, r in zip(asked, answers)]
    assert len(whole[0]) > 16 >= len(whole[1])
    prompts = [Prompt(i, p, (1,)) for i, p in enumerate(asked)]
    rows = reward.tokenized(prompts, answers)
    assert rows == [whole[0][:lead] + whole[0][len(whole[0]) - 16 + lead :], whole[1]]
    said = tokenizer(answers[0], add_special_tokens=False)["input_ids"]
    assert rows[0][16 - tail - len(said) : 16 - tail] == said
    assert reward.take_counts() == {"responses": 2, "reward_truncated": 0.5}
    assert reward.take_counts() == {}
    with torch.no_grad():
        want = [model(torch.tensor([row])).logits[0, 1].item() for row in rows]
    got = reward(*batch(policy_tokenizer, asked, answers))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert reward.take_counts()["responses"] == 2  # a row that only fills the batch is no text


def test_a_text_of_no_token_is_the_token_that_begins_texts(make, policy_tokenizer):
    reward, tokenizer, model = make("gpt2", "logit", template="{response}")
    (got, _) = reward(*batch(policy_tokenizer, ["a", "a"], ["", "a"]))
    with torch.no_grad():
        want = model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, 1].item()
    assert got == pytest.approx(want, abs=1e-4)


def test_an_unknown_word_at_the_beginning_is_no_special_token(make):
    reward, tokenizer, _ = make("bert", "logit", max_tokens=4)
    (row,) = reward.tokenized([Prompt(0, "§ the film was a", (1,))], [" wonder"])
    whole = tokenizer("§ the film was a wonder")["input_ids"]
    assert whole[1] == tokenizer.unk_token_id
    assert row == [whole[0], *whole[-3:]]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{prompt}", "has no {response}"),
        ("{prompt} {answer} {response}", "has the field 'answer'"),
        ("{} {response}", "has the field ''"),
        ("{prompt!r}{response}", "has the field 'prompt'"),
        ("{prompt:>9}{response}", "has the field 'prompt'"),
        ("{response.title}", "has the field 'response.title'"),
        ("{prompt} {response", "expected '}'.*write a brace of the text itself twice"),
    ],
)
def test_bad_templates_are_named(template, message):
    with pytest.raises(InputError, match=rf"reward\.others\.b\.template=.*{message}"):
        text.check_template(template, "reward.others.b")


def test_good_templates():
    for template in ("{prompt}{response}", "{response}", "Q{{}}: {prompt}\nA: {response}", "chat"):
        assert text.check_template(template) == template


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 49}, r"^evaluator\.max_tokens=49: the evaluator model has 48 positions"),
        ({"max_tokens": 1}, r"^evaluator\.max_tokens=1:"),
        ({"batch_size": 0}, r"^evaluator\.batch_size=0"),
        ({"template": "chat"}, r"^evaluator\.template='chat': the tokenizer of evaluator\.path"),
        ({"template": "x"}, r"^evaluator\.template='x' has no \{response\}"),
        ({"kind": "rank"}, r"^evaluator\.score='rank'"),
    ],
)
def test_bad_settings_are_named(make, options, message):
    with pytest.raises(InputError, match=message):
        make(key="evaluator", **options)


def test_a_tokenizer_of_another_model_is_refused(make, models_of, bpe):
    reward, _, _ = make("bert", "logit", key="evaluator")
    with pytest.raises(InputError, match=r"evaluator\.path: the tokenizer gives id 299, .* only"):
        reward.score_ids([[1, 2], [3, 299]])


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_chat_is_the_reward_tokenizers_own_template(make, policy_tokenizer, bpe, monkeypatch):
    monkeypatch.setattr(bpe, "chat_template", CHAT)
    reward, tokenizer, _ = make("gpt2", "logit", template="chat", max_tokens=0)
    said = (("system", "a"), ("user", "what"))
    prompts = [Prompt(0, "the film", (1,)), Prompt(1, "as the policy reads it", (1,), said)]
    rows = reward.tokenized(prompts, ["fine", "not"])
    for row, prompt, response, messages in zip(
        rows, prompts, ["fine", "not"], [(("user", "the film"),), said]
    ):
        assert row == list(chat.render(tokenizer, messages, response, chat.Rendering()))[-48:], (
            prompt
        )
        assert response in tokenizer.decode(row)
    assert "as the policy" not in tokenizer.decode(rows[1])
