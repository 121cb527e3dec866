"""`launch/tpu_pod.sh`, with a `gcloud` that runs the workers' scripts in folders here."""

import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.launch.fakes import LAUNCH, NOTE, VBON, Stage, program

POD = LAUNCH / "tpu_pod.sh"
RUN = ("run", "--config=configs/reviews.py", "--prompt=it's a film")
WORKERS = 2
GCLOUD = f"""
note()
verb = args[2:4]
pod = os.environ["POD"]
if os.environ.get("ONLY_NOTE") in ("all", verb[1]) and verb[1] != "describe":
    sys.exit(0)
homes = [os.path.join(pod, str(i)) for i in range({WORKERS})]
if verb == ["tpu-vm", "ssh"]:
    assert "--worker=all" in args
    (script,) = [word.split("=", 1)[1] for word in args if word.startswith("--command=")]
    shells = [
        subprocess.Popen(["bash", "-c", script], env=os.environ | dict(HOME=home), cwd=home)
        for home in homes
    ]
    sys.exit(next((code for code in [shell.wait() for shell in shells] if code), 0))
if verb == ["tpu-vm", "scp"]:
    for home in homes:
        subprocess.run(["cp", args[4], os.path.join(home, args[5].partition(":")[2])], check=True)
if verb == ["queued-resources", "describe"]:
    with open(os.environ["FAKE_LOG"]) as file:
        asked = sum('"describe"' in line for line in file)
    print(json.loads(os.environ["STATES"])[asked - 1])
"""


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    program(stage.bin, "gcloud", GCLOUD)
    (stage.bin / "vbon").unlink()
    for i in range(WORKERS):
        folder = tmp_path / "pod" / str(i) / "vbon_jax" / ".venv" / "bin"
        folder.mkdir(parents=True)
        # A worker knows by itself which one it is.
        own = f'os.environ["SLURM_PROCID"] = "{i}"\n'
        (folder / "vbon").write_text(NOTE + own + VBON)
        (folder / "vbon").chmod(0o755)
    stage.env |= {
        "POD": str(tmp_path / "pod"), "ZONE": "us-west4-a", "ACCELERATOR_TYPE": "v5litepod-16",
        "RUNTIME_VERSION": "v2-alpha-tpuv5-lite", "POLL_SECONDS": "0",
    }  # fmt: skip
    return stage


def starts(stage):
    return sorted(stage.noted("vbon", "process"), key=lambda line: line["process"])


def verbs(stage):
    return [" ".join(line["args"][2:4]) for line in stage.noted("gcloud")]


def calls(stage):
    """The arguments of each call of gcloud, but for the name of a temporary folder."""
    found = [line["args"] for line in stage.noted("gcloud")]
    return [[re.sub(r"^/.*/tmp\.\w+/", "TMP/", word) for word in words] for words in found]


def test_a_run_is_the_same_command_on_all_workers(stage):
    code, out, _ = stage.run(POD, "run", "pod", *RUN)
    assert code == 0
    assert "table of 0" in out and "table of 1" in out
    assert [line["args"] for line in starts(stage)] == [
        [*RUN, "--distributed", "--config.mesh.data=-1"]
    ] * WORKERS
    assert verbs(stage) == ["tpu-vm ssh"]
    assert "--zone=us-west4-a" in stage.noted("gcloud")[0]["args"]
    assert stage.run(POD, "run", "pod", *RUN, "--config.mesh.fsdp=-1")[0] == 0
    assert "--config.mesh.data=-1" not in starts(stage)[1]["args"]


def test_a_run_is_started_again_after_75_only(stage):
    code, _, err = stage.run(POD, "run", "pod", *RUN, FAKE_DOES={"0": [0], "1": [75, 2]})
    assert code == 2
    assert [line["process"] for line in starts(stage)] == [0, 0, 1, 1]
    assert [line for line in err.splitlines() if line.startswith("tpu_pod.sh")] == [
        "tpu_pod.sh: exit code 75: started again, 1 of 3 times"
    ]


def test_starts_are_bounded(stage):
    does = {"0": [75], "1": [75]}
    assert stage.run(POD, "run", "pod", *RUN, FAKE_DOES=does, LAUNCH_RESTARTS="1")[0] == 75
    assert [line["process"] for line in starts(stage)] == [0, 0, 1, 1]


def test_a_run_is_followed_again_and_stopped(stage):
    does = {"0": ["hang"], "1": ["hang"]}
    first = stage.start(POD, "run", "pod", *RUN, FAKE_DOES=does)
    deadline = time.monotonic() + 20
    while len(stage.noted("vbon", "ready")) < WORKERS:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = stage.start(POD, "run", "pod", *RUN, FAKE_DOES=does)
    shown = ""
    while not ("table of 0" in shown and "table of 1" in shown):
        line = second.stdout.readline()
        assert line, "it shows what the workers wrote so far"
        shown += line
    assert len(starts(stage)) == WORKERS, "the second follows what the first started"
    assert stage.run(POD, "stop", "pod")[0] == 0
    for process in (first, second):
        process.communicate(timeout=20)
        assert process.returncode == 143
    signals = [line["signal"] for line in stage.noted("vbon", "signal")]
    assert signals == [signal.SIGTERM] * WORKERS
    assert stage.run(POD, "stop", "pod")[0] == 0, "nothing runs any more"


def test_create_asks_for_a_queued_resource_and_waits_for_it(stage):
    states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    code, _, err = stage.run(POD, "create", "pod", STATES=states, SPOT="1", PROJECT="mine")
    assert code == 0 and err.count("\n") == 3
    first, *rest = stage.noted("gcloud")
    assert first["args"] == [
        "compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod",
        "--zone=us-west4-a", "--project=mine", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
    ]  # fmt: skip
    assert [line["args"][3] for line in rest] == ["describe"] * 3
    assert stage.run(POD, "create", "pod", STATES=[*states, "FAILED"])[0] == 1
    assert "--spot" not in stage.noted("gcloud")[4]["args"]


def test_install_brings_the_commit_and_a_script_that_is_sound(stage):
    assert stage.run(POD, "install", "pod", BUCKET="my-bucket", ONLY_NOTE="ssh")[0] == 0
    assert verbs(stage) == ["tpu-vm scp", "tpu-vm ssh"]
    assert "--worker=all" in stage.noted("gcloud")[0]["args"]
    with tarfile.open(Path(stage.env["POD"]) / "1" / "vbon_jax.tar.gz") as file:
        assert {"pyproject.toml", "vbon_jax/cli.py", "configs/reviews.py"} <= set(file.getnames())
    assert stage.run(POD, "install", "pod", NFS="10.0.0.2:/share", ONLY_NOTE="ssh")[0] == 0
    scripts = [line["args"][-1].removeprefix("--command=") for line in stage.noted("gcloud")[1::2]]
    assert "gcsfuse" in scripts[0] and "my-bucket /mnt/vbon" in scripts[0]
    assert "nfs 10.0.0.2:/share /mnt/vbon" in scripts[1] and "gcsfuse" not in scripts[1]
    checker = shutil.which("shellcheck", path=Path(sys.executable).parent)
    for script in scripts:
        assert '-e ".[tpu]"' in script
        subprocess.run([checker, "--shell=bash", "-"], input=script, text=True, check=True)


@pytest.mark.parametrize("verb", ["create", "install", "run", "stop", "delete"])
def test_a_dry_run_prints_and_does_nothing(stage, verb):
    words = RUN if verb == "run" else ()
    code, out, _ = stage.run(POD, "--dry-run", verb, "pod", *words)
    assert code == 0
    assert not stage.noted("gcloud") and not starts(stage)
    # What is printed are commands of a shell, and those that are called otherwise.
    assert stage.run("bash", "-euc", out, ONLY_NOTE="all")[0] == 0
    printed = calls(stage)
    assert len(printed) == (2 if verb == "install" else 1)
    stage.log.write_text("")
    assert stage.run(POD, verb, "pod", *words, ONLY_NOTE="all", STATES=["ACTIVE"])[0] == 0
    assert printed == [words for words in calls(stage) if "describe" not in words]


@pytest.mark.parametrize("words", [(), ("run",), ("run", "pod"), ("fly", "pod")])
def test_what_it_does_not_know_is_refused(stage, words):
    code, out, _ = stage.run(POD, *words)
    assert code == 2 and "launch/tpu_pod.sh create NAME" in out
    assert not stage.noted("gcloud")


def test_the_zone_must_be_named(stage):
    del stage.env["ZONE"]
    code, _, err = stage.run(POD, "stop", "pod")
    assert code != 0 and "ZONE=us-west4-a" in err
    assert not stage.noted("gcloud")
