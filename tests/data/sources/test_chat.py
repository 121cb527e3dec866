import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from vbon_jax.data import prompts, tokenizer
from vbon_jax.data.sources import chat, reviews
from vbon_jax.data.sources.chat import Conversation
from vbon_jax.errors import InputError

# Of the shape of Qwen3's: the generation prompt thinks unless told not to.
TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<no_think>\n{% endif %}"
    "{% endif %}"
)
ALTERNATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


def build(template, bos_added=False):
    """A BPE tokenizer with the template; with bos_added, encode puts a BOS before any text."""
    made = tokenizer.build([e.text for e in reviews.examples(0, 200)], "bpe", 330)
    made.add_special_tokens(
        {"additional_special_tokens": ["<|start|>", "<|end|>"], "bos_token": "<|bos|>"}
    )
    if bos_added:
        from tokenizers.processors import TemplateProcessing

        made.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", made.bos_token_id)]
        )
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def talker():
    return build(TEMPLATE)


def ids(tokenizer_, text):
    return tuple(tokenizer_.encode(text, add_special_tokens=False))


def said(*messages):
    return [Conversation(tuple(messages), "x.jsonl:7")]


def test_reads_messages_and_prompts_and_drops_the_reference_answer(tmp_path):
    path = tmp_path / "c.jsonl"
    system = {"role": "system", "content": "be brief"}
    user, assistant = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}
    lines = [
        {"messages": [user]},
        {"messages": [system, user, assistant, user | {"name": "x"}, assistant], "id": 3},
        {"prompt": "the film"},
        {"messages": [user], "prompt": "not read"},
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    u, a = ("user", "why?"), ("assistant", "so")
    assert chat.read(path) == [
        Conversation((u,), f"{path}:1"),
        Conversation((("system", "be brief"), u, a, u), f"{path}:3"),
        Conversation((("user", "the film"),), f"{path}:5"),
        Conversation((u,), f"{path}:7"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x"}, "neither 'messages' nor 'prompt' is there (found: 'text')"),
        ({"prompt": ["x"]}, "message 1 must be"),
        ({"prompt": 7}, "'prompt' must be a string or a list of messages, not 7"),
        ({"messages": "x"}, "'messages' must be a list of messages, not 'x'"),
        ({"messages": []}, "must end with one of the user"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "there is none"),
        (
            {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "assistant")]},
            "the last is of 'assistant'",
        ),
        ({"messages": [{"role": "system", "content": "x"}]}, "the last is of 'system'"),
        ({"messages": [{"role": "user", "content": "x"}, "y"]}, "message 2 must be {"),
        ({"messages": [{"content": "x"}]}, "message 1: key 'role' is missing"),
        ({"messages": [{"role": "user"}]}, "message 1: key 'content' is missing"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "must be a string"),
    ],
)
def test_faults_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "x"}\n' + json.dumps(line))
    with pytest.raises(InputError, match=r"c\.jsonl:2: ") as error:
        chat.read(path)
    assert message in str(error.value)


def test_parquet_messages_are_a_list_of_structs(tmp_path):
    path = tmp_path / "c.parquet"
    user, assistant = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}
    table = pa.table({"id": [1, 2], "messages": [[user], [user, assistant]], "turns": [9, 9]})
    pq.write_table(table, path)
    want = [Conversation((("user", "why?"),), f"{path}: row index {i}") for i in range(2)]
    assert chat.read(path) == want
    pq.write_table(table.rename_columns(["id", "said", "messages"]), path)
    assert chat.read(path, "said") == want  # another column named messages is not read
    pq.write_table(table.rename_columns(["id", "said", "turns"]), path)
    with pytest.raises(InputError, match=r"index 0: neither.*found: 'id', 'said'.*prompts\.column"):
        chat.read(path)
    with pytest.raises(InputError, match=r"no column 'asked' .*'said'.*set prompts\.column"):
        chat.read(path, "asked")
    pq.write_table(pa.table({"messages": pa.array([[user], None])}), path)
    with pytest.raises(InputError, match="row index 1: 'messages' must be a list of messages, not"):
        chat.read(path)


def test_a_named_column_holds_messages_or_what_the_user_says(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text('question,prompt\n"why, ""x""?",no\n')
    assert chat.read(path, "question") == [Conversation((("user", 'why, "x"?'),), f"{path}:2")]
    assert chat.read(path) == [Conversation((("user", "no"),), f"{path}:2")]
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": [{"role": "user", "content": "why?"}]}\n{"prompt": 3}')
    with pytest.raises(
        InputError, match=r"jsonl:2: 'prompt' must be a string or a list of mess.*not 3"
    ):
        chat.read(path, "prompt")
    path.write_text('{"prompt": [{"role": "user", "content": "why?"}]}\n{"text": ""}')
    with pytest.raises(InputError, match=r"jsonl:2: key 'prompt' is missing.*set prompts\.column"):
        chat.read(path, "prompt")
    path.write_text('{"said": [{"role": "system", "content": "x"}]}')
    with pytest.raises(InputError, match=r"jsonl:1: 'said' must end with one of the user"):
        chat.read(path, "said")
    path.write_text("")
    with pytest.raises(InputError, match=r"jsonl: the file is empty; give it records with 'said'"):
        chat.read(path, "said")


def test_an_empty_file_says_what_is_needed(tmp_path):
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"c\.jsonl: the file is empty; .*messages.*prompt"):
        chat.read(tmp_path / "c.jsonl")


def test_tokens_are_what_the_template_writes(talker):
    messages = (("system", "be brief"), ("user", "the film , why ?"))
    (a, b) = chat.prompts(said(*messages) + said(messages[1]), talker, chat.Rendering(), 100)
    text = (
        "<|bos|><|start|>system\nbe brief<|end|>\n<|start|>user\nthe film , why ?<|end|>\n"
        "<|start|>assistant\n"
    )
    assert (a.id, b.id) == (0, 1)
    assert a.text == text and a.tokens == ids(talker, text)
    assert a.messages == messages and b.messages == messages[1:]
    assert type(a.tokens) is tuple and all(type(token) is int for token in a.tokens)
    assert talker.decode(list(b.tokens)) == b.text
    # The special tokens are single ids, not spelled out.
    assert a.tokens.count(talker.convert_tokens_to_ids("<|start|>")) == 3


def test_template_arguments_reach_the_template(talker):
    (thinks,) = chat.prompts(
        said(("user", "hi")), talker, chat.Rendering({"enable_thinking": True}), 100
    )
    (not_,) = chat.prompts(
        said(("user", "hi")), talker, chat.Rendering({"enable_thinking": False}), 100
    )
    assert not_.text == thinks.text + "<no_think>\n"
    (default,) = chat.prompts(said(("user", "hi")), talker, chat.Rendering({"unknown": 1}), 100)
    assert default == thinks
    for name in ("tokenize", "add_generation_prompt", "max_length", "return_dict"):
        with pytest.raises(InputError, match=f"template argument '{name}' is not one of"):
            chat.prompts(said(("user", "hi")), talker, chat.Rendering({name: True}), 100)


def test_a_tokenizer_that_adds_bos_does_not_add_a_second(tmp_path):
    adds = build(TEMPLATE, bos_added=True)
    tokenizer.save(adds, tmp_path)
    for tok in (adds, AutoTokenizer.from_pretrained(tmp_path)):
        bos = tok.bos_token_id
        assert tok.encode("x")[0] == bos
        (made,) = chat.prompts(said(("user", "hi")), tok, chat.Rendering(), 100)
        assert made.tokens[0] == bos and made.tokens.count(bos) == 1
        assert chat.render(tok, (("user", "hi"),), "yes", chat.Rendering()).count(bos) == 1


def test_a_prompt_that_is_too_long_is_named_not_cut(talker):
    (made,) = chat.prompts(said(("user", "the film")), talker, chat.Rendering(), 100)
    length = len(made.tokens)
    assert chat.prompts(said(("user", "the film")), talker, chat.Rendering(), length) == [made]
    with pytest.raises(
        InputError, match=rf"x\.jsonl:7: the prompt has {length} tokens and {length - 1} are"
    ):
        chat.prompts(said(("user", "the film")), talker, chat.Rendering(), length - 1)


def test_no_template_and_a_template_that_refuses(talker):
    bare = build(None)
    for call in (
        lambda: chat.prompts(said(("user", "hi")), bare, chat.Rendering(), 100),
        lambda: chat.render(bare, (("user", "hi"),), "yes", chat.Rendering()),
    ):
        with pytest.raises(InputError, match=r"tokenizer built here has no chat template.*_config"):
            call()
    strict = build(ALTERNATE)
    assert chat.prompts(said(("user", "hi")), strict, chat.Rendering(), 9)[0].text == "hi"
    with pytest.raises(InputError, match=r"x\.jsonl:7: .*failed .*System role not supported"):
        chat.prompts(said(("system", "s"), ("user", "hi")), strict, chat.Rendering(), 100)
    with pytest.raises(InputError, match=r"x\.jsonl:7: the chat template makes no token"):
        chat.prompts(said(("user", "")), strict, chat.Rendering(), 100)


def test_render_is_the_whole_conversation_in_the_rewards_tokens(talker):
    messages = (("system", "s"), ("user", "the film ?"))
    found = chat.render(talker, messages, " fine .", chat.Rendering())
    assert found == ids(
        talker,
        "<|bos|><|start|>system\ns<|end|>\n<|start|>user\nthe film ?<|end|>\n"
        "<|start|>assistant\n fine .<|end|>\n",
    )
    # The policy's prompt is its beginning, where both have one template and tokenizer.
    (prompt,) = chat.prompts(said(*messages), talker, chat.Rendering(), 100)
    assert found[: len(prompt.tokens)] == prompt.tokens


def test_prompts_survive_the_disk(talker, tmp_path):
    made = chat.prompts(said(("system", "s"), ("user", "é\n漢")) * 2, talker, chat.Rendering(), 100)
    prompts.write_jsonl(tmp_path / "p.jsonl", made)
    assert prompts.read_jsonl(tmp_path / "p.jsonl") == made
