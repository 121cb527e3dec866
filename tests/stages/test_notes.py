import contextlib
import json

import pytest

from vbon_jax.errors import InputError
from vbon_jax.stages import notes
from vbon_jax.stages.notes import Note

NOTE = Note({"seed": 3}, True, {}, {"sft": "ab"}, {"prompts": {"size": 1, "sha256": "cd"}})


def test_a_note_survives_the_disk(tmp_path):
    path = tmp_path / "n.json"
    assert notes.read(path) is None
    path.write_text(json.dumps(notes.as_json(NOTE), indent=1))
    assert notes.read(path) == NOTE


def test_a_note_of_an_old_version_has_no_digests(tmp_path):
    path = tmp_path / "n.json"
    path.write_text('{"settings": {"seed": 3}, "complete": true}')
    assert notes.read(path) == Note({"seed": 3}, True)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b"7", b'"x"', b"\xff\xfe\x00", b"\0" * 40, b"{}", b"[" * 100_000,
        b'{"settings": 3, "complete": true}', b'{"settings": {}, "complete": 1}',
        b'{"complete": true}', b'{"settings": {}}', b'{"settings": {}, "complete": true, "x": 1}',
    ],
    ids=range(15),
)  # fmt: skip
def test_what_is_no_note_is_told_in_a_line(tmp_path, text):
    path = tmp_path / "n.json"
    path.write_bytes(text)
    with pytest.raises(
        InputError, match=r"n\.json is damaged or was edited .*: put it back, or rem"
    ):
        notes.read(path)


def test_every_flipped_byte_is_seen(tmp_path):
    path = tmp_path / "n.json"
    whole = json.dumps(notes.as_json(NOTE), indent=1).encode()
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        with contextlib.suppress(InputError):
            assert notes.read(path) == NOTE, at  # a space that became another
