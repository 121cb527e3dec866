import pytest

from vbon_jax.data.sources.text import Example, read_jsonl
from vbon_jax.errors import InputError

GOOD = b'{"text": "fine film .", "label": 1}\n'


def test_reads_ints_bools_extra_keys_blank_lines_and_no_final_newline(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + GOOD
        + b'\n{"label": false, "text": "a \\u2028 b\xe2\x80\xa8c", "id": 7}\r\n'
        b'  \n{"text": "bad", "label": 0}'
    )
    assert read_jsonl(path) == [
        Example("fine film .", 1),
        Example("a \u2028 b\u2028c", 0),
        Example("bad", 0),
    ]
    assert all(type(example.label) is int for example in read_jsonl(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x", "label": 0', "not a line of JSON"),
        (b"\xff\xfe", "not a line of JSON"),
        (b"[" * 100_000, "not a line of JSON"),
        (b'["x", 0]', "this one is a list"),
        (b'{"label": 0}', "'text' is missing"),
        (b'{"text": "x"}', "'label' is missing"),
        (b'{"text": 3, "label": 0}', "'text' must be a string, not 3"),
        (b'{"text": " ", "label": 0}', "'text' is empty"),
        (b'{"text": "x", "label": "0"}', "must be 0 or 1, not '0'"),
        (b'{"text": "x", "label": 1.0}', "must be 0 or 1, not 1.0"),
        (b'{"text": "x", "label": 2}', "must be 0 or 1, not 2"),
        (b'{"text": "x", "label": null}', "must be 0 or 1, not None"),
    ],
)
def test_faults_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "reviews.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(InputError, match=r"reviews\.jsonl:3: ") as error:
        read_jsonl(path)
    assert message in str(error.value)


def test_missing_empty_directory_and_one_label(tmp_path):
    with pytest.raises(InputError, match=r"gone\.jsonl does not exist"):
        read_jsonl(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read_jsonl(tmp_path)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n \n")
    with pytest.raises(InputError, match=r"x\.jsonl: the file is empty"):
        read_jsonl(path)
    path.write_bytes(GOOD * 3)
    with pytest.raises(InputError, match=r"x\.jsonl: all 3 labels are 1"):
        read_jsonl(path)
