"""Records of a file: JSON lines, CSV, TSV or Parquet, by the file's suffix.

A record is a dict of column name -> value. Values of JSON lines and Parquet keep their types; those
of CSV and TSV are strings.
"""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vbon_jax.data import jsonl
from vbon_jax.errors import InputError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", *DELIMITERS, ".parquet")
LINES = (".jsonl", ".ndjson", ".json", ".txt", "")  # JSON lines may have any of these

_BATCH = 1024  # rows of a Parquet file that are Python objects at a time


def read(
    path: str | os.PathLike[str], columns: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the records of a file with where each of them stands, in file order.

    The suffix decides the format: .jsonl, .ndjson, .json, .txt or none (one JSON object a line,
    UTF-8), .csv or .tsv (a header line, UTF-8 with or without a byte order mark, quoted fields may
    hold newlines) or .parquet. Blank lines are skipped.

    Args:
      path: the file.
      columns: the columns each record must have, and for each the config key that names it, for
        the message. Of a Parquet file no other column is read; empty to read them all.

    Yields:
      (location, record): the location is "file:line", for Parquet "file: row index i", i from 0.

    Raises:
      InputError: the file is missing, of another suffix, unreadable or damaged; a column is
        missing or occurs twice; a line is malformed. Names the file and the line.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in (*SUFFIXES, *LINES):
        raise InputError(
            f"file {path} has the suffix {path.suffix!r}; it must be one of {', '.join(SUFFIXES)}, "
            "which says how it is read: convert it, or rename it if it holds one of these formats"
        )
    if suffix in DELIMITERS:
        yield from _delimited(path, columns, DELIMITERS[suffix])
    elif suffix == ".parquet":
        yield from _parquet(path, columns)
    else:  # a path that is no file is refused there
        for where, record in jsonl.read(path):
            for column, setting in columns.items():
                jsonl.field(record, column, where, setting)
            yield where, record


def check_columns(source: str, found: Sequence[str], columns: Mapping[str, str]) -> None:
    """Raises InputError unless every wanted column is there and no name occurs twice."""
    for column, setting in columns.items():
        if column not in found:
            raise InputError(
                f"{source}: there is no column {column!r} (found: {', '.join(map(repr, found))}); "
                f"set {setting} to one of them"
            )
    for column in found:
        if column and found.count(column) > 1:  # spreadsheets write nameless empty columns
            raise InputError(f"{source}: column {column!r} occurs twice; rename one of them")


def _decoded(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their newlines; names the line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start} of the "
                    "line); save the file as UTF-8"
                ) from error


def _delimited(
    path: Path, columns: Mapping[str, str], delimiter: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    header: list[str] | None = None
    end = 0  # the last line of the row before
    try:
        rows = csv.reader(_decoded(path), delimiter=delimiter, strict=True)
        for row in rows:
            where, end = f"{path}:{end + 1}", rows.line_num
            if not row:
                continue
            if header is None:
                header = row
                check_columns(str(path), header, columns)
                continue
            if len(row) != len(header):
                raise InputError(
                    f"{where}: the row has {len(row)} fields and the header has {len(header)}; a "
                    'field that holds the separator or a newline needs quotes (")'
                )
            yield where, dict(zip(header, row))
    except csv.Error as error:
        raise InputError(
            f"{path}:{end + 1}: not a row of {path.suffix} ({error}); look for a quote that is not "
            f"closed, or one within a field that is not doubled; texts of more than "
            f"{csv.field_size_limit()} characters need .jsonl or .parquet"
        ) from error
    except FileNotFoundError as error:
        raise InputError(f"file {path} does not exist; check the path") from error
    except OSError as error:
        raise InputError(f"file {path} cannot be read: {error.strerror}") from error


def _parquet(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        raise InputError(f"file {path} does not exist; check the path")
    try:
        with pq.ParquetFile(path) as file:
            check_columns(str(path), file.schema_arrow.names, columns)
            start = 0
            for batch in file.iter_batches(_BATCH, columns=list(columns) or None):
                rows = batch.to_pylist()
                for index, record in enumerate(rows, start):
                    yield f"{path}: row index {index}", record
                start += len(rows)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"file {path} cannot be read as Parquet ({reason}); write it again, or give another"
        ) from error
