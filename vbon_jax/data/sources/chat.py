"""Chat prompts: conversations tokenized with the tokenizer's own chat template."""

import dataclasses
import datetime
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from vbon_jax.data import records
from vbon_jax.data.prompts import COLUMN_SETTING, Prompt, from_texts, parse_messages
from vbon_jax.errors import InputError

Messages = tuple[tuple[str, str], ...]
# transformers gives templates this function of the clock, and takes no other in its place.
_DATE = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<form>.*?)(?P=quote)\s*\)""")
NO_LIMIT = 2**31  # prompts of a call are held against the model's context alone

# Arguments of apply_chat_template that are decided here, not the template's own.
_RESERVED = frozenset(
    {
        "conversation", "chat_template", "add_generation_prompt", "continue_final_message",
        "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rendering:
    """How a chat template is rendered.

    Attributes:
      arguments: passed to the template, such as {"enable_thinking": False} for Qwen3; a template
        ignores arguments that it does not use.
      date: what a template that writes a date, as Llama 3's does by ``strftime_now``, takes for
        today: without it, a run would see other prompts after midnight. None for the day itself.
    """

    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    date: datetime.date | None = None

    def __post_init__(self) -> None:
        """Raises InputError for an argument that is decided here and not the template's own."""
        reserved = sorted(_RESERVED & self.arguments.keys())
        if reserved:
            raise InputError(
                f"template argument {reserved[0]!r} is not one of the template: it is decided by "
                "what reads the prompts; remove it"
            )

    def template(self, tokenizer: PreTrainedTokenizerFast) -> str:
        """The tokenizer's chat template with its date written in."""
        source = tokenizer.get_chat_template()
        if self.date is None:
            return source
        midnight = datetime.datetime.combine(self.date, datetime.time())
        return _DATE.sub(lambda call: repr(midnight.strftime(call["form"])), source)


class Conversation(NamedTuple):
    """A conversation that ends with the user's message.

    Attributes:
      messages: (role, content) pairs in order.
      where: "file:line", for messages.
    """

    messages: Messages
    where: str


def read(path: str | os.PathLike[str], column: str = "") -> list[Conversation]:
    """Reads conversations from a .jsonl, .csv, .tsv or .parquet file; see `records.read`.

    Args:
      path: the file.
      column: the column (or JSON key) of the conversations, each a list of {"role", "content"}
        or a string, which is one message of the user. "" for "messages", a list, or else "prompt",
        either. Other columns are ignored.

    Returns:
      The conversations in file order. The last message is the user's; an answer of the assistant
      after it is dropped.

    Raises:
      InputError: the file cannot be read or holds no record, or a record lacks the column, is
        malformed or does not end with the user; names the file and the line.
    """
    return conversations(records.read(path, settings(column)), str(path), column)


def settings(column: str) -> dict[str, str]:
    """The column with the config key that names it, as `records.read` takes them."""
    return {column: COLUMN_SETTING} if column else {}


def _messages(record: Mapping[str, Any], column: str, where: str) -> Messages:
    may_be_text = bool(column) or "messages" not in record
    column = column or next((c for c in ("messages", "prompt") if c in record), "")
    if column and may_be_text:
        value = record[column]
        if isinstance(value, str):
            return (("user", value),)
        if not isinstance(value, list):
            raise InputError(
                f"{where}: {column!r} must be a string or a list of messages, not {value!r}"
            )
    if column:
        messages = parse_messages(record[column], where, column)
        return messages[:-1] if messages and messages[-1][0] == "assistant" else messages
    found = ", ".join(map(repr, record)) or "none"
    raise InputError(
        f"{where}: neither 'messages' nor 'prompt' is there (found: {found}); add one, or set "
        f"{COLUMN_SETTING} to the column to read"
    )


def conversations(
    found: Iterable[tuple[str, Mapping[str, Any]]], source: str, column: str = ""
) -> list[Conversation]:
    """Makes conversations of records.

    Args:
      found: (location, record) of each, the location for messages; the column is there.
      source: the name of the file or data set, for messages.
      column: see `read`.

    Returns:
      The conversations in order.

    Raises:
      InputError: there is no record, or as `read`.
    """
    made = []
    for where, record in found:
        messages = _messages(record, column, where)
        if not messages or messages[-1][0] != "user":
            last = f"the last is of {messages[-1][0]!r}" if messages else "there is none"
            raise InputError(
                f"{where}: {column or 'messages'!r} must end with one of the user, before the "
                f"assistant's answer if there is one; {last}"
            )
        made.append(Conversation(messages, where))
    if not made:
        columns = repr(column) if column else "'messages' or 'prompt'"
        raise InputError(f"{source}: the file is empty; give it records with {columns}")
    return made


def _name(tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.name_or_path or "built here"


def _check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    if not tokenizer.chat_template:
        raise InputError(
            f"tokenizer {_name(tokenizer)} has no chat template: give one that has, or add "
            '"chat_template" to its tokenizer_config.json'
        )


def _apply(
    tokenizer: PreTrainedTokenizerFast,
    messages: Messages,
    rendering: Rendering,
    add_generation_prompt: bool,
) -> tuple[int, ...]:
    """Tokenizes messages with the tokenizer's chat template.

    Raises:
      InputError: the template refuses the messages or the arguments.
    """
    said = [{"role": role, "content": content} for role, content in messages]
    try:
        # A list, not the dict that transformers 5 returns by default. No special token is added to
        # those the template writes, so there is one BOS at most.
        ids = tokenizer.apply_chat_template(
            said,
            chat_template=rendering.template(tokenizer),
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,
            **rendering.arguments,
        )
    except Exception as error:  # a template raises whatever it likes
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"the chat template of tokenizer {_name(tokenizer)} failed "
            f"({type(error).__name__}: {reason}); check the roles and the template's arguments"
        ) from error
    return tuple(map(int, ids))


def prompts(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerFast,
    rendering: Rendering,
    max_tokens: int,
) -> list[Prompt]:
    """Tokenizes conversations up to the generation prompt, where the assistant's answer begins.

    Args:
      conversations: what `read` returned.
      tokenizer: the policy's; its chat template writes the special tokens, and no other is added.
      rendering: arguments and date of the template.
      max_tokens: greatest length of a prompt in tokens; prompts are never cut.

    Returns:
      Prompts with ids 0, 1, ... in order, with their messages and, as text, the decoded tokens with
      special tokens included.

    Raises:
      InputError: the tokenizer has no chat template, an argument is reserved, the template raises
        an error, or a prompt is empty or too long; the last three name the line.
    """
    _check_template(tokenizer)
    made: list[Prompt] = []
    for messages, where in conversations:
        try:
            tokens = _apply(tokenizer, messages, rendering, add_generation_prompt=True)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if not tokens:
            raise InputError(f"{where}: the chat template makes no token of it; check the template")
        if len(tokens) > max_tokens:
            raise InputError(
                f"{where}: the prompt has {len(tokens)} tokens and {max_tokens} are allowed; "
                "shorten it, take it out, or allow more"
            )
        text = tokenizer.decode(list(tokens), skip_special_tokens=False)
        made.append(Prompt(len(made), text, tokens, messages))
    return made


def given(
    items: Sequence[Any],
    tokenizer: PreTrainedTokenizerFast,
    rendering: Rendering | None = None,
) -> list[Prompt]:
    """Tokenizes prompts that are texts, or conversations.

    Args:
      items: all texts, or all conversations: lists of {"role", "content"} that end with the user.
      tokenizer: the policy's.
      rendering: arguments and date of the chat template.

    Returns:
      Prompts with ids 0, 1, ... in order.

    Raises:
      InputError: texts and conversations are mixed, or as `prompts` and `prompts.from_texts`.
    """
    texts = [item for item in items if isinstance(item, str)]
    if len(texts) == len(items):
        return from_texts(texts, tokenizer)
    if texts:
        raise InputError(
            f"prompts: {len(texts)} texts among {len(items) - len(texts)} conversations; make all "
            'of one kind: a text as [{"role": "user", "content": text}]'
        )
    found = [
        (f"prompt {i}", {"messages": [dict(message) for message in item]})
        for i, item in enumerate(items)
    ]
    return prompts(conversations(found, "prompts"), tokenizer, rendering or Rendering(), NO_LIMIT)


def closing_id(
    tokenizer: PreTrainedTokenizerFast, end_ids: Sequence[int], is_chat: bool
) -> int | None:
    """Returns the id to end a response with that is given as text.

    Args:
      tokenizer: the policy's.
      end_ids: the ids that end a response.
      is_chat: whether it answers a conversation: then the one that the chat template writes after
        an answer, "<end_of_turn>" of Gemma's <eos> and <end_of_turn>.

    Returns:
      The id, else the tokenizer's EOS where that is among the end ids, else the first of them; None
      where there are none.
    """
    if is_chat and tokenizer.chat_template and end_ids:
        example = (("user", "a"), ("assistant", "b"))
        written = [i for i in _apply(tokenizer, example, Rendering(), False) if i in end_ids]
        if written:
            return written[-1]
    own = tokenizer.eos_token_id
    return own if own in end_ids else next(iter(end_ids), None)


def render(
    tokenizer: PreTrainedTokenizerFast,
    messages: Messages,
    response: str,
    rendering: Rendering,
) -> tuple[int, ...]:
    """Tokenizes a whole conversation with the reward model's own chat template.

    Args:
      tokenizer: the reward model's.
      messages: (role, content) pairs that end with the user.
      response: the assistant's answer.
      rendering: arguments and date of the template.

    Returns:
      The token ids of the messages and the response, special tokens included.

    Raises:
      InputError: the tokenizer has no chat template, or the template raises an error.
    """
    _check_template(tokenizer)
    whole = (*messages, ("assistant", response))
    return _apply(tokenizer, whole, rendering, add_generation_prompt=False)
