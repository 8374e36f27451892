"""The image that docker/Dockerfile makes, without a network, on a base without torch."""

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import engine_image
import pytest
from engine import Engine
from engine_image import ROOT, Image
from stopwatch import Stopwatch

pytestmark = pytest.mark.timeout(600)  # the first test of a session may have to make everything

# Ends like an agent that was asked to stop: it has a child, hears SIGTERM and answers with 75.
AGENT = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
def stop(number, frame):
    print("signal", number, "child", child.poll(), flush=True)
    child.kill(); child.wait()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""
TIGHT = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none")


def run_python(engine: Engine, image: Image, program: str, *options: str, check: bool = True):
    """Runs a program under the image's own entrypoint, in the place of `python -m muster agent`."""
    first, *rest = engine.inspect(image.tag)["Config"]["Entrypoint"]
    assert rest[-4:] == ["python", "-m", "muster", "agent"]
    words = [*options, f"--entrypoint={first}", image.tag, *rest[:-3], "-c", program]
    return engine.docker("run", *words, check=check)


def test_the_project_and_its_dependencies_import(engine: Engine, image: Image):
    program = (
        "import trainer, torch, submitit, importlib.metadata as m\n"
        "print(trainer.__file__, m.version('muster-train'))\n"
        "print([e.value for e in m.entry_points(group='submitit', name='job_environment')])"
    )
    where, entry = run_python(engine, image, program, "--rm").stdout.splitlines()
    assert where.startswith("/opt/muster/venv/")
    assert where.endswith(engine_image.project()["project"]["version"])
    assert entry != "[]"


def test_every_file_of_the_package_is_installed(engine: Engine, image: Image):
    files = [path for path in (ROOT / "trainer").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    program = (
        "import pathlib, trainer\n"
        "root = pathlib.Path(trainer.__file__).parent.parent\n"
        "print(*(path.relative_to(root) for path in (root / 'trainer').rglob('*') if path.is_file()), sep='\\n')"
    )
    installed = run_python(engine, image, program, "--rm").stdout.splitlines()
    assert [name for path in files if (name := str(path.relative_to(ROOT))) not in installed] == []


def test_everything_imported_was_compiled_at_build_time(engine: Engine, image: Image):
    program = (
        "import sys, trainer, torch, torch._dynamo, numpy, submitit, omegaconf, os\n"
        "flags = {}\n"
        "for name, module in sorted(sys.modules.items()):\n"
        "    cached = vars(module).get('__cached__') or ''\n"
        "    if cached.startswith('/opt/muster/'):\n"
        "        flags[name] = open(cached, 'rb').read(8)[4] if os.path.exists(cached) else 'missing'\n"
        "print(len(flags), [name for name, flag in flags.items() if flag != 1])"
    )
    count, others = run_python(engine, image, program, "--rm").stdout.split(maxsplit=1)
    assert int(count) > 500
    assert others.strip() == "[]"  # 1: by content and unchecked, so no date can make it stale


def test_a_source_change_rebuilds_in_about_a_second(
    engine: Engine, image: Image, wheels: Path, tmp_path: Path, stopwatch: Stopwatch
):
    # The builder remembers a folder by its name, and what was in it: each copy has a name of its own.
    context, other = (tmp_path / secrets.token_hex(4) for _ in range(2))
    copies = [engine_image.copy_context(path) for path in (context, other)]
    first, same = (engine_image.build(engine, wheels, context=path, tag="muster-test-edited") for path in copies)
    assert same.id == first.id  # a fresh copy of the same files is the same image
    (context / "trainer/__init__.py").open("a").write(f"EDITED = {time.time_ns()}\n")  # never seen before
    (context / "pyproject.toml").open("a").write("# a comment\n")
    edited = engine_image.build(engine, wheels, context=context, tag="muster-test-edited")
    print(f"rebuild after a source change: {edited.seconds:.1f} s")
    assert int(run_python(engine, edited, "import trainer; print(trainer.EDITED)", "--rm").stdout)
    layers = [engine.inspect(tag)["RootFS"]["Layers"] for tag in (image.tag, edited.tag)]
    assert layers[0][:-1] == layers[1][:-1]  # the dependencies were not touched
    stopwatch.check(edited.seconds, 10, "the build")  # 1.3 s on two quiet cores


def test_a_wrong_version_label_is_refused(engine: Engine, image: Image, wheels: Path):
    with pytest.raises(RuntimeError, match=r"VERSION=9\.9: pyproject\.toml says"):
        engine_image.build(engine, wheels, "--build-arg=VERSION=9.9", tag="muster-test-wrong")


def test_labels_and_size(engine: Engine, wheels: Path, image: Image):
    labelled = engine_image.build(engine, wheels, "--build-arg=REVISION=abc123", tag="muster-test-labelled")
    found = engine.inspect(labelled.tag)
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in found["Config"]["Labels"].items()}
    assert labels["version"] == engine_image.project()["project"]["version"]
    assert labels["revision"] == "abc123"
    print(f"image size: {found['Size'] / 1e6:.0f} MB")
    assert found["Size"] < 2.5e9


def test_no_launch_settings_are_baked_in(engine: Engine, image: Image):
    names = [line.split("=")[0] for line in engine.inspect(image.tag)["Config"]["Env"]]
    forbidden = ("NCCL_", "GLOO_", "MASTER_", "MUSTER_", "RANK", "WORLD_SIZE", "PIP_", "SOURCE_DATE_EPOCH")
    assert [name for name in names if name.startswith(forbidden)] == []


def test_the_bill_of_materials_names_what_is_installed(engine: Engine, image: Image):
    program = (
        "import json, importlib.metadata as m\n"
        "bill = json.load(open('/opt/muster/bom.cdx.json'))\n"
        "listed = {part['purl'] for part in bill['components']}\n"
        "print(bill['bomFormat'], f'pkg:pypi/torch@{m.version(\"torch\")}' in listed, len(listed))"
    )
    kind, torch, count = run_python(engine, image, program, "--rm").stdout.split()
    assert (kind, torch) == ("CycloneDX", "True")
    assert int(count) > 20


def test_stop_reaches_the_agent_alone_and_its_exit_code_survives(engine: Engine, image: Image, stopwatch: Stopwatch):
    run_python(engine, image, AGENT, "--detach", "--name=agent")
    while "ready" not in engine.docker("logs", "agent").stdout:
        time.sleep(0.05)
    with stopwatch.at_most(5):
        engine.docker("stop", "--time=20", "agent")
    assert engine.inspect("agent")["State"]["ExitCode"] == 75
    assert "signal 15 child None" in engine.docker("logs", "agent").stdout  # the child heard nothing


def test_orphans_are_reaped(engine: Engine, image: Image):
    program = (
        "import subprocess, sys, time, pathlib\n"
        "subprocess.run(['sh', '-c', 'sleep 0.1 & exit'])\n"  # its child is left to process 1, and ends
        "time.sleep(0.5)\n"
        "stats = [path.read_text() for path in pathlib.Path('/proc').glob('[0-9]*/stat')]\n"
        "print([stat.rpartition(')')[2].split()[0] for stat in stats])"
    )
    assert "Z" not in run_python(engine, image, program, "--rm").stdout


@pytest.mark.parametrize("user", [10001, 12345], ids=["own user", "foreign uid"])
def test_it_trains_read_only_without_capabilities(engine: Engine, image: Image, tmp_path: Path, user: int):
    folder = tmp_path / "runs"
    folder.mkdir()
    os.chown(folder, user, user)
    who = [] if user == 10001 else [f"--user={user}:{user}"]
    job = ["jobs/digits.yaml", "parallel=single", "train.steps=20"]
    engine.docker("run", "--rm", *TIGHT, *who, f"--volume={folder}:/workspace/runs", image.tag, *job)
    (run,) = folder.iterdir()
    assert json.loads((run / "result.json").read_text())["steps"] == 20
    assert {(path.stat().st_uid, path.stat().st_gid) for path in run.rglob("*")} == {(user, user)}


def test_a_uid_without_an_entry_has_a_name_and_a_place_for_caches(engine: Engine, image: Image):
    program = (
        "import os, getpass, pathlib\n"
        "(pathlib.Path.home() / '.cache').mkdir()\n"  # where compilers and plotting libraries keep theirs
        "print(os.getuid(), getpass.getuser())"
    )
    done = run_python(engine, image, program, "--rm", *TIGHT, "--user=12345:12345")
    assert done.stdout.split() == ["12345", "muster"]


def test_health_asks_the_agent(engine: Engine, image: Image):
    check = engine.inspect(image.tag)["Config"]["Healthcheck"]
    assert check["Test"] == ["CMD", "python", "-m", "muster", "agent", "--health"]


def test_its_structure(engine: Engine, image: Image):
    tool = Path(sys.executable).with_name("container-structure-test")
    command = [tool, "test", f"--image={image.tag}", f"--config={Path(__file__).with_name('structure.yaml')}"]
    done = subprocess.run(
        [*map(str, command), "--output=json"], env=engine.env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["Fail"] == 0


def test_its_dockerfile_is_lint_free():
    tool = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([tool, ROOT / "docker/Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_context_holds_no_more_than_the_image(engine: Engine, wheels: Path, tmp_path: Path):
    context = engine_image.copy_context(tmp_path)
    (context / ".env").write_text("KEY=secret")
    (context / "runs").mkdir()
    (context / "runs/secret").write_text("secret")
    program = "FROM scratch\nCOPY . /context\n"
    engine.docker(
        "build", "--file=-", "--output", f"type=local,dest={tmp_path}/out", context, input=program, stdin=None
    )
    found = {path.name for path in (tmp_path / "out/context").iterdir()}
    kept = {"LICENSE", "README.md", "constraints.txt", "docker", "jobs", "muster.py", "pyproject.toml", "trainer"}
    assert found == kept
    assert [path.name for path in (tmp_path / "out/context/docker").iterdir()] == ["lock.txt"]
