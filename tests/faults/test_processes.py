"""A few faults on real processes; the scripts beside try many."""

import signal

import pytest

from tests.faults import disk, run, signals


def test_a_full_disk_ends_in_one_line_and_goes_on_to_the_same_results(tmp_path):
    whole = tmp_path / "whole"
    assert run.done(run.command(whole, stage="sft")).code == 0
    wanted = run.digest_of(whole)
    assert wanted.keys() == {"reference/model.safetensors"}
    try:
        row = disk.filled(tmp_path / "disk", "size=24k", wanted, "sft")
    except (PermissionError, FileNotFoundError) as error:
        pytest.skip(str(error))
    assert row[1] == "2" and row[5] == "-", row


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_starting_ends_in_order(tmp_path, signum):
    ended, seconds = signals.stopped(run.command(tmp_path / "w"), 0.7, [signum])
    assert ended.code == 128 + signum and not ended.traceback, ended.lines
    assert ended.last.startswith(f"vbon: stopped by {signal.Signals(signum).name}")
    assert seconds < 10
