"""SampleWriter: a kill at any moment loses, repeats and tears no line."""

import os
import signal
import subprocess
import sys
import time

import pytest

from vbon_jax.data import jsonl
from vbon_jax.data import samples as reference
from vbon_jax.data.sample_lines import to_record
from vbon_jax.data.samples import PromptSamples, SampleWriter
from vbon_jax.errors import InputError


def sample(prompt_id, count=3):
    return PromptSamples(
        prompt=f"prompt {prompt_id} é",
        responses=tuple(f"r{i}" for i in range(count)),
        rewards=tuple(prompt_id + i / 4 for i in range(count)),
        prompt_id=prompt_id,
        finished=(True,) * count,
    )


def unsealed(samples):
    """A line as older versions wrote it, without its checksum."""
    return jsonl.dump_line(to_record(samples))


def test_truncation_at_every_byte_is_repaired(tmp_path):
    path = tmp_path / "s.jsonl"
    with SampleWriter(path) as writer:
        writer.append(sample(5))
        writer.append(sample(2))
        assert writer.done == [5, 2] and writer.recovery is None
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with SampleWriter(path) as writer:
            done = [5] * (size >= first - 1) + [2] * (size >= len(whole) - 1)
            assert writer.done == done
            if size in (0, first, len(whole)):
                assert writer.recovery is None
            elif size in (first - 1, len(whole) - 1):
                assert "newline of the last line was missing" in writer.recovery
            else:
                number = 1 if size < first else 2
                assert f"s.jsonl:{number}: the last line was torn" in writer.recovery
                torn = size if size < first else size - first
                assert f"its {torn} bytes were cut off" in writer.recovery
            for prompt_id in (5, 2):
                if prompt_id not in writer.done:
                    writer.append(sample(prompt_id))
        assert path.read_bytes() == whole


@pytest.mark.parametrize("tail", [b'{"prompt": "\xc3', b'{"pro\n', b"\0" * 50, b'{"a": 1}}', b"{"])
def test_other_torn_tails(tmp_path, tail):
    path = tmp_path / "s.jsonl"
    with SampleWriter(path) as writer:
        writer.append(sample(0))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with pytest.raises(InputError, match=r"s\.jsonl:2: not a line of JSON"):
        reference.read(path)
    with SampleWriter(path) as writer:
        assert writer.done == [0] and f"its {len(tail)} bytes" in writer.recovery
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "number", "message"),
    [
        (b'{LINE0\n{"prompt": "x", \n{LINE1\n', 2, "not a line of JSON"),
        (b'{"prompt": "x", \n{"prompt": "y', 1, "not a line of JSON"),
        (b"{LINE0\n{LINE0\n", 2, "prompt_id 0 is there twice"),
        (b'{LINE0\n{"prompt": "p", "responses": ["x"], "rewards": [1]}\n', 2, "no 'prompt_id'"),
        (b'{LINE0\n{"prompt": "p", "responses": ["x"], "rewards": []}\n', 2, "1 responses but 0"),
        (b'{"prompt": "p", "text": "p", "reward": 1}', 1, "'responses' is missing"),
        (b"my notes, no JSON", 1, "not a line of JSON"),  # a file named by mistake
    ],
)
def test_what_is_not_a_torn_line_is_refused_and_left_alone(tmp_path, content, number, message):
    path = tmp_path / "s.jsonl"
    for prompt_id in (0, 1):  # as older versions wrote them
        content = content.replace(b"{LINE%d" % prompt_id, unsealed(sample(prompt_id)).rstrip())
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"s\.jsonl:{number}: .*{message}"):
        SampleWriter(path)
    assert path.read_bytes() == content


def test_every_flipped_byte_of_a_written_file_is_cut_off_and_written_again(tmp_path):
    """What comes out is the file of an undisturbed run; nothing damaged is read meanwhile."""
    path = tmp_path / "s.jsonl"
    with SampleWriter(path) as writer:
        for prompt_id in range(3):
            writer.append(sample(prompt_id))
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            read = reference.read(path)
        except InputError as error:
            assert "s.jsonl:" in str(error)
        else:
            assert read == [sample(i) for i in range(3)], at
        with SampleWriter(path) as writer:
            for prompt_id in range(3):
                if prompt_id not in writer.done:
                    writer.append(sample(prompt_id))
            assert writer.recovery is not None, at
        assert path.read_bytes() == whole, at


def test_the_file_is_kept_where_more_than_its_end_is_damaged(tmp_path):
    path = tmp_path / "s.jsonl"
    with SampleWriter(path) as writer:
        for prompt_id in range(3):
            writer.append(sample(prompt_id))
    edited = path.read_bytes().replace(b"[1.0, 1.25, 1.5]", b"[1.0, 1.25, 7.5]")
    path.write_bytes(edited)
    with pytest.raises(InputError, match=r"s\.jsonl:2: the line is not what it was written as"):
        reference.read(path)
    with SampleWriter(path) as writer:
        assert writer.done == [0]
        assert "those after it are sampled again" in writer.recovery
        assert "s.jsonl.damaged" in writer.recovery
    assert (tmp_path / "s.jsonl.damaged").read_bytes() == edited


def test_a_line_without_its_checksum_is_used_as_it_is(tmp_path):
    """The remedy of the message about an edited line."""
    path = tmp_path / "s.jsonl"
    with SampleWriter(path) as writer:
        writer.append(sample(0))
    line = path.read_bytes().replace(b"0.25", b"9.25")
    path.write_bytes(line)
    with pytest.raises(InputError, match=f"take {jsonl.CHECKSUM} out of it"):
        reference.read(path)
    path.write_bytes(line[: line.index(b', "vbon_crc32"')] + b"}\n")
    assert reference.read(path)[0].rewards[1] == 9.25


def test_a_file_that_an_older_version_began_is_continued(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_bytes(unsealed(sample(0)) + unsealed(sample(1)))
    for prompt_id in (2, 3):
        with SampleWriter(path) as writer:
            assert writer.recovery is None
            writer.append(sample(prompt_id))
    assert reference.read(path) == [sample(i) for i in range(4)]


def test_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "s.jsonl"
    with SampleWriter(path) as writer:
        writer.append(sample(0))
    path.write_bytes(b"\n" + path.read_bytes() + b" \n")
    with SampleWriter(path) as writer:
        assert writer.done == [0] and writer.recovery is None
        writer.append(sample(1))
    assert reference.read(path) == [sample(0), sample(1)]


def test_bad_samples_are_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "s.jsonl"
    with SampleWriter(path) as writer:
        writer.append(sample(0))
        whole = path.read_bytes()
        for bad in (sample(0), PromptSamples("p", ("x",), (1.0,))):
            with pytest.raises(ValueError, match="prompt_id must be an id that is not in the file"):
                writer.append(bad)
        nan = PromptSamples("p", ("x", "y"), (float("nan"), 1.0), prompt_id=1)
        with pytest.raises(
            InputError, match=r"samples of prompt 1 .*1 of 2 'rewards' are not finite"
        ):
            writer.append(nan)
        with pytest.raises(InputError, match="2 responses but 1 rewards"):
            writer.append(PromptSamples("p", ("x", "y"), (1.0,), prompt_id=1))
        assert path.read_bytes() == whole and writer.done == [0]
        writer.append(sample(1))
    assert reference.read(path) == [sample(0), sample(1)]


def test_two_writers_at_once_are_refused(tmp_path):
    path = tmp_path / "s.jsonl"
    with SampleWriter(path), pytest.raises(InputError, match="is open for writing elsewhere"):
        SampleWriter(path)
    SampleWriter(path).close()  # free again


def test_unwritable_path_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        SampleWriter(tmp_path)


def test_a_failed_write_leaves_the_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "s.jsonl"
    with SampleWriter(path) as writer:
        writer.append(sample(0))
        whole = path.read_bytes()

        def full_disk(fd):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(InputError, match="No space left"):
            writer.append(sample(1))
        monkeypatch.undo()
        assert path.read_bytes() == whole and writer.done == [0]
        writer.append(sample(1))
    assert reference.read(path) == [sample(0), sample(1)]


# Lines of a megabyte, so that a kill often falls in the middle of a write.
KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from test_sample_writer import sample
from vbon_jax.data.samples import SampleWriter
with SampleWriter(sys.argv[1]) as writer:
    print("open", writer.recovery, flush=True)
    done = set(writer.done)
    for prompt_id in range(int(sys.argv[3])):
        if prompt_id not in done:
            writer.append(sample(prompt_id, count=40_000))
            print(prompt_id, flush=True)
"""


def test_kill_9_again_and_again_loses_repeats_and_tears_nothing(tmp_path):
    path, total = tmp_path / "s.jsonl", 30
    acknowledged = []
    kills = 0
    for attempt in range(100):
        run = subprocess.Popen(
            [sys.executable, "-c", KILLED, path, os.path.dirname(__file__), str(total)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert run.stdout.readline().startswith("open")
        if attempt < 8:
            time.sleep(0.01 + 0.035 * attempt)
            run.send_signal(signal.SIGKILL)
        reported = run.communicate()[0].split()
        acknowledged += [int(word) for word in reported]
        with SampleWriter(path) as writer:
            assert set(acknowledged) <= set(writer.done)  # what append returned from is there
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 3
    assert reference.read(path) == [sample(i, count=40_000) for i in range(total)]
