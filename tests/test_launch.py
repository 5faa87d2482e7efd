"""The scripts of launch/: checked for mistakes, their dry runs, and the manifests against their schemas."""

import configparser
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pjrlhf.serving.people.address import PEOPLE_VARIABLE
from pjrlhf.serving.running import KEY_VARIABLE
from pjrlhf.serving.settings import EngineSettings, ServerSettings
from pjrlhf.settings import fields_of

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
CI_SCRIPTS = [ROOT / ".ci" / name for name in ("run", "oldest", "release")]
# jobset.x-k8s.io/v1alpha2, the fields that ours uses; the pods inside are checked as batch/v1.
JOBSET = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["replicatedJobs"],
            "additionalProperties": False,
            "properties": {
                "network": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"enableDNSHostnames": {"type": "boolean"}, "subdomain": {"type": "string"}},
                },
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"maxRestarts": {"type": "integer", "minimum": 0}},
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "template"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string", "pattern": "^[a-z0-9-]+$"},
                            "replicas": {"type": "integer"},
                            "template": {"type": "object", "required": ["spec"]},
                        },
                    },
                },
            },
        },
    },
}


def output(script, *arguments, **environment):
    """What a script prints; it must end well."""
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(LAUNCH / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", [*SCRIPTS, *CI_SCRIPTS], ids=lambda path: path.name)
def test_shellcheck(script):
    tool = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run([tool, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK), "not executable"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_without_a_config_they_say_how(script):
    done = subprocess.run([str(script)], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: " in done.stderr and "CONFIG [flags]" in done.stderr


def test_local_dry_runs():
    assert output("local.sh", "-n", "configs/soups.py", "--config.seed=1").splitlines()[-1] == (
        "python -m pjrlhf.main --config=configs/soups.py --config.seed=1"
    )
    flags, *lines = output("local.sh", "-n", "-p", "2", "-d", "4", "configs/soups.py", PJRLHF_PORT="1234").splitlines()
    assert "--xla_force_host_platform_device_count=4" in flags
    assert lines == [
        "python -m pjrlhf.main --config=configs/soups.py --coordinator=127.0.0.1:1234 --num_processes=2 "
        f"--process_id={i}"
        for i in range(2)
    ]


def test_slurm_dry_run():
    line = output("slurm.sbatch", "configs/pdpo.py", "--config.seed=2", DRY="1", SLURM_SUBMIT_DIR=str(ROOT))
    assert line.strip() == (
        "srun --kill-on-bad-exit=1 .venv/bin/python -m pjrlhf.main --config=configs/pdpo.py --config.seed=2"
    )


@pytest.mark.parametrize("queued", [False, True])
def test_tpu_pod_dry_run(queued):
    options = ["-t", "mine", "-z", "us-east5-b", "-a", "v6e-256", "-b", "store", "-n", "-d", "-s"]
    config = ["configs/llama.py:pdpo_70b", "--config.model.path=bucket/with space"]
    text = output("tpu_pod.sh", *options, *(["-q"] if queued else []), *config)
    make, pack, copy, setup, start, _, collect, delete = text.splitlines()
    assert ("queued-resources create mine --node-id=mine" if queued else "tpu-vm create mine") in make
    assert "--accelerator-type=v6e-256" in make and "v2-alpha-tpuv6e" in make and "--spot" in make
    assert all((ROOT / name).exists() for name in pack.split()[3:])
    assert "--worker=all" in copy and "--worker=all" in setup and "--worker=all" in start
    assert "--config=configs/llama.py:pdpo_70b" in start.replace("\\", "") and "--distributed=on" in start
    assert "bucket/with" in start and "gs://store/runs/mine/report" in collect and "delete mine" in delete
    assert "gcsfuse" in setup and "--workdir=bucket/runs/mine" in start.replace("\\", "")


def test_the_job_set():
    manifest = yaml.safe_load((LAUNCH / "gke" / "jobset.yaml").read_text())
    jsonschema.validate(manifest, JOBSET)
    (job,) = manifest["spec"]["replicatedJobs"]
    version = kubernetes_validate.latest_version()
    as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
    kubernetes_validate.validate(as_job, version, strict=True)
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    # As many processes as pods, the first pod's name, and pods enough for the topology.
    assert int(environment["PJRLHF_PROCESS_COUNT"]) == spec["parallelism"] == spec["completions"] == 4
    name = manifest["metadata"]["name"]
    assert environment["JAX_COORDINATOR_ADDRESS"].startswith(f"{name}-{job['name']}-0-0.{name}:")
    rows, columns = spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert int(rows) * int(columns) == 4 * container["resources"]["limits"]["google.com/tpu"]
    config = next(arg for arg in container["args"] if arg.startswith("--config="))
    assert (ROOT / config.removeprefix("--config=").partition(":")[0]).is_file()


def test_the_server():
    """Valid manifests, whose parts fit each other and the server."""
    deployment, service, budget = manifests = list(yaml.safe_load_all((LAUNCH / "k8s" / "serve.yaml").read_text()))
    for manifest in manifests:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    spec = deployment["spec"]["template"]["spec"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert budget["spec"]["selector"]["matchLabels"] == labels and deployment["spec"]["replicas"] == 2
    (container,) = spec["containers"]
    (port,) = container["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    entry = json.loads((LAUNCH / "serve.Dockerfile").read_text().partition("ENTRYPOINT ")[2])
    assert str(port["containerPort"]) == entry[entry.index("--port") + 1]
    flags = dict(argument.removeprefix("--").split("=") for argument in container["args"])
    known = {name.replace("_", "-") for cls in (ServerSettings, EngineSettings) for name in fields_of(cls)}
    assert set(flags) <= known | {"run"}
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert spec["terminationGracePeriodSeconds"] > sleep + int(flags["drain-seconds"])
    environment = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in container["env"]}
    assert set(environment) == {KEY_VARIABLE, PEOPLE_VARIABLE}
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert [probe["path"] for probe in probes.values()] == ["/health", "/health", "/health/live"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["volumes"]}


DOCKERFILES = ("Dockerfile.tpu", "Dockerfile.gpu", "serve.Dockerfile")


@pytest.mark.parametrize("file", DOCKERFILES)
def test_hadolint(file):
    tool = shutil.which("hadolint", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip("no hadolint for this platform")
    done = subprocess.run([tool, "--no-color", str(LAUNCH / file)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("file", DOCKERFILES)
def test_an_image_gets_every_package(file):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {name.split(".")[0] for name in setup["options"]["packages"].split()}
    folders |= {
        line.split("=")[1].strip().split("/")[0] for line in setup["options"]["package_dir"].split("\n") if line
    }
    copied = re.findall(r"^COPY (\w+) (\w+)$", (LAUNCH / file).read_text(), re.MULTILINE)
    assert {"pjrlhf", "configs"} == folders == {source for source, target in copied if source == target}


def test_images_install_locked_versions_that_setup_cfg_allows():
    lines = (LAUNCH / "requirements.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.lstrip().startswith("#"))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(re.findall(r"--extra (\w+)", "\n".join(lines)))
    asked = setup["options"]["install_requires"].split("\n")
    for extra in extras:
        asked += setup["options.extras_require"][extra].split("\n")
    for requirement in map(Requirement, filter(None, asked)):
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: {version} is locked; make the lock anew"
    for file in DOCKERFILES:
        text = (LAUNCH / file).read_text()
        for line in re.findall(r"pip install.*", text):
            assert "--constraint requirements.lock" in line
        said = re.findall(r"(?:'\.\[|EXTRAS=)([\w,]+)", text)
        assert set(",".join(said).split(",")) <= extras, file


@pytest.mark.parametrize("file", DOCKERFILES)
def test_dockerfiles(file):
    lines = (LAUNCH / file).read_text().splitlines()
    words = {"#", "FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "ENTRYPOINT"}
    assert {line.split()[0] for line in lines} <= words
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    found = ",".join(re.findall(r"(?:'\.\[|EXTRAS=)([\w,]+)", "\n".join(lines))).split(",")
    for extra in found:
        assert extra in extras["options.extras_require"]
    assert "root" not in "".join(lines) and any(line.startswith("USER") for line in lines)
