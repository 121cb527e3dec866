import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vbon_jax.data.sources.text import Example, read
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
    assert read(path) == [
        Example("fine film .", 1),
        Example("a \u2028 b\u2028c", 0),
        Example("bad", 0),
    ]
    assert all(type(example.label) is int for example in read(path))


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
        read(path)
    assert message in str(error.value)


def test_missing_empty_directory_and_one_label(tmp_path):
    with pytest.raises(InputError, match=r"gone\.jsonl does not exist"):
        read(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n \n")
    with pytest.raises(InputError, match=r"x\.jsonl: the file is empty"):
        read(path)
    path.write_bytes(GOOD * 3)
    with pytest.raises(InputError, match=r"x\.jsonl: all 3 labels are 1"):
        read(path)


def test_csv_labels_are_the_strings_0_and_1(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('review,stars,label\n"fine ,\nfilm",9,1\nbad,1,0\n')
    want = [Example("fine ,\nfilm", 1), Example("bad", 0)]
    assert read(path, "review") == want
    assert all(type(example.label) is int for example in read(path, "review"))
    path = tmp_path / "x.tsv"
    path.write_text("good\tx\n1\ta\n0\tb\n")
    assert read(path, text_column="x", label_column="good") == [Example("a", 1), Example("b", 0)]


@pytest.mark.parametrize("labels", [[1, 0], [True, False], pa.array([1, 0], pa.int8())])
def test_parquet_labels_are_ints_or_bools(tmp_path, labels):
    pq.write_table(pa.table({"body": ["a", "b"], "y": labels}), tmp_path / "x.parquet")
    found = read(tmp_path / "x.parquet", "body", "y")
    assert found == [Example("a", 1), Example("b", 0)]
    assert all(type(example.label) is int for example in found)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,2", "'label' must be 0 or 1, not '2'"),
        ("x,", "'label' must be 0 or 1, not ''"),
        ("x, 1", "not ' 1'"),
        ("x,1.0", "not '1.0'"),
        ("x,True", "not 'True'"),
        ("x,\u00b9", "not '\u00b9'"),
        ("x,01", "not '01'"),
        (",1", "'text' is empty"),
        ('" ",1', "'text' is empty"),
    ],
)
def test_faults_of_csv_rows_name_file_and_line(tmp_path, row, message):
    path = tmp_path / "x.csv"
    path.write_text(f'text,label\n"two\nlines",0\n{row}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"x\.csv:4: ") as error:
        read(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "label", "message"),
    [
        (pa.array(["a", None]), [0, 1], "row index 1: 'text' must be a string, not None"),
        (pa.array(["a", ""]), [0, 1], "row index 1: 'text' is empty"),
        (
            pa.array(["a", "b"]),
            pa.array([0, None]),
            "row index 1: 'label' must be 0 or 1, not None",
        ),
        (pa.array(["a", "b"]), [0, 3], "row index 1: 'label' must be 0 or 1, not 3"),
        # Of another type throughout, so that the first row is the one named.
        (pa.array(["a", "b"]), [0.0, 1.0], "row index 0: 'label' must be 0 or 1, not 0.0"),
        (pa.array(["a", "b"]), ["0", "1"], "row index 0: 'label' must be 0 or 1, not '0'"),
        (pa.array([b"a", b"b"]), [0, 1], "row index 0: 'text' must be a string, not b'a'"),
    ],
)
def test_faults_of_parquet_rows_name_file_and_row(tmp_path, text, label, message):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": text, "label": label}), path)
    with pytest.raises(InputError, match=r"x\.parquet: row index") as error:
        read(path)
    assert message in str(error.value)


def test_columns_that_are_missing_and_files_without_rows(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,sentiment\na,1\n")
    with pytest.raises(
        InputError, match=r"no column 'label' \(found: 'text', 'sentiment'\); .*data"
    ):
        read(path)
    path.write_text("text,label\n")
    with pytest.raises(InputError, match=r"x\.csv: the file is empty; .*'text'.*'label'"):
        read(path)
    path.write_text("text,label\na,1\nb,1\n")
    with pytest.raises(InputError, match=r"x\.csv: all 2 labels are 1"):
        read(path)
    other = tmp_path / "x.xlsx"
    other.write_text("[]")
    with pytest.raises(InputError, match=r"x\.xlsx has the suffix '\.xlsx'; it must be one of"):
        read(other)


def test_json_keys_are_named_as_columns_are(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "a", "y": true}\n{"body": "b", "y": 0}\n')
    assert read(path, "body", "y") == [Example("a", 1), Example("b", 0)]
    with pytest.raises(
        InputError, match=r"jsonl:1: key 'label' is missing .*set data\.label_column"
    ):
        read(path, "body")
