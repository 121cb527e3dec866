"""Runs of several processes on this host, against the same run in one."""

import dataclasses
import json
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.faults import run
from vbon_jax import cli, exits, processes, sharding
from vbon_jax.data.tabular import reward
from vbon_jax.errors import InputError
from vbon_jax.signals import StopSignal
from vbon_jax.stages import notes

REWARD = """
from pathlib import Path
import jax
from vbon_jax.data.tabular import reward

FOLDER = Path(__file__).parent

calls = []

def failing(prompts, responses):
    calls.append(len(prompts))
    if calls[1:] and jax.process_index() == 1:
        raise ValueError("no more of this")
    with open(f"{FOLDER}/rows{jax.process_index()}", "a") as file:
        file.write(f"{len(prompts)}\\n")
    return reward(prompts, responses)
"""


def alone(devices, workdir, *flags, stage="run"):
    """The small run in one process of so many devices: their threads decide the last bits."""
    ended = run.done(run.command(workdir, *flags, stage=stage), devices=devices)
    assert ended.code == 0, ended.lines


def launched(count, workdir, *flags, stage="run"):
    """The command line of the small run by the launcher of this host."""
    argv = run.command(workdir, *flags, stage=stage)
    return [str(run.ROOT / "launch" / "local.sh"), "-n", str(count), *argv[argv.index(stage) :]]


def iterations(workdir):
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def trained(group, workdir, count, seconds=300.0):
    """Waits until so many iterations are done, and no process has ended."""
    began = time.monotonic()
    while iterations(workdir) < count:
        assert all(p.poll() is None for p in group), "a process ended"
        assert time.monotonic() - began < seconds, "it hangs"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def on_two_devices(tmp_path_factory):
    """The run of one process with two devices: what two processes with one each are held to."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    alone(2, workdir, "--config.mesh.data=2")
    return workdir


def test_two_processes_give_the_bits_of_one_also_after_one_was_lost(on_two_devices, tmp_path):
    workdir = tmp_path / "run"
    argvs = run.together(2, workdir, "--config.mesh.data=-1")
    with run.all_started(argvs) as group:
        trained(group, workdir, 4)
        group[1].kill()
        began = time.monotonic()
        ended = run.finished(group[0])
    assert ended.code == exits.LOST, ended.lines
    assert time.monotonic() - began < 60
    assert any("another process of the run was lost" in line for line in ended.lines)
    assert 4 <= iterations(workdir) < 12
    again = run.all_done(argvs)
    assert [e.code for e in again] == [0, 0], again
    assert any("going on after iteration" in line for line in again[0].lines)
    assert run.differing(run.digest_of(workdir), run.digest_of(on_two_devices)) == []
    # What people read comes from the first alone.
    assert not [line for line in again[1].lines if "done in" in line]


def test_four_processes_and_another_mesh_go_on_from_a_checkpoint_of_one(on_two_devices, tmp_path):
    """The fingerprints of a checkpoint say that what is restored is what was saved, to the bit."""
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    workdirs = [tmp_path / "four", tmp_path / "one"]
    for workdir in workdirs:
        shutil.copytree(on_two_devices, workdir)
        for path in (workdir / "checkpoints" / "train").iterdir():
            if int(path.name) > 10:
                shutil.rmtree(path)
        assert (workdir / "checkpoints" / "train" / "10").is_dir()
        path = workdir / "stages" / "train.json"
        note = dataclasses.replace(notes.read(path), complete=False, results=None)
        path.write_text(json.dumps(notes.as_json(note)))
    ended = run.done(launched(4, workdirs[0], *mesh, stage="train"))
    assert ended.code == 0, ended.lines
    assert any("going on after iteration 10 of 12" in line for line in ended.lines)
    assert not any("damaged" in line or "unchecked" in line for line in ended.lines)
    argv = run.command(workdirs[1], *mesh, stage="train")  # here, on 4 of the devices
    assert cli.main(argv[argv.index("train") :]) == 0
    found = [[json.loads(x) for x in (w / "metrics.jsonl").open()] for w in workdirs]
    for row, wanted in zip(*found, strict=True):
        for name in ("reward", "kl_ref", "kl_bon", "loss", "grad_norm"):
            np.testing.assert_allclose(row[name], wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_signal_to_one_process_stops_all_at_the_same_iteration(on_two_devices, tmp_path):
    workdir = tmp_path / "run"
    for name in ("reference", "tokenizer", "prompts", "samples", "stages"):
        shutil.copytree(on_two_devices / name, workdir / name)
    for name in ("train", "export", "evaluate"):
        (workdir / "stages" / f"{name}.json").unlink()
    long = ("--config.train.iterations=4000", "--config.mesh.data=-1")
    argvs = run.together(2, workdir, *long, stage="train")
    with run.all_started(argvs) as group:
        trained(group, workdir, 2)
        group[1].send_signal(signal.SIGTERM)
        ended = [run.finished(process) for process in group]
    assert [e.code for e in ended] == [128 + signal.SIGTERM] * 2, ended
    said = [e.last.partition("is saved")[0] for e in ended]
    assert said[0] == said[1] and f"iteration {iterations(workdir)} of 4000" in said[0]


def test_a_reward_is_called_on_rows_of_its_own_and_its_error_ends_all(tmp_path, on_two_devices):
    """Two batches of 32 samples: one process fails in the second."""
    (tmp_path / "several.py").write_text(REWARD)
    workdir = tmp_path / "run"
    for folder in ("reference", "tokenizer", "stages"):
        shutil.copytree(on_two_devices / folder, workdir / folder)
    for stage in ("reward", "sample", "train", "export", "evaluate"):
        (workdir / "stages" / f"{stage}.json").unlink()
    flags = ("--config.reward.function=several:failing", "--config.mesh.data=-1")
    flags += ("--config.stages=('reward','sample')", "--config.samples.m=64")
    ended = run.done(launched(2, workdir, *flags), path=tmp_path)
    assert ended.code == 2, ended
    said = "\n".join(ended.lines)
    assert "[1] vbon: reward.function='several:failing' raised ValueError: no more" in said
    assert "\nvbon: process 1 was refused its share of" in f"\n{said}"
    counts = [(tmp_path / f"rows{i}").read_text().split() for i in (0, 1)]
    assert counts == [["16", "16"], ["16"]]


def test_what_is_generated_is_printed_by_the_first_alone(on_two_devices):
    """Also Gloo, which says on standard output whom it met, must not stand among the results."""
    flags = ("--config.mesh.data=-1", "--prompt=a", "--prompt=b", "--best_of=2")
    argvs = [
        run.command(on_two_devices, *flags, stage="generate"),
        *run.together(2, on_two_devices, *flags, stage="generate"),
    ]
    group = [
        subprocess.Popen(
            argv,
            cwd=run.ROOT,
            env=run.environment(devices=devices),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for argv, devices in zip(argvs, (2, 1, 1), strict=True)
    ]
    alone, first, second = (process.communicate(timeout=300)[0] for process in group)
    assert [process.returncode for process in group] == [0, 0, 0]
    assert [json.loads(line)["prompt"] for line in alone.splitlines()] == ["a", "b"]
    assert (first, second) == (alone, "")


def test_processes_that_see_other_folders_are_told_so(tmp_path):
    argvs = [
        run.together(2, tmp_path / "a")[0],
        run.together(2, tmp_path / "b")[1],
    ]
    argvs[1] = [a if "coordinator" not in a else argvs[0][argvs[1].index(a)] for a in argvs[1]]
    flag = "--config.mesh.data=-1"
    ended = run.all_done([[*argv, flag] for argv in argvs])
    assert [e.code for e in ended] == [2, 2], ended
    assert all("process 1 does not see what process 0 writes" in e.last for e in ended)


def test_processes_that_do_not_come_are_told_with_the_code_to_start_again(tmp_path, monkeypatch):
    argv = run.together(2, tmp_path / "run", "--config.mesh.data=-1")[0]
    program = (
        "import sys; from vbon_jax import processes; processes.CONNECT_SECONDS = 2; "
        "from vbon_jax.__main__ import entry; entry()"
    )
    ended = run.done([argv[0], "-c", program, *argv[3:]])
    assert ended.code == exits.LOST, ended.lines
    assert "process 0 of 2 did not meet the others within 2 s" in ended.last


def test_in_a_run_of_one_process_nothing_is_shared_out():
    assert processes.count() == 1 and processes.first()
    assert processes.by_first(lambda: [1, "a"]) == [1, "a"]
    assert processes.most(3) == 3 and processes.signal(StopSignal()) is None
    rewards = processes.joined(3, lambda rows: reward(["a"] * 3, ["bbbb", "cccc", "dddd"])[rows])
    assert len(rewards) == 3
    processes.wait()
    processes.see_the_same("/nowhere")
    processes.refuse_apart(sharding.make_mesh())


def test_a_mesh_without_devices_of_a_process_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(InputError, match=r"takes 8 of 8 devices and none of process 1"):
        processes.refuse_apart(sharding.make_mesh(data=8))
