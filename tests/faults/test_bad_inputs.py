"""Bad inputs that are refused before any work, in this process; the script tries all."""

import logging

import pytest

from tests.faults import bad_inputs
from vbon_jax import cli

EARLY = ("data.path", "reference.path", "tokenizer.path", "tokenizer with code")
CASES = [
    *bad_inputs.COMMANDS, *bad_inputs.VALUES, *bad_inputs.CONFIGS, *bad_inputs.WORKDIRS,
    *(case for case in bad_inputs.FILES if case.name.startswith(EARLY)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_is_answered_in_one_line(case, tmp_path, capfd, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nothing may ask
    monkeypatch.setattr(logging, "raiseExceptions", False)  # as in a process: see `exits.prepare`
    code = cli.main(bad_inputs.arguments(case, tmp_path))
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert not bad_inputs.faults_of(code, lines), lines
    assert not (tmp_path / "ran").exists()


def test_a_lock_leaves_what_its_link_points_to(tmp_path, capfd):
    (case,) = (c for c in bad_inputs.WORKDIRS if c.name == "lock is a link")
    assert cli.main(bad_inputs.arguments(case, tmp_path)) == 2
    assert (tmp_path / "precious").read_text() == "precious"
    assert "is a link" in capfd.readouterr().err
