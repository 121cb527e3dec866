"""Chat prompts: conversations put into tokens by the tokenizer's own chat template."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from vbon_jax.data import jsonl
from vbon_jax.data.prompts import Prompt, parse_messages
from vbon_jax.errors import InputError

Messages = tuple[tuple[str, str], ...]

# Arguments of apply_chat_template that are decided here, not the template's own.
_RESERVED = frozenset(
    {
        "conversation", "chat_template", "add_generation_prompt", "continue_final_message",
        "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip


class Conversation(NamedTuple):
    """What was said, as (role, content) pairs that end with the user, and "file:line"."""

    messages: Messages
    where: str


def read(path: str | os.PathLike[str]) -> list[Conversation]:
    """Reads {"messages": [{"role", "content"}, ...]} or {"prompt": str} lines.

    The last message is the user's; if one of the assistant follows, it is the reference answer and
    is dropped. A prompt is one message of the user. Other keys are ignored, and so is a prompt
    beside messages.

    Raises:
      InputError: the file is missing or empty, or a line is malformed or does not end with the
        user; names the file and the line.
    """
    conversations = []
    for where, record in jsonl.read(path):
        if "messages" in record:
            messages = parse_messages(record["messages"], where)
            if messages and messages[-1][0] == "assistant":
                messages = messages[:-1]
        elif "prompt" in record:
            messages = (("user", jsonl.text_field(record, "prompt", where)),)
        else:
            found = ", ".join(map(repr, record)) or "none"
            raise InputError(
                f"{where}: neither 'messages' nor 'prompt' is there (found: {found}); add one"
            )
        if not messages or messages[-1][0] != "user":
            last = f"the last is of {messages[-1][0]!r}" if messages else "there is none"
            raise InputError(
                f"{where}: 'messages' must end with one of the user, before the assistant's answer "
                f"if there is one; {last}"
            )
        conversations.append(Conversation(messages, where))
    if not conversations:
        raise InputError(
            f'{path}: the file is empty; give one {{"messages": [...]}} or {{"prompt": ...}} a line'
        )
    return conversations


def _name(tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.name_or_path or "built here"


def _check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    if not tokenizer.chat_template:
        raise InputError(
            f"tokenizer {_name(tokenizer)} has no chat template: give one that has, or add "
            '"chat_template" to its tokenizer_config.json'
        )


def _apply(
    tokenizer: PreTrainedTokenizerFast, messages: Messages, **arguments: Any
) -> tuple[int, ...]:
    """The ids the tokenizer's template makes of messages.

    Raises:
      InputError: the template refuses the messages or the arguments.
    """
    said = [{"role": role, "content": content} for role, content in messages]
    try:
        # A list, not the dict that transformers 5 returns by default. No special token is added to
        # those the template writes, so there is one BOS at most.
        ids = tokenizer.apply_chat_template(said, tokenize=True, return_dict=False, **arguments)
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
    template_arguments: Mapping[str, Any],
    max_tokens: int,
) -> list[Prompt]:
    """Puts conversations into tokens, up to where the assistant's answer begins.

    Args:
      conversations: what `read` gives.
      tokenizer: the policy's; its chat template writes the tokens, special ones included, and no
        other is added.
      template_arguments: passed to the template, such as {"enable_thinking": False} for Qwen3; what
        a template does not read, it ignores.
      max_tokens: most tokens of a prompt; none is ever cut.

    Returns:
      Prompts with ids 0, 1, ... in order, their messages, and the decoded tokens as text, special
      tokens included.

    Raises:
      InputError: the tokenizer has no chat template, an argument is not the template's to have, the
        template refuses a conversation, or a prompt is too long; the last two name the line.
    """
    _check_template(tokenizer)
    reserved = sorted(_RESERVED & template_arguments.keys())
    if reserved:
        raise InputError(
            f"template argument {reserved[0]!r} is not one of the template: it is decided by what "
            "reads the prompts; remove it"
        )
    made: list[Prompt] = []
    for messages, where in conversations:
        try:
            tokens = _apply(tokenizer, messages, add_generation_prompt=True, **template_arguments)
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


def render(
    tokenizer: PreTrainedTokenizerFast, messages: Messages, response: str
) -> tuple[int, ...]:
    """The ids of a whole conversation, for a reward model that reads it by its own template.

    Args:
      tokenizer: the reward model's.
      messages: (role, content) pairs that end with the user.
      response: what the assistant answers.

    Raises:
      InputError: the tokenizer has no chat template, or it refuses the messages.
    """
    _check_template(tokenizer)
    return _apply(tokenizer, (*messages, ("assistant", response)), add_generation_prompt=False)
