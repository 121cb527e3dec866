"""Records of CSV, TSV and Parquet files: what is read, and the faults that are named."""

import re
import subprocess
import sys

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vbon_jax.data import records
from vbon_jax.errors import InputError

WANTED = {"text": "data.text_column", "label": "data.label_column"}


def read(path, columns=WANTED):
    return list(records.read(path, columns))


def written(path, content):
    path.write_bytes(content)
    return path


def test_csv_with_quotes_newlines_separators_a_bom_and_a_blank_line(tmp_path):
    path = written(
        tmp_path / "x.csv",
        b'\xef\xbb\xbfid,text,label\r\n7,"a ""b"",\nc",1\r\n\r\n8,caf\xc3\xa9 \xe2\x80\xa8 d,0',
    )
    assert read(path) == [
        (f"{path}:2", {"id": "7", "text": 'a "b",\nc', "label": "1"}),
        (f"{path}:5", {"id": "8", "text": "café \u2028 d", "label": "0"}),
    ]


def test_tsv_and_a_suffix_in_capitals(tmp_path):
    for name in ("x.tsv", "x.TSV"):
        path = written(tmp_path / name, b'text\tlabel\na, b\t1\n"c\td"\t0\n')
        assert [record for _, record in read(path)] == [
            {"text": "a, b", "label": "1"}, {"text": "c\td", "label": "0"}
        ]  # fmt: skip


def test_what_pandas_writes(tmp_path):
    frame = pandas.DataFrame({"text": ['a,"\n', "b", " "], "label": [0, 1, 1]})
    frame.to_csv(tmp_path / "x.csv")  # with an index column that has no name
    frame.to_csv(tmp_path / "x.tsv", sep="\t", index=False)
    frame.to_parquet(tmp_path / "x.parquet")
    for name in ("x.csv", "x.tsv", "x.parquet"):
        assert [(r["text"], int(r["label"])) for _, r in read(tmp_path / name)] == [
            ('a,"\n', 0), ("b", 1), (" ", 1)
        ]  # fmt: skip


def test_parquet_keeps_types_and_reads_the_columns_asked_for(tmp_path):
    path = tmp_path / "x.parquet"
    count = 2 * records._BATCH + 3
    table = pa.table(
        {"id": range(count), "text": [f"t{i}" for i in range(count)], "label": [True] * count}
    )
    pq.write_table(table, path, row_group_size=700)
    found = read(path)
    assert len(found) == count
    assert found[-1] == (
        f"{path}: row index {count - 1}", {"text": f"t{count - 1}", "label": True}
    )  # fmt: skip
    assert [where for where, _ in found] == [f"{path}: row index {i}" for i in range(count)]
    assert read(path, {})[5][1] == {"id": 5, "text": "t5", "label": True}


def test_parquet_strings_of_other_encodings_and_nulls(tmp_path):
    path = tmp_path / "x.parquet"
    text = pa.array(["a", None, "a"]).dictionary_encode()
    label = pa.array([1, 0, None], pa.int8())
    pq.write_table(pa.table({"text": text, "label": label}), path)
    assert [record for _, record in read(path)] == [
        {"text": "a", "label": 1}, {"text": None, "label": 0}, {"text": "a", "label": None}
    ]  # fmt: skip


def test_a_column_that_is_missing_names_what_is_there_and_the_key(tmp_path):
    csv, parquet = tmp_path / "x.csv", tmp_path / "x.parquet"
    written(csv, b"review,label\na,1\n")
    pq.write_table(pa.table({"review": ["a"], "label": [1]}), parquet)
    for path in (csv, parquet):
        with pytest.raises(
            InputError,
            match=rf"^{re.escape(str(path))}: there is no column 'text' \(found: 'review', "
            r"'label'\); set data\.text_column to one of them$",
        ):
            read(path)
    jsonl = written(tmp_path / "x.jsonl", b'{"review": "a", "label": 1}\n')
    with pytest.raises(
        InputError, match=r"x\.jsonl:1: key 'text' is missing \(found: .*set data\.text_column to"
    ):
        read(jsonl)


def test_json_lines_may_differ_in_what_else_they_have(tmp_path):
    path = written(tmp_path / "x.jsonl", b'{"text": 1, "label": 2}\n\n{"label": 4, "text": 3}')
    assert read(path) == [
        (f"{path}:1", {"text": 1, "label": 2}), (f"{path}:3", {"text": 3, "label": 4})
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [b"a,1\nb\n", b"a,1\nb,1,\n", b'"a\n",1\n  \n'])
def test_ragged_rows_are_named_by_their_line(tmp_path, rows):
    path = written(tmp_path / "x.csv", b"text,label\n" + rows)
    number = 4 if rows.startswith(b'"') else 3
    with pytest.raises(InputError, match=rf"x\.csv:{number}: the row has \d fields? and the head"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'text,label\na,1\n"b,0\nc,1\n', r"x\.csv:3: not a row of \.csv \(unexpected end of data"),
        (b'text,label\n"a" b,1\n', r"x\.csv:2: not a row of \.csv \(.*expected after"),
        (
            b"text,label\na,1\n" + b"b" * 200_000 + b",0\n",
            r"x\.csv:3: .*field larger than field limit.*need \.jsonl or \.parquet",
        ),
        (b"text,label\na,1\ncaf\xe9,0\n", r"x\.csv:3: not UTF-8 \(.* at byte 3"),
        ("text,label\na,1\n".encode("utf-16"), r"x\.csv:1: not UTF-8"),
        (b"text,label,text\na,1,b\n", r"x\.csv: column 'text' occurs twice"),
    ],
)
def test_faults_of_csv(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read(written(tmp_path / "x.csv", content))


def test_nameless_columns_are_left_alone(tmp_path):
    path = written(tmp_path / "x.csv", b"text,label,,\na,1,,\n")
    assert read(path) == [(f"{path}:2", {"text": "a", "label": "1", "": ""})]


def test_empty_files_have_no_records(tmp_path):
    assert read(written(tmp_path / "a.csv", b"")) == []
    assert read(written(tmp_path / "b.csv", b"text,label\n")) == []
    assert read(written(tmp_path / "c.jsonl", b"\n")) == []
    pq.write_table(pa.table({"text": [], "label": []}), tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == []


@pytest.mark.parametrize("name", ["x.json", "x.txt", "x", "x.ndjson"])
def test_json_lines_may_have_another_suffix(tmp_path, name):
    path = written(tmp_path / name, b'{"text": "a", "label": 1}')
    ((_, record),) = read(path)
    assert record == {"text": "a", "label": 1}


@pytest.mark.parametrize("name", ["x.xlsx", "x.csv.gz"])
def test_another_suffix_is_refused(tmp_path, name):
    path = written(tmp_path / name, b'{"text": "a", "label": 1}')
    with pytest.raises(InputError, match=r"suffix .*; it must be one of \.jsonl, \.csv, \.tsv, "):
        read(path)


@pytest.mark.parametrize("suffix", ["", *records.SUFFIXES])
def test_missing_files_and_directories(tmp_path, suffix):
    gone = tmp_path / f"gone{suffix}"
    with pytest.raises(InputError, match=rf"^file {re.escape(str(gone))} does not exist"):
        read(gone)
    gone.mkdir()
    with pytest.raises(InputError, match=rf"^file {re.escape(str(gone))} cannot be read"):
        read(gone)


def test_damaged_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [f"t{i}" for i in range(2000)], "label": [1] * 2000}), path)
    whole = path.read_bytes()
    for content in (b"", b"text,label\n", whole[:-100], whole[:8] + b"\xff" * 600 + whole[608:]):
        written(path, content)
        with pytest.raises(InputError, match=r"x\.parquet cannot be read as Parquet \(.+\); write"):
            read(path)
    binary = pa.array([b"a", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": binary, "label": [0, 1]}), path)
    with pytest.raises(InputError, match=r"x\.parquet cannot be read as Parquet \(.*utf-8"):
        read(path)


def test_pyarrow_is_imported_for_parquet_only():
    code = (
        "import sys, vbon_jax.data.sources.text, vbon_jax.data.sources.chat\n"
        "import vbon_jax.data.sources.hub\n"
        "print([m for m in ('pyarrow', 'datasets', 'pandas') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
