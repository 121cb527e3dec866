"""The files of `launch/` that other programs read: Kubernetes', SkyPilot's and Docker's."""

import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import jsonschema
import pytest
import yaml
from kubeflow_trainer_api import models

from tests.launch.fakes import LAUNCH, VBON, Stage, program
from vbon_jax import cli

ROOT = LAUNCH.parent
JOBSET_GRACE = 120  # seconds that a pod has to save, at least
MANIFESTS = {
    manifest["metadata"]["labels"]["launch"]: manifest
    for manifest in yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
}
SKY = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
DOCKERFILE = (LAUNCH / "Dockerfile").read_text()


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def jobs(kind):
    """The Job of a document: itself, or that of the one replicated job of a JobSet."""
    spec = MANIFESTS[kind]["spec"]
    return spec["replicatedJobs"][0]["template"]["spec"] if "replicatedJobs" in spec else spec


def pod(kind):
    return jobs(kind)["template"]["spec"]


def container(kind):
    (found,) = pod(kind)["containers"]
    return found


def expanded(kind, **variables):
    """The command line of a pod, as Kubernetes expands it from the pod's variables."""
    labels = {
        "jobset.sigs.k8s.io/jobset-name": MANIFESTS[kind]["metadata"]["name"],
        "jobset.sigs.k8s.io/replicatedjob-name": "node",
    }
    for variable in container(kind).get("env", []):
        path = variable["valueFrom"]["fieldRef"]["fieldPath"]
        variables[variable["name"]] = labels[re.fullmatch(r"metadata\.labels\['(.*)'\]", path)[1]]
    return [
        re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], word)
        for word in container(kind)["args"]
    ]


def flags(words):
    """What ``vbon`` reads from a command line; files of the repository are found."""
    values, rest = cli._flags([word.replace("configs/", f"{ROOT}/configs/") for word in words])
    assert values.config is not None and len(rest) == 1 and rest[0] in cli.commands()
    return values


def left_out(manifest, read, path=""):
    """The paths of a document that what a schema's record read of it has not, or otherwise."""
    if isinstance(manifest, dict) and isinstance(read, dict):
        pairs = [(f"{path}.{key}", value, read.get(key)) for key, value in manifest.items()]
    elif isinstance(manifest, list) and isinstance(read, list) and len(manifest) == len(read):
        pairs = [(f"{path}[{i}]", *both) for i, both in enumerate(zip(manifest, read))]
    else:
        return [] if manifest == read else [path]
    return [name for key, *both in pairs for name in left_out(*both, key)]


def test_there_is_a_document_for_each_machine():
    assert list(MANIFESTS) == ["tpu", "gpu", "sweep"]
    assert len({manifest["metadata"]["name"] for manifest in MANIFESTS.values()}) == 3


RECORDS = {
    ("JobSet", "jobset.x-k8s.io/v1alpha2"): models.JobsetV1alpha2JobSet,
    ("Job", "batch/v1"): models.IoK8sApiBatchV1Job,
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_documents_are_of_the_published_schemas(kind):
    manifest = MANIFESTS[kind]
    record = RECORDS[manifest["kind"], manifest["apiVersion"]]
    assert left_out(manifest, record.from_dict(manifest).to_dict()) == []


def test_a_key_or_a_type_that_is_in_no_schema_would_be_seen():
    manifest = yaml.safe_load(yaml.safe_dump(MANIFESTS["gpu"]))
    manifest["spec"]["failurePolicy"]["maxRestart"] = 3
    container = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    container["containers"][0]["argv"] = ["run"]
    read = models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict()
    assert left_out(manifest, read) == [
        ".spec.failurePolicy.maxRestart",
        ".spec.replicatedJobs[0].template.spec.template.spec.containers[0].argv",
    ]
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] = "2"
    with pytest.raises(ValueError, match="completions"):
        models.JobsetV1alpha2JobSet.from_dict(manifest)


@pytest.mark.parametrize("kind", MANIFESTS)
def test_pods_are_indexed_and_all_run_at_once(kind):
    job = jobs(kind)
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    assert pod(kind)["restartPolicy"] == "Never", "which a podFailurePolicy needs"
    assert pod(kind)["terminationGracePeriodSeconds"] >= JOBSET_GRACE


@pytest.mark.parametrize("kind", MANIFESTS)
def test_bad_input_ends_all_and_a_lost_process_starts_all_again(kind):
    first, *rest = jobs(kind)["podFailurePolicy"]["rules"]
    assert first["action"] == "FailJob"
    codes = first["onExitCodes"]
    assert codes["containerName"] == container(kind)["name"]
    assert codes["operator"] == "In" and 2 in codes["values"]
    assert not {75, 137, 143} & set(codes["values"])
    if kind == "sweep":  # each share by itself
        assert jobs(kind)["backoffLimitPerIndex"] > 0 and "backoffLimit" not in jobs(kind)
        assert [rule["action"] for rule in rest] == ["Ignore"]
        return
    # A pod that is lost fails its Job, a Job that failed starts the JobSet again, but for this one.
    assert not rest and jobs(kind)["backoffLimit"] == 0
    policy = MANIFESTS[kind]["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_hosts_of_a_tpu_slice_find_each_other_by_the_variables_of_gke():
    words = expanded("tpu")
    values = flags(words)
    assert values.distributed and values.coordinator is None
    chips = container("tpu")["resources"]["limits"]["google.com/tpu"]
    rows, columns = pod("tpu")["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert jobs("tpu")["completions"] * chips == int(rows) * int(columns)
    (slices,) = MANIFESTS["tpu"]["spec"]["replicatedJobs"]
    assert slices["replicas"] > 1
    ports = {port["containerPort"] for port in container("tpu")["ports"]}
    assert ports >= {8471, 8080, 8482}


def test_nodes_with_gpus_find_each_other_by_the_names_of_their_pods():
    (node,) = MANIFESTS["gpu"]["spec"]["replicatedJobs"]
    name = MANIFESTS["gpu"]["metadata"]["name"]
    assert node["name"] == "node" and node["replicas"] == 1
    count = jobs("gpu")["completions"]
    found = [flags(expanded("gpu", JOB_COMPLETION_INDEX=str(i))) for i in range(count)]
    for i, values in enumerate(found):
        assert values.process_id == i
        assert values.num_processes == count > 1
        # <JobSet>-<replicated job>-<job>-<pod>.<subdomain>, which is the JobSet's name
        host, port = values.coordinator.split(":")
        assert host == f"{name}-node-0-0.{name}"
        assert [{"containerPort": int(port)}] == container("gpu")["ports"]


def test_pods_of_a_sweep_divide_it():
    count = jobs("sweep")["completions"]
    for i in range(count):
        words = expanded("sweep", JOB_COMPLETION_INDEX=str(i))
        assert words[0] == "sweep" and words[-1] == f"--shard={i}/{count}"
        flags(words)


@pytest.mark.parametrize("kind", MANIFESTS)
def test_the_workdir_is_a_volume_that_all_pods_share(kind):
    mounts = {mount["name"]: mount["mountPath"] for mount in container(kind)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod(kind)["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert volumes["workdir"]["persistentVolumeClaim"] == {"claimName": "vbon-workdir"}
    workdir = flags(expanded(kind, JOB_COMPLETION_INDEX="0")).workdir
    assert workdir.startswith(f"{mounts['workdir']}/")
    resources = container(kind)["resources"]
    assert resources["requests"] == resources["limits"]
    assert pod(kind)["securityContext"]["fsGroup"] == 1000, "the user of the image"


# Of SkyPilot's own schema (sky/utils/schemas.py) the part that the file uses.
SKY_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["resources", "run", "setup", "file_mounts"],
    "properties": {
        "name": {"type": "string"},
        "num_nodes": {"type": "integer", "minimum": 1},
        "workdir": {"type": "string"},
        "setup": {"type": "string"},
        "run": {"type": "string"},
        "envs": {"type": "object", "additionalProperties": {"type": "string"}},
        "file_mounts": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "required": ["source"],
                "properties": {
                    "source": {"type": "string"},
                    "mode": {"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]},
                },
            },
        },
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "accelerators": {"type": "string"},
                "use_spot": {"type": "boolean"},
                "job_recovery": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "strategy": {"enum": ["FAILOVER", "EAGER_NEXT_REGION"]},
                        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
                        "recover_on_exit_codes": {
                            "type": "array",
                            "uniqueItems": True,
                            "items": {"type": "integer", "minimum": 0, "maximum": 255},
                        },
                    },
                },
            },
        },
    },
}


def test_the_task_of_skypilot_is_of_its_schema_and_starts_again_after_75_only():
    jsonschema.validate(SKY, SKY_SCHEMA)
    recovery = SKY["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [75]
    assert recovery["max_restarts_on_errors"] == 0
    (mount,) = SKY["file_mounts"]
    assert SKY["file_mounts"][mount] == {"source": "${BUCKET}", "mode": "MOUNT"}
    assert f" --workdir={mount}/" in SKY["envs"]["VBON"]


@pytest.mark.parametrize("part", ["setup", "run"])
def test_the_scripts_of_skypilot_are_sound(part):
    checker = shutil.which("shellcheck", path=Path(sys.executable).parent)
    subprocess.run([checker, "--shell=bash", "-"], input=SKY[part], text=True, check=True)


@pytest.mark.parametrize(
    "command, own",
    [
        (SKY["envs"]["VBON"], ["--coordinator=10.0.0.7:8476", "--num_processes=3"]),
        ("sweep --config=configs/reviews_sweep.py --workdir=/workdir/s", []),
        ("run --config=configs/chat.py --workdir=/workdir/c --config.mesh.fsdp=-1", None),
    ],
)
def test_nodes_of_skypilot_find_each_other(stage, command, own):
    program(stage.home / "vbon" / "bin", "vbon", VBON)
    for rank in range(3):
        code, _, _ = stage.run(
            "bash", "-c", SKY["run"], VBON=command, SKYPILOT_NUM_NODES="3",
            SKYPILOT_NODE_RANK=str(rank), SKYPILOT_NODE_IPS="10.0.0.7\n10.0.0.8\n10.0.0.9",
        )  # fmt: skip
        assert code == 0
        words = stage.noted("vbon", "process")[rank]["args"]
        said = command.split()
        assert words[: len(said)] == said
        if own is None:
            assert not any("mesh.data" in word for word in words)
        elif own:
            assert words[len(said) :] == [*own, f"--process_id={rank}", "--config.mesh.data=-1"]
            assert flags(words).process_id == rank
        else:
            assert words[len(said) :] == [f"--shard={rank}/3", "--config.mesh.data=-1"]


def instructions():
    """(instruction, rest) of each line of the Dockerfile, with what continues it."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", "")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def test_what_the_image_copies_is_in_its_context():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY"]
    names = [name for line in copied for name in line]
    assert {"pyproject.toml", "vbon_jax", "configs"} <= set(names)
    for name in names:
        assert (ROOT / name).exists() and f"!{name}" in ignored
    assert {rule[1:] for rule in ignored if rule.startswith("!")} == set(names)
    assert any(fnmatch("vbon_jax/__pycache__", rule) for rule in ignored if rule != "*")


def test_the_package_lies_in_a_layer_of_its_own():
    order = [f"{name} {rest}" for name, rest in instructions()]
    needs = next(i for i, line in enumerate(order) if 'pip install ".[$extras]"' in line)
    code = next(i for i, line in enumerate(order) if line.startswith("COPY vbon_jax"))
    assert needs < code
    assert "pip install --no-deps ." in order[code + 1]


def test_the_image_runs_vbon_as_a_user_who_is_not_root():
    said = instructions()
    assert said[-1] == ("ENTRYPOINT", '["vbon"]')
    (user,) = [rest for name, rest in said if name == "USER"]
    assert user == "1000" and "--uid 1000" in DOCKERFILE


@pytest.mark.parametrize(
    "accelerator, extras", [("cpu", ["hub"]), ("gpu", ["hub", "gpu"]), ("tpu", ["hub", "tpu"])]
)
def test_each_accelerator_installs_an_extra_that_exists(stage, accelerator, extras):
    (step,) = [rest for name, rest in instructions() if name == "RUN" and "$extras" in rest]
    program(stage.bin, "pip", "note()")
    shell = ("bash", "-euo", "pipefail", "-c", step)
    assert stage.run(*shell, ACCELERATOR=accelerator)[0] == 0
    first, second = (line["args"] for line in stage.noted("pip"))
    assert first == ["install", f".[{','.join(extras)}]"]
    assert second == ["uninstall", "--yes", "vbon_jax"]
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras) <= known["optional-dependencies"].keys()


def test_another_accelerator_is_refused(stage):
    (step,) = [rest for name, rest in instructions() if name == "RUN" and "$extras" in rest]
    program(stage.bin, "pip", "note()")
    code, _, err = stage.run("bash", "-euo", "pipefail", "-c", step, ACCELERATOR="abacus")
    assert code == 2 and "ACCELERATOR=abacus: choose cpu, gpu or tpu" in err
    assert not stage.noted("pip")
    assert ("ARG", "ACCELERATOR=cpu") in instructions(), "what is built when nothing is said"


def test_the_page_names_every_file_and_how_often_it_starts_again():
    page = (ROOT / "docs" / "pages" / "launch.md").read_text()
    files = {path.name for path in LAUNCH.iterdir() if path.is_file()} - {"sample_vllm.py"}
    first, restarts = page.split("| file |")[1:]
    assert {name for name in files if f"| `launch/{name}` |" in first} == files
    rows = re.findall(r"^\| (`launch.*?) \| (\d+|without).*?\|", restarts, re.MULTILINE)
    times = {name: count for names, count in rows for name in re.findall(r"`launch/(.*?)`", names)}
    assert times.keys() == files - {"Dockerfile"}
    for name in ("local.sh", "slurm.sbatch", "tpu_pod.sh"):
        assert set(re.findall(r"LAUNCH_RESTARTS:-(\d+)", (LAUNCH / name).read_text())) == {
            times[name]
        }
    for kind in ("tpu", "gpu"):
        policy = MANIFESTS[kind]["spec"]["failurePolicy"]
        assert str(policy["maxRestarts"]) == times["gke_jobset.yaml"]
