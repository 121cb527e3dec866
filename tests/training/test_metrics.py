"""Where metrics go: metrics.jsonl, TensorBoard, and Weights & Biases where it is asked for."""

import json
import struct
import sys
import time

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from vbon_jax.errors import InputError
from vbon_jax.training.metrics import MetricsWriter


def written(path, start, steps, **options):
    writer = MetricsWriter(path, start, **options)
    for step in steps:
        writer.write(step, {"loss": step / 4, "kl_ref": [0.5, 1.5]})
    writer.close()
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_line_a_step_and_the_same_on_tensorboard(tmp_path):
    assert written(tmp_path, 0, (1, 2)) == [
        {"step": 1, "loss": 0.25, "kl_ref": [0.5, 1.5]},
        {"step": 2, "loss": 0.5, "kl_ref": [0.5, 1.5]},
    ]
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert not (tmp_path / "wandb").exists()


def test_steps_after_the_last_checkpoint_are_written_once(tmp_path):
    written(tmp_path, 0, (1, 2, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut in the middle of a line
    assert [x["step"] for x in written(tmp_path, 2, (3, 4))] == [1, 2, 3, 4]


@pytest.fixture
def wandb_offline(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_wandb_writes_an_offline_run(tmp_path, wandb_offline):
    arguments = {"project": "p", "name": "n", "id": "abc123", "dir": str(tmp_path)}
    lines = written(tmp_path, 0, (1, 2), wandb=arguments | {"config": {"train.iterations": 2}})
    assert [x["step"] for x in lines] == [1, 2]  # besides, not instead
    (run,) = (tmp_path / "wandb").glob("offline-run-*-abc123")
    (record,) = run.glob("run-abc123.wandb")
    names = (b"kl_ref", b"loss", b"train.iterations")
    deadline = time.monotonic() + 30
    while not all(name in record.read_bytes() for name in names):  # its own process writes it
        assert time.monotonic() < deadline, record.read_bytes()
        time.sleep(0.05)


def test_wandb_gets_the_mean_of_a_population_at_its_step(tmp_path, monkeypatch):
    logged = []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    class Module:
        @staticmethod
        def init(**arguments):
            logged.append(arguments)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Module)
    written(tmp_path, 0, (1,), wandb={"project": "p"})
    assert logged == [{"project": "p"}, (1, {"loss": 0.25, "kl_ref": 1.0}), "finished"]


def test_wandb_that_is_not_installed_is_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"log.wandb=True, but wandb is not installed: pip inst"):
        MetricsWriter(tmp_path, 0, wandb={"project": "p"})


def test_wandb_that_cannot_start_is_an_input_error(tmp_path, monkeypatch):
    class Module:
        @staticmethod
        def init(**arguments):
            raise RuntimeError("no API key configured")

    monkeypatch.setitem(sys.modules, "wandb", Module)
    with pytest.raises(InputError, match=r"cannot start \(no API key configured\): log in with"):
        MetricsWriter(tmp_path, 0, wandb={"project": "p"})


@pytest.mark.parametrize(("of", "name"), [("_file", "metrics.jsonl"), ("board", "tensorboard")])
def test_a_full_disk_is_told_at_once(tmp_path, of, name):
    """Of TensorBoard too: its own writer's thread would die, and the next value wait for ever."""
    writer = MetricsWriter(tmp_path, 0)
    full = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    if of == "board":
        writer._board._file = full
    else:
        writer._file = full
    with pytest.raises(
        InputError, match=rf"{name}.*: No space left on device \(.* free.*make room"
    ):
        writer.write(1, {"loss": 0.5})
    writer.close()


def test_tensorboard_reads_what_is_written(tmp_path):
    """Each record as tensorboardX's own reader of the format takes it: steps, tags, values."""
    written(tmp_path, 0, (1, 2))
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        header, body = data[:8], data[12 : 12 + length]
        assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(header)
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked_crc32c(body)
        events.append(Event.FromString(body))
        data = data[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    assert events[1].session_log.status == SessionLog.START and events[1].step == 1
    found = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in events[2:]]
    assert found == [(1, {"loss": 0.25, "kl_ref": 1.0}), (2, {"loss": 0.5, "kl_ref": 1.0})]


@pytest.mark.parametrize(
    "line",
    ["", "null", "7", "[1]", '"x"', "{}", '{"step": -3}', '{"step": "2"}', '{"step": 2.0}',
     '{"loss": 1}', '{"step": 2, "lo', "\x00\x00", "\udcff", '{"step": 1, "loss": 0}'],
)  # fmt: skip
def test_a_damaged_line_is_dropped_with_a_line(tmp_path, line, capfd):
    """The policy does not follow from it: training goes on."""
    written(tmp_path, 0, (1, 2, 3))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_bytes(f"{lines[0]}\n{line}\n{lines[2]}\n".encode(errors="surrogateescape"))
    capfd.readouterr()
    assert [x["step"] for x in written(tmp_path, 3, (4,))] == [1, 3, 4]
    assert "metrics.jsonl: 1 damaged lines dropped" in capfd.readouterr().err


@pytest.mark.parametrize("data", [b"", b"\xff\xfe" * 9, b"[]", b"{", b"null\n"])
def test_a_file_of_anything_else_begins_anew(tmp_path, data):
    (tmp_path / "metrics.jsonl").write_bytes(data)
    assert [x["step"] for x in written(tmp_path, 3, (4,))] == [4]
