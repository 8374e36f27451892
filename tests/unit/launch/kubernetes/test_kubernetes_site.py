"""The Kubernetes site file: what a cluster would accept and not run is refused here."""

from __future__ import annotations

from dataclasses import asdict, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import ROOT

from trainer.errors import JobError
from trainer.launch.kubernetes.platform import Kubernetes
from trainer.launch.kubernetes.site import KubernetesSite, quantity

K8S = ROOT / "k8s"


def load(tmp_path: Path, **values: Any) -> KubernetesSite:
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(values))
    return Kubernetes().load_site(path)


def test_the_documented_defaults_are_the_defaults() -> None:
    assert yaml.safe_load((K8S / "site.yaml").read_text()) == asdict(KubernetesSite())


@pytest.mark.parametrize("path", sorted((K8S / "sites").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sites_to_begin_from_are_accepted(path: Path) -> None:
    assert Kubernetes().load_site(path) != KubernetesSite()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("imgae", "x", ["imgae='x'", "unknown key", "Did you mean image?"]),
        ("kind", "deployment", ["kind='deployment'", "job, jobset"]),
        ("image", "", ["image=''", "not a valid image name"]),
        ("image", "two words", ["image='two words'", "For example"]),
        ("claim", "My Claim", ["claim='My Claim'", "a-z"]),
        ("secrets", ["API_KEY"], ["secrets='API_KEY'", "a-z"]),
        ("image_pull_secrets", ["a b"], ["image_pull_secrets='a b'"]),
        ("resources", {"memory": "4Gi"}, ["resources.memory='4Gi'", "key of its own"]),
        ("env", {"MASTER_PORT": "29500"}, ["env.MASTER_PORT='29500'", "set by Muster itself"]),
        ("env", {"MUSTER_NODES": "3"}, ["env.MUSTER_NODES='3'", "Remove it"]),
        ("env", {"RANK": "0"}, ["env.RANK='0'"]),
        ("memory", "4 GB", ["memory='4 GB'", "quantity"]),
        ("memory", "1536Mi", ["memory='1536Mi'", "shm=1Gi", "lower shm"]),
        ("shm", "4Gi", ["memory='4Gi'", "does not cover shm=4Gi"]),
        ("user_id", 0, ["user_id=0", "at least 1", "root"]),
        ("time_limit_min", 0, ["time_limit_min=0", "at least 1"]),
        ("keep_finished_min", 0, ["keep_finished_min=0", "at least 1", "says how the run ended"]),
        ("time_limit_min", "soon", ["time_limit_min='soon'", "int"]),
        ("claim_size", "1Ti", ["claim_size='1Ti'", "claim is null"]),
        ("claim_storage_class", "nfs", ["claim_storage_class='nfs'", "claim_size"]),
        ("mounts", ["data"], ["mounts='data'", "claim:/path"]),
        ("mounts", ["data:data"], ["mounts='data:data'"]),
        ("mounts", ["data:/runs"], ["mounts='data:/runs'", "itself uses /runs"]),
        ("mounts", ["data:/data:rw"], ["mounts='data:/data:rw'", "/path:ro"]),
        ("fabric", "infiniban", ["infiniban", "infiniband"]),
    ],
)
def test_a_wrong_value_is_refused(tmp_path: Path, key: str, value: Any, words: list[str]) -> None:
    with pytest.raises(JobError) as caught:
        load(tmp_path, **{key: value})
    for word in words:
        assert word in str(caught.value)


def test_a_policy_without_a_spread_would_be_ignored(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="spread_policy='DoNotSchedule': would be ignored"):
        load(tmp_path, spread=None, spread_policy="DoNotSchedule")


def test_numbers_are_taken_where_texts_are_meant(tmp_path: Path) -> None:
    site = load(tmp_path, cpu=2, env={"A": 1}, annotations={"a/b": "false"})
    assert (site.cpu, site.env, site.annotations) == ("2", {"A": "1"}, {"a/b": "false"})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("500m", "0.5"),
        ("2", "2"),
        ("1.5", "1.5"),
        ("1Ki", "1024"),
        ("1k", "1000"),
        ("2Gi", "2147483648"),
        ("1T", "1e12"),
    ],
)
def test_quantities(text: str, value: str) -> None:
    assert quantity("memory", text) == Decimal(value)


def test_every_field_is_documented_beside_its_key() -> None:
    text = (K8S / "site.yaml").read_text()
    assert [item.name for item in fields(KubernetesSite)] == [
        line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()
    ]


def test_text_in_a_site_file_stays_as_written(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("cpu: 1.10\nenv: {DEBUG: true, VERSION: 1.10, ID: 1e5}\ncommand: [run, 0x10]\nuser_id: 1000\n")
    site = Kubernetes().load_site(path)
    assert site.cpu == "1.10"
    assert site.env == {"DEBUG": "true", "VERSION": "1.10", "ID": "1e5"}
    assert site.command == ["run", "0x10"]
    assert site.user_id == 1000
