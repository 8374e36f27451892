"""docker/compose.yaml: what compose itself makes of it, and the training that it starts."""

import json
import os
from pathlib import Path

import pytest
from engine import Engine
from engine_image import ROOT, Image

pytestmark = pytest.mark.timeout(600)

COMPOSE = ("compose", f"--file={ROOT}/docker/compose.yaml")


def resolved(engine: Engine, **variables: str) -> dict:
    """The file as compose understands it under these variables."""
    done = engine.docker(*COMPOSE, "config", "--format=json", env=engine.env | variables)
    assert done.stderr == ""  # compose warns about variables without a value and fields that it drops
    return json.loads(done.stdout)


def test_two_nodes_have_the_launch_contract(engine: Engine):
    services = resolved(engine)["services"]
    common = {
        "MUSTER_PLATFORM": "docker",
        "MUSTER_NODES": "2",
        "MUSTER_HOSTNAMES": "node0,node1",
        "MUSTER_JOB_ID": "compose",
        "OMP_NUM_THREADS": "1",
    }
    for rank, name in enumerate(common["MUSTER_HOSTNAMES"].split(",")):
        assert services[name]["environment"] == common | {"MUSTER_NODE_RANK": str(rank)}
        assert services[name]["hostname"] == name
        assert services[name]["command"] == ["jobs/digits.yaml", "nodes=2"]
    assert (ROOT / "jobs/digits.yaml").exists()


def test_the_nodes_differ_in_name_and_rank_only(engine: Engine):
    node0, node1 = (resolved(engine)["services"][name] for name in ("node0", "node1"))
    assert node0.pop("hostname") != node1.pop("hostname")
    assert node0["environment"].pop("MUSTER_NODE_RANK") != node1["environment"].pop("MUSTER_NODE_RANK")
    assert node0 == node1


def test_a_folder_of_the_caller_takes_the_runs(engine: Engine, tmp_path: Path):
    node = resolved(engine, MUSTER_RUNS=str(tmp_path), MUSTER_USER="12345:12345")["services"]["node0"]
    assert node["user"] == "12345:12345"
    assert [(each["type"], each["source"]) for each in node["volumes"]] == [("bind", str(tmp_path))]
    assert [each["type"] for each in resolved(engine)["services"]["node0"]["volumes"]] == ["volume"]


def test_up_trains_on_two_nodes(engine: Engine, image: Image, tmp_path: Path):
    mine = {"MUSTER_IMAGE": image.tag, "MUSTER_RUNS": str(tmp_path), "MUSTER_USER": f"{os.getuid()}:{os.getgid()}"}
    engine.docker(*COMPOSE, "up", "--no-build", env=engine.env | mine, timeout_s=500)
    result = json.loads((tmp_path / "digits-compose" / "result.json").read_text())
    assert result["world_size"] == 4
    assert result["metrics"]["accuracy"] > 0.9
