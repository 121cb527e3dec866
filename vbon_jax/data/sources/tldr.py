"""Prompts of the public TL;DR data set: Reddit posts with summaries (Stiennon et al. 2020).

A file has one {"id", "subreddit", "title", "post", "summary"} a line, as OpenAI's
`tldr_3_filtered/{train,valid,test}.jsonl`.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerFast

from vbon_jax.data import jsonl
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError


@dataclass(frozen=True)
class Post:
    """A Reddit post.

    Attributes:
      id: the id on Reddit.
      subreddit: the subreddit, without "r/".
      title: the title.
      post: the body.
      summary: the summary by the post's author.
    """

    id: str
    subreddit: str
    title: str
    post: str
    summary: str


def _bare(subreddit: str) -> str:
    return subreddit.strip().removeprefix("/").removeprefix("r/")


def read(path: str | os.PathLike[str]) -> list[Post]:
    """Reads the posts of a .jsonl file; other keys than the five are ignored.

    Args:
      path: the file.

    Returns:
      The posts in file order.

    Raises:
      InputError: the file is missing or empty, a line lacks a key or has a value that is no string,
        or a subreddit or post is empty; names the file and the line.
    """
    posts = []
    for where, record in jsonl.read(path):
        keys = ("id", "subreddit", "title", "post", "summary")
        values = {key: jsonl.text_field(record, key, where) for key in keys}
        values["subreddit"] = _bare(values["subreddit"])
        for key in ("subreddit", "post"):
            if not values[key].strip():
                raise InputError(f"{where}: {key!r} is empty; fill it in or delete the line")
        posts.append(Post(**values))
    if not posts:
        names = '"id", "subreddit", "title", "post", "summary"'
        raise InputError(f"{path}: the file is empty; give one {{{names}}} a line")
    return posts


def split(posts: Sequence[Post], subreddits: Sequence[str]) -> tuple[list[Post], list[Post]]:
    """Splits posts into in-distribution and out-of-distribution ones, by subreddit.

    Args:
      posts: the posts.
      subreddits: names of those in distribution, with or without "r/", in any case.

    Returns:
      (posts of the subreddits, all others), in order.

    Raises:
      InputError: no post is of any of the subreddits; names the most common ones.
    """
    wanted = {_bare(name).casefold() for name in subreddits}
    inside = [post for post in posts if post.subreddit.casefold() in wanted]
    if not inside:
        common = ", ".join(name for name, _ in Counter(p.subreddit for p in posts).most_common(5))
        raise InputError(
            f"none of the {len(posts)} posts is of {' or '.join(map(repr, subreddits))}; the most "
            f"common subreddits are {common or 'none'}"
        )
    return inside, [post for post in posts if post.subreddit.casefold() not in wanted]


def prompt_text(post: Post, gap: str = "\n") -> str:
    """Formats a post as the prompt of its summary: subreddit, title, post and "TL;DR:".

    Args:
      post: the post.
      gap: the separator of the parts. CarperAI's `openai_summarize_tldr` and the code of the vBoN
        paper have one newline; OpenAI's own `summarize-from-feedback`, TRL's `tldr` and Huang et
        al. 2024 (`summarize_from_feedback_details`, the `cleanrl/*__tldr` checkpoints) have two.

    Returns:
      The text of the prompt.
    """
    return gap.join(
        (f"SUBREDDIT: r/{post.subreddit}", f"TITLE: {post.title}", f"POST: {post.post}", "TL;DR:")
    )


def _shortened(post: str) -> str:
    line_end = post.rfind("\n")
    return post[:line_end] if line_end >= 0 else post[:-1]


def prompts(
    posts: Sequence[Post],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    count: int,
    seed: int,
    gap: str = "\n",
) -> tuple[list[Prompt], int]:
    """Makes prompts of posts, in random order and without replacement.

    As in OpenAI's code, lines are removed from the end of a post until the prompt fits, and of the
    last line that is left, characters.

    Args:
      posts: the posts to choose from.
      tokenizer: encodes the prompts, BOS in front where it begins a text so.
      max_tokens: greatest length of a prompt in tokens (OpenAI: 512).
      count: number of prompts, or 0 for all.
      seed: seed of the choice and the order; the first k prompts do not depend on count.
      gap: see `prompt_text`.

    Returns:
      (prompts with ids 0, 1, ..., the number of them that were truncated).

    Raises:
      InputError: there are fewer posts than prompts asked for, or a prompt does not fit even
        without the body of its post.
    """
    if not 0 <= count <= len(posts) or not posts:
        raise InputError(
            f"asked for {count} prompts of {len(posts)} posts; ask for at most that, 0 for all, or "
            "give more posts"
        )
    made: list[Prompt] = []
    cuts = 0
    order = np.random.default_rng(seed).permutation(len(posts))
    for index in order[: count or len(posts)]:
        post = posts[index]
        text = prompt_text(post, gap)
        tokens = tokenizers.begun(tokenizer, tokenizers.encode(tokenizer, text))
        cuts += len(tokens) > max_tokens
        while len(tokens) > max_tokens:
            if not post.post:
                raise InputError(
                    f"post {post.id!r}: its prompt has {len(tokens)} tokens even without the text, "
                    f"and {max_tokens} are allowed; allow more, or take it out"
                )
            post = replace(post, post=_shortened(post.post))
            text = prompt_text(post, gap)
            tokens = tokenizers.begun(tokenizer, tokenizers.encode(tokenizer, text))
        made.append(Prompt(len(made), text, tokens))
    return made, cuts
