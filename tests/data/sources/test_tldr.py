import json

import pytest

from tests.data import tldr_shaped
from vbon_jax.data import tokenizer
from vbon_jax.data.sources import tldr
from vbon_jax.data.sources.tldr import Post
from vbon_jax.errors import InputError

POST = Post("t3_a", "tifu", "By {waiting}", "One.\nTwo.\n\nThree three. Four", "late")


@pytest.fixture(scope="module")
def posts(tmp_path_factory):
    path = tmp_path_factory.mktemp("tldr") / "train.jsonl"
    written = tldr_shaped.write(path, 120, seed=0)
    read = tldr.read(path)
    assert [vars(post) for post in read] == written
    return read


@pytest.fixture(scope="module")
def letters(posts):
    """One token a character."""
    texts = [tldr.prompt_text(post) for post in [*posts, POST]]
    return tokenizer.build(texts, "characters", 200)


@pytest.fixture(scope="module")
def bpe(posts):
    return tokenizer.build([post.post for post in posts], "bpe", 400)


def test_reads_the_public_layout(tmp_path):
    path = tmp_path / "valid.jsonl"
    fields = {"id": "t3_1", "subreddit": "r/dogs", "title": "", "post": " a\n", "summary": ""}
    lines = [fields | {"url": None}, fields | {"subreddit": "/r/jobs"}, fields | {"id": "t3_1"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert tldr.read(path) == [
        Post("t3_1", "dogs", "", " a\n", ""),
        Post("t3_1", "jobs", "", " a\n", ""),
        Post("t3_1", "dogs", "", " a\n", ""),
    ]
    for changes, message in (
        ({"post": ...}, "'post' is missing"),
        ({"summary": ...}, "'summary' is missing"),
        ({"title": None}, "'title' must be a string, not None"),
        ({"id": 5}, "'id' must be a string, not 5"),
        ({"post": " \n"}, "'post' is empty"),
        ({"subreddit": "r/"}, "'subreddit' is empty"),
    ):
        line = {k: v for k, v in (fields | changes).items() if v is not ...}
        path.write_text(json.dumps(fields) + "\n" + json.dumps(line))
        with pytest.raises(InputError, match=r"valid\.jsonl:2: ") as error:
            tldr.read(path)
        assert message in str(error.value)
    path.write_text("")
    with pytest.raises(InputError, match=r"valid\.jsonl: the file is empty.*\"subreddit\""):
        tldr.read(path)


def test_split_by_subreddit_keeps_order_and_loses_nothing(posts):
    inside, others = tldr.split(posts, tldr_shaped.RELATIONSHIPS)
    assert len(inside) == len(others) == 60
    assert {post.subreddit for post in inside} == set(tldr_shaped.RELATIONSHIPS)
    assert not {post.subreddit for post in others} & set(tldr_shaped.RELATIONSHIPS)
    assert inside == posts[::2] and others == posts[1::2]
    assert tldr.split(posts, ["r/Relationships", "/r/relationship_advice", "gone"])[0] == inside
    # A name is a whole name.
    part = tldr.split(posts, ["relationships"])[0]
    assert 0 < len(part) < 60 and {post.subreddit for post in part} == {"relationships"}
    with pytest.raises(InputError) as error:
        tldr.split(posts, ["relationship", "r/advice"])
    assert "none of the 120 posts is of 'relationship' or 'r/advice'" in str(error.value)
    assert "most common subreddits are relation" in str(error.value)
    with pytest.raises(InputError, match="subreddits are none"):
        tldr.split([], ["relationships"])


def test_prompt_text_is_the_published_format():
    assert tldr.prompt_text(POST) == (
        "SUBREDDIT: r/tifu\nTITLE: By {waiting}\nPOST: One.\nTwo.\n\nThree three. Four\nTL;DR:"
    )
    assert tldr.prompt_text(POST, gap="\n\n") == (
        "SUBREDDIT: r/tifu\n\nTITLE: By {waiting}\n\n"
        "POST: One.\nTwo.\n\nThree three. Four\n\nTL;DR:"
    )


def one(letters, post, max_tokens, **options):
    (prompt,), cut = tldr.prompts([post], letters, max_tokens, 1, seed=0, **options)
    assert len(prompt.tokens) == len(prompt.text) <= max_tokens
    assert letters.decode(prompt.tokens) == prompt.text and not prompt.messages
    head, body = prompt.text.split("POST: ")
    gap = options.get("gap", "\n")
    assert head == f"SUBREDDIT: r/tifu{gap}TITLE: By {{waiting}}{gap}"
    assert body.endswith(f"{gap}TL;DR:")
    return body.removesuffix(f"{gap}TL;DR:"), cut


def test_a_long_post_loses_its_last_lines_then_its_last_characters(letters):
    whole = len(tldr.prompt_text(POST))
    assert one(letters, POST, whole) == (POST.post, 0)
    # Lines go whole, an empty one in a step of its own.
    assert one(letters, POST, whole - 1) == ("One.\nTwo.\n", 1)
    assert one(letters, POST, whole - 18) == ("One.\nTwo.\n", 1)
    assert one(letters, POST, whole - 19) == ("One.\nTwo.", 1)
    assert one(letters, POST, whole - 20) == ("One.", 1)
    assert one(letters, POST, whole - 24) == ("One.", 1)
    # The last line goes by characters, to nothing at all.
    assert one(letters, POST, whole - 25) == ("One", 1)
    assert one(letters, POST, whole - 28) == ("", 1)
    assert one(letters, POST, whole + 3, gap="\n\n") == (POST.post, 0)
    assert one(letters, POST, whole + 2, gap="\n\n") == ("One.\nTwo.\n", 1)
    with pytest.raises(InputError, match=r"post 't3_a': .* 51 tokens even .* 50 are allowed"):
        one(letters, POST, whole - 29)


def openai(post, count_tokens, limit):
    """The rule again: drop what follows the last newline, or one character, while too long."""
    body = post.post
    while count_tokens(tldr.prompt_text(Post("", post.subreddit, post.title, body, ""))) > limit:
        body = body.rsplit("\n", 1)[0] if "\n" in body else body[:-1]
    return body


def test_prompts_are_the_posts_and_the_cut_ones_are_counted(posts, bpe):
    def count_tokens(text):
        return len(bpe.encode(text))

    lengths = [count_tokens(tldr.prompt_text(post)) for post in posts]
    limit = sorted(lengths)[80]
    made, cut = tldr.prompts(posts, bpe, limit, 0, seed=3)
    assert [p.id for p in made] == list(range(120))
    assert cut == sum(length > limit for length in lengths) and 20 < cut < 40
    bodies = [openai(post, count_tokens, limit) for post in posts]
    expected = [
        tldr.prompt_text(Post("", p.subreddit, p.title, body, ""))
        for p, body in zip(posts, bodies, strict=True)
    ]
    assert sorted(p.text for p in made) == sorted(expected)
    assert [p.text for p in made] != expected  # in random order
    assert all(p.tokens == tuple(bpe.encode(p.text)) for p in made)
    assert max(len(p.tokens) for p in made) == limit
    assert all(type(token) is int for p in made for token in p.tokens)


def test_choice_is_seeded_and_without_replacement(posts, bpe):
    def texts(count, seed):
        return [p.text for p in tldr.prompts(posts, bpe, 10_000, count, seed)[0]]

    everything = texts(0, 1)
    assert len(everything) == 120 and texts(120, 1) == everything
    assert texts(30, 1) == everything[:30]
    assert texts(30, 2) != everything[:30]
    assert len(set(texts(0, 1))) == len({tldr.prompt_text(p) for p in posts})
    for wrong in (121, -1):
        with pytest.raises(InputError, match=rf"asked for {wrong} prompts of 120 posts"):
            texts(wrong, 1)
    with pytest.raises(InputError, match="asked for 0 prompts of 0 posts"):
        tldr.prompts([], bpe, 10, 0, 0)
