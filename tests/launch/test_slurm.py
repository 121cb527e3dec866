"""`launch/slurm.sbatch`, with Slurm's variables and programs faked."""

import re
import shutil

import pytest

from tests.launch.fakes import LAUNCH, Stage, program

# srun: a task for each SLURM_NTASKS, or as asked; its exit code is the highest of theirs.
SRUN = """
options = [word for word in args if word.startswith("--")][: len(args)]
first = next(i for i, word in enumerate(args) if not word.startswith("--"))
options, command = args[:first], args[first:]
note(options=options)
tasks = dict(word.split("=") for word in options).get("--ntasks", os.environ["SLURM_NTASKS"])
ids = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(int(tasks))]
started = [subprocess.Popen(command, env=os.environ | own) for own in ids]
codes = [task.wait() for task in started]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
RUN = ("run", "--config=configs/reviews.py", "--workdir=/shared/a b")
JOB = {
    "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "6",
}  # fmt: skip


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    program(stage.bin, "srun", SRUN)
    program(stage.bin, "scontrol", "note()")
    stage.env |= JOB | {"SLURM_SUBMIT_DIR": str(tmp_path / "submitted")}
    return stage


@pytest.fixture
def job(stage, tmp_path):
    """Slurm runs a copy of the script, from a folder of its own."""
    (tmp_path / "spool").mkdir()
    return shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "spool" / "slurm_script")


def test_a_run_has_a_task_for_each_gpu(stage, job):
    code, out, _ = stage.run(job, *RUN)
    assert code == 0
    assert sorted(out.splitlines()) == ["table of 0", "table of 1"]
    (srun,) = stage.noted("srun", "options")
    # Every task sees all GPUs of its node, of which JAX takes the one of its SLURM_LOCALID.
    assert srun["options"] == ["--gpu-bind=none", "--kill-on-bad-exit=0"]
    assert srun["env"]["SRUN_CPUS_PER_TASK"] == "6"
    tasks = stage.noted("vbon", "process")
    assert sorted(task["process"] for task in tasks) == [0, 1]
    for task in tasks:
        assert task["args"] == [*RUN, "--config.mesh.data=-1", "--distributed"]
    assert not stage.noted("scontrol")


def test_an_element_of_an_array_does_its_share_of_a_sweep(stage, job):
    element = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    sweep = ("sweep", "--config=c.py", "--workdir=/shared/s", "--config.mesh.tensor=2")
    assert stage.run(job, *sweep, **element)[0] == 0
    (task,) = stage.noted("vbon", "process")
    assert task["args"] == [*sweep, "--shard=3/8"]
    assert stage.run(job, *sweep)[0] == 0
    assert stage.noted("vbon", "process")[1]["args"] == [*sweep]


@pytest.mark.parametrize(
    "codes, again",
    [((75, 0), True), ((0, 143), True), (("killed", 75), True), ((2, 2), False), ((1, 0), False)],
)
def test_the_job_is_queued_again_when_something_was_lost(stage, job, codes, again):
    does = {str(i): [code] for i, code in enumerate(codes)}
    code, _, err = stage.run(job, *RUN, FAKE_DOES=does)
    assert code == max(137 if x == "killed" else x for x in codes)
    calls = [line["args"] for line in stage.noted("scontrol")]
    assert calls == ([["requeue", "4711"]] if again else [])
    assert (f"exit code {code}: queued again, 1 of 10 times" in err) == again


def test_how_often_it_is_queued_again_is_bounded(stage, job):
    does = {"0": [75], "1": [75]}
    for restarts, calls in (("9", 1), ("10", 1), ("2", 2)):
        assert stage.run(job, *RUN, FAKE_DOES=does, SLURM_RESTART_COUNT=restarts)[0] == 75
        assert len(stage.noted("scontrol")) == calls


@pytest.mark.parametrize(
    "words, env, said",
    [
        (RUN, {"SLURM_NTASKS_PER_NODE": "1"}, "2 GPUs and 1 tasks on a node: give --ntasks-per-"),
        (RUN, {"SLURM_ARRAY_TASK_ID": "0"}, "run: an array is for a sweep"),
        ((), {}, "no stage"),
    ],
)
def test_what_would_waste_the_nodes_is_refused(stage, job, words, env, said):
    code, _, err = stage.run(job, *words, **env)
    assert code == 2 and err.startswith(f"slurm.sbatch: {said}") and err.count("\n") == 1
    assert not stage.noted("srun") and not stage.noted("scontrol")


def test_a_cluster_without_gpus_has_as_many_tasks_as_it_likes(stage, job):
    del stage.env["SLURM_GPUS_ON_NODE"]
    assert stage.run(job, *RUN)[0] == 0
    assert len(stage.noted("vbon", "process")) == 2


def test_vbon_is_found_where_the_job_was_submitted(stage, job, tmp_path):
    place = tmp_path / "submitted" / ".venv" / "bin"
    place.mkdir(parents=True)
    (stage.bin / "vbon").rename(place / "vbon")
    assert stage.run(job, *RUN)[0] == 0
    assert len(stage.noted("vbon", "process")) == 2


def test_the_directives_come_first_and_leave_time_to_save():
    text = (LAUNCH / "slurm.sbatch").read_text()
    head = re.match(r"(?:#.*\n)+", text)[0]  # Slurm stops reading at the first command
    given = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", head, re.MULTILINE))
    assert text.count("\n#SBATCH") == len(given)
    assert "requeue" in given and given["open-mode"] == "append"
    signal, seconds = given["signal"].split("@")
    assert signal == "TERM", "without B: it goes to the tasks, and not to the script"
    assert int(seconds) >= 120
    assert given["ntasks-per-node"] == given["gpus-per-node"]
